"""The Inception v3 that FID is measured with (Szegedy et al., arXiv 1512.00567), as pytorch-fid publishes its weights.

It is TensorFlow's network of December 2015, which differs from torchvision's: average pools leave the padding out of their count, the
last block pools by maximum, and there are 1008 logits. The attributes have the names of the published file. Batch normalisation is
folded into the convolutions when the weights are read, so what is left is convolutions with a bias.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dit.images import from_uint8

average = partial(nnx.avg_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)
maximum = partial(nnx.max_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME")
halve = partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding="VALID")


class Features(NamedTuple):
    """What the metrics look at: `pool` `[B, 2048]` for FID, `spatial` `[B, 2023]` for sFID, `logits` `[B, 1008]` for IS."""

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array


class Conv(nnx.Module):
    """A convolution with its batch norm folded in, then a ReLU. Padded to keep the size unless `padding` says otherwise."""

    def __init__(self, inputs: int, outputs: int, height: int, width: int, rngs: nnx.Rngs, stride: int = 1, padding: str = "SAME"):
        self.conv = nnx.Conv(inputs, outputs, (height, width), strides=stride, padding=padding, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.conv(x))


class MixedA(nnx.Module):
    """35 x 35."""

    def __init__(self, inputs: int, pool_features: int, rngs: nnx.Rngs):
        self.branch1x1 = Conv(inputs, 64, 1, 1, rngs)
        self.branch5x5_1, self.branch5x5_2 = Conv(inputs, 48, 1, 1, rngs), Conv(48, 64, 5, 5, rngs)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64, 1, 1, rngs), Conv(64, 96, 3, 3, rngs)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 3, rngs)
        self.branch_pool = Conv(inputs, pool_features, 1, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(average(x))], axis=-1)


class MixedB(nnx.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        self.branch3x3 = Conv(inputs, 384, 3, 3, rngs, 2, "VALID")
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64, 1, 1, rngs), Conv(64, 96, 3, 3, rngs)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 3, rngs, 2, "VALID")

    def __call__(self, x: jax.Array) -> jax.Array:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch3x3(x), double, halve(x)], axis=-1)


class MixedC(nnx.Module):
    """17 x 17, with 7 x 7 kernels as 1 x 7 and 7 x 1."""

    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs):
        self.branch1x1 = Conv(inputs, 192, 1, 1, rngs)
        self.branch7x7_1, self.branch7x7_2 = Conv(inputs, width, 1, 1, rngs), Conv(width, width, 1, 7, rngs)
        self.branch7x7_3 = Conv(width, 192, 7, 1, rngs)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(inputs, width, 1, 1, rngs), Conv(width, width, 7, 1, rngs)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(width, width, 1, 7, rngs), Conv(width, width, 7, 1, rngs)
        self.branch7x7dbl_5 = Conv(width, 192, 1, 7, rngs)
        self.branch_pool = Conv(inputs, 192, 1, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return jnp.concatenate([self.branch1x1(x), single, double, self.branch_pool(average(x))], axis=-1)


class MixedD(nnx.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        self.branch3x3_1, self.branch3x3_2 = Conv(inputs, 192, 1, 1, rngs), Conv(192, 320, 3, 3, rngs, 2, "VALID")
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(inputs, 192, 1, 1, rngs), Conv(192, 192, 1, 7, rngs)
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, 7, 1, rngs), Conv(192, 192, 3, 3, rngs, 2, "VALID")

    def __call__(self, x: jax.Array) -> jax.Array:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return jnp.concatenate([self.branch3x3_2(self.branch3x3_1(x)), seven, halve(x)], axis=-1)


class MixedE(nnx.Module):
    """8 x 8, with branches that fork."""

    def __init__(self, inputs: int, pool, rngs: nnx.Rngs):
        self.pool = pool
        self.branch1x1 = Conv(inputs, 320, 1, 1, rngs)
        self.branch3x3_1 = Conv(inputs, 384, 1, 1, rngs)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, 1, 3, rngs), Conv(384, 384, 3, 1, rngs)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 448, 1, 1, rngs), Conv(448, 384, 3, 3, rngs)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, 1, 3, rngs), Conv(384, 384, 3, 1, rngs)
        self.branch_pool = Conv(inputs, 192, 1, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return jnp.concatenate([self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single), self.branch3x3dbl_3a(double),
                                self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))], axis=-1)


class Inception(nnx.Module):
    """uint8 images `[B, H, W, 1 or 3]` of any size to their features."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 3, rngs, 2, "VALID")
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 3, rngs, 1, "VALID")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, 3, rngs)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1, 1, rngs)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 3, rngs, 1, "VALID")
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = MixedA(192, 32, rngs), MixedA(256, 64, rngs), MixedA(288, 64, rngs)
        self.Mixed_6a = MixedB(288, rngs)
        self.Mixed_6b, self.Mixed_6c = MixedC(768, 128, rngs), MixedC(768, 160, rngs)
        self.Mixed_6d, self.Mixed_6e = MixedC(768, 160, rngs), MixedC(768, 192, rngs)
        self.Mixed_7a = MixedD(768, rngs)
        self.Mixed_7b, self.Mixed_7c = MixedE(1280, average, rngs), MixedE(2048, maximum, rngs)
        self.fc = nnx.Linear(2048, 1008, rngs=rngs)

    def __call__(self, images: jax.Array) -> Features:
        B, H, W, _ = images.shape
        x = jnp.broadcast_to(from_uint8(images), (B, H, W, 3))
        x = jax.image.resize(x, (B, 299, 299, 3), "bilinear", antialias=False)
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))  # [B, 73, 73, 64]
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # [B, 35, 35, 192]
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))  # [B, 17, 17, 768]
        x = self.Mixed_6c(self.Mixed_6b(x))
        spatial = self.Mixed_6d.branch1x1(x)[..., :7].reshape(B, -1)  # TensorFlow's mixed_6/conv, as the ADM evaluator takes it
        x = self.Mixed_6e(self.Mixed_6d(x))
        pool = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(axis=(1, 2))  # [B, 2048]
        return Features(pool, spatial, pool @ self.fc.kernel)  # the ADM evaluator leaves out the bias
