"""Checkpoints: state, position in the data and config together, written by Orbax in the background, checked before they are read.

`checkpoints/STEP/` holds the items `model`, `ema`, `optimizer`, `position`, `config`, and `checksums.json`: Orbax itself restores a
flipped bit without a word.
"""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from dit import config as dit_config
from dit.config import Config, InputError
from dit.model import DiT
from dit.state import State, make_model

CHECKSUMS = "checksums.json"


def checksums(folder: Path) -> dict[str, list[int]]:
    """{file: [bytes, crc32]} of every file in a folder but the checksums themselves."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        found[str(path.relative_to(folder))] = [path.stat().st_size, crc]
    return found


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (folder / CHECKSUMS).exists():  # killed between Orbax's commit and ours: complete, only unchecked
        return None
    written, found = json.loads((folder / CHECKSUMS).read_text()), checksums(folder)
    return next((f"{name} is {'missing' if name not in found else 'truncated' if found[name][0] < size else 'damaged'}"
                 for name, (size, crc) in written.items() if found.get(name) != [size, crc]), None)


def newest_intact(workdir: Path) -> tuple[int, dict[int, str]]:
    """The newest step whose checkpoint is whole, and what is wrong with each newer one. Raises InputError if there is none."""
    folder = workdir / "checkpoints"
    steps = sorted((int(p.name) for p in folder.glob("*") if p.name.isdigit()), reverse=True)
    broken = {}
    for step in steps:
        if (what := damage(folder / str(step))) is None:
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
            preservation_policy=policies.AnyPreservationPolicy(kept))
        self.manager = ocp.CheckpointManager(self.folder, options=options)
        self.background = ThreadPoolExecutor(max_workers=1)
        self.sealing = self.background.submit(lambda: None)

    def _seal(self, step: int) -> None:
        """Waits for Orbax's commit and adds the checksums."""
        self.manager.wait_until_finished()
        if jax.process_index() == 0:
            (self.folder / str(step) / CHECKSUMS).write_text(json.dumps(checksums(self.folder / str(step))))

    @property
    def last_step(self) -> int | None:
        return self.manager.latest_step()

    def save(self, state: State, config: Config, num_examples: int) -> None:
        """Copies the state off the devices and returns; the rest happens in the background."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        self.sealing.result()
        self.manager.save(step, args=ocp.args.Composite(
            model=ocp.args.StandardSave(state.model), ema=ocp.args.StandardSave(state.ema),
            optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            position=ocp.args.JsonSave({"next_batch": step, "num_examples": num_examples}),
            config=ocp.args.JsonSave(json.loads(config.to_json()))))
        self.sealing = self.background.submit(self._seal, step)

    def restore(self, step: int, target: State) -> State:
        """The state of a step, in the shapes, types and shardings of the target."""
        items = self.manager.restore(step, args=ocp.args.Composite(
            model=ocp.args.StandardRestore(target.model), ema=ocp.args.StandardRestore(target.ema),
            optimizer=ocp.args.StandardRestore({"step": target.step, "opt_state": target.opt_state})))
        return State(items.optimizer["step"], items.model, items.ema, items.optimizer["opt_state"])

    def close(self) -> None:
        """Waits for what is being written."""
        self.sealing.result()
        self.background.shutdown()
        self.manager.close()


def read_json(workdir: Path, step: int, item: str):
    """The item `config` or `position` of a step, without anything else of it."""
    return json.loads((workdir / "checkpoints" / str(step) / item / "metadata").read_text())


def stored_config(workdir: Path, step: int) -> Config:
    return dit_config.from_json(json.dumps(read_json(workdir, step, "config")))


def load(path: str | Path, ema: bool = True, sharding: jax.sharding.Sharding | None = None) -> tuple[DiT, Config]:
    """The model of the newest intact checkpoint of a workdir (its average unless `ema` is False), and its config.

    `sharding` places every parameter; None puts them on the first device. Raises InputError.
    """
    workdir = Path(path)
    step, broken = newest_intact(workdir)
    for other, what in broken.items():
        print(f"checkpoint {other}: {what}; using checkpoint {step}")
    config = stored_config(workdir, step)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                          jax.eval_shape(lambda: make_model(config, jax.random.key(0))))
    item = workdir.resolve() / "checkpoints" / str(step) / ("ema" if ema else "model")
    return ocp.StandardCheckpointer().restore(item, target), config
