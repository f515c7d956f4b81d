"""Trains a Diffusion Transformer: python train.py PRESET_OR_FILE.py [--section.field value ...]

Everything of a run is kept in runs/NAME (--name, or --workdir DIR): config.json, metrics.jsonl, TensorBoard events, samples/, loss.png,
checkpoints/. The same command again resumes it, exactly. Presets: {presets}.
"""

import contextlib
import dataclasses
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from dit import checkpoint, fid
from dit import config as dit_config
from dit.config import Config, InputError
from dit.data import Dataset, batch_shapes, batches, open_dataset
from dit.images import prepare
from dit.log import Log, Meter
from dit.model import count_parameters, multiply_adds
from dit.sharding import batch_sharding, connect, make_mesh, place_batch, replicated
from dit.state import (State, abstract_state, learning_rate, make_objective, make_optimizer, make_state, mean_over_parts, run_keys,
                       update_ema)
from dit.weights import load_inception, load_vae
from sample import Sample, labels_of, make_sampler, spread


def make_train_step(config: Config):
    """The function (state, batch) -> (state, metrics): one optimizer step, everything random in it from (seed, step)."""
    objective, optimizer = make_objective(config), make_optimizer(config.optim, config.train.steps)
    schedule = learning_rate(config.optim, config.train.steps)

    def train_step(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(run_keys(config)[1], state.step)
        data_key, drop_key, noise_key = jax.random.split(key, 3)
        x, mask = prepare(batch, data_key, config.data.flip, config.data.latent_scale)  # [B, H, W, C], [B, H, W] or None
        chance = jax.random.uniform(drop_key, (len(x),))
        y = jnp.where(chance < config.objective.label_dropout, config.data.num_classes, batch["label"])  # [B]
        if mask is not None:
            y = y, jnp.where((chance < config.objective.mask_dropout)[:, None, None], config.data.mask_classes, mask)

        def loss_and_grads(part):
            return jax.value_and_grad(objective.loss, has_aux=True)(state.model, *part)

        sample_keys = jax.random.split(noise_key, len(x))
        (loss, metrics), grads = mean_over_parts(loss_and_grads, (sample_keys, x, y), config.optim.accumulate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)
        ema = update_ema(state.ema, model, state.step, config.optim.ema_decay)
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads), "learning_rate": jnp.asarray(schedule(state.step))}
        return State(state.step + 1, model, ema, opt_state), metrics

    return train_step


def compile_train_step(config: Config, mesh: jax.sharding.Mesh):
    """The step compiled for a mesh, its state donated: shapes and shardings go in, no array is needed."""
    target = abstract_state(config, mesh)
    batch = {name: jax.ShapeDtypeStruct(*spec, sharding=batch_sharding(mesh)) for name, spec in batch_shapes(config).items()}
    placed = jax.tree.map(lambda leaf: leaf.sharding, target)
    step = jax.jit(make_train_step(config), donate_argnums=0, out_shardings=(placed, None))
    return step.lower(target, batch).compile()


def example_masks(dataset: Dataset, labels: np.ndarray) -> np.ndarray:
    """A mask `[N, H, W]` for each label, of the class's own images where it has any among the first thousand."""
    records = [dataset.records[i] for i in range(min(len(dataset.records), 1000))]
    masks = {k: [r["mask"] for r in records if r["label"] == k] or [r["mask"] for r in records] for k in set(labels.tolist())}
    return np.stack([masks[k][i % len(masks[k])] for i, k in enumerate(labels.tolist())])


def make_grid_sampler(config: Config, vae, dataset: Dataset, mesh: jax.sharding.Mesh):
    """The function (model) -> uint8 `[rows * 8, H, W, C]` from fixed noise, eight a class, and the names of its rows."""
    t, classes = config.train, spread(config.data.num_classes)
    labels = classes.repeat(8)
    y = jax.tree.map(jnp.asarray, (labels, example_masks(dataset, labels)) if config.data.mask_classes else labels)
    sample = make_sampler(config, Sample("", sampler=t.sampler, steps=t.sample_steps, guidance=t.guidance, seed=t.seed))
    everywhere = jax.jit(lambda model, vae: sample(model, vae, y, jnp.arange(len(labels))), out_shardings=replicated(mesh))
    return lambda model: np.asarray(everywhere(model, vae)), [config.data.class_names[k].split(",")[0] for k in classes]


def make_evaluation(config: Config, vae, mesh: jax.sharding.Mesh):
    """The function (model) -> {"fid": ..., "sfid": ..., ...} of fresh samples, drawn and looked at on all devices."""
    e, t, devices = config.eval, config.train, jax.device_count()
    fid.warn_of_few(e.num_samples)
    inception = jax.device_put(load_inception(e.inception), replicated(mesh))
    reference = fid.open_reference(e.reference or config.data.name, config.data.split, config.data.image_size, inception)
    options = Sample("", tuple(map(str, range(config.data.num_classes))), num_samples=e.num_samples, sampler=t.sampler,
                     steps=t.sample_steps, guidance=e.guidance, seed=t.seed)
    labels, sample = labels_of(options, config), make_sampler(config, options, devices)
    extract = jax.jit(lambda model, vae, inception, y, indices: inception(sample(model, vae, y, indices)), out_shardings=replicated(mesh))
    null_mask = np.full(config.input_shape[:2], config.data.mask_classes, np.uint8)

    def evaluate(model) -> dict[str, float]:
        activations, B = fid.Activations(), -(-e.batch_size // devices) * devices
        for first in range(0, e.num_samples, B):
            indices = np.minimum(np.arange(first, first + B), e.num_samples - 1)
            y = (labels[indices], np.tile(null_mask, (B, 1, 1))) if config.data.mask_classes else labels[indices]
            features = extract(model, vae, inception, *jax.device_put((y, indices), batch_sharding(mesh)))
            activations.add(jax.tree.map(lambda a: a[:e.num_samples - first], features))
        return fid.scores(activations, reference)

    return evaluate


def start_or_resume(config: Config, dataset: Dataset) -> tuple[int | None, list[str]]:
    """The step to resume from, None for a new run, and what to say of it. Raises InputError for a run of another kind."""
    if not checkpoint.steps(config.workdir):
        return None, []
    step, broken = checkpoint.newest_intact(config.workdir)
    stored = checkpoint.stored_config(config.workdir, step)
    told = dit_config.differences(config, stored)
    examples = checkpoint.stored_position(config.workdir, step)["num_examples"]
    if examples != len(dataset.records):
        told.append(f"data: {len(dataset.records)} images, where the run was trained on {examples}")
    if told:
        raise InputError(f"{told[0]} in {str(config.workdir)!r}; a run goes on with the config it began with, so set it back or "
                         "choose another --name")
    multihost_utils.sync_global_devices("all have looked")
    if jax.process_index() == 0:
        for other in broken:  # out of Orbax's sight, but not lost
            (config.workdir / "checkpoints" / str(other)).rename(config.workdir / "checkpoints" / f"broken-{other}-{int(time.time())}")
    multihost_utils.sync_global_devices("the damaged are out of sight")
    return step, [f"checkpoint {other}: {what}; going back to checkpoint {step}" for other, what in broken.items()]


def prepare_workdir(config: Config) -> None:
    """Makes the workdir and writes config.json. Raises InputError where it cannot be written."""
    try:
        for folder in ("samples", "checkpoints"):
            (config.workdir / folder).mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            (config.workdir / "config.json").write_text(config.to_json() + "\n")
    except OSError as error:
        raise InputError(f"train.workdir: {str(config.workdir)!r} should be a folder that can be written ({error.strerror})") from error


@contextlib.contextmanager
def stop_request():
    """A list that is no longer empty after Ctrl-C or SIGTERM; a second signal acts as ever."""
    asked, before = [], {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number, frame):
        asked.append(number)
        restore()

    before |= {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        restore()


def agreed(asked: bool) -> bool:
    """Whether any process was asked to stop."""
    return asked if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(asked)).any())


def train(config: Config) -> State:
    """Trains, or goes on training, what a config describes, and returns the last state. Raises InputError."""
    config.validate()
    connect(config.mesh.distributed, "mesh.distributed")
    mesh = make_mesh(config.mesh, config.train.batch_size, config.optim.accumulate)
    dataset = open_dataset(config.data)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=dataset.class_names))
    resumed, news = start_or_resume(config, dataset)
    vae = jax.device_put(load_vae(config.data.vae), replicated(mesh)) if config.data.vae else None
    t, start = config.train, resumed or 0
    evaluate = make_evaluation(config, vae, mesh) if config.eval.every and start < t.steps else None
    if resumed is None or start < t.steps:
        prepare_workdir(config)
    checkpoints = checkpoint.Checkpoints(config.workdir, t.keep_last, t.keep_every)
    state = make_state(config, mesh) if resumed is None else checkpoints.restore(start, abstract_state(config, mesh))
    log = Log(config, start)
    for line in news:
        log.say(line)
    log.say(f"{config.name}: {count_parameters(state.model):,} parameters, {multiply_adds(state.model) / 1e9:.3g} G multiply-adds an "
            f"image, {len(dataset.records):,} images, {jax.device_count()} {jax.devices()[0].device_kind} device(s), from step {start}")
    if config.data.latents and not vae:
        log.say("no sample grids are drawn: --data.vae names no VAE that would decode them")
    if start < t.steps:
        began = time.perf_counter()
        train_step = compile_train_step(config, mesh)
        log.say(f"compiled in {time.perf_counter() - began:.1f} s")
    else:
        log.say(f"already at step {start}: nothing to do before --train.steps {start + 1}")
    data = batches(dataset, t.batch_size, t.seed, start, jax.process_index(), jax.process_count())
    sample_grid, row_names = make_grid_sampler(config, vae, dataset, mesh)
    meter, waiting, window = Meter(2 * 3 * multiply_adds(state.model)), [], []

    def settle():
        """Fetches the metrics that the device has been left to compute, and stops the run where they are not finite."""
        for n, metrics in waiting:
            values = {name: float(value) for name, value in metrics.items()}
            if not np.isfinite([values["loss"], values["grad_norm"]]).all():
                checkpoints.close()
                log.close()
                last = checkpoints.last_step
                raise InputError(f"loss: {values['loss']} with gradient norm {values['grad_norm']} at step {n} should be finite; "
                                 f"{'no checkpoint was written yet' if last is None else f'checkpoint {last} is kept'}; "
                                 "begin again under another --name with a lower optim.learning_rate, or with optim.grad_clip")
            window.append(values)
            log.step(n, values["loss"])
        waiting.clear()

    with stop_request() as stop:
        for n in range(start + 1, t.steps + 1):
            batch = place_batch(next(data), mesh)
            state, metrics = train_step(state, batch)
            settle()  # of the step before: the device is already at work on this one
            waiting.append((n, metrics))
            meter.images += t.batch_size
            evaluates = evaluate and (n % config.eval.every == 0 or n == t.steps)
            logs = n % t.log_every == 0 or n == t.steps or evaluates
            stopping = (logs or jax.process_count() == 1) and agreed(bool(stop))
            saves = n == t.steps or stopping or (t.checkpoint_every and n % t.checkpoint_every == 0)
            draws = t.sample_every and (vae or not config.data.latents) and (n % t.sample_every == 0 or n == t.steps)
            if logs or saves or draws:
                settle()
            paused = time.perf_counter()
            if logs or stopping:
                means = {name: float(np.mean([values[name] for values in window])) for name in window[0]}
                log.metrics(n, means | meter.read() | (evaluate(state.ema) if evaluates else {}))
                window.clear()
            if saves:
                checkpoints.save(state, config, len(dataset.records))
            if draws:
                log.grid(n, sample_grid(state.ema), row_names)
            meter.skip(time.perf_counter() - paused)
            if stopping:
                log.say(f"stopped at step {n}; the same command goes on from here")
                break
        checkpoints.close()
    log.close()
    return state


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with dit_config.input_errors("train.py"):
        train(dit_config.from_command_line(argv, "train.py", __doc__.format(presets=", ".join(dit_config.preset_names()))))


if __name__ == "__main__":
    main()
