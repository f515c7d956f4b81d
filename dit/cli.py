"""Command lines: presets by name or file, options from dataclasses, errors as exit statuses.

Each command parses its options at the top of its file, before it imports jax, so that `--help` and
bad input are answered at once. Exit status 2 is bad input, 1 a run that diverged; both print one
line on stderr.
"""

import contextlib
import functools
import importlib.util
import io
import os
import re
import sys
from collections.abc import Iterator
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
    nearest,
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
    if is_file and not path.is_file():
        hint = nearest(path.name, [other.name for other in path.parent.glob("*.py")])
        raise InputError(f"preset: {name_or_file!r} should be a file, and there is none{hint}")
    if not path.is_file():
        names = preset_names()
        hint = nearest(name_or_file, names)
        known = f"presets are {', '.join(names)}" if names else f"no {CONFIGS}"
        raise InputError(
            f"preset: {name_or_file!r} is neither a preset nor a Python file{hint}; {known}"
        )
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
            args = spell_flags(argv, kind)
            options = tyro.cli(kind, args=args, prog=prog, description=description, default=default)
        check_options(options)
        return options
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    box = r"[╭─╮│╰╯]+|-{4,}"  # that tyro draws around its answer
    lines = [re.sub(box, " ", line).strip(" |+") for line in answer.getvalue().splitlines()[1:]]
    words = " ".join(" ".join(lines).split())
    see = f"(see {prog} --help)"
    words = re.sub(r"(Argument helptext:|For full helptext).*", see, words)
    flags = re.compile(r"--[\w.-]+").findall
    unknown, _, offered = words.partition(" Perhaps you meant:")
    hint = nearest("".join(flags(unknown)[:1]), flags(offered))  # of the several that tyro names
    raise InputError(f"{unknown}{hint} {see}" if hint else words)


def boolean_fields(kind: type) -> set[str]:
    """The names of a dataclass's fields that are bool, and of those of its sections."""
    names = set()
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            names |= boolean_fields(hint)
        elif hint is bool:
            names.add(name)
    return names


def spell_flags(argv: list[str], kind: type) -> list[str]:
    """The command line with `--x.flag True` as `--x.flag`, and `--x.flag False` as `--x.no-flag`.

    Both spellings of a boolean are taken by every command.
    """
    names = "|".join(boolean_fields(kind)).replace("_", "[-_]")
    spelled = rf"(?<![^\0])(--(?:[\w-]+\.)*)({names})[\0=](True|False)(?![^\0])"

    def flag(match: re.Match) -> str:
        section, name, value = match.groups()
        return section + name if value == "True" else f"{section}no-{name}"

    return re.sub(spelled, flag, "\0".join(argv)).split("\0") if argv and names else argv


def check_options(options: Any) -> None:
    """Holds every option against its annotation and range. Raises InputError."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        if not is_dataclass(hint):
            option = "--" + name.replace("_", "-")
            check_value(option, getattr(options, name), hint)


def parse_config(
    argv: list[str], prog: str, description: str, kind: type[Options] = Config
) -> Options:
    """A valid Config, or what holds one, of `PRESET_OR_FILE.py [--section.field value ...]`.

    A preset's number of classes is that of its own data: with other data it is left open. Raises
    InputError.
    """
    if not argv or argv[0].startswith("-"):
        names = ", ".join(preset_names())
        parse(kind, argv, f"{prog} PRESET_OR_FILE.py", f"{description}\nPresets: {names}.")
        raise InputError(f"preset: missing; it should come first, one of {names}, or a Python file")
    preset, flags = load_preset(argv[0]), argv[1:]
    if any(re.match(r"--data\.(name|latents)(=|$)", flag) for flag in flags):
        preset = replace(preset, data=dict(num_classes=None))
    default = preset if kind is Config else kind(preset)
    options = parse(kind, flags, f"{prog} {argv[0]}", description, default)
    config = options if kind is Config else options.config
    config.validate()
    is_folder = Path(config.name).name == config.name and config.name not in ("", ".", "..")
    is_free = is_folder or config.train.workdir
    require(is_free, "--name", config.name, "the name of a folder in runs/, not a path")
    return options


def joins_hosts(argv: list[str]) -> bool:
    """Whether a command line, which need not be valid, is one of several hosts'."""
    flag = re.search(r"--(?:mesh\.)?(no-)?distributed(?:[= ](True|False))?", " ".join(argv))
    if flag:
        return not flag[1] and flag[2] != "False"
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
