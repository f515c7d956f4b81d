"""What plan.py says of a run, with and without a compiler for its chips."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import plan
from dit import cli

PARAMETERS = 674_834_720  # of DiT-XL/2
ROOT = Path(plan.__file__).parent


def run_plan(*argv: str) -> int:
    """What `python plan.py *argv` does; returns the exit status."""
    with cli.exit_status("plan.py"):
        return plan.run(plan.parse(list(argv)))


def test_plan_counts_parameters_cost_and_bytes_without_any_chip(capsys):
    assert run_plan("imagenet256_xl2", "--mesh.fsdp", "8") == 0
    output = capsys.readouterr().out
    assert f"{PARAMETERS:,} parameters" in output
    assert "118.62 G multiply-adds" in output
    assert "182.2 TFLOP a step" in output
    assert "data 1 x fsdp 8" in output
    share = float(output.split(" GiB of state a device")[0].split()[-1])
    copies = 4  # parameters, their average, and two moments
    assert share == pytest.approx(copies * 4 * PARAMETERS / 8 / 2**30, rel=0.01)


def test_help_lists_the_topology_and_needs_no_jax(tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('jax was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "plan.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--topology" in done.stdout
    assert "--train.batch-size" in done.stdout


def test_what_is_no_topology_is_refused(refused):
    line = refused(run_plan, "imagenet256_xl2", "--topology", "v9e:2x4")
    assert "--topology: 'v9e:2x4' should be a TPU topology, such as v5e:2x4" in line
    assert "--topology" in refused(run_plan, "imagenet256_xl2", "--topology")


def test_a_batch_that_the_topology_does_not_divide_is_refused(refused):
    line = refused(run_plan, "digits", "--train.batch-size", "12")
    assert "train.batch_size: 12 should be a multiple of the 8 devices" in line


@pytest.mark.parity
def test_plan_compiles_for_chips_that_are_not_there(capsys):
    assert run_plan("cifar10_tiny", "--topology", "v5e:2x4", "--mesh.fsdp", "2") == 0
    output = capsys.readouterr().out
    assert "8 v5e:2x4 device(s), data 4 x fsdp 2" in output
    assert "it compiles: " in output
    assert "of 16 GiB a device" in output


@pytest.mark.parity
def test_a_run_that_does_not_fit_has_exit_status_1(capsys):
    argv = ["cifar10_tiny", "--topology", "v5e:2x4", "--train.batch-size", "262144"]
    assert run_plan(*argv, "--model.remat", "False") == 1
    assert "does not fit: RESOURCE_EXHAUSTED" in capsys.readouterr().out
