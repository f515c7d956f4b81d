"""What a healthy run looks like: python benchmarks/health.py RUN RUN ...

The runs are of one recipe and of several seeds, as `python train.py digits --train.seed 1 --workdir
runs/digits-1` makes them. Prints the loss, the norm of its gradient and the share of the loss that
each quarter of t has, from image to noise, mean and standard deviation over the runs. Writes the
band of the loss to configs/bands.json, and loss.png of every later run of this recipe shows it: the
mean, up and down by three times the seeds' relative deviation, a line's own or all lines' root mean
square, whichever is more. A line is the mean over train.log_every steps.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import jax
import numpy as np
import tyro

from dit import cli, intact
from dit.config import Config, LocalPath, Objective, require
from dit.writers import Metrics, are_alike, read_metrics

QUARTERS = [f"loss_quarter_{k}" for k in (1, 2, 3, 4)]
STEPS = [n * 10**power for power in range(2, 7) for n in (1, 3, 5)]  # 100, 300, 500, 1000, ...
BANDS = cli.CONFIGS / "bands.json"


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[LocalPath, ...]]  # folders of runs that differ in their seeds


def open_runs(folders: tuple[str, ...]) -> tuple[Config, list[list[Metrics]]]:
    """The config of the first run, and the lines of each. Raises InputError."""
    require(len(folders) > 1, "runs", folders, "two or more, for their spread")
    configs, runs = [], []
    for folder in folders:
        workdir, step, _ = intact.find(Path(folder), option="runs")
        configs.append(intact.stored_config(workdir, step))
        rows = [row for _, row in read_metrics(workdir / "metrics.jsonl")]
        runs.append([row for row in rows if "loss" in row])  # the others are scores
        steps = [[row["step"] for row in rows] for rows in (runs[0], runs[-1])]
        is_alike = are_alike(configs[0], configs[-1]) and steps[0] == steps[1]
        require(is_alike, "runs", folder, f"of the recipe and the steps of {folders[0]!r}")
    seeds = [config.train.seed for config in configs]
    require(len(set(seeds)) == len(seeds), "train.seed", seeds, "another one in each run")
    return configs[0], runs


def shares_of_times(objective: Objective) -> np.ndarray:
    """The shares of the samples whose times are in each quarter: `[4]`."""
    if objective.name == "ddpm" or objective.times == "uniform":
        return np.full(4, 0.25)
    logits = NormalDist(objective.time_mean, objective.time_std)
    edges = [0, *(logits.cdf(np.log(t / (1 - t))) for t in (0.25, 0.5, 0.75)), 1]
    return np.diff(edges)


def values_of(row: Metrics, shares: np.ndarray) -> list[float]:
    """Loss, norm of its gradient, and the quarters' shares of the loss."""
    parts = shares * [row.get(name, 0.0) for name in QUARTERS]
    return [row["loss"], row["grad_norm"], *(parts / parts.sum())]


def band_of(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edges `[lines]` of the band around losses `[seeds, lines]`."""
    mean = losses.mean(axis=0)
    relative = losses.std(axis=0, ddof=1) / mean  # [lines]
    width = 3 * np.maximum(relative, np.sqrt(np.square(relative).mean()))
    return mean / (1 + width), mean * (1 + width)


def print_table(config: Config, runs: list[list[Metrics]]) -> None:
    shares = shares_of_times(config.objective)
    print("\n| step | loss | gradient norm | quarter 1 of t | 2 | 3 | 4 |\n" + "|---" * 7 + "|")
    for rows in zip(*runs, strict=True):
        if rows[0]["step"] in STEPS or rows[0] is runs[0][-1]:
            values = np.array([values_of(row, shares) for row in rows])
            mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1)
            cells = [f"{m:.3g} ± {d:.1g}" for m, d in zip(mean[:2], deviation[:2], strict=True)]
            cells += [f"{m:.0%} ± {d:.0%}" for m, d in zip(mean[2:], deviation[2:], strict=True)]
            print(f"| {rows[0]['step']:,.0f} | {' | '.join(cells)} |")


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
    options = cli.parse(Options, sys.argv[1:], "benchmarks/health.py", __doc__)
    config, runs = open_runs(options.runs)
    print_table(config, runs)
    every, device = config.train.log_every, jax.devices()[0].device_kind
    print(f"\n{config.name}, {len(runs)} seeds, lines of {every} steps, {device}")
    write_band(config, runs)
    print(f"wrote the band of its loss to {BANDS}")


if __name__ == "__main__":
    with cli.exit_status("benchmarks/health.py"):
        main()
