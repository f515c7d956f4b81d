"""What a run survives: python benchmarks/survive.py [--kills 50] [--only kills flips]

A small run on the digits is killed, stopped, starved of its disk and given damaged files and bad
input. Judged is what comes of it:

- The same command goes on with a run that was broken off, without a word on stderr, to a state and
  metrics that are bit for bit those of a run that nobody disturbed, and leaves nothing unfinished.
- A stop ends every host with a line at most, within 30 seconds, and with exit status 0; that of one
  process before its first step with 143, as SIGTERM does.
- The host that another one leaves behind says so and ends, within five minutes.
- A run without a disk ends with status 1 or 2 and two lines at most.
- Bad input and damaged files are refused in one line with status 2 and nothing written, or are
  ignored rightly: then the run ends as ever.

Prints how much was tried and survived, and what was not, for which it exits with status 1.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from bad_input import CHANGES, OFFERS, bad_flags
from processes import finish, start_hosts

from dit import cli, intact
from dit.config import NonNegativeInt, one_line

STEPS, HALF = 60, 30  # of a run, and where the one ends whose files are damaged
RUN = f"""digits --model.hidden-size 20 --model.depth 2 --model.num-heads 5 --train.batch-size 16
    --objective.num-steps 101 --optim.schedule constant --train.steps {STEPS} --train.log-every 3
    --train.checkpoint-every 5 --train.keep-last 2 --train.sample-every 20 --train.sample-steps 3
    """.split()
TIMINGS = {"images_per_second", "tflops_per_second", "data_seconds", "mfu"}  # differ in every run
STOP_SECONDS = 30  # in which a run that is told to stop has to end, as Slurm kills it then;
STOP_SHARE = 3  # or on a busy machine in so many times the seconds of a whole run
PEER_SECONDS = 300  # in which the others have to end that a host leaves behind
COMMAND_SECONDS = 120  # for a command in this process

Part = typing.Literal[
    "kills", "kills_of_two", "flips", "stops", "peers", "disks", "inputs", "files"
]
Problem = str  # what was not survived; "" for a trial that was
Trial = tuple[str, Callable[[], Problem]]


@dataclass(frozen=True)
class Options:
    kills: NonNegativeInt = 50  # runs of one process that SIGKILL ends at a random instant
    kills_of_two: NonNegativeInt = 20  # runs of two processes, likewise
    flips: NonNegativeInt = 50  # bits, each of a random file of a run or of sample.py's parts
    stops: NonNegativeInt = 99  # SIGTERMs, at most: one in each phase, with one process and two
    peers: NonNegativeInt = 99  # hosts that are killed or stand still, at most
    disks: NonNegativeInt = 99  # kinds of disks, at most
    inputs: NonNegativeInt = 200  # values of a field on the command line, at random
    files: NonNegativeInt = 99  # damaged or hostile files, at most
    only: tuple[Part, ...] = ()  # names of the parts above; without any, all
    seed: NonNegativeInt = 0  # seed of all that is random


# Runs


class Runs:
    """Runs of one command, each in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.random = random.Random()
        self.numbers = itertools.count()

    def new(self) -> Path:
        return self.folder / f"run-{next(self.numbers)}"

    @cache  # noqa: B019
    def undisturbed(self, hosts: int) -> tuple[Path, float]:
        """The folder of a run that nobody disturbs, and its seconds. Its programs are cached."""
        if hosts == 1:
            self.half()
        for _ in range(hosts):  # of two, the first fills the cache
            workdir, began = self.new(), time.monotonic()
            for status, _, err in finish(start(workdir, hosts)):
                assert status == 0, err
        return workdir, time.monotonic() - began

    @cache  # noqa: B019
    def half(self) -> Path:
        """The folder of a run that has ended at HALF."""
        workdir = self.new()
        assert answer("train", *RUN, "--workdir", workdir, "--train.steps", HALF) == (0, [])
        return workdir

    @cache  # noqa: B019
    def half_with_parts(self) -> Path:
        """The same folder, with the parts of samples in it that a kill has left."""
        workdir = self.half()
        sampling = start_hosts([["sample.py", *sample_npz(workdir, workdir)]])
        while len(list((workdir / "samples.npz.parts").glob("*.npy"))) < 3:
            time.sleep(0.001)
        sampling[0].kill()
        finish(sampling)
        return workdir

    @cache  # noqa: B019
    def samples(self) -> list[np.ndarray]:
        """What nobody disturbs the sampling of."""
        folder = self.new()
        folder.mkdir()
        assert answer("sample", *sample_npz(self.half(), folder))[0] == 0
        return arrays_of(folder / "samples.npz")

    def copy_of_half(self) -> Path:
        return shutil.copytree(self.half(), self.new())

    def go_on(self, workdir: Path, hosts: int = 1) -> Problem:
        """Gives the command of a run again, and holds its end against the undisturbed one."""
        for status, _, err in finish(start(workdir, hosts)):
            if status != 0 or lines_of(err):
                return f"going on: status {status}: {err}"
        return self.difference(workdir, hosts)

    def difference(self, workdir: Path, hosts: int = 1, but_metrics: bool = False) -> Problem:
        whole, _ = self.undisturbed(hosts)
        newest = intact.newest(workdir)
        if newest != (STEPS, []):
            return f"{newest} is the newest checkpoint"
        if not all(map(np.array_equal, state_of(whole), state_of(workdir))):
            return "the state differs"
        if metrics_of(whole) != metrics_of(workdir) and not but_metrics:
            return "the metrics differ"
        unfinished = [path.name for path in workdir.rglob("*tmp")]
        return f"half-written: {unfinished}" if unfinished else ""


def start(workdir: Path, hosts: int = 1) -> list[subprocess.Popen]:
    """The command of the runs, on so many hosts."""
    return start_programs(workdir, [["train.py"]] * hosts)


def start_programs(workdir: Path, programs: list[list], flags: tuple = ()) -> list:
    """The same with a program of its own on each host, which takes train.py's command line."""
    command = [*RUN, "--workdir", workdir, "--mesh.distributed", len(programs) > 1, *flags]
    return start_hosts([[*program, *command] for program in programs])


def state_of(workdir: Path) -> list[np.ndarray]:
    """Step, parameters, average and optimizer of the newest checkpoint."""
    import jax

    from dit import checkpoint
    from dit.sharding import make_mesh
    from dit.state import abstract_state

    config = intact.stored_config(workdir, STEPS)
    state = checkpoint.restore(workdir, STEPS, abstract_state(config, make_mesh(config)))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def metrics_of(workdir: Path) -> list[dict]:
    """The rows but for what differs in every run, and for scores, which the other has none of."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "fid" not in row]
    return [{name: row[name] for name in row.keys() - TIMINGS} for row in rows]


def lines_of(err: str) -> list[str]:
    """What a command says on stderr, without gloo's greetings and the progress of a reference."""
    return [line for line in err.splitlines() if not line.startswith(("[Gloo]", "image "))]


# Commands in this process


class TooLong(BaseException):
    """A command does not end. No Exception, which the command could take for one of its own."""


def run(command: str, *argv: str) -> None:
    """What train.py, sample.py and dit.imagenet's convert and fid do."""
    import sample
    import train
    from dit.imagenet import convert, fid

    if command == "train":
        train.train(cli.parse_config(list(argv), command, ""))
    elif command == "sample":
        sample.run(cli.parse(sample.Sample, list(argv), command, ""))
    elif command == "convert":
        convert.run(cli.parse(convert.Convert, list(argv), command, ""))
    else:
        fid.run(cli.parse(fid.Fid, list(argv), command, ""))


def answer(command: str, *argv: object) -> tuple[int, list[str]]:
    """The exit status of a command, and its lines on stderr."""

    def interrupt(*args) -> None:
        raise TooLong

    printed, status = io.StringIO(), 0
    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(COMMAND_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
            with cli.exit_status(command):
                run(command, *map(str, argv))
    except SystemExit as stop:
        status = stop.code
    except (Exception, TooLong):
        traceback.print_exc(file=printed)
        status = 1
    finally:
        signal.alarm(0)
    return status, lines_of(printed.getvalue())


def sample_npz(workdir: Path, folder: Path) -> list:
    return [workdir, *"--num-samples 64 --batch-size 4 --out".split(), folder / "samples.npz"]


def arrays_of(npz: Path) -> list[np.ndarray]:
    with np.load(npz) as file:
        return list(file.values())


def refused(status: int, lines: list[str]) -> Problem:
    return "" if (status, len(lines)) == (2, 1) else f"status {status}: {lines}"


# Kills


def kills(runs: Runs, count: int, hosts: int = 1) -> Iterator[Trial]:
    for _ in range(count):
        seconds = runs.random.uniform(0, runs.undisturbed(hosts)[1])
        yield f"after {seconds:.2f} s", partial(kill, runs, seconds, hosts)


def kill(runs: Runs, seconds: float, hosts: int) -> Problem:
    workdir = runs.new()
    processes = start(workdir, hosts)
    time.sleep(seconds)
    for process in processes:
        process.kill()
    finish(processes)
    return runs.go_on(workdir, hosts)


# Flipped bits


def flips(runs: Runs, count: int) -> Iterator[Trial]:
    half = runs.half_with_parts()
    paths = sorted(path for path in half.rglob("*") if path.is_file() and path.stat().st_size)
    for _ in range(count):
        path = runs.random.choice(paths)
        bit = runs.random.randrange(8 * path.stat().st_size)
        name = path.relative_to(half)
        yield f"bit {bit} of {name}", partial(flip, runs, name, bit)


def flip(runs: Runs, name: Path, bit: int) -> Problem:
    workdir = runs.copy_of_half()
    content = bytearray((workdir / name).read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (workdir / name).write_bytes(content)
    if name.parts[0] == "samples.npz.parts":
        status, lines = answer("sample", *sample_npz(runs.half(), workdir))
        if status:
            return refused(status, lines)
        is_same = all(map(np.array_equal, arrays_of(workdir / "samples.npz"), runs.samples()))
        return "" if is_same else "the samples differ"
    status, lines = answer("train", *RUN, "--workdir", workdir)
    if status or lines:
        return f"status {status}: {lines}"
    return runs.difference(workdir, but_metrics=name.name == "metrics.jsonl")


# Stops

# A phase, a function of it, and which of its calls is meant
PHASES = {
    "import": ("flax/nnx/__init__.py", "<module>", 1),
    "grid": ("dit/generation.py", "make_draw.<locals>.draw", 1),
    "save": ("dit/checkpoint.py", "Checkpoints._make_room", 2),
    "compile": ("train.py", "lower_train_step", 1),
    "data": ("dit/data.py", "open_dataset", 1),
    "step": ("dit/sharding.py", "place_batch", 7),
    "evaluation": ("dit/generation.py", "make_draw.<locals>.draw", 1),
}

# Runs sys.argv[4:] and sends itself SIGTERM at the nth call of a function of a file
TOLD = """
import os, runpy, signal, sys, threading

file, function, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])

def watch(frame, event, argument):
    global calls
    code = frame.f_code
    if event == "call" and code.co_qualname == function and code.co_filename.endswith(file):
        calls -= 1
        if calls == 0:
            print("told", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

threading.setprofile(watch)
sys.setprofile(watch)
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Some products of the pixels in place of Inception, for evaluations that take no minutes
STAND_IN = """
import jax, numpy
from dit.imagenet import fid

sizes = fid.POOL_FEATURES, fid.SPATIAL_FEATURES, logits = 13, 11, 7
matrices = [numpy.random.default_rng(n).normal(size=(64, n)).astype("float32") for n in sizes]

def features(matrices, images):
    x = images.reshape(len(images), -1) / 127.5 - 1
    return fid.Features(*(x @ matrix for matrix in matrices))

fid.load_inception = lambda file: jax.tree_util.Partial(features, matrices)
"""
EVALUATION = """--eval.every 20 --eval.inception x --eval.num-samples 64 --eval.batch-size 8
    --eval.steps 3""".split()


def stops(runs: Runs, count: int) -> Iterator[Trial]:
    cases = [(phase, hosts) for hosts in (1, 2) for phase in PHASES]
    for phase, hosts in cases[:count]:
        yield f"in {phase}, {hosts} process(es)", partial(stop, runs, phase, hosts)


def stop(runs: Runs, phase: str, hosts: int) -> Problem:
    workdir = runs.new()
    limit = max(STOP_SECONDS, STOP_SHARE * runs.undisturbed(hosts)[1])
    file, function, calls = PHASES[phase]
    is_evaluation = phase == "evaluation"
    program = ["-c", STAND_IN + TOLD if is_evaluation else TOLD, file, function]
    programs = [[*program, 0, "train.py"]] * (hosts - 1) + [[*program, calls, "train.py"]]
    processes = start_programs(workdir, programs, EVALUATION if is_evaluation else ())
    if not any("told" in line for line in processes[-1].stdout):
        return f"{function} was not called: {finish(processes)}"
    is_early = hosts == 1 and phase in ("import", "data", "compile")
    expected = 128 + signal.SIGTERM if is_early else 0
    for status, _, err in finish(processes, limit):
        if status != expected or len(lines_of(err)) > 1:
            return f"status {status}: {err}"
    return runs.go_on(workdir, hosts)


# Hosts that are lost


def peers(runs: Runs, count: int) -> Iterator[Trial]:
    runs.undisturbed(2)
    cases = [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)]
    for number, host in cases[:count]:
        yield f"{number.name} to host {host} of 2", partial(lose, runs, number, host)


def lose(runs: Runs, number: signal.Signals, host: int) -> Problem:
    workdir = runs.new()
    processes = start(workdir, 2)
    wait_for(workdir / "checkpoints/10", processes[0])
    processes[host].send_signal(number)
    try:
        [(status, _, err)] = finish([processes[1 - host]], PEER_SECONDS)
    finally:
        processes[host].kill()
        processes[host].communicate()
    if status == 0 or "the same command goes on" not in err:
        return f"status {status}: {err}"
    return runs.go_on(workdir, 2)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.001)


# Disks


def disks(runs: Runs, count: int) -> Iterator[Trial]:
    cases = {"no file of 50 kB": limited_files, "the folder is moved away": moved_away}
    if can_mount(runs.new()):
        cases |= {"fills up": fills_up, "is too small": too_small, "is read-only": read_only}
    else:
        print("disks: no rights to mount any; files are limited instead")
    for name, case in list(cases.items())[:count]:
        yield name, partial(case, runs)


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A small disk of its own at a new folder."""
    folder.mkdir()
    mount(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def mount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", *options, folder], check=True, capture_output=True)


def can_mount(folder: Path) -> bool:
    with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
        with disk(folder, "1m"):
            return True
    return False


def ended(workdir: Path, expected: int, program: tuple = ("train.py",)) -> Problem:
    """What is wrong with the end of a run without a disk."""
    return judge_end(finish(start_programs(workdir, [program])), expected)


def judge_end(answers: list[tuple[int, str, str]], expected: int) -> Problem:
    [(status, _, err)] = answers
    lines = lines_of(err)
    is_right = status == expected and len(lines) <= 2
    return "" if is_right else f"status {status}: {lines}"


def fills_up(runs: Runs) -> Problem:
    runs.undisturbed(1)
    with disk(runs.new(), "8m") as folder:
        workdir, ballast = folder / "run", folder / "ballast"
        [process] = start(workdir)
        wait_for(workdir / "checkpoints/5", process)
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        problem = judge_end(finish([process]), 1)
        ballast.unlink()
        return problem or runs.go_on(workdir)


def too_small(runs: Runs) -> Problem:
    with disk(runs.new(), "1m") as folder:
        problem = ended(folder / "run", 2)
        mount(folder, "-o", "remount,size=64m")
        return problem or runs.go_on(folder / "run")


def read_only(runs: Runs) -> Problem:
    with disk(runs.new(), "64m") as folder:
        mount(folder, "-o", "remount,ro")
        problem = ended(folder / "run", 2)
        mount(folder, "-o", "remount,rw")
        return problem or runs.go_on(folder / "run")


LIMITED = """
import resource, runpy, sys

resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def limited_files(runs: Runs) -> Problem:
    runs.undisturbed(1)
    workdir = runs.new()
    problem = ended(workdir, 1, ("-c", LIMITED, "train.py"))
    return problem or runs.go_on(workdir)


def moved_away(runs: Runs) -> Problem:
    """As a network's disk that is lost: what it held is elsewhere, and whole."""
    runs.undisturbed(1)
    workdir = runs.new()
    [process] = start(workdir)
    wait_for(workdir / "checkpoints/10", process)
    elsewhere = workdir.rename(runs.new())
    problem = judge_end(finish([process]), 1)
    return problem or runs.go_on(elsewhere)


# Bad input


def inputs(runs: Runs, count: int) -> Iterator[Trial]:
    cases = bad_flags()
    for flag, value in runs.random.sample(cases, min(count, len(cases))):
        yield f"{flag} {value[:20]!r}", partial(give, runs, flag, value)


def give(runs: Runs, flag: str, value: str) -> Problem:
    """Trains for a step, unless the value is refused."""
    folder = runs.new()
    folder.mkdir()
    where = [] if flag in ("--name", "--train.workdir") else ["--workdir", "run"]
    with contextlib.chdir(folder):
        argv = [*RUN, "--train.steps", 1, "--train.sample-every", 1, *where, flag, value]
        status, lines = answer("train", *argv)
    if status == 2:
        return refused(status, lines) or ("written" if any(folder.iterdir()) else "")
    has_diverged = status == 1 and len(lines) == 1
    return "" if has_diverged or (status, lines) == (0, []) else f"status {status}: {lines}"


def files(runs: Runs, count: int) -> Iterator[Trial]:
    cases = [(f"{path}: {str(change)[:40]}", damage, path, change) for path, change in CHANGES]
    cases += [(what, offer, *case) for what, *case in OFFERS]
    for case, trial, *args in cases[:count]:
        yield case, partial(trial, runs, *args)


def damage(runs: Runs, path: str, change: bytes | tuple[bytes, bytes] | None) -> Problem:
    """Samples from a run with a file changed, then goes on with it."""
    workdir = runs.copy_of_half()
    newest = intact.step_folder(workdir, HALF)
    changed = workdir / path.replace("NEWEST", f"checkpoints/{HALF}")
    if change is None:
        shutil.rmtree(changed) if changed.is_dir() else changed.unlink()
    else:
        changed.parent.mkdir(exist_ok=True)
        is_content = isinstance(change, bytes)
        changed.write_bytes(change if is_content else changed.read_bytes().replace(*change))
    if newest.is_dir() and changed.name != "checksums.json":
        (newest / "checksums.json").write_text(json.dumps(intact.checksums(newest)))

    picture = workdir / "x.png"
    status, lines = answer(
        "sample", workdir, "--per-class", 1, "--steps", 2, "--batch-size", 4, "--out", picture
    )
    is_refused = not refused(status, lines)
    if picture.exists() == is_refused or status not in (0, 2):
        return f"sample.py: status {status}: {lines}"
    status, lines = answer("train", *RUN, "--workdir", workdir)
    if status == 0 and not lines:
        return runs.difference(workdir, but_metrics=changed.name == "metrics.jsonl")
    return refused(status, lines)


def offer(runs: Runs, name: str, content: bytes, command: list[str]) -> Problem:
    folder = runs.new()
    folder.mkdir()
    (folder / name).write_bytes(content)
    words = {"FILE": name, "RUN": str(runs.half())}
    with contextlib.chdir(folder):
        problem = refused(*answer(*[words.get(word, word) for word in command]))
    return problem or ("written" if len(list(folder.iterdir())) > 1 else "")


# The whole


def main() -> None:
    options = cli.parse(Options, sys.argv[1:], "benchmarks/survive.py", __doc__)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with the runs
    cli.use_compilation_cache()
    parts = {
        "kills": kills,
        "kills_of_two": partial(kills, hosts=2),
        "flips": flips,
        "stops": stops,
        "peers": peers,
        "disks": disks,
        "inputs": inputs,
        "files": files,
    }
    counts, rows = dataclasses.asdict(options), []
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        for name in options.only or parts:
            began, problems, tried = time.monotonic(), 0, 0
            runs.random.seed(options.seed)
            for case, trial in parts[name](runs, counts[name]):
                tried += 1
                problem = try_out(trial)
                if problem:
                    problems += 1
                    print(f"{name}: {case}: {problem}", flush=True)
            seconds = time.monotonic() - began
            rows.append((name, tried, tried - problems, f"{seconds:.0f}"))
            print(f"{name}: {tried - problems} of {tried} survived, {seconds:.0f} s", flush=True)
    print("\n| part | tried | survived | seconds |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    sys.exit(any(tried > survived for _, tried, survived, _ in rows))


def try_out(trial: Callable[[], Problem]) -> Problem:
    try:
        return trial()
    except Exception as error:  # of the trial itself, or of what it left behind
        return f"{type(error).__name__}: {one_line(error)[:300]}"


if __name__ == "__main__":
    with cli.exit_status("benchmarks/survive.py"):
        main()
