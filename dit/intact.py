"""Which checkpoints are intact, and what they say of themselves, read without jax.

A checkpoint is a folder `checkpoints/STEP/` of a run's, as dit/checkpoint.py writes it. Its
`checksums.json` shows a flipped bit, which Orbax would restore without an error.
"""

import re
import zlib
from pathlib import Path
from typing import Any

from dit.config import Config, InputError, PositiveInt, check_value, from_json, one_line, require
from dit.files import naming, read_json

CHECKSUMS = "checksums.json"
STEP = "0|[1-9][0-9]*"  # the name of a checkpoint's folder


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
        return path, *newest(path, option)
    numbers = ", ".join(map(str, kept))
    require(step in kept, "step", step, f"one of {numbers}, which {str(path)!r} keeps")
    problem = damage(step_folder(path, step))
    require(problem is None, "step", step, f"of an intact checkpoint: in this one {problem}")
    check_layout(path, step, option)
    return path, step, []


def newest(workdir: Path, option: str = "workdir") -> tuple[int, list[str]]:
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
