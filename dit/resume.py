"""What a run goes on from: its own newest checkpoint, or the weights of another model.

A run goes on with the config that it began with. Some fields that steer it may change, which is
said and recorded: `config.json` has a `history` of {"step": 3000, "train.steps": [3000, 6000]}, the
step that the run went on from, and of each changed field the old value and the new one.
"""

import contextlib
import dataclasses
import json
import operator
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dit import checkpoint, intact
from dit.checkpoint import arrays_by_name
from dit.config import Config, InputError, replace, require
from dit.data import Dataset
from dit.files import locked, read_json, whole
from dit.progress import say
from dit.sharding import shardings
from dit.state import (
    State,
    abstract_model,
    abstract_state,
    learning_rate,
    leaves_by_name,
    with_shardings,
)

STEERING = ("optim.learning_rate", "optim.grad_clip", "optim.ema_decay", "train.steps")

Changes = dict[str, list[Any]]  # {"train.steps": [3000, 6000], ...}


# Which run may go on, and with what changes


def differences(ours: Config, theirs: Config) -> Changes:
    """The fields that a run's result depends on and that differ: {field: [theirs, ours]}.

    It does not depend on where the run computes and keeps its files, how it is split up, and what
    it logs.
    """
    names = [
        f"{section}.{field.name}"
        for section in ("model", "objective", "data", "optim")
        for field in dataclasses.fields(getattr(ours, section))
    ]
    names += ["input_shape"]
    names += [f"train.{name}" for name in ("batch_size", "seed", "dtype", "init_from", "steps")]
    without_effect = ("model.remat", "optim.accumulate", "data.latents", "data.vae")
    found = {}
    for name in names:
        value, stored = operator.attrgetter(name)(ours), operator.attrgetter(name)(theirs)
        if value != stored and name not in without_effect:
            found[name] = [stored, value]
    return found


def step_to_resume(config: Config, dataset: Dataset) -> tuple[int, list[str]]:
    """The step that a run goes on from, 0 for a new one, and a line on each damaged checkpoint.

    Raises InputError if the workdir holds a run of another kind.
    """
    workdir = config.workdir
    if not intact.steps(workdir):
        return 0, []
    step, damaged = intact.newest(workdir)
    examples, stored = len(dataset.records), intact.stored_dataset(workdir, step)["num_examples"]
    expected = "a run's folder or new: it holds converted weights, from which no run goes on"
    require(stored is not None, "train.workdir", str(workdir), expected)
    before = intact.stored_config(workdir, step)
    has_as_many = len(config.optim.averages) == len(before.optim.averages)
    refused = [
        f"{name}: {ours!r}, where {theirs!r} is stored"
        for name, (theirs, ours) in differences(config, before).items()
        if name not in STEERING or (name == "optim.ema_decay" and not has_as_many)
    ]
    if stored != examples:
        refused.append(f"data: {examples} images, where the run was trained on {stored}")
    if refused:
        raise InputError(
            f"{refused[0]} in {str(workdir)!r}; a run goes on with the config it began with, so "
            "set it back or choose another --name"
        )
    return step, damaged


def changes_at(config: Config, start: int) -> Changes:
    """What a run that goes on from checkpoint `start` changes; nothing at step 0."""
    return differences(config, intact.stored_config(config.workdir, start)) if start else {}


def describe_changes(config: Config, start: int) -> list[str]:
    """A line on each change, and on what a cosine makes of it."""
    changes = changes_at(config, start)
    lines = [f"{name} is now {new}, and was {old}" for name, (old, new) in changes.items()]
    is_cosine = config.optim.schedule == "cosine"
    if is_cosine and changes.keys() & {"optim.learning_rate", "train.steps"}:
        before = intact.stored_config(config.workdir, start)
        old = float(learning_rate(before.optim, before.train.steps)(start))
        new = float(learning_rate(config.optim, config.train.steps)(start))
        lines.append(
            f"the cosine's learning rate at step {start} is now {new:.3g}, and was {old:.3g}; "
            f"it falls to 0 at step {config.train.steps}"
        )
    return lines


def prepare_workdir(config: Config, start: int) -> contextlib.ExitStack:
    """Makes the workdir and writes config.json; no other run can use it until the result is closed.

    Damaged checkpoints after step `start` are renamed, so that Orbax does not see them. Raises
    InputError if the workdir is in use, has been since `start` was found, or cannot be written.
    """
    try:
        for name in ("samples", "checkpoints"):
            (config.workdir / name).mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as lock:
            if jax.process_index() == 0:
                lock.enter_context(locked(config.workdir, "train.workdir"))
                set_aside_after(config.workdir, start)
                write_config(config, start)
            return lock.pop_all()
    except OSError as error:
        raise InputError(
            f"train.workdir: {str(config.workdir)!r} should be a folder that can be written "
            f"({error.strerror})"
        ) from error


def set_aside_after(workdir: Path, start: int) -> None:
    """Renames the checkpoints after step `start`. Raises InputError if one is intact."""
    later = [intact.step_folder(workdir, step) for step in intact.steps(workdir) if step > start]
    for folder in later:
        is_damaged = intact.damage(folder) is not None
        expected = f"of no other run, which has just saved step {folder.name}; try again"
        require(is_damaged, "train.workdir", str(workdir), expected)
    for folder in later:
        folder.rename(folder.with_name(f"broken-{folder.name}-{int(time.time())}"))


def write_config(config: Config, start: int) -> None:
    """Writes config.json, with its history where a run has gone on with changes."""
    path = config.workdir / "config.json"
    history = history_before(path, start)
    changes = changes_at(config, start)
    if changes:
        history.append({"step": start, **changes})
    values = dataclasses.asdict(config)
    if history:
        values["history"] = history
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(values, indent=2) + "\n")


def history_before(path: Path, start: int) -> list[dict[str, Any]]:
    """The history of a config.json up to step `start`, nothing of one that is not as written.

    What a run did after the checkpoint that it goes on from is lost, and so are its changes.
    """
    try:
        return [entry for entry in read_json(path)["history"] if entry["step"] < start]
    except (InputError, LookupError, TypeError):
        return []


def restore(config: Config, mesh: jax.sharding.Mesh, start: int) -> State:
    """The state of the run's checkpoint `start`. Raises InputError."""
    stored = intact.stored_config(config.workdir, start)
    as_stored = replace(config, optim=dict(grad_clip=stored.optim.grad_clip))
    state = checkpoint.restore(config.workdir, start, abstract_state(as_stored, mesh))
    # a clip has no arrays of its own, but Adam's have other names behind one
    structure = jax.tree.structure(abstract_state(config, mesh))
    return jax.tree.unflatten(structure, jax.tree.leaves(state))


# The weights of another model


class Source(NamedTuple):
    """Averaged weights that a run begins with."""

    folder: Path  # their checkpoint
    config: Config  # of the model that they are of
    taken: list[str]  # the parameters that fit by name and shape


def find_weights(config: Config, start: int) -> Source | None:
    """What `train.init_from` means to a run that begins at step 0; None later, and without one.

    Says which parameters fit. Raises InputError if none does.
    """
    source = config.train.init_from
    if start > 0 or source is None:
        return None
    workdir, step, damaged = intact.find(Path(source), option="train.init_from")
    stored = intact.stored_config(workdir, step)
    ours, theirs = (
        arrays_by_name(abstract_model(config)),
        arrays_by_name(abstract_model(stored)),
    )
    taken = [name for name, array in ours.items() if theirs.get(name) == array]
    expected = "weights of which some fit: none has the name and the shape of one of this model's"
    require(taken, "train.init_from", source, expected)
    heads = stored.model.num_heads
    has_heads = config.model.num_heads == heads or not any("attention" in name for name in taken)
    expected = f"{heads}, those of train.init_from, whose attention is taken: no shape says them"
    require(has_heads, "model.num_heads", config.model.num_heads, expected)
    for line in damaged:
        say(line)
    say(f"from {source}, checkpoint {step}: {describe_weights(taken, list(ours))}")
    return Source(intact.step_folder(workdir, step), stored, taken)


def load_weights(source: Source | None, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """The parameters that are taken, placed as a run's own; without a source none.

    All hosts read their parts together. Raises InputError for what is not finite.
    """
    if source is None:
        return {}
    shapes = abstract_model(source.config)
    target = with_shardings(shapes, shardings(shapes, mesh))
    model = checkpoint.restore_item(source.folder / "ema", target)
    is_finite = jax.jit(checkpoint.is_finite)(model)
    require(is_finite, "train.init_from", str(source.folder), "of finite weights")
    leaves = leaves_by_name(model)
    return {name: leaves[name] for name in source.taken}


def describe_weights(taken: list[str], names: list[str]) -> str:
    """What is taken and what begins fresh, by name; if most are taken, those by their number."""
    fresh = [name for name in names if name not in taken]
    few = len(taken) <= len(fresh)
    words = list_names(taken) if few else f"{len(taken)} of {len(names)} parameters"
    return f"{words} taken; {list_names(fresh) if fresh else 'nothing'} fresh"


def list_names(names: list[str]) -> str:
    return ", ".join(name.removesuffix(".value") for name in names)


def with_weights(state: State, weights: dict[str, jax.Array]) -> State:
    """A state of step 0 with other parameters, from which its average begins too."""
    if not weights:
        return state
    leaves = leaves_by_name(state.model) | weights
    model = jax.tree.unflatten(jax.tree.structure(state.model), leaves.values())
    placement = jax.tree.map(lambda leaf: leaf.sharding, model)
    copy = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=placement)
    emas = tuple(copy(model) for _ in state.emas)  # each step donates all of them
    return dataclasses.replace(state, model=model, emas=emas)
