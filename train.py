"""Trains a Diffusion Transformer: python train.py PRESET_OR_FILE.py [--section.field value ...]

Everything of a run is kept in runs/NAME (--name, or --workdir DIR): config.json, metrics.jsonl,
TensorBoard events, samples/, loss.png, checkpoints/. The same command again resumes it.
With --dry-run it says what a run would be and cost, and tries its parts in a temporary folder.
"""

from dit import heap
from dit.signals import StopRequest

if __name__ == "__main__":
    heap.keep_freed_memory()
    STOP = StopRequest().end_at_once("train.py")

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import tyro

from dit import cli
from dit.config import Config, Stopped, require
from dit.hosts import (
    AnyHost,
    command_refused_together,
    connect_hosts,
    ended_together,
    refused_together,
    require_same,
)


@dataclass(frozen=True)
class Command:
    config: Annotated[Config, tyro.conf.arg(name="")]
    dry_run: bool = False  # say what the run would be and cost, try its parts, and leave nothing


def parse(argv: list[str]) -> Command:
    """The options of `PRESET_OR_FILE.py [--dry-run] [--section.field value ...]`."""
    command = cli.parse_config(argv, "train.py", __doc__, Command)
    is_one_host = not (command.dry_run and command.config.mesh.distributed)
    require(is_one_host, "--dry-run", True, "on one host, without mesh.distributed")
    return command


if __name__ == "__main__":  # --help and bad input are answered before jax is imported
    joins = cli.joins_hosts(sys.argv[1:])
    STOP.entered = joins  # hosts stop together
    cli.use_compilation_cache()
    with cli.exit_status("train.py"), command_refused_together(joins):
        COMMAND = parse(sys.argv[1:])

import jax
import jax.numpy as jnp
import optax

from dit import checkpoint, intact, resume
from dit.data import augment, batch_shapes, batches, drop_condition
from dit.dry_run import dry_run
from dit.log import Log
from dit.model import TRAINING_FLOPS, DiT, multiply_adds
from dit.progress import say
from dit.run import (
    describe,
    describe_result,
    first_state,
    held_out_losses,
    is_due,
    make_judges,
    open_run,
)
from dit.sharding import batch_sharding, compiler_options, mean_over_parts, place_batch
from dit.state import (
    State,
    abstract_state,
    learning_rate,
    make_objective,
    make_optimizer,
    run_keys,
    update_ema,
)

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def train_step(config: Config, state: State, batch: Batch) -> tuple[State, Metrics]:
    """One optimizer step. Everything random in it is a function of (seed, step)."""
    objective = make_objective(config)
    schedule = learning_rate(config.optim, config.train.steps)
    optimizer = make_optimizer(config.optim, schedule)

    _, run_key = run_keys(config)
    step_key = jax.random.fold_in(run_key, state.step)
    data_key, drop_key, noise_key = jax.random.split(step_key, 3)
    x, condition = augment(batch, data_key, config.data)  # [B, H, W, C]
    condition = drop_condition(condition, drop_key, config)
    sample_keys = jax.random.split(noise_key, len(x))  # one a sample, so parts equal the whole

    def loss_and_grads(model: DiT, samples: tuple) -> tuple:
        return jax.value_and_grad(objective.loss, has_aux=True)(model, *samples)

    (loss, metrics), grads = mean_over_parts(
        loss_and_grads, state.model, (sample_keys, x, condition), config.optim.accumulate
    )

    updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
    model = optax.apply_updates(state.model, updates)
    emas = tuple(
        update_ema(ema, model, state.step, decay)
        for ema, decay in zip(state.emas, config.optim.averages.values(), strict=True)
    )

    metrics["loss"] = loss
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = jnp.asarray(schedule(state.step))
    return State(state.step + 1, model, emas, opt_state), metrics


def compile_train_step(config: Config, mesh: jax.sharding.Mesh) -> Callable:
    """The step compiled for a mesh: state, metrics = step(state, batch). The state is donated."""
    return lower_train_step(config, mesh).compile(compiler_options(mesh))


def lower_train_step(config: Config, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
    """The step traced for a mesh, from shapes and shardings alone."""
    state = abstract_state(config, mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in batch_shapes(config).items()
    }
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(partial(train_step, config), donate_argnums=0, out_shardings=(placement, None))
    with jax.set_mesh(mesh):  # in which the model gathers its weights
        return step.lower(state, batch)


def compile_and_say(config: Config, mesh: jax.sharding.Mesh) -> Callable:
    """The compiled step, and how long it took."""
    began = time.perf_counter()
    lowered = lower_train_step(config, mesh)
    traced = time.perf_counter()
    step = lowered.compile(compiler_options(mesh))  # fast where the cache has it
    compiled = time.perf_counter()
    say(f"traced in {traced - began:.1f} s, compiled in {compiled - traced:.1f} s")
    return step


def train(config: Config, stop: StopRequest | None = None) -> State:
    """Trains what a config describes, or goes on training it, and returns the last state.

    Raises InputError before anything is compiled or written; Diverged; Unsaved; and Stopped for a
    `stop` outside of the steps. Without one, it listens while it makes them.
    """
    config.validate()
    stop = stop or StopRequest()
    steps, seed = config.train.steps, config.train.seed
    distributed = config.mesh.distributed
    connect_hosts(distributed, "mesh.distributed")
    with refused_together(distributed):
        config, mesh, dataset, start, damaged = open_run(config)
    require_same(distributed, "train.workdir", str(config.workdir), f"step {start}")
    for line in damaged:
        say(line)
    if start >= steps:
        say(f"already at step {start}; to go on, ask for more than --train.steps {start}")
        with ended_together(distributed):
            return first_state(config, mesh, start, {})

    on_any_host = AnyHost(mesh)

    def check_stop() -> None:
        if on_any_host(stop.requested):
            raise Stopped("stopped; the same command goes on from the newest checkpoint")

    with refused_together(distributed):
        source = resume.find_weights(config, start)
        evaluate, draw_grid, held_out_loss = make_judges(config, dataset, mesh, check_stop)
    check_stop()
    with ended_together(distributed):  # each host reads its parts and waits for the others
        weights = resume.load_weights(source, mesh)
    with refused_together(distributed):  # written to only now that no host has refused
        lock = resume.prepare_workdir(config, start)
    hosts = (jax.process_index(), jax.process_count())
    stream = batches(dataset, config.train.batch_size, seed, start, *hosts)  # reads from here on
    with ended_together(distributed):
        state = first_state(config, mesh, start, weights)
    with refused_together(distributed):
        checkpoint.require_room(config, state)
    describe(config, state, len(dataset.records), start)
    compiled_step = compile_and_say(config, mesh)
    flops_per_image = TRAINING_FLOPS * multiply_adds(state.model)
    unwritten = intact.stored_metrics(config.workdir, start)
    check_stop()

    with (
        lock,
        contextlib.closing(stream),
        stop,  # until the last checkpoint is written
        checkpoint.Checkpoints(config, dataset) as checkpoints,
        Log(config, start, flops_per_image, unwritten) as log,
        ended_together(distributed, lambda: f", at step {log.progress.done}"),
    ):
        for step in range(start + 1, steps + 1):
            asked = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - asked
            state, metrics = compiled_step(state, place_batch(batch, mesh))
            log.record(step, metrics | {"data_seconds": waited})  # fetches those of the step before

            stops = on_any_host(stop.requested)
            logs = is_due(step, config.train.log_every, steps)
            measures = held_out_loss is not None and is_due(step, config.eval.loss_every, steps)
            evaluates = evaluate is not None and is_due(step, config.eval.every, steps)
            draws = draw_grid is not None and is_due(step, config.train.sample_every, steps)
            saves = is_due(step, config.train.checkpoint_every, steps)
            saves = saves or stops or evaluates or draws  # before what takes long
            if not (logs or measures or saves):
                continue
            with log.paused():  # waits for this step; what follows is not training time
                if logs:
                    log.write(step)
                if measures:
                    log.scores(step, held_out_losses(config, held_out_loss, state))
                if saves:
                    checkpoints.save(state, log.unwritten)
                if stops:
                    break
                if evaluates:
                    log.scores(step, evaluate(state.ema))
                if draws:
                    log.grid(step, *draw_grid(state.ema))
    if stops:
        next_one = "the same command goes on from here" if step < steps else "which was the last"
        say(f"stopped at step {step}; {next_one}")
    describe_result(config)
    return state


def run(command: Command, stop: StopRequest | None = None) -> State | None:
    """What the command line asks for: a dry run, or training, whose last state it returns."""
    if command.dry_run:
        return dry_run(command.config, compile_and_say, stop)
    return train(command.config, stop)


if __name__ == "__main__":
    heap.fill_holes_after_compiling()
    with cli.exit_status("train.py"):
        run(COMMAND, STOP)
