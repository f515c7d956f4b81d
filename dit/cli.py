"""Command lines: presets by name or file, options from dataclasses, errors as exit statuses.

Each command parses its options at the top of its file, before it imports jax, so that `--help` and
bad input are answered at once. Exit status 2 is bad input, 1 a run that diverged; both print one
line on stderr.
"""

import contextlib
import ctypes
import difflib
import functools
import importlib.util
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

from dit.config import (
    Config,
    Diverged,
    InputError,
    Stopped,
    Unsaved,
    check_fields,
    check_value,
    one_line,
    replace,
    require,
)

Options = TypeVar("Options")

FOLDER = Path(__file__).resolve().parent
# presets lie beside the package in a checkout, and in it where it is installed
PARENT = FOLDER if (FOLDER / "configs").is_dir() else FOLDER.parent
CONFIGS = PARENT / "configs"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimal-dit"


# Presets


def preset_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def load_preset(name_or_file: str) -> Config:
    """The config of a preset's name or of a Python file. Raises InputError."""
    is_file = name_or_file.endswith(".py")
    path = Path(name_or_file) if is_file else CONFIGS / f"{name_or_file}.py"
    if not path.is_file():
        names = preset_names()
        near = difflib.get_close_matches(name_or_file, names, n=1, cutoff=0)
        hint = (
            f"the nearest preset is {near[0]!r} of {', '.join(names)}" if near else f"no {CONFIGS}"
        )
        raise InputError(f"preset: {name_or_file!r} is neither a preset nor a Python file; {hint}")
    config = run_file(path, path.stat().st_mtime_ns)
    if isinstance(config, InputError):
        raise config
    require(isinstance(config, Config), f"{path}: config", config, "a Config(...)")
    check_fields(config)
    return config


@functools.cache
def run_file(path: Path, modified: int) -> Any:
    """What a Python file defines as `config`, or the InputError of running it.

    It is run once, as it may hold a TFDS builder, which is registered once. It can import what lies
    beside it.
    """
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # at the end, so that nothing in it hides a package
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}".replace(".", "_"), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where TFDS looks for the builder's file
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except Exception as error:  # whatever a user's file does
        return InputError(f"{path}: {type(error).__name__}: {one_line(error)}")
    return vars(module).get("config")


# Command lines


def parse(
    kind: type[Options],
    argv: list[str],
    prog: str,
    description: str,
    default: Any = tyro.MISSING_NONPROP,
) -> Options:
    """A dataclass from a command line. Raises InputError with tyro's answer in one line."""
    answer = io.StringIO()
    try:
        with contextlib.redirect_stderr(answer):
            options = tyro.cli(kind, args=argv, prog=prog, description=description, default=default)
        check_options(options)
        return options
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    box = r"[╭─╮│╰╯]+|-{4,}"  # that tyro draws around its answer
    lines = [re.sub(box, " ", line).strip(" |+") for line in answer.getvalue().splitlines()[1:]]
    words = " ".join(" ".join(lines).split())
    see = f"(see {prog} --help)"
    raise InputError(re.sub(r"(Argument helptext:|For full helptext).*", see, words))


def check_options(options: Any) -> None:
    """Holds every option against its annotation and range. Raises InputError."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        if not is_dataclass(hint):
            option = "--" + name.replace("_", "-")
            check_value(option, getattr(options, name), hint)


def parse_config(argv: list[str], prog: str, description: str) -> Config:
    """The valid config of `PRESET_OR_FILE.py [--section.field value ...]`. Raises InputError."""
    config = parse_preset(Config, argv, prog, description, lambda preset: preset).validate()
    name = config.name
    is_folder = Path(name).name == name and name not in ("", ".", "..")
    is_free = is_folder or config.train.workdir
    require(is_free, "--name", name, "the name of a folder in runs/, not a path")
    return config


def parse_preset(
    kind: type[Options],
    argv: list[str],
    prog: str,
    description: str,
    make_default: Callable[[Config], Options],
) -> Options:
    """A dataclass whose defaults come from the preset that the line begins with.

    A preset's number of classes is that of its own data: with other data it is left open.
    """
    preset, flags = split_preset(argv, kind, prog, description)
    if any(re.match(r"--data\.(name|latents)(=|$)", flag) for flag in flags):
        preset = replace(preset, data=dict(num_classes=None))
    prog, kind = f"{prog} {argv[0]}", tyro.conf.FlagConversionOff[kind]
    return parse(kind, flags, prog, description, default=make_default(preset))


def split_preset(
    argv: list[str], kind: type, prog: str, description: str
) -> tuple[Config, list[str]]:
    """The preset that a command line begins with, and the rest of the line. Raises InputError."""
    if argv and not argv[0].startswith("-"):
        return load_preset(argv[0]), argv[1:]
    names = ", ".join(preset_names())
    description = f"{description}\nPresets: {names}."
    parse(tyro.conf.FlagConversionOff[kind], argv, f"{prog} PRESET_OR_FILE.py", description)
    raise InputError(f"preset: missing; it should come first, one of {names}, or a Python file")


def joins_hosts(argv: list[str]) -> bool:
    """Whether a command line, which need not be valid, is one of several hosts'."""
    flag = re.search(r"--(?:mesh\.)?distributed(?:[= ](True|False))?", " ".join(argv))
    if flag:
        return flag[1] != "False"
    with contextlib.suppress(InputError):
        return bool(argv) and load_preset(argv[0]).mesh.distributed
    return False


@contextlib.contextmanager
def exit_status(prog: str) -> Iterator[None]:
    """Ends a command in one line: with status 2 for bad input, 1 for a run or a disk that failed, 0
    for a run that was told to stop, and 130 for Ctrl-C.
    """
    try:
        yield
    except InputError as error:
        status, line = 2, str(error)
    except (Diverged, Unsaved, OSError) as error:
        status, line = 1, str(error)
    except Stopped as stop:
        status, line = 0, str(stop)
    except KeyboardInterrupt:
        status, line = 130, "interrupted"
    else:
        return
    print(f"{prog}: {line}", file=sys.stderr)
    sys.exit(status)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX's own variables say where."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's numbers, from malloc.h


def keep_freed_memory() -> None:
    """Has glibc, where it is C's library, hold what a program frees for what it allocates next.

    Otherwise the temporaries of a step on a CPU come from the kernel and go back to it every time,
    a quarter of the time of `cifar10_tiny`. A process holds up to twice as much memory. To be
    called before jax is imported, whose threads would have heaps of their own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, -1)  # never given back
        mallopt(M_MMAP_MAX, 0)  # none mapped on its own
        mallopt(M_ARENA_MAX, 1)  # one heap for all threads


# Signals


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Notes the first Ctrl-C, SIGTERM or SIGHUP, so that a run saves and stops. A second kills it.

    As a context it listens, and restores what was before at its end.
    """

    def __init__(self):
        self.requested = False
        self.before: dict[int, Any] = {}

    def listen(self) -> "StopRequest":
        """From now on; again where a library has taken the signals."""
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if not self.requested and handler is not signal.SIG_IGN:  # as nohup has it
                self.before.setdefault(number, handler)
                signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.requested = True
        for number in self.before:
            signal.signal(number, signal.SIG_DFL)

    def __enter__(self) -> "StopRequest":
        return self.listen()

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
