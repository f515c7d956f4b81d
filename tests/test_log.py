import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import tiny_config

from dit import log
from dit.chips import Chip
from dit.config import Config, Diverged
from dit.progress import Progress, say

METRICS = {"loss": 1.0, "mse": 0.75, "vb": 0.25, "grad_norm": 2.0, "learning_rate": 1e-3}


def config_in(workdir: Path, **train) -> Config:
    (workdir / "samples").mkdir()
    return tiny_config(train=dict(workdir=str(workdir), steps=9, **train))


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# Rates


def test_the_clock_counts_images_flops_and_the_share_of_the_peak(time):
    clock = log.Clock(3e12)
    clock.chip = Chip("new", ("new",), 10e12)
    time.now += 5
    clock.stop()
    time.now += 4  # not training
    clock.start()
    time.now += 3
    clock.stop()
    clock.images += 40
    expected = {
        "images_per_second": 5.0,
        "tflops_per_second": 15.0,
        "mfu": 15e12 / (10e12 * jax.device_count()),
    }
    assert clock.read() == pytest.approx(expected)
    time.now += 100  # a reading begins where the clock is started
    clock.start()
    time.now += 2
    clock.stop()
    clock.images += 4
    assert clock.read()["images_per_second"] == 2


def test_a_chip_without_a_known_peak_has_no_share_of_it(time):
    clock = log.Clock(1.0)
    time.now += 1
    clock.stop()
    assert clock.chip is None
    assert "mfu" not in clock.read()


# Metrics


class Late(float):
    """A metric that notes when it is fetched."""

    fetched = 0

    def __float__(self):
        Late.fetched += 1
        return super().__float__()


def test_metrics_are_fetched_one_step_late(tmp_path, monkeypatch):
    monkeypatch.setattr(Late, "fetched", 0)
    with log.Log(config_in(tmp_path), 0, 1.0, {}) as run:
        counts = []
        for step in (1, 2, 3):
            run.record(step, {name: Late(value) for name, value in METRICS.items()})
            counts.append(Late.fetched)
        assert counts == [0, 5, 10]
        with run.paused():
            assert Late.fetched == 15
            run.write(3)
    assert Late.fetched == 15, "each once"


def test_a_line_of_metrics_is_the_mean_since_the_line_before(tmp_path):
    with log.Log(config_in(tmp_path), 0, 1.0, {}) as run:
        for step, loss in [(1, 1.0), (2, 3.0), (3, 7.0)]:
            run.record(step, METRICS | {"loss": loss})
            if step > 1:
                with run.paused():
                    run.write(step)
        run.scores(3, {"fid": 8.0})
    *lines, scores = rows(tmp_path)
    assert [(row["step"], row["loss"]) for row in lines] == [(2, 2.0), (3, 7.0)]
    names = METRICS.keys() | {"step", "images_per_second", "tflops_per_second"}
    assert lines[0].keys() == lines[1].keys() == names
    assert scores == {"step": 3, "fid": 8.0}


def test_a_run_that_goes_on_adds_to_what_it_had_not_written(tmp_path):
    losses = [(1, 0.1), (2, 0.2), (3, 0.7)]
    with log.Log(config_in(tmp_path), 0, 1.0, {}) as run:
        for step, loss in losses:
            run.record(step, METRICS | {"loss": loss})
        with run.paused():
            run.write(3)
    whole = rows(tmp_path)
    unwritten = {}
    for step, loss in losses:  # a run a step
        with log.Log(
            tiny_config(train=dict(workdir=str(tmp_path))), step - 1, 1.0, unwritten
        ) as run:
            run.record(step, METRICS | {"loss": loss})
            with run.paused():
                unwritten = json.loads(json.dumps(run.unwritten))
                if step == 3:
                    run.write(step)
    for name in METRICS:
        assert rows(tmp_path)[-1][name] == whole[-1][name]
    assert len(rows(tmp_path)) == 1


def test_the_loss_of_a_quarter_is_the_mean_over_its_own_samples(tmp_path):
    """Over the steps, also across a resume; a step may have no sample of it."""
    config = config_in(tmp_path)
    unwritten = {}
    for step, loss, share in [(1, 0.0, 0.0), (2, 0.5, 0.25), (3, 0.25, 0.5), (4, 0.0, 0.0)]:
        quarters = {"loss_quarter_2": loss, "loss_quarter_2_share": share}
        quarters |= {"loss_quarter_3": 0.0, "loss_quarter_3_share": 0.0}
        with log.Log(config, step - 1, 1.0, unwritten) as run:  # a run a step
            run.record(step, METRICS | quarters)
            with run.paused():
                unwritten = json.loads(json.dumps(run.unwritten))
                if step == 4:
                    run.write(step)
    (row,) = rows(tmp_path)
    assert row["loss_quarter_2"] == (0.5 + 0.25) / (0.25 + 0.5)
    assert not {"loss_quarter_3", "loss_quarter_2_share"} & row.keys()
    assert row["loss"] == METRICS["loss"]


def test_what_is_done_in_a_pause_does_not_slow_the_rates(time, tmp_path):
    with log.Log(config_in(tmp_path), 0, 2e12, {}) as run:
        for step in (1, 2):
            time.now += 4
            run.record(step, METRICS)
            with run.paused():
                time.now += 1000
                run.write(step)
                time.now += 1000
    for row in rows(tmp_path):
        assert row["images_per_second"] == 16 / 4
        assert row["tflops_per_second"] == 2 * 16 / 4


def test_the_bar_shows_loss_and_rates(time, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(log, "find_chip", lambda kind: Chip("new", (kind,), 5e12))
    stats = {"bytes_in_use": 1 << 30, "peak_bytes_in_use": 3 << 29}
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with log.Log(config_in(tmp_path), 0, 1e11, {}) as run:
        run.record(1, METRICS)
        time.now += 0.5
        with run.paused():
            run.write(1)
        run.record(2, METRICS | {"loss": 0.25})
        run.fetch()
        bar = run.progress.bar
        expected = "loss 0.2500  mse 0.7500  32 images/s  3.2 TFLOP/s  MFU 8.0%  1.5 GiB"
        assert bar.postfix == expected
        assert (bar.n, bar.total) == (2, 9)
    assert [row["peak_memory_gib"] for row in rows(tmp_path)] == [1.5]


def test_progress_shows_means_of_as_many_steps_as_a_line_of_the_log_has(tmp_path):
    with log.Log(config_in(tmp_path, log_every=2), 0, 1.0, {}) as run:
        shown = []
        run.progress.advance = lambda count, note: shown.append(note)
        for step, loss in enumerate([1.0, 2.0, 4.0], 1):
            run.record(step, METRICS | {"loss": loss})
        run.fetch()
    words = [f"loss {loss}000  mse 0.7500" for loss in ("1.0", "1.5", "3.0")]
    assert shown == words


def test_without_a_terminal_lines_on_stdout_show_loss_and_rates(time, tmp_path, capsys):
    metrics = {name: value for name, value in METRICS.items() if name != "mse"}  # as flow's
    with log.Log(config_in(tmp_path), 6, 1e11, {}) as run:
        run.progress.printed = 0.0  # this is not its first line
        run.record(7, METRICS)
        time.now += 90
        run.record(8, metrics)
        time.now -= 89.5
        with run.paused():
            run.write(8)
        run.record(9, metrics | {"loss": 0.25})
        run.fetch()
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines] == [
        "step 7/9  loss 1.0000  mse 0.7500  03:00 left",
        "step 9/9  loss 0.2500  64 images/s  6.4 TFLOP/s",
    ]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_names_the_step(
    tmp_path, name, value
):
    with log.Log(config_in(tmp_path), 0, 1.0, {}) as run:
        run.record(1, METRICS)
        with run.paused():
            run.write(1)
        run.record(2, METRICS | {name: value})  # may still be computed
        with pytest.raises(Diverged) as refusal:
            run.record(3, METRICS)
    line = str(refusal.value)
    assert "\n" not in line
    assert line.startswith("loss: ")
    assert f"{value}" in line
    assert " at step 2 should be finite; " in line
    assert f"the checkpoints in {str(tmp_path / 'checkpoints')!r} are from before it" in line
    assert "goes on from the newest, with a lower optim.learning_rate, or with" in line
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_no_checkpoint_is_saved_of_a_step_that_is_not_finite(tmp_path):
    """The pause in which checkpoints are saved begins with a look at the step's own loss."""
    with log.Log(config_in(tmp_path), 0, 1.0, {}) as run:
        run.record(1, METRICS | {"loss": np.nan})
        with pytest.raises(Diverged), run.paused():
            raise AssertionError("saved")


# The run


@pytest.mark.parametrize("last, stop", [(9, 5), (4, 4)])  # the whole profile, or the run's end
def test_a_profile_is_of_the_steps_after_the_first_one(tmp_path, monkeypatch, capsys, last, stop):
    calls = []
    profiler = types.SimpleNamespace(
        start_trace=lambda folder: calls.append((step, Late.fetched, folder)),
        stop_trace=lambda: calls.append((step, Late.fetched)),
    )
    monkeypatch.setattr(Late, "fetched", 0)
    monkeypatch.setattr(jax, "profiler", profiler)
    with log.Log(config_in(tmp_path, profile_steps=3), 1, 1.0, {}) as run:
        for step in range(2, last + 1):
            run.record(step, {name: Late(value) for name, value in METRICS.items()})
        run.fetch()
    folder = tmp_path / "profile"
    done = 5 * (stop - 1)  # of five metrics each: no traced step is still being computed
    assert calls == [(2, 5, folder), (stop, done)]
    line = f"the profile opens by: xprof --logdir {folder} (after pip install xprof)"
    assert capsys.readouterr().out.count(line) == 1


def test_a_run_that_stops_before_its_first_line_still_closes(tmp_path):
    with pytest.raises(KeyError), log.Log(config_in(tmp_path), 0, 1.0, {}):
        raise KeyError
    assert rows(tmp_path) == []


def test_only_process_0_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    config = config_in(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    say("hello")
    with log.Log(config, 0, 1.0, {}) as run:
        run.record(1, METRICS)
        with run.paused():
            run.write(1)
            run.grid(1, np.zeros((1, 8, 8, 1), np.uint8), ["0"])
    progress = Progress(3, "image")
    progress.advance(3)
    progress.close()
    assert capsys.readouterr() == ("", "")
    assert sorted(tmp_path.rglob("*")) == before


def test_every_process_stops_at_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with log.Log(config_in(tmp_path), 0, 1.0, {}) as run:
        run.record(1, METRICS | {"loss": np.nan})
        with pytest.raises(Diverged):
            run.record(2, METRICS)
