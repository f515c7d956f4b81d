"""Commands as processes: one host or several, which find each other as Slurm's do."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_job() -> int:
    """A Slurm job whose port, which JAX derives from its number, is free."""
    for job in range(os.getpid(), os.getpid() + 4096):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", job % 4096 + 61440)) != 0:
                return job
    raise AssertionError("no port is free")


def start_hosts(commands: list[list], devices: int = 1) -> list[subprocess.Popen]:
    """`python *command` for each command, as one host of so many devices each."""
    job, count = free_job(), len(commands)
    processes = []
    for rank, command in enumerate(commands):
        variables = {
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
            "JAX_NUM_CPU_DEVICES": devices,
            "PYTHONPATH": ROOT,
            "SLURM_JOB_ID": job,
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": count,
            "SLURM_STEP_NUM_TASKS": count,
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": 0,
        }
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=os.environ | {name: str(value) for name, value in variables.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    return processes


def finish(processes: list[subprocess.Popen], timeout: float = 900) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each."""
    try:
        printed = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, printed, strict=True)]
