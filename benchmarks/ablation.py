"""Ablations at equal budget: python benchmarks/ablation.py STUDY ... [--preset digits] [--seeds 3]

Each study trains a preset with one thing changed, for as many steps of the same batches:
conditioning (the paper's four designs, and adaLN-Zero without its zero: Peebles & Xie, Figure 5),
objective (DDPM, or flow matching), times (of flow: uniform, or logit-normal), prediction (of flow:
v, or x0, in patches of 2, 4 and 8), average (how long the weights' is), augmentation and optimizer
(AdamW, or Muon for the blocks' matrices).

Prints the loss and the judge's figures of samples at the end, mean and standard deviation over the
seeds, and plots them against the step in runs/ablation/PRESET-STUDY.png. Samples are unguided and
take 50 forwards. The judge is that of benchmarks/digits.py or benchmarks/cifar10.py. The runs are
kept beside the plot and are resumed.
"""

from dit import heap

if __name__ == "__main__":
    heap.keep_freed_memory()

import contextlib
import re
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from unittest import mock

import cifar10
import digits
import jax
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dit import checkpoint, cli, generation, intact
from dit.config import AtLeastTwo, Config, Objective, PositiveInt, Range, replace
from dit.model import BLOCKS, AdaLNZeroBlock, multiply_adds
from dit.normalization import Modulation, xavier
from dit.writers import read_metrics
from train import train

FOLDER = Path("runs/ablation")
POINTS = 4  # of the curves of the judge's figures
LAST_LINES = 5  # of the log, whose mean is the loss at the end: a single one is noisy
FORWARDS = 50  # of the network, for a sample
JUDGES = {"digits": digits.judge, "cifar10": cifar10.judge}
FLOWS = {"digits": "digits_flow"}  # of a preset by DDPM, the one by flow matching
AVERAGES = (0.9, 0.98, 0.998)  # their decays, all of one run

Steps = Annotated[int, Range(lambda value: value >= POINTS, f"at least {POINTS}")]


# What is compared


class XavierBlock(AdaLNZeroBlock):
    """adaLN-Zero without its zero: the modulation starts as any linear layer."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, dtype, rngs):
        super().__init__(hidden_size, num_heads, mlp_ratio, dtype=dtype, rngs=rngs)
        self.modulation = Modulation(hidden_size, 6, kernel_init=xavier, dtype=dtype, rngs=rngs)


class Arm(NamedTuple):
    changes: dict[str, dict[str, Any]] = {}  # of the preset's sections
    patch: contextlib.AbstractContextManager = contextlib.nullcontext()  # of the code
    ema: bool | float = True  # the weights that are judged, as in checkpoint.load


def with_objective(objective: Objective, **fields: Any) -> dict[str, dict[str, Any]]:
    """The objective with other fields, but for the preset's dropped labels."""
    changed = asdict(objective) | fields
    return {"objective": {k: v for k, v in changed.items() if k != "label_dropout"}}


def design(name: str) -> Arm:
    return Arm({"model": dict(conditioning=name)})


def studies(preset: str) -> dict[str, dict[str, Arm]]:
    """The arms of each study. Of flow matching they begin with what suits the preset's images."""
    flow = partial(with_objective, cli.load_preset(FLOWS.get(preset, preset)).objective)
    return {
        "conditioning": {
            "in-context": design("in_context"),
            "cross-attention": design("cross_attention"),
            "adaLN": design("adaln"),
            "adaLN-Zero": design("adaln_zero"),
            "adaLN-Zero without its zero": Arm(
                patch=mock.patch.dict(BLOCKS, adaln_zero=XavierBlock),
            ),
        },
        "objective": {
            "DDPM": Arm(with_objective(Objective("ddpm", schedule="cosine", min_snr_gamma=5.0))),
            "flow": Arm(flow()),
        },
        "times": {
            "uniform": Arm(flow(times="uniform", time_mean=0.0, time_std=1.0)),
            "logit-normal (0, 1)": Arm(flow(time_mean=0.0, time_std=1.0)),
            "logit-normal (0.8, 0.8)": Arm(flow(time_mean=0.8, time_std=0.8)),
        },
        "prediction": {
            f"{prediction}, patches of {side}": Arm(
                flow(prediction=prediction) | {"model": dict(patch_size=side)}
            )
            for side in (2, 4, 8)
            for prediction in ("v", "x0")
        },
        "average": {
            str(ema or "none"): Arm({"optim": dict(ema_decay=AVERAGES)}, ema=ema)
            for ema in (False, *AVERAGES)
        },
        "augmentation": {str(share): Arm({"data": dict(augment=share)}) for share in (0.0, 0.15)},
        "optimizer": {
            "AdamW": Arm({"optim": dict(name="adamw")}),
            "Muon": Arm({"optim": dict(name="muon")}),
        },
    }


STUDIES = tuple(studies("digits"))


@dataclass(frozen=True)
class Options:
    studies: tyro.conf.Positional[tuple[Literal[STUDIES], ...]] = ()  # all, where none
    preset: Literal["digits", "digits_flow", "cifar10_tiny"] = "digits"
    steps: Steps = 1000  # training steps of each run
    split: str = "train"  # images to train on, such as train[:25%]
    seeds: PositiveInt = 3  # runs of each arm
    samples: AtLeastTwo = 1000  # samples drawn; more than an image has values, for their covariance


# One run


class Curves(NamedTuple):
    loss: np.ndarray  # [lines of the log, 2], rows of (step, loss)
    figures: dict[str, np.ndarray]  # of the judge: [POINTS, 2], rows of (step, figure)
    giga_multiply_adds: float  # of a forward


def config_of(study: str, name: str, arm: Arm, options: Options, seed: int) -> Config:
    trained = name if arm.ema is True else ""  # the arms of `average` are of one run
    words = f"{options.preset} {study} {options.split} {options.steps} {trained} {seed}"
    config = replace(cli.load_preset(options.preset), **arm.changes)
    return replace(
        config,
        data=dict(split=options.split),
        train=dict(
            steps=options.steps,
            seed=seed,
            sample_every=0,
            checkpoint_every=options.steps // POINTS,
            keep_last=POINTS,
            sample_steps=FORWARDS // 2 if config.objective.name == "flow" else FORWARDS,
            workdir=str(FOLDER / re.sub(r"[^\w.]+", "-", words.replace(":", "to"))),
        ),
    )


def run(study: str, name: str, arm: Arm, options: Options, seed: int) -> Curves:
    """Trains an arm, or goes on training it, and judges its checkpoints."""
    config = config_of(study, name, arm, options, seed)
    with arm.patch:
        state = train(config)
        figures = judge(config, arm.ema, options.samples)
    rows = read_metrics(config.workdir / "metrics.jsonl")
    losses = [(row["step"], row["loss"]) for _, row in rows]
    return Curves(np.array(losses), figures, multiply_adds(state.model) / 1e9)


def judge(config: Config, ema: bool | float, samples: int) -> dict[str, np.ndarray]:
    """Each figure of the judge at each checkpoint of a run, by the last weights or an average."""
    labels = np.arange(samples) % config.data.num_classes
    figures: dict[str, list] = {}
    for step in sorted(intact.steps(config.workdir)):
        model, _ = checkpoint.load(config.workdir, ema, step=step)
        images = generation.generate(model, config, labels)
        judged = JUDGES[config.data.name](images, labels, config.data.split)
        for name, figure in judged.items():
            figures.setdefault(name, []).append((step, figure))
    return {name: np.array(rows) for name, rows in figures.items()}


# All of them


def print_table(study: str, results: dict[str, list[Curves]], options: Options) -> None:
    device = jax.devices()[0].device_kind
    columns = ["G multiply-adds", "loss", *next(iter(results.values()))[0].figures]
    images = "" if options.split == "train" else f" on {options.split}"
    budget = f"{options.steps} steps{images}, {options.seeds} seeds"
    print(f"\n{options.preset}, {budget}, {device}\n")
    print(f"| {study} | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, runs in results.items():
        losses = [curves.loss[-LAST_LINES:, 1].mean() for curves in runs]
        ends = [[curves.figures[figure][-1, 1] for curves in runs] for figure in columns[2:]]
        cells = [f"{np.mean(values):.3g} ± {np.std(values):.2g}" for values in (losses, *ends)]
        print(f"| {name} | {runs[0].giga_multiply_adds:.2g} | " + " | ".join(cells) + " |")


def plot(results: dict[str, list[Curves]], path: Path) -> None:
    """Lines are means over the seeds, bands one standard deviation."""
    names = list(next(iter(results.values()))[0].figures)
    figure = Figure(figsize=(4.5 * (1 + len(names)), 4), layout="constrained")
    loss_axes, *axes_of_figures = figure.subplots(1, 1 + len(names))
    for name, runs in results.items():
        plot_curve(loss_axes, "-", name, [curves.loss for curves in runs])
        for axes, kind in zip(axes_of_figures, names, strict=True):
            plot_curve(axes, "o-", name, [curves.figures[kind] for curves in runs])
    loss_axes.set(xlabel="step", ylabel="loss", yscale="log")
    for axes, kind in zip(axes_of_figures, names, strict=True):
        axes.set(xlabel="step", ylabel=kind)
    for axes in (loss_axes, *axes_of_figures):
        axes.grid(alpha=0.3)
    loss_axes.legend()
    figure.savefig(path, dpi=120)


def plot_curve(axes: Axes, style: str, name: str, curves: list[np.ndarray]) -> None:
    steps = curves[0][:, 0]
    values = np.stack([curve[:, 1] for curve in curves])  # [seeds, points]
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    axes.plot(steps, mean, style, label=name, markersize=3)
    axes.fill_between(steps, mean - deviation, mean + deviation, alpha=0.2)


def main() -> None:
    options = cli.parse(Options, sys.argv[1:], "benchmarks/ablation.py", __doc__)
    arms_of = studies(options.preset)
    for study in options.studies or STUDIES:
        name, arm = next(iter(arms_of[study].items()))
        config_of(study, name, arm, options, 0).validate()
    for study in options.studies or STUDIES:
        results = {
            name: [run(study, name, arm, options, seed) for seed in range(options.seeds)]
            for name, arm in arms_of[study].items()
        }
        print_table(study, results, options)
        plot(results, FOLDER / f"{options.preset}-{study}.png")


if __name__ == "__main__":
    heap.fill_holes_after_compiling()
    with cli.exit_status("benchmarks/ablation.py"):
        main()
