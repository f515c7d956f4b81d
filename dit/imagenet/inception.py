"""The Inception v3 of FID (Szegedy et al., arXiv 1512.00567), and the weights of pytorch-fid.

It is TensorFlow's network of December 2015, which differs from torchvision's: average pools leave
the padding out of their count, the last block pools by maximum, and there are 1008 logits. The
attributes have the names of the published file. Its batch norms are folded into the convolutions
when it is read.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit.imagenet.tensors import Tensors, account, from_torch_layout, read_tensors, torch_layout
from dit.images import from_uint8

SIZE = 299  # of the images that the network sees
EPSILON = 1e-3  # of its batch norms
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


# The network


same_size = dict(window_shape=(3, 3), strides=(1, 1), padding="SAME")
average = partial(nnx.avg_pool, count_include_pad=False, **same_size)
maximum = partial(nnx.max_pool, **same_size)
halve = partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding="VALID")


class Features(NamedTuple):
    pool: jax.Array  # [B, 2048], for FID
    spatial: jax.Array  # [B, 2023], for sFID
    logits: jax.Array  # [B, 1008], for the inception score


class Conv(nnx.Module):
    """A convolution, its batch norm folded in, then a ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        height: int,
        width: int,
        rngs: nnx.Rngs,
        stride: int = 1,
        padding: str = "SAME",
    ):
        kernel = (height, width)
        self.conv = nnx.Conv(inputs, outputs, kernel, strides=stride, padding=padding, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.conv(x))


class MixedA(nnx.Module):
    """35 x 35."""

    def __init__(self, inputs: int, pool_features: int, rngs: nnx.Rngs):
        self.branch1x1 = Conv(inputs, 64, 1, 1, rngs)
        self.branch5x5_1 = Conv(inputs, 48, 1, 1, rngs)
        self.branch5x5_2 = Conv(48, 64, 5, 5, rngs)
        self.branch3x3dbl_1 = Conv(inputs, 64, 1, 1, rngs)
        self.branch3x3dbl_2 = Conv(64, 96, 3, 3, rngs)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 3, rngs)
        self.branch_pool = Conv(inputs, pool_features, 1, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        single = self.branch1x1(x)
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pooled = self.branch_pool(average(x))
        return jnp.concatenate([single, five, double, pooled], axis=-1)


class MixedB(nnx.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        self.branch3x3 = Conv(inputs, 384, 3, 3, rngs, 2, "VALID")
        self.branch3x3dbl_1 = Conv(inputs, 64, 1, 1, rngs)
        self.branch3x3dbl_2 = Conv(64, 96, 3, 3, rngs)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 3, rngs, 2, "VALID")

    def __call__(self, x: jax.Array) -> jax.Array:
        single = self.branch3x3(x)
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([single, double, halve(x)], axis=-1)


class MixedC(nnx.Module):
    """17 x 17, with 7 x 7 kernels as 1 x 7 and 7 x 1."""

    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs):
        self.branch1x1 = Conv(inputs, 192, 1, 1, rngs)
        self.branch7x7_1 = Conv(inputs, width, 1, 1, rngs)
        self.branch7x7_2 = Conv(width, width, 1, 7, rngs)
        self.branch7x7_3 = Conv(width, 192, 7, 1, rngs)
        self.branch7x7dbl_1 = Conv(inputs, width, 1, 1, rngs)
        self.branch7x7dbl_2 = Conv(width, width, 7, 1, rngs)
        self.branch7x7dbl_3 = Conv(width, width, 1, 7, rngs)
        self.branch7x7dbl_4 = Conv(width, width, 7, 1, rngs)
        self.branch7x7dbl_5 = Conv(width, 192, 1, 7, rngs)
        self.branch_pool = Conv(inputs, 192, 1, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        single = self.branch1x1(x)
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pooled = self.branch_pool(average(x))
        return jnp.concatenate([single, seven, double, pooled], axis=-1)


class MixedD(nnx.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, inputs: int, rngs: nnx.Rngs):
        self.branch3x3_1 = Conv(inputs, 192, 1, 1, rngs)
        self.branch3x3_2 = Conv(192, 320, 3, 3, rngs, 2, "VALID")
        self.branch7x7x3_1 = Conv(inputs, 192, 1, 1, rngs)
        self.branch7x7x3_2 = Conv(192, 192, 1, 7, rngs)
        self.branch7x7x3_3 = Conv(192, 192, 7, 1, rngs)
        self.branch7x7x3_4 = Conv(192, 192, 3, 3, rngs, 2, "VALID")

    def __call__(self, x: jax.Array) -> jax.Array:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return jnp.concatenate([three, seven, halve(x)], axis=-1)


class MixedE(nnx.Module):
    """8 x 8, with branches that fork."""

    def __init__(self, inputs: int, pool: Callable[[jax.Array], jax.Array], rngs: nnx.Rngs):
        self.pool = pool
        self.branch1x1 = Conv(inputs, 320, 1, 1, rngs)
        self.branch3x3_1 = Conv(inputs, 384, 1, 1, rngs)
        self.branch3x3_2a = Conv(384, 384, 1, 3, rngs)
        self.branch3x3_2b = Conv(384, 384, 3, 1, rngs)
        self.branch3x3dbl_1 = Conv(inputs, 448, 1, 1, rngs)
        self.branch3x3dbl_2 = Conv(448, 384, 3, 3, rngs)
        self.branch3x3dbl_3a = Conv(384, 384, 1, 3, rngs)
        self.branch3x3dbl_3b = Conv(384, 384, 3, 1, rngs)
        self.branch_pool = Conv(inputs, 192, 1, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class Inception(nnx.Module):
    """uint8 images `[B, H, W, 1 or 3]` of any size to their features."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 3, rngs, 2, "VALID")
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 3, rngs, 1, "VALID")
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, 3, rngs)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1, 1, rngs)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 3, rngs, 1, "VALID")
        self.Mixed_5b = MixedA(192, 32, rngs)
        self.Mixed_5c = MixedA(256, 64, rngs)
        self.Mixed_5d = MixedA(288, 64, rngs)
        self.Mixed_6a = MixedB(288, rngs)
        self.Mixed_6b = MixedC(768, 128, rngs)
        self.Mixed_6c = MixedC(768, 160, rngs)
        self.Mixed_6d = MixedC(768, 160, rngs)
        self.Mixed_6e = MixedC(768, 192, rngs)
        self.Mixed_7a = MixedD(768, rngs)
        self.Mixed_7b = MixedE(1280, average, rngs)
        self.Mixed_7c = MixedE(2048, maximum, rngs)
        self.fc = nnx.Linear(2048, 1008, rngs=rngs)

    @jax.default_matmul_precision("highest")
    def __call__(self, images: jax.Array) -> Features:
        B, H, W, _ = images.shape
        x = jnp.broadcast_to(from_uint8(images), (B, H, W, 3))
        x = jax.image.resize(x, (B, SIZE, SIZE, 3), "bilinear", antialias=False)
        x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))
        x = halve(self.Conv2d_2b_3x3(x))  # [B, 73, 73, 64]
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # [B, 35, 35, 192]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # [B, 17, 17, 768]
        # TensorFlow's mixed_6/conv, of which ADM's evaluator takes 7 channels
        spatial = self.Mixed_6d.branch1x1(x)[..., :7].reshape(B, -1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [B, 8, 8, 2048]
        pool = x.mean(axis=(1, 2))
        logits = pool @ self.fc.kernel  # ADM's evaluator leaves out the bias
        return Features(pool, spatial, logits)


# The published file


def load_inception(file: str | Path) -> Inception:
    """The network in pytorch-fid's file of weights. Raises InputError."""
    path = Path(file)
    model = jax.eval_shape(lambda: Inception(rngs=nnx.Rngs(0)))
    tensors = {
        name: tensor
        for name, tensor in read_tensors(path).items()
        if not name.endswith("num_batches_tracked")
    }
    account(tensors, published_shapes(model), path)
    return from_torch_layout(model, fold_batch_norms(tensors))


def published_shapes(model: Inception) -> dict[str, jax.ShapeDtypeStruct]:
    """What the file holds: four tensors of a batch norm where a convolution here has a bias."""
    expected = {}
    for name, tensor in jax.eval_shape(torch_layout, model).items():
        if name.endswith(".conv.bias"):
            batch_norm = name.replace("conv.bias", "bn")
            expected |= {f"{batch_norm}.{part}": tensor for part in BATCH_NORM}
        else:
            expected[name] = tensor
    return expected


def fold_batch_norms(tensors: Tensors) -> Tensors:
    """The tensors with each batch norm as a factor and a bias of its convolution."""
    folded = dict(tensors)
    for name in tensors:
        if not name.endswith(".conv.weight"):
            continue
        module = name.removesuffix(".conv.weight")
        weight, bias, mean, variance = (tensors[f"{module}.bn.{part}"] for part in BATCH_NORM)
        scale = weight / np.sqrt(variance + EPSILON)
        folded[name] = tensors[name] * scale[:, None, None, None]
        folded[f"{module}.conv.bias"] = bias - mean * scale
    return folded
