"""Checkpoints: state, config and data set facts together, checked before they are read.

`checkpoints/STEP/` holds the items `model`, `ema`, `optimizer`, `config`, `dataset` and `log`, and
`ema_DECAY` for each further average, which Orbax writes in the background, and `checksums.json`.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from dit import intact
from dit.config import Config, InputError, Unsaved, diverged, one_line, replace, require
from dit.data import Dataset
from dit.files import whole
from dit.hosts import refused_together
from dit.model import DiT
from dit.state import State, abstract_model, leaves_by_name, with_shardings

UNFINISHED = ".orbax-checkpoint-tmp"  # behind the name of a checkpoint that is being written


class Checkpoints:
    """Saves a run's state; keeps the last `train.keep_last` and the multiples of `keep_every`.

    What cannot be saved is warned of, and the next is tried. A run whose last state could not be
    saved raises Unsaved at the end.
    """

    def __init__(self, config: Config, dataset: Dataset):
        self.config = config
        self.facts = intact.dataset_facts(dataset.class_names, len(dataset.records))
        self.folder = config.workdir.resolve() / "checkpoints"
        self.manager = self._make_manager()
        self.saving = None
        self.failure = ""  # why the last one could not be saved
        silence_orbax()

    def _make_manager(self) -> ocp.CheckpointManager:
        kept = [policies.LatestN(self.config.train.keep_last)]
        if self.config.train.keep_every:
            kept.append(policies.EveryNSteps(self.config.train.keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            lightweight_initialize=True,  # does not read _CHECKPOINT_METADATA
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *exception: Any) -> None:
        """Waits for the save that is under way."""
        with self._failures_noted():
            self.manager.close()
        if self.failure and kind is None:
            raise Unsaved(self.failure)

    def save(self, state: State, unwritten: dict[str, float]) -> None:
        """Copies the state off the devices and returns; Orbax writes it in the background.

        `unwritten` is the log's. Raises Diverged for a state that is not finite.
        """
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        if not jax.jit(is_finite)(state):
            raise diverged(f"the state after step {step}", self.folder)
        with self._failures_noted():
            self.manager.wait_until_finished()
        optimizer = {"step": state.step, "opt_state": state.opt_state}
        averages = zip(self.config.optim.averages, state.emas, strict=True)
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(state.model),
            **{name: ocp.args.StandardSave(ema) for name, ema in averages},
            optimizer=ocp.args.StandardSave(optimizer),
            config=ocp.args.JsonSave(dataclasses.asdict(self.config)),
            dataset=ocp.args.JsonSave(self.facts),
            log=ocp.args.JsonSave(dict(unwritten)),  # which the log goes on with meanwhile
        )
        self.saving = step
        with self._failures_noted():
            with refused_together(self.config.mesh.distributed):
                self._make_room(num_bytes(state))
            self.manager.save(step, args=items)

    @contextlib.contextmanager
    def _failures_noted(self) -> Iterator[None]:
        """Says, once, why a checkpoint could not be written, and goes on without it."""
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore raises ValueError for a full disk
            reason = getattr(error, "strerror", None) or one_line(error)
            failure = (
                f"{self.folder}: checkpoint {self.saving} could not be saved ({reason[:120]}); the "
                f"newest there is {max(self.manager.all_steps(), default='none')}"
            )
            if not self.failure:
                print(f"warning: {failure}; the next will be tried", file=sys.stderr, flush=True)
            self.failure = failure
            self.manager = self._make_manager()

    def _make_room(self, size: int) -> None:
        """Removes what saves that failed have left. Raises OSError if `size` bytes do not fit."""
        if jax.process_index() == 0:
            for unfinished in self.folder.glob(f"*{UNFINISHED}"):
                shutil.rmtree(unfinished, ignore_errors=True)
        free, needed = shutil.disk_usage(self.folder).free, 1.02 * size + 2**21  # with the rest
        if free < needed:
            words = f"{needed / 1e9:.3g} GB are needed and {free / 1e9:.3g} free"
            raise OSError(errno.ENOSPC, words)
        with tempfile.TemporaryFile(dir=self.folder) as probe:
            probe.write(b"x")

    def _write_checksums(self) -> None:
        """Called by Orbax's thread when all items are written, before the folder is renamed."""
        self.failure = ""
        folder = self.folder / f"{self.saving}{UNFINISHED}"
        if jax.process_index() == 0:
            (folder / intact.CHECKSUMS).write_text(json.dumps(intact.checksums(folder)))


def silence_orbax() -> None:
    """Keeps off stderr the tracebacks and warnings that it has for each part where one fails."""

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # to which the others still answer
            sys.__unraisablehook__(unraisable)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = report


def num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def require_room(config: Config, state: State) -> None:
    """Raises InputError unless the checkpoints that a run keeps, and one more, fit on the disk."""
    size, count = num_bytes(state), config.train.keep_last + 1 - len(intact.steps(config.workdir))
    free = shutil.disk_usage(config.workdir).free
    expected = f"smaller, or on a larger disk: a checkpoint takes {size / 1e9:.3g} GB, "
    expected += f"{free / 1e9:.3g} GB are free"
    require(count * size <= free, "train.keep_last", config.train.keep_last, expected)


def is_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is; on all devices that hold a part of it."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def restore(workdir: Path, step: int, target: State) -> State:
    """The state of a step, in the shapes, types and shardings of the target. Raises InputError."""
    folder = intact.step_folder(workdir, step)
    optimizer = {"step": target.step, "opt_state": target.opt_state}
    model = restore_item(folder / "model", target.model)
    names = intact.stored_config(workdir, step).optim.averages
    emas = tuple(
        restore_item(folder / name, ema) for name, ema in zip(names, target.emas, strict=True)
    )
    optimizer = restore_item(folder / "optimizer", optimizer)
    found = int(optimizer["step"])
    require(found == step, f"{folder}: step", found, f"{step}, the name of the folder")
    return State(optimizer["step"], model, emas, optimizer["opt_state"])


def restore_item(folder: Path, target: Any) -> Any:
    """An item of a checkpoint, in the shapes, types and shardings of the target.

    Raises InputError for arrays that are not the target's, before any is read.
    """
    silence_orbax()
    try:
        stored = arrays_by_name(ocp.StandardCheckpointHandler().metadata(folder).tree)
        expected = arrays_by_name(target)
        for name in sorted(stored.keys() | expected.keys()):
            found, wanted = stored.get(name, "nothing"), expected.get(name, "nothing")
            is_same = found == wanted
            require(is_same, f"{folder}: {name}", found, f"{wanted}, as its config says")
        return ocp.StandardCheckpointer().restore(folder, target)
    except InputError:
        raise
    except Exception as error:  # Orbax and TensorStore raise errors of their own
        raise InputError(
            f"{folder}: should be arrays that Orbax reads ({type(error).__name__}: "
            f"{one_line(error)[:120]})"
        ) from error


def arrays_by_name(tree: Any) -> dict[str, str]:
    """{"blocks.mlp.up.kernel.value": "float32[2, 20, 80]", ...} of arrays or their metadata."""
    leaves = leaves_by_name(tree)
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def load(
    path: str | Path,
    ema: bool | float = True,
    sharding: jax.sharding.Sharding | None = None,
    dtype: str | None = None,
    step: int | None = None,
) -> tuple[DiT, Config]:
    """The model of a workdir's newest intact checkpoint, or of converted weights, and its config.

    path: the workdir, or one checkpoint of it, as in runs/digits/checkpoints/3000. ema: the
    averaged weights, of several averages the first, or that of a decay; False takes the last ones.
    sharding: of every parameter; None is the first device. dtype: of the products; None is the
    training's. step: of a checkpoint known to be intact; None looks for the newest and warns of
    damaged ones. Raises InputError.
    """
    workdir = Path(path)
    if step is None:
        workdir, step, damaged = intact.find(workdir)
        for line in damaged:
            warnings.warn(line, stacklevel=2)
    config = intact.stored_config(workdir, step)
    if dtype is not None:
        config = replace(config, train=dict(dtype=dtype))
    item = intact.step_folder(workdir, step) / weights_item(config, ema)
    require(item.is_dir(), "ema", ema, "True: converted weights are one set")
    shapes = abstract_model(config)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = with_shardings(shapes, jax.tree.map(lambda leaf: sharding, shapes))
    model = restore_item(item, target)
    expected = f"of finite weights, which those of checkpoint {step} are not"
    require(jax.jit(is_finite)(model), "workdir", str(workdir), expected)
    return model, config


def weights_item(config: Config, ema: bool | float) -> str:
    """The item that holds the average of a decay; with True the first, with False the last weights.

    Raises InputError.
    """
    if isinstance(ema, bool):
        return "ema" if ema else "model"
    names = {decay: name for name, decay in config.optim.averages.items()}
    require(ema in names, "ema", ema, f"one of the run's decays: {', '.join(map(str, names))}")
    return names[ema]


def save_weights(path: Path, model: DiT, config: Config, class_names: tuple[str, ...]) -> None:
    """Writes a model that no run has trained as checkpoint 0 of a folder, which `load` reads."""
    facts = intact.dataset_facts(class_names, None)
    with whole(path.resolve()) as unfinished:
        folder = unfinished / "checkpoints" / "0"
        with ocp.StandardCheckpointer() as writer:
            writer.save(folder / "ema", model)
        for item, text in [("config", config.to_json()), ("dataset", json.dumps(facts))]:
            (folder / item).mkdir()
            (folder / item / "metadata").write_text(text)
        (folder / intact.CHECKSUMS).write_text(json.dumps(intact.checksums(folder)))
