"""Checkpoints: state, position in the data and config together, written by Orbax in the background, checked before they are read.

`checkpoints/STEP/` holds the items `model`, `ema`, `optimizer`, `position`, `config`, and `checksums.json`: Orbax itself restores a
flipped bit without a word.
"""

import dataclasses
import json
import shutil
import zlib
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from dit import config as dit_config
from dit.config import Config, InputError, require
from dit.model import DiT
from dit.state import State, make_model

CHECKSUMS = "checksums.json"


def checksums(folder: Path) -> dict[str, list[int]]:
    """{file: [bytes, crc32]} of the items of a checkpoint."""
    found = {}
    for path in sorted(path for path in folder.glob("*/**/*") if path.is_file()):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        found[str(path.relative_to(folder))] = [path.stat().st_size, crc]
    return found


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        written = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return f"{CHECKSUMS} is missing or damaged"
    found = checksums(folder)
    for name, (size, crc) in written.items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] < size:
            return f"{name} is truncated"
        if found[name] != [size, crc]:
            return f"{name} is damaged"
    return None


def steps(workdir: Path) -> list[int]:
    """The steps whose checkpoints were written to the end, newest first."""
    return sorted((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), reverse=True)


def newest_intact(workdir: Path) -> tuple[int, dict[int, str]]:
    """The newest step whose checkpoint is whole, and what is wrong with each newer one. Raises InputError if there is none."""
    broken = {}
    for step in steps(workdir):
        if (what := damage(workdir / "checkpoints" / str(step))) is None:
            return step, broken
        broken[step] = what
    why = "; ".join(f"{step}: {what}" for step, what in broken.items()) or "train.py writes them"
    raise InputError(f"workdir: {str(workdir)!r} should hold an intact checkpoint in checkpoints/ ({why})")


class Checkpoints:
    """The checkpoints of a workdir: keeps the last `keep_last`, and for good those at multiples of `keep_every`."""

    def __init__(self, workdir: Path, keep_last: int, keep_every: int):
        self.folder = workdir.resolve() / "checkpoints"
        kept = [policies.LatestN(keep_last)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal))
        self.manager = ocp.CheckpointManager(self.folder, options=options)
        self.saving = None

    def _seal(self) -> None:
        """Adds the checksums, in Orbax's own thread: all items are written, and their folder has its temporary name still."""
        folder = self.folder / f"{self.saving}.orbax-checkpoint-tmp"
        if jax.process_index() == 0:
            (folder / CHECKSUMS).write_text(json.dumps(checksums(folder)))

    @property
    def last_step(self) -> int | None:
        return self.manager.latest_step()

    def save(self, state: State, config: Config, num_examples: int) -> None:
        """Copies the state off the devices and returns; the rest happens in the background."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        self.manager.wait_until_finished()
        self.saving = step
        self.manager.save(step, args=ocp.args.Composite(
            model=ocp.args.StandardSave(state.model), ema=ocp.args.StandardSave(state.ema),
            optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            position=ocp.args.JsonSave({"next_batch": step, "num_examples": num_examples}),
            config=ocp.args.JsonSave(dataclasses.asdict(config))))

    def restore(self, step: int, target: State) -> State:
        """The state of a step, in the shapes, types and shardings of the target."""
        items = self.manager.restore(step, args=ocp.args.Composite(
            model=ocp.args.StandardRestore(target.model), ema=ocp.args.StandardRestore(target.ema),
            optimizer=ocp.args.StandardRestore({"step": target.step, "opt_state": target.opt_state})))
        return State(items.optimizer["step"], items.model, items.ema, items.optimizer["opt_state"])

    def close(self) -> None:
        """Waits for what is being written."""
        self.manager.close()


def stored_config(workdir: Path, step: int) -> Config:
    return dit_config.from_json((workdir / "checkpoints" / str(step) / "config/metadata").read_text())


def stored_position(workdir: Path, step: int) -> dict[str, int]:
    """{"next_batch": the step whose batch comes next, counted from 0, "num_examples": images of the data set}."""
    file = workdir / "checkpoints" / str(step) / "position/metadata"
    require(file.is_file(), "train.workdir", str(workdir), "a run's or new: it holds converted weights, from which no run goes on")
    return json.loads(file.read_text())


def save_weights(path: Path, model: DiT, config: Config) -> None:
    """Writes a model without a run behind it as the only checkpoint of a folder, which `load` reads; whole or not at all."""
    folder, unfinished = path.resolve(), path.resolve().with_name(path.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    step = unfinished / "checkpoints" / "0"
    with ocp.StandardCheckpointer() as writer:
        writer.save(step / "ema", model)
    (step / "config").mkdir()
    (step / "config/metadata").write_text(config.to_json())
    (step / CHECKSUMS).write_text(json.dumps(checksums(step)))
    unfinished.rename(folder)


def load(path: str | Path, ema: bool = True, sharding: jax.sharding.Sharding | None = None, dtype: str | None = None,
         step: int | None = None) -> tuple[DiT, Config]:
    """The model of the newest intact checkpoint of a workdir (its average unless `ema` is False), and its config.

    `sharding` places every parameter; None puts them on the first device. `dtype` is that of the computation; None is that of the
    training. `step` names a checkpoint that is known to be intact. Raises InputError.
    """
    workdir, broken = Path(path), {}
    if step is None:
        step, broken = newest_intact(workdir)
    for other, what in broken.items():
        print(f"checkpoint {other}: {what}; using checkpoint {step}")
    config = stored_config(workdir, step)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype or config.train.dtype))
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                          jax.eval_shape(lambda: make_model(config, jax.random.key(0))))
    item = workdir.resolve() / "checkpoints" / str(step) / ("ema" if ema else "model")
    require(item.is_dir(), "ema", ema, "True: these are converted weights, of which there is one set")
    return ocp.StandardCheckpointer().restore(item, target), config
