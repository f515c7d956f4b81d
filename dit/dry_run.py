"""A dry run: what a run would be and cost, its parts tried once in a temporary folder."""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dit import checkpoint, intact, resume
from dit.config import OWN_FIELDS, Config, Stopped, Unsaved, replace
from dit.data import Dataset, batches
from dit.images import save_grid
from dit.model import TRAINING_FLOPS, multiply_adds
from dit.program import temporaries
from dit.progress import say
from dit.run import describe, first_state, is_due, make_judges, open_run
from dit.sharding import place_batch
from dit.signals import StopRequest
from dit.state import State


def dry_run(config: Config, compile_step: Callable, stop: StopRequest | None = None) -> None:
    """Says what a run would be and cost, and tries its parts once in a temporary folder.

    Raises what `train` does. Of the run's own folder it reads which step would be the next.
    """
    stop = stop or StopRequest()

    def check_stop() -> None:
        if stop.requested:
            raise Stopped("stopped; a dry run leaves nothing")

    say_config(config)
    config, mesh, dataset, start, _ = open_run(config)
    source = resume.find_weights(config, start)
    unscored = replace(config, eval=dict(every=0))  # an evaluation would take long
    _, draw_grid, _ = make_judges(unscored, dataset, mesh, check_stop)
    check_stop()
    state = first_state(config, mesh, 0, resume.load_weights(source, mesh))
    describe(config, state, len(dataset.records), start)
    step = compile_step(config, mesh)
    check_stop()
    flops = TRAINING_FLOPS * multiply_adds(state.model) * config.train.batch_size
    held = step.memory_analysis().argument_size_in_bytes
    say(
        f"a step is {flops / 1e9:,.1f} GFLOP; a device holds {held / 1e6:,.1f} MB of state and "
        f"batch, and {temporaries(step) / 1e6:,.1f} MB more in a step"
    )

    stream = batches(dataset, config.train.batch_size, config.train.seed, 0)
    with stop, contextlib.closing(stream), tempfile.TemporaryDirectory() as folder:
        trial = replace(config, train=dict(workdir=folder))
        seconds = []  # of each step; the first warms up
        while len(seconds) < 2 or (len(seconds) < 6 and sum(seconds) < 10):
            batch = place_batch(next(stream), mesh)
            (state, _), taken = timed(step, state, batch)
            seconds.append(taken)
            check_stop()
        restored = save_and_restore(trial, dataset, mesh, state)
        check_stop()
        grid_seconds = 0.0
        if draw_grid is not None:
            (images, row_names), grid_seconds = timed(draw_grid, restored.ema)
            save_grid(trial.workdir / "grid.png", images, row_names)
            say(f"a grid of {len(images)} was drawn in {grid_seconds:.1f} s, compiling included")

    left = range(start + 1, config.train.steps + 1)
    grids = [n for n in left if is_due(n, config.train.sample_every, config.train.steps)]
    seconds_each = statistics.mean(seconds[1:])
    total = len(left) * seconds_each + len(grids) * grid_seconds
    say(
        f"{len(left):,} steps of {seconds_each:.3g} s and their grids would take "
        f"{tqdm.format_interval(total)}; waiting for data, checkpoints and evaluations are not "
        f"counted, and nothing was written to {config.workdir}"
    )


def say_config(config: Config) -> None:
    """All fields but those that only the other objective has."""
    unused = set(sum(OWN_FIELDS.values(), ())) - set(OWN_FIELDS[config.objective.name])
    for section in ("model", "objective", "data", "optim", "mesh", "train", "eval"):
        fields = dataclasses.asdict(getattr(config, section))
        shown = [f"{name} {value!r}" for name, value in fields.items() if name not in unused]
        say(f"{section}: " + ", ".join(shown))


def save_and_restore(
    config: Config, dataset: Dataset, mesh: jax.sharding.Mesh, state: State
) -> State:
    """The state as it comes back from the first checkpoint of a run. Raises Unsaved."""
    _, save_seconds = timed(save_once, config, dataset, state)
    saved, _ = intact.newest(config.workdir)
    restored, restore_seconds = timed(first_state, config, mesh, saved, {})
    if not all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(restored))):
        raise Unsaved(f"{config.workdir}: the checkpoint was not restored as it was saved")
    say(
        f"a checkpoint of {checkpoint.num_bytes(state) / 1e6:,.1f} MB was saved in "
        f"{save_seconds:.1f} s, and restored bit for bit in {restore_seconds:.1f} s"
    )
    return restored


def timed(f: Callable, *args: Any) -> tuple[Any, float]:
    """What f returns, and the seconds until it is there."""
    began = time.perf_counter()
    result = jax.block_until_ready(f(*args))
    return result, time.perf_counter() - began


def save_once(config: Config, dataset: Dataset, state: State) -> None:
    """Saves the first checkpoint of a run, and waits for it."""
    with (
        resume.prepare_workdir(config, 0),
        checkpoint.Checkpoints(config, dataset) as checkpoints,
    ):
        checkpoints.save(state, {})
