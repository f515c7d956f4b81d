"""Samples class-conditional images from a trained model: python sample.py WORKDIR --classes 3 5 8 --out x.png

Writes a labelled grid, one class a row (.png), or `arr_0` uint8 [N, H, W, C] and `arr_1` int64 labels, the form of the ADM evaluator
(.npz). Sample i is a function of (--seed, i), whatever the batch size and the number of devices.
"""

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from dit import checkpoint, sampling
from dit import config as dit_config
from dit.config import Config, require
from dit.images import save_grid, to_uint8
from dit.sharding import batch_sharding, make_mesh
from dit.state import make_objective


@dataclass(frozen=True)
class Sample:
    workdir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORKDIR")]  # a run's folder, such as runs/digits
    classes: tuple[int, ...] = ()  # classes to draw, by number; none are all of them
    per_class: int = 8  # images of each class
    guidance: float = 1.0  # scale of classifier-free guidance; 1 is none, 4 makes typical pictures
    sampler: Literal["ddpm", "ddim"] | None = None  # ancestral, or (at eta 0) deterministic; None is the run's train.sampler
    steps: int | None = None  # denoising steps; None is the run's train.sample_steps
    eta: float = 0.0  # noise of DDIM, from 0 to DDPM's at 1
    cfg_channels: int | None = None  # guide only the first so many channels; None guides all, 3 is the published DiT
    guidance_interval: tuple[float, float] | None = None  # guide only at timesteps from LOW to below HIGH
    seed: int = 0  # of all noise
    batch_size: int = 256  # images at a time, over all devices
    ema: bool = True  # take the average of the weights rather than the last
    out: str = "samples.png"  # .png for a grid, .npz for arrays


def completed(options: Sample, config: Config) -> Sample:
    """The options, with what they leave open taken from the model's config. Raises InputError for what the model cannot meet."""
    options = dataclasses.replace(options, classes=options.classes or tuple(range(config.data.num_classes)),
                                  sampler=options.sampler or config.train.sampler,
                                  steps=config.train.sample_steps if options.steps is None else options.steps)
    K, T, C = config.data.num_classes, config.objective.num_steps, config.input_shape[2]
    for k in options.classes:
        require(0 <= k < K, "--classes", k, f"from 0 to {K - 1}: the model has {K} classes")
    require(options.per_class > 0, "--per-class", options.per_class, "more than 0")
    require(options.batch_size > 0, "--batch-size", options.batch_size, "more than 0")
    require(0 < options.steps <= T, "--steps", options.steps, f"from 1 to the model's {T} timesteps")
    require(0 <= options.eta <= 1, "--eta", options.eta, "from 0 to 1")
    require(options.cfg_channels is None or 0 < options.cfg_channels <= C, "--cfg-channels", options.cfg_channels, f"from 1 to {C}")
    out = Path(options.out)
    require(out.suffix in (".png", ".npz"), "--out", options.out, "a .png or .npz file")
    require(out.parent.is_dir(), "--out", options.out, f"in a folder that exists, unlike {str(out.parent)!r}")
    require(not out.is_dir() and os.access(out.parent, os.W_OK), "--out", options.out, "a file that can be written")
    require(0 <= options.seed < 2**32, "--seed", options.seed, "from 0 to 2^32 - 1")
    return options


def make_sampler(config: Config, options: Sample):
    """The jitted function (model, labels `[B]`, indices `[B]`) -> uint8 `[B, H, W, C]`."""
    process, K = make_objective(config), config.data.num_classes

    @jax.jit
    def sample(model, labels, indices):
        keys = sampling.sample_keys(options.seed, indices)
        denoise = sampling.guided(model, labels, K, options.guidance, options.cfg_channels, options.guidance_interval)
        if options.sampler == "ddpm":
            x = sampling.ddpm(process, denoise, keys, config.input_shape, options.steps, clip=True)
        else:
            x = sampling.ddim(process, denoise, keys, config.input_shape, options.steps, options.eta, clip=True)
        return to_uint8(x)

    return sample


def draw(model, config: Config, options: Sample, labels: np.ndarray) -> np.ndarray:
    """uint8 `[N, H, W, C]`, image i of label i, in equal batches over all devices."""
    devices, N = jax.device_count(), len(labels)
    B = -(-min(options.batch_size, N) // devices) * devices
    rows = batch_sharding(make_mesh(dit_config.Mesh(), B))
    sample, images = make_sampler(config, options), []
    for start in tqdm(range(0, N, B), unit="batch", disable=None):
        indices = np.minimum(np.arange(start, start + B), N - 1)  # the last batch repeats its last image
        images.append(np.asarray(sample(model, jax.device_put(labels[indices], rows), jax.device_put(indices, rows))))
    return np.concatenate(images)[:N]


def run(options: Sample) -> Path:
    """Draws what the options ask for and returns the file it wrote. Raises InputError."""
    mesh = make_mesh(dit_config.Mesh(), jax.device_count())
    model, config = checkpoint.load(options.workdir, options.ema, NamedSharding(mesh, PartitionSpec()))
    options = completed(options, config)
    labels = np.repeat(np.array(options.classes, np.int32), options.per_class)
    images = draw(model, config, options, labels)
    if options.out.endswith(".npz"):
        np.savez(options.out, arr_0=images, arr_1=labels.astype(np.int64))
    else:
        save_grid(options.out, images, [config.data.class_names[k] for k in options.classes])
    return Path(options.out)


def main(argv: list[str] | None = None) -> None:
    with dit_config.input_errors("sample.py"):
        options = dit_config.parse(Sample, sys.argv[1:] if argv is None else argv, "sample.py", __doc__)
        print(f"wrote {run(options)}")


if __name__ == "__main__":
    main()
