"""Files and folders that are written whole or not at all, and folders that one request resumes."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit.config import InputError, one_line, require


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder to, which becomes `path` on success."""
    unfinished = path.with_name(path.name + ".tmp")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    yield unfinished
    unfinished.rename(path)


@contextlib.contextmanager
def locked(folder: Path, option: str) -> Iterator[None]:
    """Holds the folder's `.lock`, as one process at a time can; one that ends sets it free.

    Raises InputError, naming `option` and the process that holds it.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"{option}: {str(folder)!r} should be used by one run at a time, and is by "
                f"{file.read()}"
            ) from error
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, end="", flush=True)
        yield


def read_json(path: Path, expected: str = "a JSON object") -> dict[str, Any]:
    """The JSON object in a file. Raises InputError."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: should be {expected} ({one_line(error)})") from error
    require(isinstance(values, dict), str(path), values, expected)
    return values


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts a file's name before the InputErrors that what it holds raises in the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@contextlib.contextmanager
def renaming(fields: dict[str, str]) -> Iterator[None]:
    """In the InputErrors of the block, the options of this command in place of fields' names."""
    try:
        yield
    except InputError as error:
        line = str(error)
        for field, option in fields.items():
            line = line.replace(field, option)
        raise InputError(line) from error


def claim_folder(folder: Path, request: dict, option: str) -> None:
    """Makes a folder for a request, or checks that it was made for the same one.

    What the folder was made for is kept in `request.json`. Raises InputError, naming `option`, the
    folder and the first setting that differs.
    """
    try:
        is_empty = folder.is_dir() and not any(folder.iterdir())
        if is_empty or not folder.exists():
            with whole(folder) as unfinished:
                unfinished.mkdir(parents=True)
                (unfinished / "request.json").write_text(json.dumps(request, indent=2) + "\n")
        stored = read_json(folder / "request.json")
    except (OSError, InputError) as error:
        raise InputError(
            f"{option}: {str(folder)!r} should be new, or hold the request.json that it was begun "
            f"with ({one_line(error)})"
        ) from error
    for name, value in json.loads(json.dumps(request)).items():
        if stored.get(name) != value:
            raise InputError(
                f"{option}: {str(folder)!r} was begun with {name} {stored.get(name)!r} rather than "
                f"{value!r}; remove it, or name another folder"
            )
