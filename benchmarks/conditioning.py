"""The paper's ablation of the conditioning, in small: python benchmarks/conditioning.py [--seeds 3]

Trains in-context, cross-attention, adaLN, adaLN-Zero, and adaLN-Zero without its zero (its
modulation initialised as any linear layer), all else equal. Prints the loss and the Frechet
distance in pixel space at the end, mean and standard deviation over the seeds, and plots both
against the step in runs/conditioning/PRESET.png. The runs are kept beside it and are resumed.
(Peebles & Xie, Figure 5, from worst to best: in-context, cross-attention, adaLN, adaLN-Zero.)
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import numpy as np
from digits import pixel_rows
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dit import checkpoint, cli, generation
from dit.config import AtLeastTwo, Config, PositiveInt, Range, replace, require
from dit.data import open_dataset
from dit.metrics import Gaussian, frechet_distance, gaussian_of
from dit.model import BLOCKS, AdaLNZeroBlock
from dit.normalization import Modulation, xavier
from dit.sharding import local_mesh, replicated
from train import train

FOLDER = Path("runs/conditioning")
POINTS = 4  # of the curve of the Frechet distance
REAL_IMAGES = 10_000  # behind the real images' Gaussian, at most
LAST_LINES = 5  # of the log, whose mean is the loss at the end: a single one is noisy
WITHOUT_ZERO = "adaLN-Zero without its zero"

DESIGNS = {
    "in-context": "in_context",
    "cross-attention": "cross_attention",
    "adaLN": "adaln",
    "adaLN-Zero": "adaln_zero",
    WITHOUT_ZERO: "adaln_zero",
}

Steps = Annotated[int, Range(lambda value: value >= POINTS, f"at least {POINTS}")]


@dataclass(frozen=True)
class Options:
    steps: Steps = 1000  # of each run
    seeds: PositiveInt = 3  # runs of each design
    preset: str = "digits"  # of pixels, without masks
    samples: AtLeastTwo = 1000  # drawn; more than an image has values, for their covariance


class XavierBlock(AdaLNZeroBlock):
    """adaLN-Zero without its zero: the modulation starts as any linear layer."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, dtype, rngs):
        super().__init__(hidden_size, num_heads, mlp_ratio, dtype=dtype, rngs=rngs)
        self.modulation = Modulation(hidden_size, 6, kernel_init=xavier, dtype=dtype, rngs=rngs)


class Curves(NamedTuple):
    loss: np.ndarray  # [lines of the log, 2], rows of (step, loss)
    distance: np.ndarray  # [POINTS, 2], rows of (step, Frechet distance)


def config_of(name: str, options: Options, seed: int) -> Config:
    """The config of one run of a design."""
    words = name.replace(" ", "-")
    return replace(
        cli.load_preset(options.preset),
        model=dict(conditioning=DESIGNS[name]),
        train=dict(
            steps=options.steps,
            seed=seed,
            sample_every=0,
            checkpoint_every=options.steps // POINTS,
            keep_last=POINTS,
            sampler="ddim",
            sample_steps=50,
            workdir=str(FOLDER / f"{options.preset}-{words}-{seed}"),
        ),
    )


def run(name: str, options: Options, seed: int, real: Gaussian) -> Curves:
    """Trains a design, or goes on training it, and measures its checkpoints."""
    BLOCKS["adaln_zero"] = XavierBlock if name == WITHOUT_ZERO else AdaLNZeroBlock
    config = config_of(name, options, seed)
    train(config)
    lines = (config.workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [(row["step"], row["loss"]) for row in rows]
    return Curves(np.array(losses), np.array(measure(config, options.samples, real)))


def measure(config: Config, samples: int, real: Gaussian) -> list[tuple[int, float]]:
    """(step, Frechet distance in pixel space) of each checkpoint of a run."""
    mesh = local_mesh()
    labels = np.arange(samples) % config.data.num_classes
    condition = generation.make_condition(labels, config)
    sampler, steps = config.sampler, config.train.sample_steps
    draw = generation.make_draw(config, mesh, condition, samples, sampler=sampler, steps=steps)
    distances = []
    for step in sorted(checkpoint.steps(config.workdir)):
        model, _ = checkpoint.load(config.workdir, sharding=replicated(mesh), step=step)
        drawn = gaussian_of(pixel_rows(draw(model, None, 0)))
        distances.append((step, frechet_distance(drawn, real)))
    return distances


def print_table(results: dict[str, list[Curves]], options: Options) -> None:
    device = jax.devices()[0].device_kind
    header = f"{'design':<30}{'loss':>10}{'+-':>8}{'Frechet':>10}{'+-':>8}"
    print(f"\n{header}   ({options.seeds} seeds, {options.steps} steps, {device})")
    for name, runs in results.items():
        losses = np.array([curves.loss[-LAST_LINES:, 1].mean() for curves in runs])
        distances = np.array([curves.distance[-1, 1] for curves in runs])
        loss = f"{losses.mean():>10.4f}{losses.std():>8.4f}"
        print(f"{name:<30}{loss}{distances.mean():>10.3f}{distances.std():>8.3f}")


def plot(results: dict[str, list[Curves]], path: Path) -> None:
    """Lines are means over the seeds, bands one standard deviation."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    loss_axes, distance_axes = figure.subplots(1, 2)
    for name, runs in results.items():
        plot_curve(loss_axes, "-", name, [curves.loss for curves in runs])
        plot_curve(distance_axes, "o-", name, [curves.distance for curves in runs])
    loss_axes.set(xlabel="step", ylabel="loss", yscale="log")
    distance_axes.set(xlabel="step", ylabel="Frechet distance in pixel space", yscale="log")
    loss_axes.grid(alpha=0.3)
    distance_axes.grid(alpha=0.3)
    loss_axes.legend()
    figure.savefig(path, dpi=120)


def plot_curve(axes: Axes, style: str, name: str, curves: list[np.ndarray]) -> None:
    steps = curves[0][:, 0]
    values = np.stack([curve[:, 1] for curve in curves])  # [seeds, points]
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    axes.plot(steps, mean, style, label=name, markersize=3)
    axes.fill_between(steps, mean - deviation, mean + deviation, alpha=0.2)


def main() -> None:
    options = cli.parse(Options, sys.argv[1:], "benchmarks/conditioning.py", __doc__)
    data = cli.load_preset(options.preset).data
    is_plain = not data.latents and not data.mask_classes
    require(is_plain, "--preset", options.preset, "one of pixels, without masks")
    real = gaussian_of(pixel_rows(open_dataset(data).records.images[:REAL_IMAGES]))
    results = {
        name: [run(name, options, seed, real) for seed in range(options.seeds)] for name in DESIGNS
    }
    print_table(results, options)
    plot(results, FOLDER / f"{options.preset}.png")


if __name__ == "__main__":
    with cli.exit_status("benchmarks/conditioning.py"):
        main()
