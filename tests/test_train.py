"""The command, end to end, on the embedded digits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, tiny_config
from PIL import Image

import train
from dit import checkpoint
from dit import config as dit_config
from dit.state import abstract_state
from dit.sharding import make_mesh

ROOT = Path(__file__).resolve().parent.parent


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def arrays(workdir: Path, step: int) -> list[np.ndarray]:
    """Parameters, average, optimizer state and step of a checkpoint."""
    config = checkpoint.stored_config(workdir, step)
    manager = checkpoint.Checkpoints(workdir, 9, 0)
    state = manager.restore(step, abstract_state(config, make_mesh(config.mesh, config.train.batch_size)))
    manager.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """20 steps in one go, with sample grids."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train.main([*TINY, "--workdir", str(workdir), "--train.steps", "20", "--train.sample-every", "10", "--train.checkpoint-every", "10"])
    return workdir


def test_a_run_leaves_what_it_promises(whole_run):
    names = {path.relative_to(whole_run).as_posix().split(".out.")[0] for path in whole_run.glob("*")}
    assert names == {"config.json", "metrics.jsonl", "events", "samples", "loss.png", "checkpoints"}
    assert sorted(p.name for p in (whole_run / "samples").iterdir()) == ["0000010.png", "0000020.png"]
    assert Image.open(whole_run / "samples/0000020.png").size[0] > 8 * 64 and Image.open(whole_run / "loss.png").size[0] > 100
    found = rows(whole_run)
    assert [row["step"] for row in found] == list(range(1, 21))
    assert found[-1].keys() >= {"loss", "mse", "vb", "grad_norm", "learning_rate", "images_per_second", "tflops_per_second"}
    assert found[0]["mse"] == pytest.approx(1, abs=0.2), "the zero output predicts no noise"
    config = checkpoint.stored_config(whole_run, 20)
    assert config.data.class_names == tuple("0123456789") and config.train.steps == 20
    assert checkpoint.stored_position(whole_run, 20) == {"next_batch": 20, "num_examples": 1797}


def test_ten_steps_a_kill_and_ten_more_equal_twenty(whole_run, tmp_path):
    command = [sys.executable, "train.py", *TINY, "--workdir", str(tmp_path), "--train.steps", "1000000", "--train.checkpoint-every", "10",
               "--train.keep-last", "1000000"]
    variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints/10/checksums.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for folder in (tmp_path / "checkpoints").iterdir():
        if folder.name != "10":
            shutil.rmtree(folder)
    flags = [*TINY, "--workdir", str(tmp_path), "--train.steps", "20", "--train.checkpoint-every", "10"]
    state = train.train(dit_config.from_command_line(flags, "train.py", ""))
    for a, b, live in zip(arrays(whole_run, 20), arrays(tmp_path, 20), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, live)
    for a, b in zip(rows(whole_run), rows(tmp_path), strict=True):  # the same batches in the same order, each once
        assert a["step"] == b["step"] and a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]


def test_a_finished_run_is_left_alone_and_a_longer_one_goes_on(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    train.main([*TINY, "--workdir", str(tmp_path / "run"), "--train.steps", "20"])
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 21))
    train.main([*TINY, "--workdir", str(tmp_path / "run"), "--train.steps", "22"])
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 23))


@pytest.mark.parametrize("flags, words", [
    (["--model.depth", "3"], "model.depth: 3, where 2 is stored"),
    (["--train.seed", "1"], "train.seed: 1, where 0 is stored"),
    (["--optim.learning-rate", "0.5"], "optim.learning_rate: 0.5, where 0.002 is stored"),
])
def test_a_workdir_of_another_run_is_refused_by_the_field(refused, whole_run, flags, words):
    before = sorted(p.as_posix() for p in whole_run.rglob("*"))
    assert words in refused(train.main, *TINY, "--workdir", whole_run, "--train.steps", "30", *flags)
    assert sorted(p.as_posix() for p in whole_run.rglob("*")) == before


@pytest.mark.parametrize("hurt", ["truncated", "flipped", "missing"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(whole_run, tmp_path, capsys, hurt):
    workdir = tmp_path / "run"
    shutil.copytree(whole_run, workdir)
    largest = max((p for p in (workdir / "checkpoints/20/optimizer").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    if hurt == "truncated":
        largest.write_bytes(data[: len(data) // 2])
    elif hurt == "flipped":
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    else:
        largest.unlink()
    train.main([*TINY, "--workdir", str(workdir), "--train.steps", "20", "--train.checkpoint-every", "10"])
    said = capsys.readouterr().out
    words = {"flipped": "damaged"}.get(hurt, hurt)
    assert f"is {words}; going back to checkpoint 10" in said and "checkpoint 20: optimizer/" in said
    for a, b in zip(arrays(whole_run, 20), arrays(workdir, 20), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [p.name for p in (workdir / "checkpoints").glob("broken-20-*")], "the damaged checkpoint is kept aside"


def test_a_run_killed_within_its_first_checkpoint_starts_over(tmp_path):
    (tmp_path / "checkpoints/10.orbax-checkpoint-tmp/ema").mkdir(parents=True)
    train.main([*TINY, "--workdir", str(tmp_path), "--train.steps", "1"])
    assert checkpoint.newest_intact(tmp_path) == (1, {})


@pytest.mark.parametrize("content", [None, "", '{"ema/_METADATA": ['])
def test_checksums_that_are_missing_or_damaged_make_the_checkpoint_damaged(whole_run, tmp_path, content):
    shutil.copytree(whole_run, tmp_path / "run")
    path = tmp_path / "run/checkpoints/20/checksums.json"
    path.unlink() if content is None else path.write_text(content)
    assert checkpoint.newest_intact(tmp_path / "run") == (10, {20: "checksums.json is missing or damaged"})


def test_the_bar_shows_loss_and_rates(tmp_path, monkeypatch):
    from dit import log

    monkeypatch.setattr(log.sys.stderr, "isatty", lambda: True, raising=False)
    told = log.Log(tiny_config(train=dict(workdir=str(tmp_path))), 0)
    told.metrics(1, {"loss": 1.0, "mse": 1.0, "vb": 1.0, "images_per_second": 1234.0, "tflops_per_second": 0.5, "mfu": 0.41})
    told.step(2, 0.25)
    assert told.bar.postfix == "loss 0.2500  1,234 images/s  0.5 TFLOP/s  MFU 41.0%" and told.bar.n == 2
    told.close()


def test_without_an_intact_checkpoint_nothing_is_started_over(refused, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    for step in (10, 20):
        (tmp_path / f"run/checkpoints/{step}/ema/_METADATA").unlink()
    line = refused(train.main, *TINY, "--workdir", tmp_path / "run", "--train.steps", "20")
    assert "should hold an intact checkpoint" in line and "20: ema/_METADATA is missing" in line


def test_checkpoints_keep_the_last_k_and_every_nth(tmp_path):
    train.main([*TINY, "--workdir", str(tmp_path), "--train.steps", "12", "--train.checkpoint-every", "2", "--train.keep-last", "2",
                "--train.keep-every", "4"])
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 8, 10, 12]


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint(refused, tmp_path):
    line = refused(train.main, *TINY, "--workdir", tmp_path, "--train.steps", "50", "--train.checkpoint-every", "1",
                   "--optim.learning-rate", "1e30")
    step = int(line.split(" at step ")[1].split()[0])
    assert "should be finite" in line and step > 1 and f"checkpoint {step - 1} is kept" in line
    assert checkpoint.newest_intact(tmp_path)[0] == step - 1 == rows(tmp_path)[-1]["step"]
    assert all(np.isfinite(a).all() for a in arrays(tmp_path, step - 1))


def test_sigterm_saves_and_stops(tmp_path):
    command = [sys.executable, "train.py", *TINY, "--workdir", str(tmp_path), "--train.steps", "1000000"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.terminate()
    said, _ = process.communicate(timeout=60)
    step, _ = checkpoint.newest_intact(tmp_path)
    assert process.returncode == 0 and f"stopped at step {step}; the same command goes on from here" in said and step < 1_000_000


def test_two_processes_make_the_run_of_one_and_only_the_first_speaks(whole_run, tmp_path):
    """Two hosts in small: two processes of one CPU device each, found by the variables that Slurm sets, parameters spread over both."""
    def start(rank: int, steps: int) -> subprocess.Popen:
        slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
                 "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "train.py", *TINY, "--workdir", str(tmp_path), "--train.steps", str(steps), "--mesh.fsdp", "2",
                   "--mesh.distributed", "True"]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | slurm, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for steps in (2, 3):  # a run, and its resumption
        answers = [process.communicate(timeout=240) for process in [start(rank, steps) for rank in (0, 1)]]
        assert f"step {steps}/{steps}" in answers[0][0], answers
        assert "step" not in answers[1][0] and "parameters" not in answers[1][0]
    for a, b in zip(rows(tmp_path), rows(whole_run)[:3], strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_a_workdir_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(train.main, *TINY, "--workdir", tmp_path / "file/run")
    assert "train.workdir:" in line and "should be a folder that can be written" in line


def test_a_python_file_is_as_good_as_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("""
from dit.config import *
config = Config(name="mine", model=Model(hidden_size=20, depth=1, num_heads=5),
                train=Train(batch_size=8, steps=2, dtype="float32", sample_every=0))
""")
    train.main(["mine.py"])
    assert checkpoint.newest_intact(tmp_path / "runs/mine")[0] == 2


def test_only_process_0_speaks(tmp_path, monkeypatch, capsys):
    from dit.log import Log

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = Log(tiny_config(train=dict(workdir=str(tmp_path))), 0)
    log.say("hello")
    log.step(1, 0.5)
    log.metrics(1, {"loss": 1.0, "images_per_second": 1.0, "tflops_per_second": 1.0})
    log.grid(1, np.zeros((1, 8, 8, 1), np.uint8), ["0"])
    log.close()
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_meter_counts_images_flops_and_the_share_of_the_peak(monkeypatch):
    from dit import log

    clock = iter([0.0, 12.0, 12.0])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(clock))
    meter = log.Meter(flops_per_image=3e12)
    meter.peak = 10e12
    meter.images += 40
    meter.skip(4.0)  # of the 12 seconds, 4 were sampling
    reading = meter.read()
    assert reading == {"images_per_second": 5.0, "tflops_per_second": 15.0, "mfu": 15e12 / (10e12 * 8)}
    assert log.peak_flops("NVIDIA H200") == 989e12 and log.peak_flops("TPU v5 lite") == 197e12 and log.peak_flops("cpu") is None
