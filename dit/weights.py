"""Files of weights from elsewhere: safetensors and PyTorch state dicts as dicts of tensors, and the two networks that are only read.

Every tensor and every shape is accounted for before anything is used.
"""

import argparse
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit.config import InputError, one_line, require
from dit.inception import Inception
from dit.vae import VAE

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in VAE files of before 2023


# Tensors in files


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a .safetensors file or of a PyTorch state dict (its `ema`, where it has one). Raises InputError."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: should be a file of weights, and there is none")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                return {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}
        except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: should be a whole safetensors file of floating-point numbers ({one_line(error)})") from error
    torch = import_torch(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options in a training checkpoint: plain values
            stored = torch.load(path, map_location="cpu", weights_only=True)
        stored = stored.get("ema", stored) if isinstance(stored, dict) else stored
        right = isinstance(stored, dict) and stored and all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                                            for name, value in stored.items())
        found = {name: value.detach().float().numpy() for name, value in stored.items()} if right else None
    except Exception as error:  # torch raises nearly anything for a file that is not its own
        raise InputError(f"{path}: should be a PyTorch state dict, readable without unpickling code ({type(error).__name__})") from error
    if found is None:
        raise InputError(f"{path}: holds {type(stored).__name__!r}, which should be a PyTorch state dict: tensors by their names")
    return found


def write_tensors(path: Path, tensors: dict[str, jax.Array]) -> None:
    """Writes a .safetensors file, or a PyTorch state dict, whole or not at all."""
    arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    unfinished = path.with_name(path.name + ".tmp")
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(arrays, unfinished, metadata={"format": "pt"})
    else:
        torch = import_torch(path)
        torch.save({name: torch.tensor(value) for name, value in arrays.items()}, unfinished)
    unfinished.rename(path)


def import_torch(path: Path):
    try:
        import torch
    except ImportError as error:
        raise InputError(f"{path}: a {path.suffix} file needs PyTorch: pip install -c constraints.txt -e '.[torch]'") from error
    return torch


def account(found: dict[str, np.ndarray], expected: dict, source: Path) -> None:
    """Raises InputError for the first tensor that is missing, of another shape, or unknown."""
    for name, tensor in expected.items():
        if name not in found:
            raise InputError(f"{source}: {name} is missing; it should be of shape {tensor.shape}")
        if found[name].shape != tensor.shape:
            transposed = ": it is transposed" if found[name].shape == tensor.shape[::-1] else ""
            raise InputError(f"{source}: {name} has shape {found[name].shape}, which should be {tensor.shape}{transposed}")
    for name in found.keys() - expected.keys():
        raise InputError(f"{source}: {name} of shape {found[name].shape} is unknown; it should not be there")


def leaves_by_name(model: nnx.Module) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


# Folders of diffusers


def read_json(path: Path, *classes: str) -> dict:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: should be the config.json of a diffusers {classes[0]} ({one_line(error)})") from error
    require(isinstance(config, dict) and config.get("_class_name") in classes, f"{path}: _class_name",
            config.get("_class_name") if isinstance(config, dict) else config, f"{classes[0]!r}")
    return config


def weights_file(folder: Path) -> Path:
    """The weights of a diffusers folder, safetensors before a PyTorch file."""
    files = [folder / f"diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "bin")]
    return next((file for file in files if file.is_file()), files[0])


# Networks whose attributes have the names of the file


def torch_layout(model: nnx.Module) -> dict[str, jax.Array]:
    """Parameters under PyTorch's names and in its shapes, where the attributes have the names of the file."""
    tensors = {}
    for path, a in leaves_by_name(model).items():
        module, kind = path.rsplit(".", 1)
        a = a.transpose(3, 2, 0, 1) if kind == "kernel" and a.ndim == 4 else a.T if kind == "kernel" else a
        tensors[f"{module}.{'bias' if kind == 'bias' else 'weight'}"] = a
    return tensors


def from_torch_layout(model: nnx.Module, tensors: dict[str, np.ndarray]) -> nnx.Module:
    """The abstract model with the tensors, already accounted for, as its parameters."""
    def leaf(path: str) -> np.ndarray:
        module, kind = path.rsplit(".", 1)
        a = tensors[f"{module}.{'bias' if kind == 'bias' else 'weight'}"]
        return a.transpose(2, 3, 1, 0) if kind == "kernel" and a.ndim == 4 else a.T if kind == "kernel" else a

    return jax.tree.unflatten(jax.tree.structure(model), [jnp.asarray(leaf(path)) for path in leaves_by_name(model)])


def load_vae(folder: str | Path) -> VAE:
    """The autoencoder of a diffusers `AutoencoderKL` folder (or of a pipeline with one). Raises InputError."""
    folder = Path(folder) / "vae" if (Path(folder) / "vae").is_dir() else Path(folder)
    config = read_json(folder / "config.json", "AutoencoderKL")
    widths, channels = config.get("block_out_channels"), config.get("latent_channels")
    require(channels == 4, f"{folder}: latent_channels", channels, "4, as in Stable Diffusion's VAE")
    right = isinstance(widths, list) and len(widths) == 4 and all(isinstance(width, int) and width > 0 for width in widths)
    require(right, f"{folder}: block_out_channels", widths, "four widths: a factor of 8")
    try:
        model = jax.eval_shape(lambda: VAE(tuple(widths), config.get("layers_per_block", 2), config.get("norm_num_groups", 32),
                                           rngs=nnx.Rngs(0)))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{folder / 'config.json'}: should describe an AutoencoderKL ({one_line(error)})") from error
    source, expected = weights_file(folder), jax.eval_shape(torch_layout, model)
    tensors = {}
    for name, a in read_tensors(source).items():
        if ".attentions." in name:
            name = re.sub(r"\.(query|key|value|proj_attn)\.", lambda old: f".{OLD_ATTENTION[old.group(1)]}.", name)
            a = a.reshape(a.shape[:2]) if a.shape[2:] == (1, 1) else a  # in the oldest files they are 1 x 1 convolutions
        tensors[name] = a
    account(tensors, expected, source)
    return from_torch_layout(model, tensors)


def load_inception(file: str | Path) -> Inception:
    """The network of pytorch-fid's weights file, its batch norms (epsilon 1e-3) folded into the convolutions. Raises InputError."""
    model = jax.eval_shape(lambda: Inception(rngs=nnx.Rngs(0)))
    expected = {}
    for name, tensor in jax.eval_shape(torch_layout, model).items():
        if name.endswith(".conv.bias"):
            expected |= {name.replace("conv.bias", f"bn.{part}"): tensor for part in ("weight", "bias", "running_mean", "running_var")}
        else:
            expected[name] = tensor
    tensors = {name: a for name, a in read_tensors(Path(file)).items() if not name.endswith("num_batches_tracked")}
    account(tensors, expected, Path(file))
    for module in [name.removesuffix(".conv.weight") for name in expected if name.endswith(".conv.weight")]:
        weight, bias, mean, variance = (tensors[f"{module}.bn.{part}"] for part in ("weight", "bias", "running_mean", "running_var"))
        scale = weight / np.sqrt(variance + 1e-3)
        tensors[f"{module}.conv.weight"] = tensors[f"{module}.conv.weight"] * scale[:, None, None, None]
        tensors[f"{module}.conv.bias"] = bias - mean * scale
    return from_torch_layout(model, tensors)
