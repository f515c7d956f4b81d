"""The command, end to end, on the embedded digits."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, TINY_FLOW, largest_difference, run_sample, run_train, tiny_config
from on_hosts import signal_at
from PIL import Image

import train
from dit import checkpoint, dry_run, generation, intact, run, writers
from dit.config import Stopped
from dit.data import InMemory
from dit.sharding import make_mesh
from dit.signals import StopRequest
from dit.state import abstract_state

ROOT = Path(__file__).resolve().parent.parent


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def arrays(workdir: Path, step: int) -> list[np.ndarray]:
    """Step, parameters, average and optimizer state of a checkpoint."""
    config = intact.stored_config(workdir, step)
    state = checkpoint.restore(workdir, step, abstract_state(config, make_mesh(config)))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def files(workdir: Path) -> dict[str, bytes]:
    paths = sorted(path for path in workdir.rglob("*") if path.is_file())
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


def start(*argv, **variables) -> subprocess.Popen:
    """`python train.py *argv` in a process of its own."""
    command = [sys.executable, "train.py", *[str(a) for a in argv]]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | variables
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """20 steps in one go, with sample grids."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    options = "--train.steps 20 --train.sample-every 10 --train.checkpoint-every 10".split()
    run_train(*TINY, "--workdir", workdir, *options)
    return workdir


# A run


def test_a_run_leaves_what_it_promises(whole_run):
    names = {path.name.split(".out.")[0] for path in whole_run.iterdir()}
    files = {"config.json", "metrics.jsonl", "events", "loss.png", ".lock"}
    assert names == files | {"samples", "checkpoints"}
    grids = sorted(path.name for path in (whole_run / "samples").iterdir())
    assert grids == ["0000010.png", "0000020.png"]
    assert Image.open(whole_run / "samples/0000020.png").size[0] > 8 * 64
    assert Image.open(whole_run / "loss.png").size[0] > 100
    assert intact.steps(whole_run) == [20, 10]

    lines = rows(whole_run)
    assert [row["step"] for row in lines] == list(range(1, 21))
    names = "loss mse vb grad_norm learning_rate data_seconds images_per_second tflops_per_second"
    assert lines[-1].keys() >= set(names.split())
    assert lines[0]["mse"] == pytest.approx(1, abs=0.2), "the zero output predicts no noise"
    config = intact.stored_config(whole_run, 20)
    assert config.train.steps == 20
    assert json.loads((whole_run / "config.json").read_text()) == json.loads(config.to_json())
    facts = {"class_names": list("0123456789"), "num_examples": 1797}
    assert intact.stored_dataset(whole_run, 20) == facts


@pytest.mark.slow
def test_a_run_by_flow_matching_is_none_by_ddpm(refused, tmp_path):
    run_train(*TINY_FLOW, "--workdir", tmp_path, "--train.steps", "2")
    first, second = rows(tmp_path)
    assert first["loss"] == pytest.approx(1.5, abs=0.6), "the zero output predicts no image"
    assert not {"mse", "vb"} & second.keys()
    assert Image.open(tmp_path / "loss.png").size[0] > 100
    assert intact.stored_config(tmp_path, 2).objective.name == "flow"
    line = refused(run_train, *TINY, "--workdir", tmp_path)
    assert "objective.name: 'ddpm', where 'flow' is stored in " in line
    run_train(*TINY_FLOW, "--workdir", tmp_path, "--train.steps", "3")
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def watch_stream(monkeypatch) -> list:
    """The streams of batches that runs make."""
    streams = []
    before = train.batches

    def batches(*args):
        streams.append(before(*args))
        return streams[-1]

    monkeypatch.setattr(train, "batches", batches)
    return streams


def test_data_is_read_while_the_state_is_made_and_no_longer_than_the_run(tmp_path, monkeypatch):
    streams = watch_stream(monkeypatch)
    is_read = threading.Event()
    before = train.first_state
    read = InMemory.read

    def noted(records, indices):
        is_read.set()
        return read(records, indices)

    def first_state(*args):
        assert is_read.wait(timeout=10)
        return before(*args)

    monkeypatch.setattr(InMemory, "read", noted)
    monkeypatch.setattr(train, "first_state", first_state)
    run_train(*TINY, "--workdir", tmp_path, "--train.steps", "1")
    (stream,) = streams
    with pytest.raises(ValueError, match="closed"):
        next(stream)


def test_data_seconds_are_the_mean_time_that_a_step_waited_for_its_batch(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    before = train.batches

    def slow_batches(*args):
        for seconds, batch in zip([3, 5, 7, 1], before(*args), strict=False):
            clock.now += seconds
            yield batch

    monkeypatch.setattr(train, "batches", slow_batches)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock.now)
    options = ["--train.steps", "4", "--train.log-every", "2"]
    run_train(*TINY, *options, "--workdir", tmp_path)
    assert [row["data_seconds"] for row in rows(tmp_path)] == [4, 4]


@pytest.mark.slow
def test_a_python_file_is_as_good_as_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("""
from dit.config import *

config = Config(
    name="mine",
    model=Model(hidden_size=20, depth=1, num_heads=5),
    train=Train(batch_size=8, steps=2, dtype="float32", sample_every=0),
)
""")
    run_train("mine.py")
    assert intact.newest(tmp_path / "runs/mine") == (2, [])


@pytest.mark.parametrize(
    "step, every, due",
    [(4, 4, True), (8, 4, True), (6, 4, False), (10, 4, True), (6, 0, False), (10, 0, True)],
)
def test_what_is_done_every_n_steps_is_done_at_the_last_one_too(step, every, due):
    assert run.is_due(step, every, 10) == due


def test_a_block_that_there_is_not_is_refused_before_anything_is_written(refused, tmp_path):
    flags = ["--workdir", tmp_path / "run", "--model.conditioning", "film"]
    line = refused(run_train, *TINY, *flags)
    words = "'film' should be one of adaln_zero, adaln, cross_attention, in_context"
    assert line == f"train.py: model.conditioning: {words}"
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "file").touch()
    line = refused(run_train, *TINY, "--workdir", tmp_path / "file/run")
    assert "train.workdir:" in line
    assert "should be a folder that can be written" in line


# What is measured and drawn is the average


@pytest.fixture(scope="module")
def spied_run(tmp_path_factory) -> tuple[Path, list, list]:
    """A workdir with every checkpoint, and the models that were measured and drawn on the way."""
    measured, drawn = [], []

    def make_evaluation(config, vae, mesh, check_stop):
        def evaluate(model):
            measured.append(jax.device_get(model))
            return {"fid": float(len(measured))}

        return evaluate

    def make_grid_sampler(config, vae, dataset, mesh, check_stop):
        def draw_grid(model):
            drawn.append(jax.device_get(model))
            return np.zeros((20, 8, 8, 1), np.uint8), list(dataset.class_names)

        return draw_grid

    workdir = tmp_path_factory.mktemp("runs") / "spied"
    every_step = dict(steps=5, checkpoint_every=1, keep_last=9, log_every=100)
    config = tiny_config(
        train=every_step | dict(workdir=str(workdir), sample_every=3),
        eval=dict(every=2, inception="x"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit.run.make_evaluation", make_evaluation)
        patch.setattr(generation, "make_grid_sampler", make_grid_sampler)
        train.train(config)
    return workdir, measured, drawn


def assert_averages(models: dict, workdir: Path) -> None:
    """Holds the model of each step against the two of its checkpoint."""
    for step, model in models.items():
        average, _ = checkpoint.load(workdir, step=step)
        last, _ = checkpoint.load(workdir, ema=False, step=step)
        assert largest_difference(average, last) > 1e-5
        assert largest_difference(model, average) == 0


@pytest.mark.slow
def test_evaluation_is_of_the_average_and_is_logged(spied_run):
    workdir, measured, _ = spied_run
    assert_averages(dict(zip([2, 4, 5], measured, strict=True)), workdir)
    scores = [(row["step"], row["fid"]) for row in rows(workdir) if "fid" in row]
    assert scores == [(2, 1), (4, 2), (5, 3)]


@pytest.mark.slow
def test_grids_are_drawn_from_the_average(spied_run):
    workdir, _, drawn = spied_run
    assert_averages(dict(zip([3, 5], drawn, strict=True)), workdir)
    grids = sorted(path.name for path in (workdir / "samples").iterdir())
    assert grids == ["0000003.png", "0000005.png"]
    assert Image.open(workdir / "samples/0000003.png").height == 10 * 66 + 2


def test_neither_is_done_where_it_is_not_asked_for(tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError

    monkeypatch.setattr(run, "make_evaluation", never)
    monkeypatch.setattr(generation, "make_grid_sampler", never)
    train.train(tiny_config(train=dict(workdir=str(tmp_path), steps=1)))
    assert list((tmp_path / "samples").iterdir()) == []


# What is said


@pytest.mark.slow
def test_a_run_ends_with_the_command_that_samples_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_train(*TINY, "--name", "my run", "--train.steps", "1", "--train.sample-every", "1")
    *_, grids, command = capsys.readouterr().out.splitlines()
    assert grids == "sample grids are in runs/my run/samples"
    python, script, *argv = shlex.split(command.removeprefix("more samples by: "))
    assert Path(shutil.which(python) or python).samefile(sys.executable)
    assert Path(script).samefile(ROOT / "sample.py")
    assert argv == ["runs/my run", "--guidance", "2"]
    run_sample(*argv, "--classes", "3", "--per-class", "1")
    assert Path("runs/my run/samples.png").exists()


def test_a_dry_run_tries_every_part_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    flags = ["--train.steps", "20", "--train.sample-every", "7", "--workdir", tmp_path / "run"]
    run_train(*TINY, *flags, "--dry-run")
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
    out = capsys.readouterr().out
    for words in [
        "optim: name 'adamw', learning_rate 0.004, ",
        " parameters, ",
        "traced in ",
        " GFLOP; a device holds ",
        "a checkpoint of ",
        " restored bit for bit in ",
        "a grid of 80 was drawn in ",
        "20 steps of ",
        f"are not counted, and nothing was written to {tmp_path / 'run'}\n",
    ]:
        assert words in out


@pytest.mark.slow
def test_a_dry_run_of_a_run_that_goes_on_reads_it_and_refuses_what_the_run_would(
    refused, whole_run, capsys
):
    before = files(whole_run)
    flags = ["--workdir", whole_run, "--train.steps", "30", "--dry-run"]
    run_train(*TINY, *flags)
    out = capsys.readouterr().out
    assert "from step 20\n" in out and "\n10 steps of " in out
    assert "train.seed: 1, where 0 is stored" in refused(run_train, *TINY, *flags, "--train.seed=1")
    words = "--dry-run: True should be on one host, without mesh.distributed"
    assert words in refused(run_train, *TINY, *flags, "--mesh.distributed")
    assert files(whole_run) == before


@pytest.mark.slow
def test_a_dry_run_finds_a_checkpoint_that_is_not_what_was_saved(tmp_path, monkeypatch, capsys):
    before = dry_run.first_state

    def other_bits(*args):
        state = before(*args)
        return dataclasses.replace(state, step=state.step + 1)

    monkeypatch.setattr(dry_run, "first_state", other_bits)
    with pytest.raises(SystemExit) as stop:
        run_train(*TINY, "--workdir", tmp_path, "--dry-run")
    assert stop.value.code == 1
    assert "was not restored as it was saved" in capsys.readouterr().err


# Going on


def test_ten_steps_a_kill_and_ten_more_equal_twenty(whole_run, tmp_path):
    endless = "--train.steps 1000000 --train.checkpoint-every 10 --train.keep-last 1000"
    options = ["--workdir", tmp_path, *endless.split()]
    process = start(*TINY, *options, JAX_NUM_CPU_DEVICES="8")
    deadline = time.monotonic() + 240
    written = tmp_path / "checkpoints/10/checksums.json"
    while not written.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for folder in (tmp_path / "checkpoints").iterdir():
        if folder.name != "10":
            shutil.rmtree(folder)

    options = "--train.steps 20 --train.checkpoint-every 10".split()
    state = run_train(*TINY, "--workdir", tmp_path, *options)
    live = jax.tree.leaves(state)
    for a, b, c in zip(arrays(whole_run, 20), arrays(tmp_path, 20), live, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    # the same batches in the same order, each once
    for a, b in zip(rows(whole_run), rows(tmp_path), strict=True):
        for name in ("step", "loss", "grad_norm"):
            assert a[name] == b[name]


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is_and_a_longer_one_goes_on(whole_run, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(whole_run, workdir)
    before = files(workdir)
    for steps in ("20", "7"):
        state = run_train(*TINY, "--workdir", workdir, "--train.steps", steps)
        words = "already at step 20; to go on, ask for more than --train.steps 20\n"
        assert capsys.readouterr().out == words
        for a, b in zip(arrays(whole_run, 20), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(a, b)
    assert files(workdir) == before
    run_train(*TINY, "--workdir", workdir, "--train.steps", "22")
    assert [row["step"] for row in rows(workdir)] == list(range(1, 23))
    assert rows(workdir)[:20] == rows(whole_run)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model.depth", "3"], "model.depth: 3, where 2 is stored"),
        (["--train.seed", "1"], "train.seed: 1, where 0 is stored"),
        (["--optim.beta1", "0.5"], "optim.beta1: 0.5, where 0.9 is stored"),
    ],
)
def test_a_workdir_of_another_run_is_refused_by_the_field(refused, whole_run, flags, words):
    before = files(whole_run)
    line = refused(run_train, *TINY, "--workdir", whole_run, "--train.steps", "30", *flags)
    assert words in line
    assert files(whole_run) == before


@pytest.mark.slow
def test_a_run_goes_on_with_what_steers_it_changed(whole_run, tmp_path, capsys):
    """Without a learning rate the parameters stay, and without a decay they are the average."""
    workdir = tmp_path / "run"
    shutil.copytree(whole_run, workdir)
    steering = "--optim.learning-rate 0 --optim.ema-decay 0 --optim.grad-clip 0.5".split()
    state = run_train(*TINY, "--workdir", workdir, *steering, "--train.steps", "22")
    out = capsys.readouterr().out
    assert "optim.learning_rate is now 0.0, and was 0.004\n" in out
    assert "train.steps is now 22, and was 20\n" in out
    before, _ = checkpoint.load(whole_run, ema=False)
    for model in (state.model, state.ema):
        assert largest_difference(jax.device_put(model, jax.devices()[0]), before) == 0
    (entry,) = json.loads((workdir / "config.json").read_text())["history"]
    assert entry["step"] == 20
    assert entry["optim.grad_clip"] == [None, 0.5]
    assert rows(workdir)[-1]["learning_rate"] == 0
    assert intact.stored_config(workdir, 22).optim.learning_rate == 0


@pytest.mark.slow
def test_a_finished_cosine_takes_the_advice_to_go_on(tmp_path, capsys):
    options = [*TINY, "--optim.schedule", "cosine", "--workdir", tmp_path, "--train.steps"]
    run_train(*options, 2)
    capsys.readouterr()
    run_train(*options, 2)
    advice = "already at step 2; to go on, ask for more than --train.steps 2\n"
    assert capsys.readouterr().out == advice
    run_train(*options, 3)
    assert "; it falls to 0 at step 3\n" in capsys.readouterr().out
    assert intact.steps(tmp_path) == [3, 2]


@pytest.mark.slow
def test_from_a_damaged_checkpoint_the_run_goes_back_and_makes_it_again(
    whole_run, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(whole_run, workdir)
    (workdir / "checkpoints/20/optimizer/_METADATA").unlink()
    options = "--train.steps 20 --train.checkpoint-every 10".split()
    run_train(*TINY, "--workdir", workdir, *options)
    out = capsys.readouterr().out
    assert "checkpoint 20: optimizer/_METADATA is missing; using 10\n" in out
    assert "from step 10\n" in out
    for a, b in zip(arrays(whole_run, 20), arrays(workdir, 20), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [row["loss"] for row in rows(workdir)] == [row["loss"] for row in rows(whole_run)]
    assert len(list((workdir / "checkpoints").glob("broken-20-*"))) == 1


def test_a_run_killed_within_its_first_checkpoint_starts_over(tmp_path):
    (tmp_path / "checkpoints/10.orbax-checkpoint-tmp/ema").mkdir(parents=True)
    run_train(*TINY, "--workdir", tmp_path, "--train.steps", "1")
    assert intact.newest(tmp_path) == (1, [])


# Stopping


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path, capsys
):
    options = "--train.steps 50 --train.checkpoint-every 1 --optim.learning-rate 1e30".split()
    with pytest.raises(SystemExit) as stop:
        run_train(*TINY, "--workdir", tmp_path, *options)
    assert stop.value.code == 1, "no bad input, which exits with 2"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("train.py: loss: ")
    assert "should be finite" in lines[0]
    assert f"the checkpoints in {str(tmp_path / 'checkpoints')!r} are from before it" in lines[0]
    step = int(lines[0].split(" at step ")[1].split()[0])
    assert step > 1
    assert intact.newest(tmp_path) == (step - 1, [])
    assert rows(tmp_path)[-1]["step"] == step - 1
    assert all(np.isfinite(array).all() for array in arrays(tmp_path, step - 1))
    for bad in range(2, step):  # of parameters that are finite, and too large
        shutil.rmtree(tmp_path / f"checkpoints/{bad}")
    run_train(*TINY, "--workdir", tmp_path, "--train.steps", step + 1)
    assert intact.newest(tmp_path) == (step + 1, [])


def test_no_checkpoint_is_made_of_a_state_that_is_not_finite(tmp_path, capsys):
    """The loss of step 2 is of the parameters before it, and step 1 has a learning rate of 0."""
    options = "--train.steps 5 --train.checkpoint-every 1 --optim.learning-rate 1e30".split()
    options += ["--optim.weight-decay", "1e30"]
    with pytest.raises(SystemExit) as stop:
        run_train(*TINY, "--workdir", tmp_path, *options)
    assert stop.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith("train.py: the state after step 2 should be finite")
    assert len(line.splitlines()) == 1
    assert intact.newest(tmp_path) == (1, [])


@pytest.mark.slow
@pytest.mark.parametrize("full_at, kept, status", [({2, 3}, [4, 1], 0), ({3, 4}, [2, 1], 1)])
def test_a_full_disk_is_warned_of_once_and_tried_again(
    tmp_path, monkeypatch, capsys, full_at, kept, status
):
    usage = shutil.disk_usage
    asked = []

    def full(path):
        asked.append(path)  # at the start, and for each checkpoint
        free = 7 if len(asked) - 1 in full_at else usage(path).free
        return types.SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", full)
    options = "--train.steps 4 --train.checkpoint-every 1".split()
    try:
        run_train(*TINY, "--workdir", tmp_path, *options)
        ended = 0
    except SystemExit as stop:
        ended = stop.code
    warning, *lines = capsys.readouterr().err.splitlines()
    words = "GB are needed and 7e-09 free); the newest there is"
    step, newest = min(full_at), min(full_at) - 1
    folder = tmp_path / "checkpoints"
    assert warning.startswith(f"warning: {folder}: checkpoint {step} could not be saved (")
    assert warning.endswith(f"{words} {newest}; the next will be tried")
    assert ended == status
    assert intact.steps(tmp_path) == kept
    assert len(lines) == status
    if status:
        assert lines[0].startswith(f"train.py: {folder}: checkpoint 4 could not be saved (")


def test_too_little_room_for_the_checkpoints_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**6))
    line = refused(run_train, *TINY, "--workdir", tmp_path, "--train.steps", "1")
    words = "train.keep_last: 3 should be smaller, or on a larger disk: a checkpoint takes "
    assert words in line
    assert line.endswith("0.001 GB are free")


@pytest.mark.slow
def test_metrics_that_cannot_be_written_are_warned_of_once_and_do_not_end_the_run(
    tmp_path, monkeypatch, capsys
):
    def event(self, step, **content):
        raise OSError(28, "No space left on device")

    before = writers.Writers.event
    options = "--train.steps 3 --train.sample-every 2".split()

    def first_lines(self, step, **content):
        return before(self, step, **content) if step == 1 else event(self, step)

    monkeypatch.setattr(writers.Writers, "event", first_lines)
    run_train(*TINY, "--workdir", tmp_path, *options)
    out = capsys.readouterr().out
    words = "metrics or pictures are not written ([Errno 28] No space left on device)"
    assert out.count(words) == 1
    assert intact.steps(tmp_path)[0] == 3


def test_a_stop_before_the_first_step_leaves_nothing(tmp_path, capsys):
    stop = StopRequest()
    stop.requested = True
    config = tiny_config(train=dict(workdir=str(tmp_path / "run")))
    with pytest.raises(Stopped, match="the same command goes on from the newest checkpoint"):
        train.train(config, stop)
    assert not (tmp_path / "run").exists()


def test_a_stop_while_the_step_is_compiled_makes_none(tmp_path, monkeypatch):
    stop = StopRequest()
    before = train.lower_train_step

    def lower_train_step(config, mesh):
        stop.requested = True
        return before(config, mesh)

    monkeypatch.setattr(train, "lower_train_step", lower_train_step)
    with pytest.raises(Stopped):
        train.train(tiny_config(train=dict(workdir=str(tmp_path))), stop)
    assert intact.steps(tmp_path) == []


def test_an_evaluation_is_broken_off_with_its_step_saved(tmp_path, monkeypatch):
    stop = StopRequest()

    def make_evaluation(config, vae, mesh, check_stop):
        def evaluate(model):
            check_stop()
            stop.requested = True
            check_stop()
            raise AssertionError("not broken off")

        return evaluate

    monkeypatch.setattr(run, "make_evaluation", make_evaluation)
    config = tiny_config(
        train=dict(workdir=str(tmp_path), steps=5), eval=dict(every=2, inception="x")
    )
    with pytest.raises(Stopped):
        train.train(config, stop)
    assert intact.newest(tmp_path) == (2, [])


@pytest.mark.slow
def test_what_was_not_yet_written_of_the_metrics_survives_a_stop(tmp_path):
    """A line is the mean over the steps since the one before, whatever came in between."""
    flags = "--train.log-every 5 --train.steps".split()
    run_train(*TINY, "--workdir", tmp_path / "whole", *flags, "10")
    for steps, newest in [(3, 3), (4, 7), (9, 10)]:
        with pytest.MonkeyPatch.context() as patch:
            signal_at(patch, steps, signal.SIGTERM)
            run_train(*TINY, "--workdir", tmp_path / "run", *flags, "10")
        assert intact.steps(tmp_path / "run")[0] == newest
    whole, parts = rows(tmp_path / "whole"), rows(tmp_path / "run")
    assert [row["step"] for row in parts] == [5, 10]
    quarters = [f"loss_quarter_{k}" for k in (1, 2, 3, 4)]
    for name in ("loss", "mse", "vb", "grad_norm", *quarters):
        assert [row[name] for row in parts] == [row[name] for row in whole]


@pytest.mark.slow
def test_it_is_listened_for_signals_until_the_last_checkpoint_is_written(tmp_path, monkeypatch):
    """Where the parts of a checkpoint are written in the background, at the run's end."""
    write_checksums = checkpoint.Checkpoints._write_checksums

    def stopped_while_it_is_written(checkpoints) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write_checksums(checkpoints)

    monkeypatch.setattr(checkpoint.Checkpoints, "_write_checksums", stopped_while_it_is_written)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the run would be dead"))
    try:
        run_train(*TINY, "--workdir", tmp_path, "--train.steps", "1")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert intact.newest(tmp_path) == (1, [])


@pytest.mark.slow
def test_sigterm_saves_and_stops(tmp_path):
    process = start(*TINY, "--workdir", tmp_path, "--train.steps", "1000000")
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    step, _ = intact.newest(tmp_path)
    assert 0 < step < 1_000_000
    assert f"stopped at step {step}; the same command goes on from here" in out
    assert rows(tmp_path)[-1]["step"] == step
