"""Foreign weights in and out: python -m dit.convert SOURCE OUT [--to official|diffusers]

Reads a DiT of the authors' release (.pt, a plain state dict or a training checkpoint with `ema`; the same names in .safetensors) or of
diffusers (a folder with config.json) and writes a folder that sample.py takes. With --to, SOURCE is such a folder or a run's, and OUT a
.pt or .safetensors file (official) or a folder (diffusers). Every tensor and every shape is accounted for.
"""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from dit import checkpoint
from dit import config as dit_config
from dit.config import Config, Data, InputError, Model, Train, one_line, require
from dit.data import imagenet_names
from dit.model import PRESETS, DiT, position_embedding
from dit.state import make_model
from dit.vae import FACTOR
from dit.weights import account, leaves_by_name, read_json, read_tensors, weights_file, write_tensors

# Our module: the official one. A stack of blocks is one module a block there, {} its number.
OFFICIAL = {
    "patch_embed": "x_embedder.proj", "timestep_embed.fc1": "t_embedder.mlp.0", "timestep_embed.fc2": "t_embedder.mlp.2",
    "label_embed": "y_embedder.embedding_table", "blocks.modulation.linear": "blocks.{}.adaLN_modulation.1",
    "blocks.attention.qkv": "blocks.{}.attn.qkv", "blocks.attention.proj": "blocks.{}.attn.proj", "blocks.mlp.up": "blocks.{}.mlp.fc1",
    "blocks.mlp.down": "blocks.{}.mlp.fc2", "final.modulation.linear": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear"}

# The official module: those of diffusers. {} is the block; each block there holds a copy of the embeddings of t and y.
DIFFUSERS = {
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": ["transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["transformer_blocks.{}.norm1.emb.timestep_embedder.linear_2"],
    "y_embedder.embedding_table": ["transformer_blocks.{}.norm1.emb.class_embedder.embedding_table"],
    "adaLN_modulation.1": ["transformer_blocks.{}.norm1.linear"],
    "attn.qkv": [f"transformer_blocks.{{}}.attn1.to_{part}" for part in "qkv"], "attn.proj": ["transformer_blocks.{}.attn1.to_out.0"],
    "mlp.fc1": ["transformer_blocks.{}.ff.net.0.proj"], "mlp.fc2": ["transformer_blocks.{}.ff.net.2"],
    "final_layer.adaLN_modulation.1": ["proj_out_1"], "final_layer.linear": ["proj_out_2"]}



# The authors' layout


def to_official(model: DiT) -> dict[str, jax.Array]:
    """The model's parameters under the names and in the shapes of the authors' release."""
    p, C, D = model.patch_size, model.in_channels, model.hidden_size
    tensors = {"pos_embed": jnp.asarray(position_embedding(model.input_size // p, D))}
    for path, leaf in leaves_by_name(model).items():
        module, kind = path.rsplit(".", 1)
        for i, a in enumerate(leaf if path.startswith("blocks.") else [leaf]):
            if module == "patch_embed" and kind == "kernel":
                a = a.reshape(p, p, C, D).transpose(3, 2, 0, 1)
            elif kind == "kernel":
                a = a.T
            tensors[f"{OFFICIAL[module].format(i)}.{'bias' if kind == 'bias' else 'weight'}"] = a
    return tensors


def from_official(tensors: dict[str, np.ndarray], num_heads: int | None, source: Path) -> tuple[DiT, Config]:
    """The model whose sizes the tensors' shapes say, and its config. Raises InputError."""
    config = infer_config(tensors, num_heads, source)
    model = jax.eval_shape(lambda: make_model(config, jax.random.key(0)))
    account(tensors, jax.eval_shape(to_official, model), source)
    positions = position_embedding(model.input_size // model.patch_size, model.hidden_size)
    if not np.allclose(tensors["pos_embed"], positions, atol=1e-4):
        raise InputError(f"{source}: pos_embed should hold the fixed 2-D sin-cos positions, and holds others")

    def leaf(path: str) -> np.ndarray:
        module, kind = path.rsplit(".", 1)
        name = f"{OFFICIAL[module]}.{'bias' if kind == 'bias' else 'weight'}"
        parts = [tensors[name.format(i)] for i in range(model.depth)] if path.startswith("blocks.") else [tensors[name]]
        if module == "patch_embed" and kind == "kernel":
            parts = [a.transpose(2, 3, 1, 0).reshape(-1, model.hidden_size) for a in parts]
        elif kind == "kernel":
            parts = [a.T for a in parts]
        return np.stack(parts) if path.startswith("blocks.") else parts[0]

    return jax.tree.unflatten(jax.tree.structure(model), [jnp.asarray(leaf(path)) for path in leaves_by_name(model)]), config


def infer_config(tensors: dict[str, np.ndarray], num_heads: int | None, source: Path) -> Config:
    """The config of a DiT on VAE latents, from the shapes of its official tensors."""
    ranks = {"pos_embed": 3, "x_embedder.proj.weight": 4, "y_embedder.embedding_table.weight": 2, "final_layer.linear.weight": 2,
             "blocks.0.mlp.fc1.weight": 2}
    for name, rank in ranks.items():
        if name not in tensors:
            raise InputError(f"{source}: {name} is missing; it should be a DiT of the authors' release, or a diffusers folder")
        if tensors[name].ndim != rank:
            raise InputError(f"{source}: {name} has shape {tensors[name].shape}, which should have {rank} axes")
    D, C, p, _ = tensors["x_embedder.proj.weight"].shape
    side, outputs = round(tensors["pos_embed"].shape[1] ** 0.5) * p, tensors["final_layer.linear.weight"].shape[0]
    classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
    depth = 1 + max(int(found.group(1)) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name)))
    known = {preset["hidden_size"]: preset["num_heads"] for preset in PRESETS.values()}
    heads = num_heads or known.get(D)
    if heads is None:
        raise InputError(f"--num-heads: missing; no shape says it, and the width {D} is none of {', '.join(map(str, known))}")
    require(C == 4, f"{source}: x_embedder.proj.weight", tensors["x_embedder.proj.weight"].shape, "of a model of 4 latent channels")
    name = next((name for name, preset in PRESETS.items() if preset == dict(patch_size=p, hidden_size=D, depth=depth, num_heads=heads)),
                "DiT")
    size = side * FACTOR
    learned = dit_config.Objective(variance="learned_range" if outputs == 2 * p * p * C else "fixed_large")
    return Config(
        name=name, objective=learned,
        model=Model(hidden_size=D, depth=depth, num_heads=heads, patch_size=p,
                    mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / D),
        data=Data(name="imagenet2012" if classes == 1000 else "unknown", image_size=size, channels=3, num_classes=classes, flip=True,
                  latents=f"latents/imagenet{size}", class_names=imagenet_names() if classes == 1000 else tuple(map(str, range(classes)))),
        train=Train(dtype="float32", sampler="ddpm", sample_steps=250)).validate()


# diffusers' layout


def diffusers_names(name: str, depth: int) -> list[str]:
    """Where diffusers keeps an official tensor: in three parts (qkv), in a copy a block (t, y), in one place, or nowhere (positions)."""
    if name == "pos_embed":
        return []
    block, module, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)\.(weight|bias)", name).groups()
    blocks = range(depth) if module.startswith(("t_embedder", "y_embedder")) else [block]
    return [f"{pattern.format(i)}.{kind}" for i in blocks for pattern in DIFFUSERS[module]]


def to_diffusers(official: dict[str, jax.Array]) -> dict[str, jax.Array]:
    depth = sum(name.endswith("attn.qkv.weight") for name in official)
    tensors = {}
    for name, a in official.items():
        names = diffusers_names(name, depth)
        tensors |= dict(zip(names, jnp.split(a, 3) if ".attn.qkv." in name else [a] * len(names)))
    return tensors


def from_diffusers(folder: Path) -> tuple[dict[str, np.ndarray], int]:
    """The official tensors of a diffusers DiT's folder (or its pipeline's), and its number of heads. Raises InputError."""
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = read_json(folder / "config.json", "DiTTransformer2DModel", "Transformer2DModel")
    try:
        D = config["num_attention_heads"] * config["attention_head_dim"]
        C, p, depth, side = (config[name] for name in ("in_channels", "patch_size", "num_layers", "sample_size"))
        model = jax.eval_shape(lambda: DiT(
            input_size=side, patch_size=p, in_channels=C, hidden_size=D, depth=depth, num_heads=config["num_attention_heads"],
            num_classes=config["num_embeds_ada_norm"], learn_sigma=(config.get("out_channels") or C) == 2 * C, rngs=nnx.Rngs(0)))
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'}: should describe a DiT ({type(error).__name__}: {one_line(error)})") from error
    official = jax.eval_shape(to_official, model)
    source = weights_file(folder)
    tensors = read_tensors(source)
    tensors.pop("pos_embed.pos_embed", None)  # older files keep the fixed positions
    account(tensors, jax.eval_shape(to_diffusers, official), source)
    found = {"pos_embed": position_embedding(side // p, D)}
    for name in official.keys() - found.keys():
        names = diffusers_names(name, depth)
        parts = [tensors[n] for n in names]
        for n, part in zip(names, parts):
            if ".norm1.emb." in n and not np.array_equal(part, parts[0]):
                raise InputError(f"{source}: {n} differs from {names[0]}, of which it should be a copy")
        found[name] = np.concatenate(parts) if ".attn.qkv." in name else parts[0]
    return found, config["num_attention_heads"]


def diffusers_config(model: DiT) -> dict:
    return {"_class_name": "DiTTransformer2DModel", "num_attention_heads": model.num_heads,
            "attention_head_dim": model.hidden_size // model.num_heads, "in_channels": model.in_channels,
            "out_channels": model.in_channels * (1 + model.learn_sigma), "num_layers": model.depth, "sample_size": model.input_size,
            "patch_size": model.patch_size, "num_embeds_ada_norm": model.num_classes, "activation_fn": "gelu-approximate",
            "attention_bias": True, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "norm_eps": 1e-6}


# The command


@dataclass(frozen=True)
class Convert:
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]  # foreign weights; with --to, ours
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]  # what to write; it should not exist yet
    to: Literal["official", "diffusers"] | None = None  # write in this layout, from ours
    num_heads: int | None = None  # attention heads of an official DiT of unusual width; no shape says them


def run(options: Convert) -> str:
    """Converts, and says in a line what was converted. Raises InputError."""
    source, out = Path(options.source), Path(options.out)
    require(not out.exists(), "OUT", options.out, "a name that is not taken yet")
    require(out.absolute().parent.is_dir(), "OUT", options.out, "in a folder that exists")
    try:
        (probe := out.with_name(out.name + ".tmp")).touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"OUT: {options.out!r} should be in a folder that can be written ({error.strerror})") from error
    if options.to is None:
        tensors, heads = from_diffusers(source) if source.is_dir() else (read_tensors(source), options.num_heads)
        model, config = from_official(tensors, heads, source)
        checkpoint.save_weights(out, model, config)
    else:
        model, config = checkpoint.load(source)
        require(model.conditioning == "adaln_zero", "SOURCE", model.conditioning, "of adaln_zero blocks, which the other layouts have")
        require(not model.mask_classes, "SOURCE: data.mask_classes", model.mask_classes, "0: the other layouts have no masks")
        official = to_official(model)
        if options.to == "official":
            require(out.suffix in (".pt", ".safetensors"), "OUT", options.out, "a .pt or .safetensors file")
            write_tensors(out, official)
        else:
            require(model.mlp_ratio == 4, "SOURCE: model.mlp_ratio", model.mlp_ratio, "4, the only one that diffusers knows")
            write_diffusers(out, model, official)
    m = config.model
    return (f"wrote {out}: {config.name}, width {m.hidden_size}, {m.depth} blocks, {m.num_heads} heads, patch {m.patch_size}, "
            f"{config.data.image_size}x{config.data.image_size}, {config.data.num_classes} classes, "
            f"{sum(leaf.size for leaf in jax.tree.leaves(model)):,} parameters")


def write_diffusers(out: Path, model: DiT, official: dict[str, jax.Array]) -> None:
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    (unfinished / "config.json").write_text(json.dumps(diffusers_config(model), indent=2) + "\n")
    write_tensors(unfinished / "diffusion_pytorch_model.safetensors", to_diffusers(official))
    unfinished.rename(out)


def main(argv: list[str] | None = None) -> None:
    with dit_config.input_errors("dit.convert"):
        print(run(dit_config.parse(Convert, sys.argv[1:] if argv is None else argv, "python -m dit.convert", __doc__)))


if __name__ == "__main__":
    main()
