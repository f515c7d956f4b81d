"""Checkpoints: state, config and data set facts together, checked before they are read.

`checkpoints/STEP/` holds the items `model`, `ema`, `optimizer`, `config`, `dataset` and `log`, and
`ema_DECAY` for each further average, which Orbax writes in the background, and `checksums.json`:
Orbax restores a flipped bit without an error. The config and the facts are read without jax, so
jax, Orbax and the model are imported where they are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import re
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit.config import (
    Config,
    InputError,
    PositiveInt,
    Unsaved,
    check_value,
    diverged,
    from_json,
    one_line,
    replace,
    require,
)
from dit.files import naming, read_json, whole
from dit.hosts import refused_together

if TYPE_CHECKING:
    import jax
    import orbax.checkpoint as ocp

    from dit.data import Dataset
    from dit.model import DiT
    from dit.state import State

CHECKSUMS = "checksums.json"
STEP = "0|[1-9][0-9]*"  # the name of a checkpoint's folder
UNFINISHED = ".orbax-checkpoint-tmp"  # behind the name of a checkpoint that is being written


# Which checkpoints are intact


def steps(workdir: Path) -> list[int]:
    """The steps whose checkpoints were completed, newest first. Other folders are ignored."""
    names = [path.name for path in (workdir / "checkpoints").glob("*/")]
    numbers = [int(name) for name in names if re.fullmatch(STEP, name)]
    return sorted(numbers, reverse=True)


def step_folder(workdir: Path, step: int) -> Path:
    return workdir.resolve() / "checkpoints" / str(step)


def checksums(folder: Path) -> dict[str, list[int]]:
    """{file: [bytes, crc32]} of the items of a checkpoint.

    Two files beside them Orbax writes last, `_CHECKPOINT_METADATA` and `commit_success.txt`. Nobody
    reads them, so that a damaged one does no harm. Damaged checksums are not as written or fit no
    file.
    """
    files = {}
    for path in sorted(path for path in folder.glob("*/**/*") if path.is_file()):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        files[str(path.relative_to(folder))] = [path.stat().st_size, crc]
    return files


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        stored = read_json(folder / CHECKSUMS)
        written = {name: [int(size), int(crc)] for name, (size, crc) in stored.items()}
    except (ValueError, TypeError, ArithmeticError):
        return f"{CHECKSUMS} is missing or damaged"
    try:
        present = checksums(folder)
    except OSError as error:
        return f"it cannot be read: {one_line(error)}"
    for name, (size, crc) in written.items():
        if name not in present:
            return f"{name} is missing"
        if present[name][0] < size:
            return f"{name} is truncated"
        if present[name] != [size, crc]:
            return f"{name} is damaged"
    for name in present:
        if name not in written:
            return f"{name} has no checksum"
    return None


def find(
    path: Path, step: int | None = None, option: str = "workdir"
) -> tuple[Path, int, list[str]]:
    """The workdir and the step of the checkpoint that a path means, and a line on each damaged one.

    path: a workdir, of which `step` is meant, or the newest that is intact; or a checkpoint itself,
    as in runs/digits/checkpoints/3000. Raises InputError, naming `option` or "step".
    """
    if path.parent.name == "checkpoints" and re.fullmatch(STEP, path.name):
        named = int(path.name)
        require(step in (None, named), "step", step, f"left out: {str(path)!r} is of step {named}")
        return find(path.parent.parent, named, option)
    kept = steps(path)
    if step is None or not kept:
        return path, *newest_intact(path, option)
    numbers = ", ".join(map(str, kept))
    require(step in kept, "step", step, f"one of {numbers}, which {str(path)!r} keeps")
    problem = damage(step_folder(path, step))
    require(problem is None, "step", step, f"of an intact checkpoint: in this one {problem}")
    check_layout(path, step, option)
    return path, step, []


def newest_intact(workdir: Path, option: str = "workdir") -> tuple[int, list[str]]:
    """The newest step whose checkpoint is intact, and a line on each damaged newer one.

    Raises InputError, naming `option`, if there is none, or if an older version of this project
    wrote it.
    """
    broken = {}
    for step in steps(workdir):
        problem = damage(step_folder(workdir, step))
        if problem is None:
            check_layout(workdir, step, option)
            return step, [f"checkpoint {n}: {why}; using {step}" for n, why in broken.items()]
        broken[step] = problem
    require(workdir.exists(), option, str(workdir), "a run's folder, and there is none")
    reasons = "; ".join(f"{step}: {problem}" for step, problem in broken.items())
    raise InputError(
        f"{option}: {str(workdir)!r} should hold an intact checkpoint in checkpoints/ "
        f"({reasons or 'train.py writes them'})"
    )


def check_layout(workdir: Path, step: int, option: str) -> None:
    is_current = (step_folder(workdir, step) / "dataset/metadata").is_file()
    expected = "of this version: an older one wrote its checkpoints; train or convert again"
    require(is_current, option, str(workdir), expected)


def stored_config(workdir: Path, step: int) -> Config:
    """The config of a checkpoint. Raises InputError."""
    path = step_folder(workdir, step) / "config/metadata"
    values = read_json(path)
    with naming(path):
        return from_json(values)


def dataset_facts(class_names: tuple[str, ...], num_examples: int | None) -> dict[str, Any]:
    """What is kept of a data set beside the config. Converted weights have no `num_examples`."""
    return {"class_names": list(class_names), "num_examples": num_examples}


def stored_dataset(workdir: Path, step: int) -> dict[str, Any]:
    """The `dataset_facts` of a checkpoint. Raises InputError."""
    path = step_folder(workdir, step) / "dataset/metadata"
    facts = read_json(path)
    are_facts = facts.keys() == dataset_facts((), None).keys()
    require(are_facts, str(path), sorted(facts), "class_names and num_examples")
    check_names(path, facts["class_names"], stored_config(workdir, step))
    check_value(f"{path}: num_examples", facts["num_examples"], PositiveInt | None)
    return facts


def check_names(path: Path, names: Any, config: Config) -> None:
    """Raises InputError unless the names that a file holds are those of the config's classes."""
    count = config.data.num_classes
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    fits = are_names and len(names) == count
    require(fits, f"{path}: class_names", names, f"the names of {count} classes")


def stored_metrics(workdir: Path, step: int) -> dict[str, float]:
    """What a run had added up since its last line of metrics, if any. Raises InputError."""
    path = step_folder(workdir, step) / "log/metadata"
    sums = read_json(path) if path.is_file() else {}
    for name, value in sums.items():
        check_value(f"{path}: {name}", value, PositiveInt if name == "steps" else float)
    require(not sums or "steps" in sums, str(path), sums, "sums of metrics and their steps")
    return sums


# Writing and reading


class Checkpoints:
    """Saves a run's state; keeps the last `train.keep_last` and the multiples of `keep_every`.

    What cannot be saved is warned of, and the next is tried. A run whose last state could not be
    saved raises Unsaved at the end.
    """

    def __init__(self, config: Config, dataset: Dataset):
        self.config = config
        self.facts = dataset_facts(dataset.class_names, len(dataset.records))
        self.folder = config.workdir.resolve() / "checkpoints"
        self.manager = self._make_manager()
        self.saving = None
        self.failure = ""  # why the last one could not be saved
        silence_orbax()

    def _make_manager(self) -> ocp.CheckpointManager:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        kept = [policies.LatestN(self.config.train.keep_last)]
        if self.config.train.keep_every:
            kept.append(policies.EveryNSteps(self.config.train.keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            lightweight_initialize=True,  # does not read _CHECKPOINT_METADATA
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
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
        import jax
        import orbax.checkpoint as ocp

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
        import jax

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
        import jax

        self.failure = ""
        folder = self.folder / f"{self.saving}{UNFINISHED}"
        if jax.process_index() == 0:
            (folder / CHECKSUMS).write_text(json.dumps(checksums(folder)))


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
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def require_room(config: Config, state: State) -> None:
    """Raises InputError unless the checkpoints that a run keeps, and one more, fit on the disk."""
    size, count = num_bytes(state), config.train.keep_last + 1 - len(steps(config.workdir))
    free = shutil.disk_usage(config.workdir).free
    expected = f"smaller, or on a larger disk: a checkpoint takes {size / 1e9:.3g} GB, "
    expected += f"{free / 1e9:.3g} GB are free"
    require(count * size <= free, "train.keep_last", config.train.keep_last, expected)


def is_finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is; on all devices that hold a part of it."""
    import jax
    import jax.numpy as jnp

    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def restore(workdir: Path, step: int, target: State) -> State:
    """The state of a step, in the shapes, types and shardings of the target. Raises InputError."""
    from dit.state import State

    folder = step_folder(workdir, step)
    optimizer = {"step": target.step, "opt_state": target.opt_state}
    model = restore_item(folder / "model", target.model)
    names = stored_config(workdir, step).optim.averages
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
    import orbax.checkpoint as ocp

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


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """{"blocks.mlp.up.kernel.value": ..., ...}, in the order of the tree's leaves."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


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
    import jax

    from dit.state import abstract_model, with_shardings

    workdir = Path(path)
    if step is None:
        workdir, step, damaged = find(workdir)
        for line in damaged:
            warnings.warn(line, stacklevel=2)
    config = stored_config(workdir, step)
    if dtype is not None:
        config = replace(config, train=dict(dtype=dtype))
    item = step_folder(workdir, step) / weights_item(config, ema)
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
    import orbax.checkpoint as ocp

    facts = dataset_facts(class_names, None)
    with whole(path.resolve()) as unfinished:
        folder = unfinished / "checkpoints" / "0"
        with ocp.StandardCheckpointer() as writer:
            writer.save(folder / "ema", model)
        for item, text in [("config", config.to_json()), ("dataset", json.dumps(facts))]:
            (folder / item).mkdir()
            (folder / item / "metadata").write_text(text)
        (folder / CHECKSUMS).write_text(json.dumps(checksums(folder)))
