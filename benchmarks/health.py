"""What a healthy run looks like: python benchmarks/health.py PRESET [--seeds 3] [--steps 1000]

Takes the first steps of a preset under several seeds. Prints the loss, the norm of its gradient and
the loss by quarter of t, at some of the steps, mean and standard deviation over the seeds. Writes
the band of the loss to configs/bands.json, and loss.png of every later run of this preset shows it:
the mean, up and down by three times the seeds' relative deviation, of which all lines have one. A
line is the mean over train.log_every steps. The runs' own files are in runs/health.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from typing import Annotated

import jax
import numpy as np
import tyro

from dit import cli
from dit.config import AtLeastTwo, Config, PositiveInt, replace, require
from dit.data import batches, open_dataset, with_num_classes
from dit.log import Log, Metrics, read_metrics
from dit.model import TRAINING_FLOPS, multiply_adds
from dit.sharding import make_mesh, place_batch
from dit.state import make_state
from train import compile_train_step, is_due

COLUMNS = ["loss", "grad_norm", *(f"loss_quarter_{k}" for k in (1, 2, 3, 4))]
STEPS = [n * 10**power for power in range(2, 7) for n in (1, 3, 5)]  # 100, 300, 500, 1000, ...
BANDS = cli.CONFIGS / "bands.json"


@dataclass(frozen=True)
class Options:
    config: Annotated[Config, tyro.conf.arg(name="")]
    seeds: AtLeastTwo = 3  # number of runs, each with a seed of its own
    steps: PositiveInt | None = None  # steps of each run; None is all of the preset's


def run(config: Config, steps: int) -> list[Metrics]:
    """The lines of metrics that the first steps of a run leave."""
    config.workdir.mkdir(parents=True, exist_ok=True)
    dataset = open_dataset(config.data)
    config = with_num_classes(config, dataset)
    mesh = make_mesh(config)
    state = make_state(config, mesh)
    step_of = compile_train_step(config, mesh)
    flops_per_image = TRAINING_FLOPS * multiply_adds(state.model)
    logged = replace(config, train=dict(steps=steps))  # the steps of the progress bar
    stream = batches(dataset, config.train.batch_size, config.train.seed, 0)
    with contextlib.closing(stream), Log(logged, 0, flops_per_image, {}) as log:
        for step in range(1, steps + 1):
            state, metrics = step_of(state, place_batch(next(stream), mesh))
            log.record(step, metrics)
            if is_due(step, config.train.log_every, steps):
                with log.paused():
                    log.write(step)
    return [row for _, row in read_metrics(config.workdir / "metrics.jsonl")]


def band_of(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edges `[lines]` of the band around losses `[seeds, lines]`."""
    mean = losses.mean(axis=0)
    relative = losses.std(axis=0, ddof=1) / mean  # [lines]
    width = 3 * np.sqrt(np.square(relative).mean())
    return mean / (1 + width), mean * (1 + width)


def print_table(runs: list[list[Metrics]]) -> None:
    print("\n| step | loss | gradient norm | loss in quarter 1 of t | 2 | 3 | 4 |")
    print("|" + "---|" * (1 + len(COLUMNS)))
    for rows in zip(*runs, strict=True):
        if rows[0]["step"] in STEPS or rows == tuple(lines[-1] for lines in runs):
            values = np.array([[row.get(name, np.nan) for name in COLUMNS] for row in rows])
            cells = zip(values.mean(axis=0), values.std(axis=0, ddof=1), strict=True)
            words = [f"{mean:.3g} ± {deviation:.1g}" for mean, deviation in cells]
            print(f"| {rows[0]['step']:,.0f} | {' | '.join(words)} |")


def write_band(config: Config, runs: list[list[Metrics]]) -> None:
    steps = [int(row["step"]) for row in runs[0]]
    losses = np.array([[row["loss"] for row in rows] for rows in runs])  # [seeds, lines]
    low, high = (edge.round(5).tolist() for edge in band_of(losses))
    known = json.loads(BANDS.read_text()) if BANDS.exists() else {}
    known[config.name] = {
        "config": json.loads(config.to_json()),
        "seeds": len(runs),
        "device": jax.devices()[0].device_kind,
        "band": list(zip(steps, low, high, strict=True)),
    }
    entries = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in known.items()]
    BANDS.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def main() -> None:
    argv = sys.argv[1:]
    options = cli.parse_preset(Options, argv, "benchmarks/health.py", __doc__, Options)
    config = options.config.validate()
    steps = options.steps or config.train.steps
    require(steps <= config.train.steps, "--steps", steps, f"at most {config.train.steps}")
    runs = []
    for seed in range(1, options.seeds + 1):  # presets have 0
        folder = f"runs/health/{config.name}-{seed}"
        runs.append(run(replace(config, train=dict(seed=seed, workdir=folder)), steps))
    print_table(runs)
    every, device = config.train.log_every, jax.devices()[0].device_kind
    print(f"\n{config.name}, {options.seeds} seeds, lines of {every} steps, {device}")
    config = with_num_classes(config, open_dataset(config.data))
    write_band(config, runs)
    print(f"wrote the band of its loss to {BANDS}")


if __name__ == "__main__":
    with cli.exit_status("benchmarks/health.py"):
        main()
