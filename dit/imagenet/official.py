"""The authors' layout of a DiT: its parameters by their names, and its sizes from their shapes."""

import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dit import config as dit_config
from dit.config import LATENT_CHANNELS, PRESETS, VAE_FACTOR, Config, InputError, require
from dit.files import naming
from dit.imagenet import tensors as files
from dit.imagenet.tensors import Tensors, from_torch, to_torch
from dit.model import DiT, position_embedding
from dit.state import abstract_model

# Our module: theirs. Our stack of blocks is one module a block there, {} its number.
NAMES = {
    "patch_embed": "x_embedder.proj",
    "timestep_embed.fc1": "t_embedder.mlp.0",
    "timestep_embed.fc2": "t_embedder.mlp.2",
    "label_embed": "y_embedder.embedding_table",
    "blocks.modulation.linear": "blocks.{}.adaLN_modulation.1",
    "blocks.attention.qkv": "blocks.{}.attn.qkv",
    "blocks.attention.proj": "blocks.{}.attn.proj",
    "blocks.mlp.up": "blocks.{}.mlp.fc1",
    "blocks.mlp.down": "blocks.{}.mlp.fc2",
    "final.modulation.linear": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
}

# Tensors whose shapes say the sizes, and their number of axes
RANKS = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
}


def official_name(path: str) -> str:
    """Their name of our parameter: "blocks.{}.mlp.fc1.weight" for "blocks.mlp.up.kernel"."""
    module, kind = files.torch_name(path).rsplit(".", 1)
    return f"{NAMES[module]}.{kind}"


def positions_of(model: DiT) -> np.ndarray:
    return position_embedding(model.input_size // model.patch_size, model.hidden_size)


def to_official(model: DiT) -> dict[str, jax.Array]:
    """The model's parameters under the names and in the shapes of the authors' release."""
    p = model.patch_size
    tensors = {"pos_embed": jnp.asarray(positions_of(model))}
    for path, parameter in files.parameters_by_path(model).items():
        if path == "augment_embed.kernel":  # of a label that is zero in sampling
            continue
        if path == "patch_embed.kernel":  # of a convolution there
            parameter = parameter.reshape(p, p, model.in_channels, model.hidden_size)
        blocks = parameter if path.startswith("blocks.") else [parameter]
        for i, block in enumerate(blocks):
            tensors[official_name(path).format(i)] = to_torch(path, block)
    return tensors


def from_official(tensors: Tensors, config: Config, source: Path) -> DiT:
    """The model of the tensors, whose config was inferred from them. Raises InputError."""
    model = abstract_model(config)
    files.account(tensors, jax.eval_shape(to_official, model), source)
    if not np.allclose(tensors["pos_embed"], positions_of(model), atol=1e-4):
        raise InputError(
            f"{source}: pos_embed should hold the fixed 2-D sin-cos positions, and holds others"
        )

    def make(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = official_name(path)
        if not path.startswith("blocks."):
            return from_torch(path, tensors[name]).reshape(shape)
        names = [name.format(i) for i in range(model.depth)]
        return np.stack([from_torch(path, tensors[name]) for name in names])

    return files.with_parameters(model, make)


def infer_config(tensors: Tensors, num_heads: int | None, source: Path) -> Config:
    """The config that the shapes of a DiT's tensors say, of the authors' recipe. Raises InputError.

    Four channels are taken for the VAE's, one or three for pixels.
    """
    check_ranks(tensors, source)
    D, C, p, _ = shape = tensors["x_embedder.proj.weight"].shape
    expected = f"of a model of {LATENT_CHANNELS} latent channels, or of 1 or 3 colours"
    require(C in (1, 3, LATENT_CHANNELS), f"{source}: x_embedder.proj.weight", shape, expected)
    positions = tensors["pos_embed"].shape
    expected = f"of the width {D}, that of x_embedder.proj.weight"
    require(positions[2] == D, f"{source}: pos_embed", positions, expected)
    depth = files.count_blocks(tensors, "blocks")
    num_heads = num_heads or usual_heads(D)
    sizes = dict(patch_size=p, hidden_size=D, depth=depth, num_heads=num_heads)
    names = [name for name, preset in PRESETS.items() if preset == sizes]

    ratio = tensors["blocks.0.mlp.fc1.weight"].shape[0] / D
    is_latent = C == LATENT_CHANNELS
    side = round(positions[1] ** 0.5) * p
    image_size = side * VAE_FACTOR if is_latent else side
    classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
    learns_variance = tensors["final_layer.linear.weight"].shape[0] == 2 * p * p * C
    data = dit_config.Data(
        name="imagenet2012" if classes == 1000 else "unknown",
        image_size=image_size,
        channels=3 if is_latent else C,
        num_classes=classes,
        latents=f"latents/imagenet{image_size}" if is_latent else None,
        flip=True,
    )
    variance = "learned_range" if learns_variance else "fixed_large"
    config = Config(
        name=names[0] if names else "DiT",
        model=dit_config.Model(mlp_ratio=ratio, **sizes),
        objective=dit_config.Objective(variance=variance),
        data=data,
        train=dit_config.Train(dtype="float32", sampler="ddpm", sample_steps=250),
    )
    with naming(source):
        return config.validate()


def hold_config(config: Config, inferred: Config, source: Path) -> None:
    """Holds a config that a file describes against what its tensors say. Raises InputError."""
    for name in (
        "model.hidden_size",
        "model.depth",
        "model.num_heads",
        "model.patch_size",
        "model.conditioning",
        "input_shape",
        "data.num_classes",
        "data.mask_classes",
        "objective.name",
        "objective.learns_variance",
    ):
        value, expected = operator.attrgetter(name)(config), operator.attrgetter(name)(inferred)
        require(value == expected, f"{source}: {name}", value, f"{expected!r}, as its tensors say")
    width, ratio = inferred.model.hidden_size, config.model.mlp_ratio
    expected = f"near {inferred.model.mlp_ratio:.6g}, as its tensors say"
    fits = int(width * ratio) == round(width * inferred.model.mlp_ratio)
    require(fits, f"{source}: model.mlp_ratio", ratio, expected)


def check_ranks(tensors: Tensors, source: Path) -> None:
    for name, rank in RANKS.items():
        if name not in tensors:
            raise InputError(
                f"{source}: {name} is missing; it should be a DiT of the authors' release, or a "
                "diffusers folder"
            )
        expected = f"which should have {rank} axes"
        if tensors[name].ndim != rank:
            raise InputError(f"{source}: {name} has shape {tensors[name].shape}, {expected}")


def usual_heads(hidden_size: int) -> int:
    """The number of heads in the paper's models of a width. Raises InputError for others."""
    known = {preset["hidden_size"]: preset["num_heads"] for preset in PRESETS.values()}
    if hidden_size not in known:
        widths = ", ".join(map(str, known))
        raise InputError(
            f"--num-heads: missing; no shape says it, and the width {hidden_size} is none of "
            f"{widths}"
        )
    return known[hidden_size]
