"""Tensors in other people's files: safetensors, PyTorch state dicts, folders of diffusers.

Every tensor and every shape is accounted for before anything is used. PyTorch names parameters
differently from Flax and turns kernels around:

    Flax                                PyTorch
    X.kernel  [in, out]                 X.weight  [out, in]
    X.kernel  [height, width, in, out]  X.weight  [out, in, height, width]
    X.scale, X.embedding                X.weight
    X.bias                              X.bias
"""

import argparse
import collections
import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit.config import InputError, one_line, require
from dit.files import read_json, whole
from dit.state import leaves_by_name

Tensors = dict[str, np.ndarray]

DESCRIPTION = "minimal_dit"  # the name of what we write beside the tensors: a text, by convert.py


# Names and orientation


def torch_name(path: str) -> str:
    """PyTorch's name of the parameter at a path such as "mlp.up.kernel"."""
    module, kind = path.rsplit(".", 1)
    return f"{module}.bias" if kind == "bias" else f"{module}.weight"


def to_torch(path: str, parameter: jax.Array) -> jax.Array:
    """A parameter in PyTorch's orientation."""
    if not path.endswith(".kernel"):
        return parameter
    return parameter.transpose(3, 2, 0, 1) if parameter.ndim == 4 else parameter.T


def from_torch(path: str, tensor: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`."""
    if not path.endswith(".kernel"):
        return tensor
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def parameters_by_path(model: nnx.Module) -> dict[str, jax.Array]:
    """{"mlp.up.kernel": ..., ...}, in the order of the model's leaves."""
    return {name.removesuffix(".value"): leaf for name, leaf in leaves_by_name(model).items()}


def with_parameters(
    model: nnx.Module, make: Callable[[str, tuple[int, ...]], np.ndarray]
) -> nnx.Module:
    """The abstract model with `make(path, shape)` for each of its parameters."""
    shapes = {path: leaf.shape for path, leaf in parameters_by_path(model).items()}
    leaves = [jnp.asarray(make(path, shape)) for path, shape in shapes.items()]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def torch_layout(model: nnx.Module) -> dict[str, jax.Array]:
    """The parameters of a model whose attributes are named as in the PyTorch file."""
    parameters = parameters_by_path(model)
    return {torch_name(path): to_torch(path, leaf) for path, leaf in parameters.items()}


def from_torch_layout(model: nnx.Module, tensors: Tensors) -> nnx.Module:
    """The inverse of `torch_layout`, for an abstract model and tensors already accounted for."""
    return with_parameters(model, lambda path, shape: from_torch(path, tensors[torch_name(path)]))


def account(tensors: Tensors, expected: dict[str, Any], source: Path) -> None:
    """Raises InputError for the first tensor that is missing, of another shape, or unknown."""
    for name, tensor in expected.items():
        if name not in tensors:
            raise InputError(f"{source}: {name} is missing; it should be of shape {tensor.shape}")
        shape = tensors[name].shape
        if shape != tensor.shape:
            hint = ": it is transposed" if shape == tensor.shape[::-1] else ""
            raise InputError(
                f"{source}: {name} has shape {shape}, which should be {tensor.shape}{hint}"
            )
    for name in sorted(tensors.keys() - expected.keys()):
        shape = tensors[name].shape
        raise InputError(f"{source}: {name} of shape {shape} is unknown; it should not be there")


def count_blocks(tensors: Tensors, stack: str) -> int:
    """The number of blocks, as in "blocks.0.mlp", of which there are tensors, from 0 on."""
    numbers = {name.split(".")[1] for name in tensors if name.startswith(f"{stack}.")}
    return next(i for i in itertools.count() if str(i) not in numbers)


# Files


def read_tensors(path: Path) -> Tensors:
    """The tensors of a .safetensors file or of a PyTorch state dict, float32. Raises InputError."""
    tensors, _ = read_described(path)
    return tensors


def read_described(path: Path) -> tuple[Tensors, Any]:
    """The tensors of a file, and the description beside them, None if there is none."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: should be a file of weights, and there is none")
    is_safetensors = path.suffix == ".safetensors"
    tensors, description = read_safetensors(path) if is_safetensors else read_state_dict(path)
    for name, tensor in tensors.items():
        require(tensor.size > 0, f"{path}: {name}", tensor.shape, "of more than 0 along each axis")
    return tensors, description


def read_safetensors(path: Path) -> tuple[Tensors, str | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            description = (file.metadata() or {}).get(DESCRIPTION)
            names = file.keys()
            return {n: np.asarray(file.get_tensor(n), np.float32) for n in names}, description
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: should be a whole safetensors file of floating-point numbers "
            f"({one_line(error)})"
        ) from error


def read_state_dict(path: Path) -> tuple[Tensors, Any]:
    """A PyTorch file; of a training checkpoint its `ema`. Code in it is never run."""
    torch = import_torch(path)
    try:
        # a training checkpoint keeps its options in a Namespace, of plain values
        is_known = torch.serialization.safe_globals([argparse.Namespace])
        with is_known, warnings.catch_warnings(action="ignore"):  # torch's, of damaged files
            stored = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(stored, dict):
            stored = stored.get("ema", stored)
        tensors = to_numpy(stored, torch)
    except Exception as error:  # torch raises nearly anything for a file that is not its own
        raise InputError(
            f"{path}: should be a PyTorch state dict, readable without unpickling code "
            f"({type(error).__name__})"
        ) from error
    if tensors is None:
        kind = type(stored).__name__
        raise InputError(
            f"{path}: holds {kind!r}, which should be a PyTorch state dict: tensors by their names"
            ", each whole"
        )
    return tensors, description_of(stored)


def description_of(state_dict: Any) -> Any:
    """Where PyTorch keeps a module's metadata beside its tensors, "" being the whole module."""
    try:
        return state_dict._metadata[""][DESCRIPTION]
    except (AttributeError, LookupError, TypeError):
        return None


def to_numpy(stored: Any, torch: ModuleType) -> Tensors | None:
    """A state dict as float32 arrays, None if it is something else."""
    if not isinstance(stored, dict) or not stored:
        return None
    are_names = all(isinstance(name, str) for name in stored)
    are_tensors = all(isinstance(value, torch.Tensor) for value in stored.values())
    if not are_names or not are_tensors or not all(map(is_whole, stored.values())):
        return None
    return {name: value.detach().float().numpy() for name, value in stored.items()}


def is_whole(tensor: Any) -> bool:
    """Whether a PyTorch tensor stores each of its numbers, rather than one for many."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def write_tensors(
    path: Path, tensors: dict[str, jax.Array], description: str | None = None
) -> None:
    """Writes a .safetensors file, or a PyTorch state dict for any other suffix.

    The description lies in the file's metadata, where nobody who reads the tensors meets it.
    """
    metadata = {} if description is None else {DESCRIPTION: description}
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with whole(path) as unfinished:
        if path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file(arrays, unfinished, metadata={"format": "pt"} | metadata)
        else:
            torch = import_torch(path)
            state_dict = collections.OrderedDict((n, torch.tensor(a)) for n, a in arrays.items())
            state_dict._metadata = {"": metadata}  # as in the state dict of any PyTorch module
            torch.save(state_dict, unfinished)


def import_torch(path: Path) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path}: a {path.suffix} file needs PyTorch: pip install -c constraints.txt "
            "-e '.[torch]'"
        ) from error
    return torch


# Folders of diffusers


def component_folder(folder: Path, name: str) -> Path:
    """The folder of a pipeline's component, or the folder itself if it is one."""
    return folder / name if (folder / name).is_dir() else folder


def read_class_config(folder: Path, *classes: str) -> dict[str, Any]:
    """The config.json of one of the classes of diffusers. Raises InputError."""
    path = folder / "config.json"
    config = read_json(path, f"the config.json of a diffusers {classes[0]}")
    found = config.get("_class_name")
    require(found in classes, f"{path}: _class_name", found, f"{classes[0]!r}")
    return config


def weights_file(folder: Path) -> Path:
    """The weights of a diffusers folder: safetensors before a PyTorch file."""
    safetensors = folder / "diffusion_pytorch_model.safetensors"
    pytorch = folder / "diffusion_pytorch_model.bin"
    return pytorch if pytorch.is_file() and not safetensors.is_file() else safetensors
