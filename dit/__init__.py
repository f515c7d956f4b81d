"""A minimal trainer of class-conditional Diffusion Transformers (DiT) in JAX and Flax.

As a library it has the names of `__all__`. Each is imported when it is first asked for, since jax
takes a second and the commands answer bad input without it.
"""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["DiT", "generate", "load", "load_vae", "preset", "replace", "train"]


@cache
def __getattr__(name: str) -> Any:
    match name:
        case "DiT":
            from dit.model import DiT as value
        case "generate":
            from dit.generation import generate as value
        case "load":
            from dit.checkpoint import load as value
        case "load_vae":
            from dit.imagenet.vae import load_vae as value
        case "preset":
            from dit.cli import load_preset as value
        case "replace":
            from dit.config import replace as value
        case "train":  # by its path: a script of the caller's may be called train.py too
            path = Path(__file__).resolve().parent.parent / "train.py"
            spec = importlib.util.spec_from_file_location("dit.train_script", path)
            script = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(script)
            value = script.train
        case _:
            raise AttributeError(f"module 'dit' has no attribute {name!r}")
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
