"""The autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752), and its published file.

    encode:  x [B, H, W, 3] in [-1, 1]  ->  mean, log variance of q(z | x), [B, H / 8, W / 8, 4]
    decode:  z [B, H / 8, W / 8, 4]  ->  x [B, H, W, 3]

A DiT sees z times `data.latent_scale`, so that its standard deviation is about 1. The attributes
have the names of the published files, and everything is float32, whatever the device's default.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit.config import LATENT_CHANNELS, VAE_FACTOR, InputError, one_line, require
from dit.imagenet.tensors import (
    account,
    component_folder,
    from_torch_layout,
    read_class_config,
    read_tensors,
    torch_layout,
    weights_file,
)

# diffusers' defaults, where a config.json leaves them out; Stable Diffusion's too
LAYERS = 2
GROUPS = 32

RESNET_TENSORS = 8  # of a ResnetBlock, at least

# The attention's layers in files of before 2023
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# The network


def group_norm(channels: int, groups: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(
        channels, num_groups=groups, epsilon=1e-6, use_fast_variance=False, rngs=rngs
    )


def conv(inputs: int, outputs: int, size: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (size, size), rngs=rngs)


class ResnetBlock(nnx.Module):
    """Two convolutions beside a skip connection."""

    def __init__(self, inputs: int, outputs: int, groups: int, rngs: nnx.Rngs):
        self.norm1 = group_norm(inputs, groups, rngs)
        self.conv1 = conv(inputs, outputs, 3, rngs)
        self.norm2 = group_norm(outputs, groups, rngs)
        self.conv2 = conv(outputs, outputs, 3, rngs)
        self.conv_shortcut = conv(inputs, outputs, 1, rngs) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return h + x


class Attention(nnx.Module):
    """Single-head attention of every place to every other."""

    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs):
        self.group_norm = group_norm(channels, groups, rngs)
        self.to_q = nnx.Linear(channels, channels, rngs=rngs)
        self.to_k = nnx.Linear(channels, channels, rngs=rngs)
        self.to_v = nnx.Linear(channels, channels, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(channels, channels, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        h = self.group_norm(x).reshape(B, H * W, 1, C)  # one head
        h = jax.nn.dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).reshape(B, H, W, C)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs):
        resnets = [ResnetBlock(channels, channels, groups, rngs) for _ in range(2)]
        self.resnets = nnx.List(resnets)
        self.attentions = nnx.List([Attention(channels, groups, rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Downsample(nnx.Module):
    """A convolution of stride 2, padded below and to the right only."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        padding = ((0, 1), (0, 1))
        self.conv = nnx.Conv(channels, channels, (3, 3), strides=2, padding=padding, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Every pixel becomes 2 x 2 of itself, then a convolution."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


class DownBlock(nnx.Module):
    def __init__(self, resnets: list[ResnetBlock], downsamplers: list[Downsample]):
        self.resnets = nnx.List(resnets)
        self.downsamplers = nnx.List(downsamplers)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    def __init__(self, resnets: list[ResnetBlock], upsamplers: list[Upsample]):
        self.resnets = nnx.List(resnets)
        self.upsamplers = nnx.List(upsamplers)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """x `[B, H, W, 3]` to `[B, H / 8, W / 8, 8]`."""

    def __init__(self, widths: tuple[int, ...], layers: int, groups: int, rngs: nnx.Rngs):
        self.conv_in = conv(3, widths[0], 3, rngs)
        blocks, inputs = [], widths[0]
        for i, width in enumerate(widths):
            resnets = []
            for _ in range(layers):
                resnets.append(ResnetBlock(inputs, width, groups, rngs))
                inputs = width
            is_last = i == len(widths) - 1
            blocks.append(DownBlock(resnets, [] if is_last else [Downsample(width, rngs)]))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(widths[-1], groups, rngs)
        self.conv_norm_out = group_norm(widths[-1], groups, rngs)
        self.conv_out = conv(widths[-1], 2 * LATENT_CHANNELS, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """z `[B, H / 8, W / 8, 4]` to `[B, H, W, 3]`."""

    def __init__(self, widths: tuple[int, ...], layers: int, groups: int, rngs: nnx.Rngs):
        inputs = widths[-1]
        self.conv_in = conv(LATENT_CHANNELS, inputs, 3, rngs)
        self.mid_block = MidBlock(inputs, groups, rngs)
        blocks = []
        for i, width in enumerate(reversed(widths)):
            resnets = []
            for _ in range(layers + 1):
                resnets.append(ResnetBlock(inputs, width, groups, rngs))
                inputs = width
            is_last = i == len(widths) - 1
            blocks.append(UpBlock(resnets, [] if is_last else [Upsample(width, rngs)]))
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = group_norm(widths[0], groups, rngs)
        self.conv_out = conv(widths[0], 3, 3, rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """The autoencoder. Stable Diffusion's has widths 128, 256, 512, 512: 83,653,863 parameters."""

    def __init__(self, widths: tuple[int, ...], layers: int, groups: int, *, rngs: nnx.Rngs):
        C = LATENT_CHANNELS
        self.encoder = Encoder(widths, layers, groups, rngs)
        self.decoder = Decoder(widths, layers, groups, rngs)
        self.quant_conv = conv(2 * C, 2 * C, 1, rngs)
        self.post_quant_conv = conv(C, C, 1, rngs)

    @jax.default_matmul_precision("highest")
    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance of the posterior of x `[B, H, W, 3]`: `[B, H / 8, W / 8, 4]` each.

        The log variance is held within [-30, 20].
        """
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(x)), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30, 20)

    @jax.default_matmul_precision("highest")
    def decode(self, z: jax.Array) -> jax.Array:
        """z `[B, H / 8, W / 8, 4]` to x `[B, H, W, 3]`, about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


# The published file


def load_vae(folder: str | Path, latent_scale: float | None = None) -> VAE:
    """The VAE in a diffusers `AutoencoderKL` folder, or in a pipeline's. Raises InputError.

    latent_scale: the run's, to be held against the VAE's own scaling_factor, if it has one.
    """
    folder = component_folder(Path(folder), "vae")
    config = read_class_config(folder, "AutoencoderKL")
    own_scale = config.get("scaling_factor", latent_scale)
    fits = latent_scale is None or own_scale == latent_scale
    expected = f"{own_scale}, the scaling_factor of {str(folder)!r}"
    require(fits, "data.latent_scale", latent_scale, expected)
    source = weights_file(folder)
    tensors = dict(rename_old(name, tensor) for name, tensor in read_tensors(source).items())
    model = abstract_vae(folder, config, len(tensors))
    account(tensors, jax.eval_shape(torch_layout, model), source)
    return from_torch_layout(model, tensors)


def abstract_vae(folder: Path, config: dict[str, Any], num_tensors: int) -> VAE:
    """The network that a config.json describes, without its arrays. Raises InputError.

    `num_tensors` is the number of its tensors, which a network of too many layers exceeds.
    """
    channels, widths = config.get("latent_channels"), config.get("block_out_channels")
    expected = f"{LATENT_CHANNELS}, as in Stable Diffusion's VAE"
    require(channels == LATENT_CHANNELS, f"{folder}: latent_channels", channels, expected)
    count = VAE_FACTOR.bit_length()  # between two widths lies a factor of 2
    is_list = isinstance(widths, list) and len(widths) == count
    are_widths = is_list and all(type(width) is int and width > 0 for width in widths)
    expected = f"{count} widths, for a factor of {VAE_FACTOR}"
    require(are_widths, f"{folder}: block_out_channels", widths, expected)
    layers = config.get("layers_per_block", LAYERS)
    is_filled = type(layers) is int and 0 < 2 * count * layers * RESNET_TENSORS <= num_tensors
    expected = f"as many as the {num_tensors} tensors fill"
    require(is_filled, f"{folder}: layers_per_block", layers, expected)
    groups = config.get("norm_num_groups", GROUPS)
    try:
        return jax.eval_shape(lambda: VAE(tuple(widths), layers, groups, rngs=nnx.Rngs(0)))
    except (TypeError, ValueError, ArithmeticError) as error:
        path = folder / "config.json"
        raise InputError(f"{path}: should describe an AutoencoderKL ({one_line(error)})") from error


def rename_old(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    """An attention's tensor of an old file as it is named, and shaped, today."""
    if ".attentions." not in name:
        return name, tensor
    for old, new in OLD_ATTENTION.items():
        name = name.replace(f".{old}.", f".{new}.")
    if tensor.shape[2:] == (1, 1):  # the oldest have 1 x 1 convolutions for linear layers
        tensor = tensor[:, :, 0, 0]
    return name, tensor
