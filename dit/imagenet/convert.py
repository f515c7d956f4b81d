"""Published weights in and out: python -m dit.imagenet.convert SOURCE OUT [--to LAYOUT]

Reads a DiT of the authors' release (.pt: a state dict or a training checkpoint with `ema`; the same
names in .safetensors) or of diffusers (a folder with config.json), and writes a folder that
sample.py takes. With --to, SOURCE is such a folder or a run's, and OUT a .pt or .safetensors file
(official) or a folder (diffusers). Every tensor and every shape is accounted for. What no shape
says, such as the number of heads and the noise schedule, travels in the metadata of what we write.
"""

from dit.signals import StopRequest

if __name__ == "__main__":
    StopRequest().end_at_once("dit.imagenet.convert")

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dit import cli
from dit.config import (
    Config,
    Decay,
    InputError,
    LocalPath,
    PositiveInt,
    check_value,
    from_json,
    one_line,
    require,
)
from dit.files import naming

Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
Out = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]


@dataclass(frozen=True)
class Convert:
    source: Source  # published weights; with --to, ours
    out: Out  # what to write; it should not exist yet
    to: Literal["official", "diffusers"] | None = None  # the layout to write ours in
    num_heads: PositiveInt | None = None  # heads of an official DiT of unusual width; no shape says
    ema_decay: Decay | None = None  # average of a run with several; None is the first; with --to


if __name__ == "__main__":  # --help and bad input are answered before jax is imported
    cli.use_compilation_cache()
    with cli.exit_status("dit.imagenet.convert"):
        OPTIONS = cli.parse(Convert, sys.argv[1:], "python -m dit.imagenet.convert", __doc__)

from dit import checkpoint, intact
from dit.imagenet.diffusers import read_diffusers, write_diffusers
from dit.imagenet.official import from_official, hold_config, infer_config, to_official
from dit.imagenet.tensors import DESCRIPTION, read_described, write_tensors
from dit.model import DiT, count_parameters
from dit.tfds import imagenet_names


def run(options: Convert) -> None:
    """Converts, and prints what was converted. Raises InputError."""
    check_value("OUT", options.out, LocalPath)
    source, out = Path(options.source), Path(options.out)
    check_out(out)
    if options.to is None:
        model, config, names = read(source, options.num_heads)
    else:
        workdir, step, damaged = intact.find(source, option="SOURCE")
        for line in damaged:
            print(line)
        ema = True if options.ema_decay is None else options.ema_decay
        model, config = checkpoint.load(workdir, ema, step=step)
        names = intact.stored_dataset(workdir, step)["class_names"]
        objective = config.objective.name
        expected = "ddpm: the other layouts do not say for which objective a model is"
        require(objective == "ddpm", "SOURCE: objective.name", objective, expected)
        check_layout(model, out, options.to)
    out.parent.mkdir(parents=True, exist_ok=True)  # only now that nothing has been refused
    if options.to is None:
        checkpoint.save_weights(out, model, config, names)
    elif options.to == "official":
        write_tensors(out, to_official(model), describe(config, names))
    else:
        write_diffusers(out, model, describe(config, names))
    size = config.data.image_size
    print(
        f"wrote {out}: {config.name}, width {model.hidden_size}, {model.depth} blocks, "
        f"{model.num_heads} heads, patch {model.patch_size}, {size}x{size}, "
        f"{model.num_classes} classes, {count_parameters(model):,} parameters"
    )


def check_out(out: Path) -> None:
    """Raises InputError unless OUT is a new name in a folder that can be written, or made."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    require(not out.exists(), "OUT", str(out), "a name that is not taken yet")
    require(folder.is_dir(), "OUT", str(out), f"in a folder, which {str(folder)!r} is not")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"OUT: {str(out)!r} should be in a folder that can be written ({error.strerror})"
        ) from error


def read(source: Path, num_heads: int | None) -> tuple[DiT, Config, tuple[str, ...]]:
    """The model of a file in the authors' layout, or of a diffusers folder, its config and classes.

    num_heads: the option, for a source that does not say them. Raises InputError.
    """
    heads = described = None
    if source.is_dir():
        tensors, description, heads = read_diffusers(source)
    else:
        tensors, description = read_described(source)
    if description is not None:
        described, names = read_description(description, source)
        heads = heads or described.model.num_heads
    agrees = None in (heads, num_heads) or heads == num_heads
    require(agrees, "--num-heads", num_heads, f"{heads}, as {source} says")

    config = infer_config(tensors, heads or num_heads, source)
    if described is None:
        names = class_names(config.data.num_classes)
        print(f"{source} says no noise schedule: taken for the authors', 1000 timesteps, linear")
    else:
        hold_config(described, config, source)
        config = described
    return from_official(tensors, config, source), config, names


def describe(config: Config, names: list[str]) -> str:
    """What a file says beside its tensors: all that sampling needs and no shape says."""
    return json.dumps({"config": dataclasses.asdict(config), "class_names": names})


def read_description(text: str, source: Path) -> tuple[Config, tuple[str, ...]]:
    """The config and the class names of `describe`. Raises InputError."""
    try:
        values = json.loads(text)
        config, names = values["config"], values["class_names"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise InputError(
            f"{source}: its metadata {DESCRIPTION!r} should be a config and class names "
            f"({one_line(error)})"
        ) from error
    with naming(source):
        config = from_json(config)
    intact.check_names(source, names, config)
    return config, tuple(names)


def class_names(num_classes: int) -> tuple[str, ...]:
    """ImageNet's for 1,000 classes, otherwise the numbers."""
    return imagenet_names() if num_classes == 1000 else tuple(map(str, range(num_classes)))


def check_layout(model: DiT, out: Path, layout: str) -> None:
    """Raises InputError unless the layout "official" or "diffusers" can hold the model."""
    design, masks, ratio = model.conditioning, model.mask_classes, model.mlp_ratio
    expected = "of adaln_zero blocks, which the other layouts have"
    require(design == "adaln_zero", "SOURCE", design, expected)
    expected = "0: the other layouts have no masks"
    require(masks == 0, "SOURCE: data.mask_classes", masks, expected)
    if layout == "official":
        is_file = out.suffix in (".pt", ".safetensors")
        require(is_file, "OUT", str(out), "a .pt or .safetensors file")
    else:
        expected = "4, the only one that diffusers knows"
        require(ratio == 4, "SOURCE: model.mlp_ratio", ratio, expected)


if __name__ == "__main__":
    with cli.exit_status("dit.imagenet.convert"):
        run(OPTIONS)
