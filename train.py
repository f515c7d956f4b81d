"""Trains a Diffusion Transformer: python train.py PRESET_OR_FILE.py [--section.field value ...]

Everything of a run is kept in runs/NAME (--name, or --workdir DIR): config.json, metrics.jsonl,
TensorBoard events, samples/, loss.png, checkpoints/. The same command again resumes it.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from functools import partial

from dit import cli
from dit.config import Config, Stopped
from dit.hosts import (
    AnyHost,
    command_refused_together,
    connect_hosts,
    ended_together,
    refused_together,
    require_same,
)

if __name__ == "__main__":  # --help and bad input are answered before jax is imported
    STOP = cli.StopRequest().listen()
    cli.use_compilation_cache()
    cli.keep_freed_memory()
    joins = cli.joins_hosts(sys.argv[1:])
    with cli.exit_status("train.py"), command_refused_together(joins):
        CONFIG = cli.parse_config(sys.argv[1:], "train.py", __doc__)

import jax
import jax.numpy as jnp
import optax

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
from dit.imagenet.fid import make_evaluation
from dit.imagenet.vae import load_vae
from dit.log import Log, say
from dit.model import TRAINING_FLOPS, DiT, check_block, count_parameters, multiply_adds
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

    def loss_and_grads(model: DiT, samples: tuple) -> tuple:
        return jax.value_and_grad(objective.loss, has_aux=True)(model, *samples)

    (loss, metrics), grads = mean_over_parts(
        loss_and_grads, state.model, (sample_keys, x, condition), config.optim.accumulate
    )

    updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
    model = optax.apply_updates(state.model, updates)
    ema = update_ema(state.ema, model, state.step, config.optim.ema_decay)

    metrics["loss"] = loss
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = jnp.asarray(schedule(state.step))
    return State(state.step + 1, model, ema, opt_state), metrics


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


def first_state(
    config: Config, mesh: jax.sharding.Mesh, start: int, weights: dict[str, jax.Array]
) -> State:
    """The state that a run goes on from: of checkpoint `start`, or of step 0 with other weights."""
    if start == 0:
        return resume.with_weights(make_state(config, mesh), weights)
    return resume.restore(config, mesh, start)


def make_judges(
    config: Config, dataset: Dataset, mesh: jax.sharding.Mesh, check_stop: Callable[[], None]
) -> tuple[Callable | None, Callable | None]:
    """What scores a model and what draws it, None where the config asks for none."""
    vae = evaluate = draw_grid = None
    if config.data.vae:
        vae = place(load_vae(config.data.vae, config.data.latent_scale), replicated(mesh))
    if config.eval.every:
        evaluate = make_evaluation(config, vae, mesh, check_stop)
    if config.train.sample_every and (vae is not None or not config.data.latents):
        draw_grid = generation.make_grid_sampler(config, vae, dataset, mesh, check_stop)
    return evaluate, draw_grid


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


def train(config: Config, stop: cli.StopRequest | None = None) -> State:
    """Trains what a config describes, or goes on training it, and returns the last state.

    Raises InputError before anything is compiled or written; Diverged; Unsaved; and Stopped for a
    `stop` outside of the steps. Without one, it listens while it makes them.
    """
    config.validate()
    stop = stop or cli.StopRequest()
    steps, seed = config.train.steps, config.train.seed
    distributed = config.mesh.distributed
    connect_hosts(distributed, "mesh.distributed")
    with refused_together(distributed):
        mesh = make_mesh(config)
        check_block(config.model.conditioning, config.data.mask_classes)
        dataset = open_dataset(config.data)
        config = with_num_classes(config, dataset)
        start, damaged = resume.step_to_resume(config, dataset)
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
        evaluate, draw_grid = make_judges(config, dataset, mesh, check_stop)
    check_stop()
    with refused_together(distributed):  # written to only now that no host has refused
        lock = resume.prepare_workdir(config, start)
    hosts = (jax.process_index(), jax.process_count())
    stream = batches(dataset, config.train.batch_size, seed, start, *hosts)  # reads from here on
    state = first_state(config, mesh, start, weights)
    with refused_together(distributed):
        checkpoint.require_room(config, state)
    describe(config, state, len(dataset.records), start)
    began = time.perf_counter()
    lowered = lower_train_step(config, mesh)
    traced = time.perf_counter()
    compiled_step = lowered.compile(compiler_options(mesh))  # fast where the cache has it
    compiled = time.perf_counter()
    say(f"traced in {traced - began:.1f} s, compiled in {compiled - traced:.1f} s")
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
            evaluates = evaluate is not None and is_due(step, config.eval.every, steps)
            draws = draw_grid is not None and is_due(step, config.train.sample_every, steps)
            saves = is_due(step, config.train.checkpoint_every, steps)
            saves = saves or stops or evaluates or draws  # before what takes long
            if not (logs or saves):
                continue
            with log.paused():  # waits for this step; what follows is not training time
                if logs:
                    log.write(step)
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
    return state


if __name__ == "__main__":
    with cli.exit_status("train.py"):
        train(CONFIG, STOP)
