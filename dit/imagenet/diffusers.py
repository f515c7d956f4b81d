"""diffusers' layout of a DiT: a folder of config.json and weights, to and from official tensors.

diffusers keeps queries, keys and values apart, a copy of the embeddings of t and y in each block,
and no positions.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit.config import (
    LATENT_CHANNELS,
    MAX_SIDE,
    VAE_FACTOR,
    InputError,
    PositiveInt,
    check_value,
    require,
)
from dit.files import whole
from dit.imagenet import tensors as files
from dit.imagenet.official import positions_of, to_official
from dit.imagenet.tensors import Tensors
from dit.model import DiT

# The authors' module: those of diffusers, {} the number of the block
BLOCK = "transformer_blocks.{}"
NAMES = {
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": [f"{BLOCK}.norm1.emb.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": [f"{BLOCK}.norm1.emb.timestep_embedder.linear_2"],
    "y_embedder.embedding_table": [f"{BLOCK}.norm1.emb.class_embedder.embedding_table"],
    "adaLN_modulation.1": [f"{BLOCK}.norm1.linear"],
    "attn.qkv": [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k", f"{BLOCK}.attn1.to_v"],
    "attn.proj": [f"{BLOCK}.attn1.to_out.0"],
    "mlp.fc1": [f"{BLOCK}.ff.net.0.proj"],
    "mlp.fc2": [f"{BLOCK}.ff.net.2"],
    "final_layer.adaLN_modulation.1": ["proj_out_1"],
    "final_layer.linear": ["proj_out_2"],
}

# The fields of config.json that say the sizes
SIZES = [
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "num_layers",
    "sample_size",
    "patch_size",
    "num_embeds_ada_norm",
]


def diffusers_names(name: str, depth: int) -> list[str]:
    """Where diffusers keeps an official tensor: in parts, in copies, in one place, or nowhere."""
    if name == "pos_embed":
        return []
    block, module, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)\.(weight|bias)", name).groups()
    is_copied = module.startswith(("t_embedder", "y_embedder"))
    blocks = range(depth) if is_copied else [block]
    return [f"{pattern.format(i)}.{kind}" for i in blocks for pattern in NAMES[module]]


def to_diffusers(official: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Official tensors as diffusers keeps them."""
    depth = sum(name.endswith("attn.qkv.weight") for name in official)
    tensors = {}
    for name, tensor in official.items():
        names = diffusers_names(name, depth)
        parts = jnp.split(tensor, 3) if ".attn.qkv." in name else [tensor] * len(names)
        tensors |= dict(zip(names, parts, strict=True))
    return tensors


def read_diffusers(folder: Path) -> tuple[Tensors, Any, int]:
    """The official tensors of a DiT's folder or its pipeline's, their description, and its heads.

    Raises InputError.
    """
    folder = files.component_folder(folder, "transformer")
    source = files.weights_file(folder)
    sizes = read_sizes(folder)
    tensors, description = files.read_described(source)
    hold_sizes(sizes, tensors, folder / "config.json", source)
    model = jax.eval_shape(lambda: DiT(**sizes, rngs=nnx.Rngs(0)))
    tensors.pop("pos_embed.pos_embed", None)  # older files keep the fixed positions
    expected = jax.eval_shape(to_official, model)
    files.account(tensors, jax.eval_shape(to_diffusers, expected), source)
    official = {"pos_embed": positions_of(model)}
    for name in expected.keys() - official.keys():
        names = diffusers_names(name, model.depth)
        parts = [tensors[part] for part in names]
        if ".attn.qkv." in name:
            official[name] = np.concatenate(parts)
        else:
            check_copies(names, parts, source)
            official[name] = parts[0]
    return official, description, model.num_heads


def hold_sizes(sizes: dict[str, Any], tensors: Tensors, path: Path, source: Path) -> None:
    """Holds what the config claims against the tensors, before a model of that size is built."""
    depth, found = sizes["depth"], files.count_blocks(tensors, "transformer_blocks")
    require(depth == found, f"{path}: num_layers", depth, f"{found}, the blocks in {source}")
    D, C, p = (sizes[name] for name in ("hidden_size", "in_channels", "patch_size"))
    name = "pos_embed.proj.weight"
    shape = tensors[name].shape if name in tensors else None
    expected = f"of shape {(D, C, p, p)}, as {path} says"
    require(shape == (D, C, p, p), f"{source}: {name}", shape, expected)


def check_copies(names: list[str], copies: list[np.ndarray], source: Path) -> None:
    """Raises InputError for a copy that differs from the first."""
    for name, copy in zip(names, copies, strict=True):
        if not np.array_equal(copy, copies[0]):
            raise InputError(
                f"{source}: {name} differs from {names[0]}, of which it should be a copy"
            )


def read_sizes(folder: Path) -> dict[str, Any]:
    """The sizes of the DiT that config.json describes. Raises InputError."""
    config = files.read_class_config(folder, "DiTTransformer2DModel", "Transformer2DModel")
    path = folder / "config.json"
    for name in SIZES:
        check_value(f"{path}: {name}", config.get(name), PositiveInt)
    num_heads, channels = config["num_attention_heads"], config["in_channels"]
    size = config["sample_size"]
    most = MAX_SIDE // VAE_FACTOR if channels == LATENT_CHANNELS else MAX_SIDE
    require(size <= most, f"{path}: sample_size", size, f"at most {most}")
    return dict(
        input_size=size,
        patch_size=config["patch_size"],
        in_channels=channels,
        hidden_size=num_heads * config["attention_head_dim"],
        depth=config["num_layers"],
        num_heads=num_heads,
        num_classes=config["num_embeds_ada_norm"],
        learn_sigma=(config.get("out_channels") or channels) == 2 * channels,
    )


def write_diffusers(folder: Path, model: DiT, description: str | None = None) -> None:
    with whole(folder) as unfinished:
        unfinished.mkdir()
        config = json.dumps(class_config(model), indent=2)
        (unfinished / "config.json").write_text(config + "\n")
        weights = unfinished / "diffusion_pytorch_model.safetensors"
        files.write_tensors(weights, to_diffusers(to_official(model)), description)


def class_config(model: DiT) -> dict[str, Any]:
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.hidden_size // model.num_heads,
        "in_channels": model.in_channels,
        "out_channels": model.in_channels * (1 + model.learn_sigma),
        "num_layers": model.depth,
        "sample_size": model.input_size,
        "patch_size": model.patch_size,
        "num_embeds_ada_norm": model.num_classes,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
