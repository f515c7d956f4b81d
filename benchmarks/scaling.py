"""How a step's costs grow with the model: python benchmarks/scaling.py [--model.hidden-size 128]

Doubles depth, width (with heads of one size), the side of the image (four times the tokens) and
batch, one at a time, and prints the exponents that the last two points give, beside theory's:

(1) seconds: those of our count of FLOPs
(2) bytes of temporaries: those of what jax.vjp keeps for the backward pass
(3) seconds of compiling, against depth: 1 where a CPU takes blocks one by one, 0 in a loop
(4) bytes of the state and an image on each of eight devices, fake ones, against mesh.fsdp: -1

Flags of a config's fields change what it starts from.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from table import Row, make_row, report
from train_step import (
    WARM_UP_STEPS,
    Step,
    in_own_process,
    make_jax_step,
    seconds_per_step,
    training_flops,
)

from dit import cli
from dit.config import Config, Data, Model, PositiveInt, Train, replace
from dit.model import SHALLOW, DiT
from dit.program import temporaries
from dit.sharding import make_mesh
from dit.state import make_init, make_objective
from train import compile_train_step

DEVICES = 8
FSDP = (1, 2, 4, 8)
BASE = Config(
    name="scaling",
    model=Model(hidden_size=128, depth=3, num_heads=4, patch_size=2),
    data=Data(image_size=16, num_classes=10),
    train=Train(batch_size=8, dtype="float32"),
)


@dataclass(frozen=True)
class Options:
    config: Annotated[Config, tyro.conf.arg(name="")] = BASE
    doublings: PositiveInt = 2  # doublings of each of the four
    steps: PositiveInt = 5  # steps timed in each round
    rounds: PositiveInt = 3  # rounds of timing, and of compiling
    json: str | None = None  # file to append the table's rows to


AXES = {
    "depth": lambda config: config.model.depth,
    "width": lambda config: config.model.hidden_size,
    "tokens": lambda config: (config.input_shape[0] // config.model.patch_size) ** 2,
    "batch": lambda config: config.train.batch_size,
}


def grow(config: Config, axis: str, factor: int) -> Config:
    """The config with one axis `factor` times as large, or the side of its image."""
    model = config.model
    if axis == "depth":
        return replace(config, model=dict(depth=factor * model.depth))
    if axis == "width":
        heads, width = factor * model.num_heads, factor * model.hidden_size
        return replace(config, model=dict(hidden_size=width, num_heads=heads))
    if axis == "tokens":
        return replace(config, data=dict(image_size=factor * config.data.image_size))
    return replace(config, train=dict(batch_size=factor * config.train.batch_size))


# The costs of one size


class Program(NamedTuple):
    step: Step
    temporaries: int  # bytes
    flops: int  # of a step
    kept: int  # bytes, by (2)


@cache
def prepare(config: Config) -> Program:
    """The compiled step, warmed up."""
    mesh = make_mesh(config, jax.devices()[:1])
    compiled_step = compile_train_step(config, mesh)
    step = make_jax_step(compiled_step, config, mesh)
    seconds_per_step(step, WARM_UP_STEPS)
    flops = config.train.batch_size * training_flops(config)
    return Program(step, temporaries(compiled_step), flops, kept_bytes(config))


def kept_bytes(config: Config) -> int:
    """(2), the weights included, in whose place a program has their gradients."""
    model, loss = jax.eval_shape(make_init(config)).model, make_objective(config).loss
    B = config.train.batch_size
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    x = jax.ShapeDtypeStruct((B, *config.input_shape), jnp.float32)
    condition = {"y": jax.ShapeDtypeStruct((B,), jnp.int32)}

    def backward_pass(model: DiT, *samples) -> Callable:
        return jax.vjp(lambda model: loss(model, *samples)[0], model)[1]

    kept = jax.eval_shape(backward_pass, model, keys, x, condition)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def bytes_a_device(config: Config) -> list[int]:
    """Of the step's arguments, for each of FSDP. For a process of its own."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    sizes = []
    for fsdp in FSDP:
        sharded = replace(config, mesh=dict(fsdp=fsdp), train=dict(batch_size=DEVICES))
        program = compile_train_step(sharded, make_mesh(sharded))
        sizes.append(program.memory_analysis().argument_size_in_bytes)
    return sizes


# Curves


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Of y ~ x^exponent through the last two points."""
    return math.log(y[-1] / y[-2]) / math.log(x[-1] / x[-2])


def curve(
    name: str, axis: str, x: Sequence[int], points: Sequence[Sequence[float]], theory: float
) -> Row:
    """The row of the exponent of a cost, of which each point has one value a round."""
    medians = ", ".join(f"{statistics.median(values):.3g}" for values in points)
    case = f"{name}: {medians} at {axis} {', '.join(map(str, x))}"
    exponents = [exponent(x, values) for values in zip(*points, strict=True)]
    row = make_row("scaling", case, "exponent", exponents, "theory", [theory])
    print(f"{case}: exponent {row['figure']:.2f}, by theory {theory:.2f}", flush=True)
    return row


def curves_of_a_step(options: Options, axis: str, configs: list[Config]) -> list[Row]:
    x = [AXES[axis](config) for config in configs]
    programs = [prepare(config) for config in configs]
    seconds = [[] for _ in configs]
    for _ in range(options.rounds):
        for program, values in zip(programs, seconds, strict=True):
            values.append(seconds_per_step(program.step, options.steps))
    megabytes = [[program.temporaries / 1e6] for program in programs]
    flops = exponent(x, [program.flops for program in programs])
    kept = exponent(x, [program.kept for program in programs])
    return [
        curve("seconds a step", axis, x, seconds, flops),
        curve("MB of temporaries", axis, x, megabytes, kept),
    ]


def curve_of_compiling(name: str, configs: list[Config], rounds: int) -> Row:
    """Of tracing and compiling, against depth."""
    seconds = [[] for _ in configs]
    for _ in range(rounds):
        for config, values in zip(configs, seconds, strict=True):
            mesh = make_mesh(config, jax.devices()[:1])
            start = time.perf_counter()
            compile_train_step(config, mesh)
            values.append(time.perf_counter() - start)
    deepest = configs[-1].model
    one_by_one = jax.default_backend() == "cpu" and deepest.depth <= SHALLOW
    theory = 1 if one_by_one and deepest.remat == "none" else 0
    return curve(name, "depth", [config.model.depth for config in configs], seconds, theory)


def main() -> None:
    options = cli.parse(Options, sys.argv[1:], "benchmarks/scaling.py", __doc__)
    factors = [2**n for n in range(options.doublings + 1)]
    grown = {axis: [grow(options.config, axis, n) for n in factors] for axis in AXES}
    for configs in grown.values():
        for config in configs:
            config.validate()
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed

    rows = []
    for axis, configs in grown.items():
        rows += curves_of_a_step(options, axis, configs)
    loops = [replace(config, model=dict(remat="dots")) for config in grown["depth"]]
    rows.append(curve_of_compiling("seconds of compiling", grown["depth"], options.rounds))
    rows.append(curve_of_compiling("the same with remat dots", loops, options.rounds))
    # apart, since eight devices would share the threads of one
    megabytes = [[size / 1e6] for size in in_own_process(bytes_a_device, options.config)]
    rows.append(curve("MB of arguments a device", "fsdp", FSDP, megabytes, theory=-1))
    report(rows, options.json)


if __name__ == "__main__":
    with cli.exit_status("benchmarks/scaling.py"):
        main()
