"""The KL autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752), as Stable Diffusion publishes it.

    encode:  x [B, H, W, 3] in [-1, 1]  ->  mean, log variance of q(z | x), [B, H / 8, W / 8, 4] each
    decode:  z [B, H / 8, W / 8, 4]  ->  x [B, H, W, 3]

A DiT sees z times 0.18215, which makes its standard deviation about 1. The attributes have the names of the published files, so a
parameter's path here is its key there. Everything is float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx

LATENT_SCALE = 0.18215
FACTOR = 8  # pixels of an image to one of its latents, along a side


def group_norm(channels: int, groups: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


def conv(inputs: int, outputs: int, size: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (size, size), rngs=rngs)


class ResnetBlock(nnx.Module):
    """Two convolutions beside a skip connection."""

    def __init__(self, inputs: int, outputs: int, groups: int, rngs: nnx.Rngs):
        self.norm1, self.conv1 = group_norm(inputs, groups, rngs), conv(inputs, outputs, 3, rngs)
        self.norm2, self.conv2 = group_norm(outputs, groups, rngs), conv(outputs, outputs, 3, rngs)
        self.conv_shortcut = conv(inputs, outputs, 1, rngs) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Single-head attention of every place to every other."""

    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs):
        self.group_norm = group_norm(channels, groups, rngs)
        self.to_q, self.to_k, self.to_v = (nnx.Linear(channels, channels, rngs=rngs) for _ in range(3))
        self.to_out = nnx.List([nnx.Linear(channels, channels, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        h = self.group_norm(x).reshape(B, H * W, 1, C)  # one head
        h = jax.nn.dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).reshape(B, H, W, C)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, groups, rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nnx.Module):
    """A convolution of stride 2, padded below and to the right only."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(channels, channels, (3, 3), strides=2, padding=((0, 1), (0, 1)), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Every pixel becomes 2 x 2 of itself, then a convolution."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


class DownBlock(nnx.Module):
    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, last: bool, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(inputs if i == 0 else outputs, outputs, groups, rngs) for i in range(layers)])
        self.downsamplers = nnx.List([] if last else [Downsample(outputs, rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, last: bool, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(inputs if i == 0 else outputs, outputs, groups, rngs) for i in range(layers)])
        self.upsamplers = nnx.List([] if last else [Upsample(outputs, rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class Encoder(nnx.Module):
    def __init__(self, widths: tuple[int, ...], layers: int, groups: int, outputs: int, rngs: nnx.Rngs):
        self.conv_in = conv(3, widths[0], 3, rngs)
        self.down_blocks = nnx.List([DownBlock(widths[max(i - 1, 0)], width, layers, groups, i == len(widths) - 1, rngs)
                                     for i, width in enumerate(widths)])
        self.mid_block = MidBlock(widths[-1], groups, rngs)
        self.conv_norm_out = group_norm(widths[-1], groups, rngs)
        self.conv_out = conv(widths[-1], outputs, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, widths: tuple[int, ...], layers: int, groups: int, inputs: int, rngs: nnx.Rngs):
        widths = widths[::-1]
        self.conv_in = conv(inputs, widths[0], 3, rngs)
        self.mid_block = MidBlock(widths[0], groups, rngs)
        self.up_blocks = nnx.List([UpBlock(widths[max(i - 1, 0)], width, layers + 1, groups, i == len(widths) - 1, rngs)
                                   for i, width in enumerate(widths)])
        self.conv_norm_out = group_norm(widths[-1], groups, rngs)
        self.conv_out = conv(widths[-1], 3, 3, rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        z = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            z = block(z)
        return self.conv_out(nnx.silu(self.conv_norm_out(z)))


class VAE(nnx.Module):
    """The autoencoder; the defaults are Stable Diffusion's, of 83,653,863 parameters."""

    def __init__(self, widths: tuple[int, ...] = (128, 256, 512, 512), layers: int = 2, groups: int = 32, latent_channels: int = 4, *,
                 rngs: nnx.Rngs):
        self.encoder = Encoder(widths, layers, groups, 2 * latent_channels, rngs)
        self.decoder = Decoder(widths, layers, groups, latent_channels, rngs)
        self.quant_conv = conv(2 * latent_channels, 2 * latent_channels, 1, rngs)
        self.post_quant_conv = conv(latent_channels, latent_channels, 1, rngs)

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance (held within [-30, 20]) of the posterior of x `[B, H, W, 3]`: `[B, H / 8, W / 8, 4]` each."""
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30, 20)

    def decode(self, z: jax.Array) -> jax.Array:
        """z `[B, H / 8, W / 8, 4]` to x `[B, H, W, 3]`, about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))
