"""Times a training step beside PyTorch's: python benchmarks/train_step.py [--presets cifar10_tiny]

Ours is train.py's step. The peer's is that of benchmarks/torch_dit.py, with the DiT there, with
diffusers' or with that of a file; eager and, on a GPU, with its blocks through torch.compile. Both
have one device, one synthetic batch, which stays there, DDPM's loss and AdamW, which stand in for a
preset's flow matching and Muon unless --peer is none. Each measurement has a process of its own,
and the sides take turns. Prints images/s; TFLOP/s by our count; their share of what a large product
of matrices reaches, in JAX or in PyTorch, whichever is faster; and the peak of memory: on a GPU of
the allocator, on a CPU of what the process grew by from its imports on, compiling included. That it
does not fit is a result, too. Flags of a config's fields change every preset.
"""

import dataclasses
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro
from table import Row, make_row, report

from dit import cli, heap
from dit.chips import GIB
from dit.config import Config, Objective, PositiveInt, replace, require

if TYPE_CHECKING:  # imported in the processes that measure
    import jax

WARM_UP_STEPS = 3

Step = Callable[[], Any]  # takes one step, which may not be finished yet, and returns its loss
Figures = dict[str, Any]


@dataclass(frozen=True)
class Options:
    config: Annotated[Config, tyro.conf.arg(name="")]
    presets: tuple[str, ...] = ("digits", "cifar10_tiny")  # presets to measure
    peer: str = "torch_dit"  # torch_dit, diffusers, FILE.py:CLASS as published, or none
    modes: tuple[Literal["eager", "compile"], ...] | None = None  # modes of the peer; None is all
    dtype: Literal["float32", "bfloat16"] | None = None  # type of products; None is the preset's
    steps: PositiveInt = 20  # steps timed in each measurement
    rounds: PositiveInt = 3  # measurements of each side
    json: str | None = None  # file to append the table's rows to


# In the process that measures


class Trainer(NamedTuple):
    device: str
    step: Step
    peak_bytes: Callable[[], int]
    planned_bytes: int | None = None  # of memory, by the compiler


def peak_rss() -> int:
    """The most bytes that this process has held."""
    if sys.platform == "linux":  # whose getrusage counts what the parent held, too
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on a Mac


def make_jax_step(compiled_step: Callable, config: Config, mesh: "jax.sharding.Mesh") -> Step:
    """The compiled step on a state and a batch of its own."""
    import numpy as np

    from dit.data import batch_shapes
    from dit.sharding import place_batch
    from dit.state import make_state

    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 2, shape).astype(dtype)  # labels and pixels, means and deviations
        for name, (shape, dtype) in batch_shapes(config).items()
    }
    batch = place_batch(arrays, mesh)
    state = make_state(config, mesh)

    def step() -> "jax.Array":
        nonlocal state
        state, metrics = compiled_step(state, batch)
        return metrics["loss"]

    return step


def jax_trainer(config: Config) -> Trainer:
    import jax

    from dit.program import temporaries
    from dit.sharding import make_mesh
    from train import compile_train_step

    device = jax.devices()[0]
    imported = peak_rss()
    mesh = make_mesh(config, [device])
    compiled_step = compile_train_step(config, mesh)
    arguments = compiled_step.memory_analysis().argument_size_in_bytes
    step = make_jax_step(compiled_step, config, mesh)

    def peak_bytes() -> int:
        if device.platform == "cpu":
            return peak_rss() - imported
        return device.memory_stats()["peak_bytes_in_use"]

    return Trainer(device.device_kind, step, peak_bytes, arguments + temporaries(compiled_step))


def torch_trainer(config: Config, peer: str, compiled: bool) -> Trainer:
    import torch
    from torch_dit import import_peer, make_step

    on_gpu, make_model = torch.cuda.is_available(), import_peer(peer)
    imported = peak_rss()
    step = make_step(config, make_model, "cuda" if on_gpu else "cpu", compiled)

    def peak_bytes() -> int:
        return torch.cuda.max_memory_allocated() if on_gpu else peak_rss() - imported

    return Trainer(torch.cuda.get_device_name() if on_gpu else "cpu", step, peak_bytes)


def seconds_per_step(step: Step, steps: int) -> float:
    """Waits for each step when the next is under way, as train.py does: each holds memory."""
    start = time.perf_counter()
    before = 0.0
    for _ in range(steps):
        loss = step()
        float(before)
        before = loss
    float(before)
    return (time.perf_counter() - start) / steps


def measure(config: Config, side: str, peer: str, steps: int) -> Figures:
    """The figures of one side, empty if it does not fit. Before either library is imported."""
    if side == "ours":
        cli.use_compilation_cache()
        heap.keep_freed_memory()
        heap.fill_holes_after_compiling()
        from machine import product_rate
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"  # the GPU is PyTorch's
        from torch_dit import product_rate
    try:
        if side == "ours":
            trainer = jax_trainer(config)
        else:
            trainer = torch_trainer(config, peer, compiled=side == "compile")
        seconds_per_step(trainer.step, WARM_UP_STEPS)
        seconds = seconds_per_step(trainer.step, steps)
    except RuntimeError as error:  # JAX's and PyTorch's are of no other common kind
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error):
            raise
        return {}
    figures = {"device": trainer.device, "images/s": config.train.batch_size / seconds}
    figures["GiB at the peak"] = trainer.peak_bytes() / GIB
    if trainer.planned_bytes:
        figures["GiB planned"] = trainer.planned_bytes / GIB
    figures["TFLOP/s"] = figures["images/s"] * training_flops(config) / 1e12
    size, repeats = (2048, 10) if trainer.device == "cpu" else (8192, 50)
    del trainer  # and with it the state
    figures["product TFLOP/s"] = product_rate(size, config.train.dtype, repeats) / 1e12
    return figures


def training_flops(config: Config) -> int:
    """FLOPs of a training step for each image."""
    import jax

    from dit.model import TRAINING_FLOPS, multiply_adds
    from dit.state import make_init

    return TRAINING_FLOPS * multiply_adds(jax.eval_shape(make_init(config)).model)


# In the process that compares


def in_own_process(f: Callable, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(f, *arguments).result()


def in_turn(config: Config, sides: list[str], options: Options) -> dict[str, list[Figures]]:
    """The figures of each side, of all rounds."""
    measured = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side in sides:
            figures = in_own_process(measure, config, side, options.peer, options.steps)
            measured[side].append(figures)
            parts = [f"{figures[k]:,.4g} {k}" for k in figures if k != "device"]
            print(f"{config.name}, {side}: {', '.join(parts) or 'does not fit'}", flush=True)
    return measured


def make_rows(config: Config, measured: dict[str, list[Figures]], peer: str) -> list[Row]:
    """Ours against each mode of the peer."""
    train, remat = config.train, config.model.remat
    case = f"{config.name}, {train.dtype}, batch {train.batch_size}, remat {remat}"
    fitting = [figures for rounds in measured.values() for figures in rounds if figures]
    device = fitting[0]["device"] if fitting else "unknown device"
    reached = max((figures["product TFLOP/s"] for figures in fitting), default=0.0)
    for figures in fitting:
        figures["% of products"] = 100 * figures["TFLOP/s"] / reached
    rows = []
    for unit in ("images/s", "TFLOP/s", "% of products", "GiB at the peak", "GiB planned"):
        values = {
            side: [figures[unit] for figures in rounds if unit in figures]
            for side, rounds in measured.items()
        }
        ours = values.pop("ours")
        if unit == "GiB planned" or not values:
            rows.append(make_row("train_step", case, unit, ours, device=device))
            continue
        for mode, theirs in values.items():
            name = f"{Path(peer).name}, {mode}"
            rows.append(make_row("train_step", case, unit, ours, name, theirs, device))
    return rows


def parse(argv: list[str]) -> tuple[Options, list[Config]]:
    """The options, and the config of each preset. Raises InputError."""
    options, configs = parse_presets(Options, argv, "benchmarks/train_step.py", __doc__)
    if options.peer != "none":
        configs = [with_loss_of_peers(config) for config in configs]
        for config in configs:
            check_comparable(config)
    check_peer(options.peer)
    return options, configs


def parse_presets(
    options_of: Callable[[Config], Any], argv: list[str], prog: str, description: str
) -> tuple[Any, list[Config]]:
    """The options of a benchmark, and the config of each of its presets under the same flags.

    `options_of` is a dataclass of a config, presets, a dtype and more. Raises InputError.
    """

    def parsed(config: Config) -> Any:
        return cli.parse(options_of, argv, prog, description, options_of(config))

    options = parsed(Config())
    configs = []
    for preset in options.presets:
        config = parsed(cli.load_preset(preset)).config
        if options.dtype:
            config = replace(config, train=dict(dtype=options.dtype))
        configs.append(config.validate())
    return options, configs


def check_peer(peer: str) -> None:
    if peer == "none":
        return
    needed = ["torch", "diffusers"] if peer == "diffusers" else ["torch"]
    installed = all(find_spec(package) for package in needed)
    require(installed, "--peer", peer, "installed: pip install -e '.[parity]'")
    is_known = peer in ("torch_dit", "diffusers") or Path(peer.partition(":")[0]).is_file()
    require(is_known, "--peer", peer, "torch_dit, diffusers, none, or FILE.py:CLASS")


def with_loss_of_peers(config: Config) -> Config:
    """The config with DDPM's loss and AdamW."""
    config = replace(config, optim=dict(name="adamw"))
    if config.objective.name == "ddpm":
        return config
    ddpm = Objective(label_dropout=config.objective.label_dropout)
    return dataclasses.replace(config, objective=ddpm)


def check_comparable(config: Config) -> None:
    model, masks, variance = config.model, config.data.mask_classes, config.objective.variance
    design = (model.conditioning, model.mlp_ratio, masks, variance)
    expected = ("adaln_zero", 4.0, 0, "learned_range")
    fields = "model.conditioning, model.mlp_ratio, data.mask_classes, objective.variance"
    require(design == expected, fields, design, f"the peers' {expected}, or --peer none")


def main() -> None:
    options, configs = parse(sys.argv[1:])
    modes = options.modes
    if modes is None:
        modes = ("eager", "compile") if shutil.which("nvidia-smi") else ("eager",)
    sides = ["ours"] if options.peer == "none" else ["ours", *modes]
    rows = []
    for config in configs:
        rows += make_rows(config, in_turn(config, sides, options), options.peer)
    report(rows, options.json)


if __name__ == "__main__":
    with cli.exit_status("benchmarks/train_step.py"):
        main()
