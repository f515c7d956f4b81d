"""Seconds before a command does its work: python benchmarks/startup.py [--runs 3] [--json PATH]

Prints medians over a few runs: of `--help` and of one refusal for each command, of importing jax
alone, for scale, and of `python train.py digits` until its first step, with no compiled program in
the cache (cold) and with all of them (warm). Everything that it writes lies in temporary folders.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from table import make_row, report

from dit import cli
from dit.config import PositiveInt

ROOT = Path(__file__).resolve().parent.parent
TRAIN = "train.py digits --train.steps 1 --train.log-every 1 --train.sample-every 0".split()

# A command, and arguments that it refuses; RUN is a folder that train.py has written
REFUSALS = {
    "train.py": "digist",
    "plan.py": "digits --train.batch-size 0",
    "sample.py": "RUN --classes eleven",
    "-m dit.identity": "digits --model.depht 3",
    "-m dit.imagenet.fid": "x.npz --reference cifar10",
    "-m dit.imagenet.latents": "cifar10 --vae vae --size 0 --out latents",
    "-m dit.imagenet.convert": "x.pt out --to offical",
}


@dataclass(frozen=True)
class Options:
    runs: PositiveInt = 3  # runs of each command
    json: str | None = None  # file to append the table's rows to


class Start(NamedTuple):
    tracing: float  # seconds, as train.py prints them
    compiling: float
    first_step: float  # seconds from the command to the line of its first step


def environment(cache: Path) -> dict[str, str]:
    """This process's environment, with another folder for compiled programs."""
    variables = dict(os.environ, XDG_CACHE_HOME=str(cache))
    variables.pop("JAX_COMPILATION_CACHE_DIR", None)  # it would be used instead
    return variables


def seconds(argv: list[str], expected_status: int, cache: Path) -> float:
    """How long a command takes. Exits if the command's own exit status is not the expected one."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=environment(cache), capture_output=True, text=True
    )
    taken = time.perf_counter() - start
    check_status(argv, done.returncode, expected_status, done.stderr)
    return taken


def start_training(workdir: Path, cache: Path) -> Start:
    """Runs `train.py digits` for one step."""
    argv = [*TRAIN, "--workdir", str(workdir)]
    start = time.perf_counter()
    tracing = compiling = first_step = math.nan
    with subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("traced in "):  # traced in 1.2 s, compiled in 0.4 s
                tracing, compiling = map(float, re.findall(r"[\d.]+", line))
            if line.startswith("step "):
                first_step = time.perf_counter() - start
    check_status(argv, process.returncode, 0, "")
    return Start(tracing, compiling, first_step)


def check_status(argv: list[str], status: int, expected: int, stderr: str) -> None:
    if status != expected:
        command = " ".join(argv)
        sys.exit(f"python {command}: exit status {status}, not {expected}\n{stderr}")


def measure_training(runs: int, folder: Path) -> dict[str, list[Start]]:
    """The cold and the warm starts of training; leaves a run's folder and a filled cache."""
    starts = {"cold": [], "warm": []}
    for n in range(runs):
        for name, found in starts.items():
            found.append(start_training(folder / f"{name}-{n}", folder / f"cache-{n}"))
    return starts


def measure_commands(runs: int, run_folder: Path, cache: Path) -> dict[str, list[float]]:
    """The seconds of `--help` and of a refusal for each command, and of importing jax alone."""
    taken = {}
    for command, arguments in REFUSALS.items():
        argv = command.split()
        refused = argv + arguments.replace("RUN", str(run_folder)).split()
        taken[f"{command} --help"] = [seconds([*argv, "--help"], 0, cache) for _ in range(runs)]
        taken[f"{command} {arguments}"] = [seconds(refused, 2, cache) for _ in range(runs)]
    taken["import jax"] = [seconds(["-c", "import jax"], 0, cache) for _ in range(runs)]
    return taken


def main() -> None:
    options = cli.parse(Options, sys.argv[1:], "benchmarks/startup.py", __doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training = measure_training(options.runs, folder)
        commands = measure_commands(options.runs, folder / "cold-0", folder / "cache-0")
    rows = [make_row("startup", case, "seconds", taken) for case, taken in commands.items()]
    for name, starts in training.items():
        for stage, taken in zip(Start._fields, zip(*starts, strict=True), strict=True):
            case = f"train.py digits, {name}: {stage.replace('_', ' ')}"
            rows.append(make_row("startup", case, "seconds", taken))
    report(rows, options.json)


if __name__ == "__main__":
    with cli.exit_status("benchmarks/startup.py"):
        main()
