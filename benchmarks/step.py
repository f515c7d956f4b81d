"""Times a training step: python benchmarks/step.py PRESET [--framework torch] [--section.field X]

The step is train.py's, or that of benchmarks/torch_dit.py, on one device and one synthetic batch
that stays there. Prints images/s, TFLOP/s, MFU, and the peak of memory beside what the compiler
planned. That it does not fit is a result, too. `--framework both` times the two in turn, each in a
process of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from dit import cli
from dit.chips import GIB, find_chip
from dit.config import Config, PositiveInt

WARM_UP_STEPS = 3

Step = Callable[[], Any]  # takes one step, which may not be finished yet, and returns its loss
Figures = dict[str, Any]


@dataclass(frozen=True)
class Options:
    config: Annotated[Config, tyro.conf.arg(name="")]
    framework: Literal["jax", "torch", "torch.compile", "both"] = "jax"  # both: jax and torch
    steps: PositiveInt = 20  # timed
    rounds: PositiveInt = 3  # of each framework, with `both`
    json: str | None = None  # file to append the figures to, a line a measurement


class Trainer(NamedTuple):
    device_kind: str
    planned_bytes: int | None  # of memory, by the compiler
    start: Callable[[], Step]  # makes the state
    peak_bytes: Callable[[], int | None]  # of memory, so far


def jax_trainer(config: Config) -> Trainer:
    import jax
    import numpy as np

    from dit.data import batch_shapes
    from dit.program import temporaries
    from dit.sharding import make_mesh, place_batch
    from dit.state import make_state
    from train import compile_train_step

    device = jax.devices()[0]
    mesh = make_mesh(config, [device])
    compiled_step = compile_train_step(config, mesh)
    arguments = compiled_step.memory_analysis().argument_size_in_bytes
    planned_bytes = arguments + temporaries(compiled_step)

    def start() -> Step:
        rng = np.random.default_rng(0)
        arrays = {
            name: rng.integers(0, 2, shape).astype(dtype)  # labels and pixels, means and deviations
            for name, (shape, dtype) in batch_shapes(config).items()
        }
        batch = place_batch(arrays, mesh)
        state = make_state(config, mesh)

        def step() -> jax.Array:
            nonlocal state
            state, metrics = compiled_step(state, batch)
            return metrics["loss"]

        return step

    def peak_bytes() -> int | None:
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    return Trainer(device.device_kind, planned_bytes, start, peak_bytes)


def torch_trainer(config: Config, compiled: bool) -> Trainer:
    import torch
    from torch_dit import make_step

    on_gpu = torch.cuda.is_available()
    device_kind = torch.cuda.get_device_name() if on_gpu else "cpu"

    def start() -> Step:
        return make_step(config, "cuda" if on_gpu else "cpu", compiled)

    def peak_bytes() -> int | None:
        return torch.cuda.max_memory_allocated() if on_gpu else None

    return Trainer(device_kind, None, start, peak_bytes)


def measure(options: Options) -> Figures:
    config, framework = options.config, options.framework
    if framework == "jax":
        cli.use_compilation_cache()
        cli.keep_freed_memory()
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"  # the GPU is PyTorch's
    figures = {
        "preset": config.name,
        "framework": framework,
        "remat": config.model.remat if framework == "jax" else "none",
        "dtype": config.train.dtype,
        "batch_size": config.train.batch_size,
    }
    began = time.perf_counter()
    try:
        if framework == "jax":
            trainer = jax_trainer(config)
        else:
            trainer = torch_trainer(config, compiled=framework == "torch.compile")
        figures["planned_bytes"] = trainer.planned_bytes
        step = trainer.start()
        for _ in range(WARM_UP_STEPS):
            float(step())  # waits
        figures["seconds_to_warm"] = time.perf_counter() - began
        figures |= time_steps(step, config, trainer.device_kind, options.steps)
        figures["peak_bytes"] = trainer.peak_bytes()
    except RuntimeError as error:  # JAX's and PyTorch's are of no other common kind
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
            raise
        figures["out_of_memory"] = True
    return figures


def time_steps(step: Step, config: Config, device_kind: str, steps: int) -> Figures:
    import jax

    from dit.model import TRAINING_FLOPS, multiply_adds
    from dit.state import make_init

    start = time.perf_counter()
    for _ in range(steps):
        loss = step()
    last_loss = float(loss)  # waits
    seconds = (time.perf_counter() - start) / steps
    images_per_second = config.train.batch_size / seconds
    model = jax.eval_shape(make_init(config)).model
    flops_per_second = images_per_second * TRAINING_FLOPS * multiply_adds(model)
    chip = find_chip(device_kind)
    return {
        "device": device_kind,
        "seconds_per_step": seconds,
        "images_per_second": images_per_second,
        "tflops_per_second": flops_per_second / 1e12,
        "mfu": flops_per_second / chip.peak if chip else None,
        "loss": last_loss,
    }


def describe(figures: Figures) -> str:
    """A measurement as one line."""
    what = "{preset:<16}{framework:<14}{remat:<6}{dtype:<9}{batch_size:>4}  ".format(**figures)
    parts = ["does not fit"]
    if "images_per_second" in figures:
        parts = [
            "{images_per_second:10,.1f} images/s".format(**figures),
            "{tflops_per_second:8.3f} TFLOP/s".format(**figures),
        ]
    if figures.get("mfu"):
        parts.append(f"MFU {figures['mfu']:6.1%}")
    for name in ("peak", "planned"):
        size = figures.get(f"{name}_bytes")
        if size:
            parts.append(f"{name} {size / GIB:6.2f} GiB")
    return what + "  ".join(parts)


def alternate(argv: list[str], rounds: int) -> list[Figures]:
    """The figures of both frameworks in turn, a process each, and prints the ratio of medians."""
    rates = {"jax": [], "torch": []}
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        for _ in range(rounds):
            for framework in rates:
                flags = ["--framework", framework, "--json", str(path)]
                subprocess.run([sys.executable, __file__, *argv, *flags], check=True)
                figures = json.loads(path.read_text().splitlines()[-1])
                rates[framework].append(figures.get("images_per_second", 0.0))
                measured.append(figures)
    ours, theirs = (statistics.median(values) for values in rates.values())
    print(f"medians: jax {ours:,.1f}, torch {theirs:,.1f} images/s", end="")
    print(f", ratio {ours / theirs:.2f}" if theirs else "")
    return measured


def main() -> None:
    argv = sys.argv[1:]
    options = cli.parse_preset(Options, argv, "benchmarks/step.py", __doc__, Options)
    options.config.validate()
    if options.framework == "both":
        measured = alternate(argv, options.rounds)
    else:
        measured = [measure(options)]
        print(describe(measured[0]), flush=True)
    if options.json:
        with Path(options.json).open("a") as file:
            file.writelines(json.dumps(figures) + "\n" for figures in measured)


if __name__ == "__main__":
    with cli.exit_status("benchmarks/step.py"):
        main()
