"""Trains a Diffusion Transformer: python train.py PRESET_OR_FILE.py [--section.field value ...]

Everything of a run is kept in runs/NAME (--name, or --workdir DIR): config.json, metrics.jsonl,
TensorBoard events, samples/, loss.png, checkpoints/. The same command again resumes it.
With --dry-run it says what a run would be and cost, and tries its parts in a temporary folder.
"""

from dit.signals import StopRequest

if __name__ == "__main__":
    STOP = StopRequest().end_at_once("train.py")

import contextlib
import dataclasses
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from dit import cli, heap
from dit.config import Config, Stopped, Unsaved, replace, require
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
    command = cli.parse_preset(Command, argv, "train.py", __doc__, Command)
    cli.check_run(command.config)
    is_one_host = not (command.dry_run and command.config.mesh.distributed)
    require(is_one_host, "--dry-run", True, "on one host, without mesh.distributed")
    return command


if __name__ == "__main__":  # --help and bad input are answered before jax is imported
    joins = cli.joins_hosts(sys.argv[1:])
    STOP.entered = joins  # hosts stop together
    cli.use_compilation_cache()
    heap.keep_freed_memory()
    with cli.exit_status("train.py"), command_refused_together(joins):
        COMMAND = parse(sys.argv[1:])

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from dit import checkpoint, generation, resume
from dit.data import (
    Dataset,
    augment,
    batch_shapes,
    batches,
    drop_condition,
    open_dataset,
    with_num_classes,
)
from dit.heldout import make_held_out_loss
from dit.imagenet.fid import make_evaluation
from dit.imagenet.vae import load_vae
from dit.images import save_grid
from dit.log import Log, say
from dit.model import TRAINING_FLOPS, DiT, check_block, count_parameters, multiply_adds
from dit.program import temporaries
from dit.sharding import (
    batch_sharding,
    compiler_options,
    make_mesh,
    mean_over_parts,
    place,
    place_batch,
    replicated,
)
from dit.state import (
    State,
    abstract_state,
    learning_rate,
    make_objective,
    make_optimizer,
    make_state,
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
    if config.model.dropout:
        other_key = partial(jax.random.fold_in, data=2)  # 0 and 1 are the time's and the noise's
        condition["dropout_keys"] = jax.vmap(other_key)(sample_keys)

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


def open_run(config: Config) -> tuple[Config, jax.sharding.Mesh, Dataset, int, list[str]]:
    """What a run needs before it can begin. Writes nothing. Raises InputError.

    The config with its data's number of classes, the mesh, the data, the step to go on from, and a
    line on each damaged checkpoint.
    """
    mesh = make_mesh(config)
    check_block(config.model.conditioning, config.data.mask_classes)
    dataset = open_dataset(config.data)
    config = with_num_classes(config, dataset)
    return config, mesh, dataset, *resume.step_to_resume(config, dataset)


def first_state(
    config: Config, mesh: jax.sharding.Mesh, start: int, weights: dict[str, jax.Array]
) -> State:
    """The state that a run goes on from: of checkpoint `start`, or of step 0 with other weights."""
    if start == 0:
        return resume.with_weights(make_state(config, mesh), weights)
    return resume.restore(config, mesh, start)


def make_judges(
    config: Config, dataset: Dataset, mesh: jax.sharding.Mesh, check_stop: Callable[[], None]
) -> tuple[Callable | None, Callable | None, Callable | None]:
    """What scores a model, what draws it and what measures its loss on held-out images, None where
    the config asks for none.
    """
    vae = evaluate = draw_grid = held_out_loss = None
    if config.data.vae:
        vae = place(load_vae(config.data.vae, config.data.latent_scale), replicated(mesh))
    if config.eval.every:
        evaluate = make_evaluation(config, vae, mesh, check_stop)
    if config.train.sample_every and (vae is not None or not config.data.latents):
        draw_grid = generation.make_grid_sampler(config, vae, dataset, mesh, check_stop)
    if config.eval.split:
        held_out_loss = make_held_out_loss(config, mesh)
    return evaluate, draw_grid, held_out_loss


def held_out_losses(
    config: Config, held_out_loss: Callable[[DiT], float], state: State
) -> dict[str, float]:
    """Of the last weights, as the loss of a step is, and of each average."""
    losses = {"held_out_loss": held_out_loss(state.model)}
    for name, ema in zip(config.optim.averages, state.emas, strict=True):
        losses[f"held_out_loss_{name}"] = held_out_loss(ema)
    return losses


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether a step is a multiple of `every`, or the last."""
    return step == steps or (every > 0 and step % every == 0)


def describe(config: Config, state: State, num_images: int, start: int) -> None:
    parameters = count_parameters(state.model)
    gigas = multiply_adds(state.model) / 1e9
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
    say(
        f"{config.name}: {parameters:,} parameters, {gigas:.3g} G multiply-adds an image, "
        f"{num_images:,} images, {devices}, from step {start}"
    )
    for line in resume.describe_changes(config, start):
        say(line)
    if config.data.latents and not config.data.vae:
        say("no sample grids are drawn: --data.vae names no VAE that would decode them")


def describe_result(config: Config) -> None:
    """Where a run's pictures are, and the command that draws more of them."""
    grids = config.workdir / "samples"
    if any(grids.iterdir()):
        say(f"sample grids are in {grids}")
    here = "python" if shutil.which("python") == sys.executable else os.path.relpath(sys.executable)
    script = os.path.relpath(Path(__file__).with_name("sample.py"))
    words = [here, script, str(config.workdir), "--guidance", f"{config.train.guidance:g}"]
    if config.data.latents and not config.data.vae:
        words += ["--vae", "VAE_FOLDER"]
    say(f"more samples by: {shlex.join(words)}")


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
        say(f"already at step {start}: nothing to do before --train.steps {start + 1}")
        return first_state(config, mesh, start, {})

    on_any_host = AnyHost(mesh)

    def check_stop() -> None:
        if on_any_host(stop.requested):
            raise Stopped("stopped; the same command goes on from the newest checkpoint")

    with refused_together(distributed):
        weights = resume.load_weights(config, mesh) if start == 0 else {}
        evaluate, draw_grid, held_out_loss = make_judges(config, dataset, mesh, check_stop)
    check_stop()
    with refused_together(distributed):  # written to only now that no host has refused
        lock = resume.prepare_workdir(config, start)
    hosts = (jax.process_index(), jax.process_count())
    stream = batches(dataset, config.train.batch_size, seed, start, *hosts)  # reads from here on
    state = first_state(config, mesh, start, weights)
    with refused_together(distributed):
        checkpoint.require_room(config, state)
    describe(config, state, len(dataset.records), start)
    compiled_step = compile_and_say(config, mesh)
    flops_per_image = TRAINING_FLOPS * multiply_adds(state.model)
    unwritten = checkpoint.stored_metrics(config.workdir, start)
    check_stop()

    with (
        lock,
        contextlib.closing(stream),
        checkpoint.Checkpoints(config, dataset) as checkpoints,
        Log(config, start, flops_per_image, unwritten) as log,
        stop,
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
        say(f"stopped at step {step}; the same command goes on from here")
    describe_result(config)
    return state


# The dry run


def dry_run(config: Config, stop: StopRequest | None = None) -> None:
    """Says what a run would be and cost, and tries its parts once in a temporary folder.

    Raises what `train` does. Of the run's own folder it reads which step would be the next.
    """
    stop = stop or StopRequest()

    def check_stop() -> None:
        if stop.requested:
            raise Stopped("stopped; a dry run leaves nothing")

    for section in ("model", "objective", "data", "optim", "mesh", "train", "eval"):
        fields = dataclasses.asdict(getattr(config, section))
        say(f"{section}: " + ", ".join(f"{name} {value!r}" for name, value in fields.items()))
    config, mesh, dataset, start, _ = open_run(config)
    weights = resume.load_weights(config, mesh) if start == 0 else {}
    unscored = replace(config, eval=dict(every=0))  # an evaluation would take long
    _, draw_grid, _ = make_judges(unscored, dataset, mesh, check_stop)
    check_stop()
    state = first_state(config, mesh, 0, weights)
    describe(config, state, len(dataset.records), start)
    step = compile_and_say(config, mesh)
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

        _, save_seconds = timed(save_once, trial, dataset, state)
        saved, _ = checkpoint.newest_intact(trial.workdir)
        restored, restore_seconds = timed(first_state, trial, mesh, saved, {})
        if not all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(restored))):
            raise Unsaved(f"{folder}: the checkpoint was not restored as it was saved")
        say(
            f"a checkpoint of {checkpoint.num_bytes(state) / 1e6:,.1f} MB was saved in "
            f"{save_seconds:.1f} s, and restored bit for bit in {restore_seconds:.1f} s"
        )
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
        f"{len(left):,} steps of {seconds_each:.3g} s and their grids would take at most "
        f"{tqdm.format_interval(total)}, evaluations not counted; {config.workdir} is as it was"
    )


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


if __name__ == "__main__":
    heap.fill_holes_after_compiling()
    with cli.exit_status("train.py"):
        (dry_run if COMMAND.dry_run else train)(COMMAND.config, STOP)
