import io
import json
import re
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import tiny_config
from matplotlib.axes import Axes
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from dit import cli, log, writers
from dit.chips import Chip
from dit.config import Config, Diverged, replace
from dit.progress import Progress, say

METRICS = {"loss": 1.0, "mse": 0.75, "vb": 0.25, "grad_norm": 2.0, "learning_rate": 1e-3}


def config_in(workdir: Path, **train) -> Config:
    (workdir / "samples").mkdir()
    return tiny_config(train=dict(workdir=str(workdir), steps=9, **train))


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Time:
    """A clock that tests set."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(log.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(log.time, "monotonic", lambda: self.now)


@pytest.fixture
def time(monkeypatch) -> Time:
    return Time(monkeypatch)


# Progress


def test_progress_prints_a_line_at_most_every_five_seconds_and_at_the_end(time):
    file = io.StringIO()
    progress = Progress(10, "image", file=file)
    for seconds in [2, 1, 1, 1, 3, 0]:  # at 102, 103, 104, 105, 108, 108
        time.now += seconds
        progress.advance(1)
    time.now += 1
    progress.advance(4)
    progress.close()
    assert file.getvalue().splitlines() == [
        "image 1/10  0.5 images/s",
        "image 5/10  0.6 images/s  00:08 left",
        "image 10/10  1.1 images/s",
    ]


def test_progress_that_goes_on_does_not_count_what_was_done_before(time, capsys):
    progress = Progress(50_000, "image", done=1000)
    time.now += 2
    progress.advance(24)
    assert progress.rate == 12
    assert capsys.readouterr() == ("", "image 1024/50000  12.0 images/s\n")
    assert progress.time_left == "1:08:01"


def test_progress_over_items_counts_each():
    progress = Progress(3, "file", file=io.StringIO())
    assert list(progress.over("abc")) == ["a", "b", "c"]
    assert progress.done == 3


def test_a_terminal_shows_a_bar_and_no_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(8, "step", done=3)
    progress.advance(2, "loss 0.2500")
    assert not progress.bar.disable
    assert (progress.bar.n, progress.bar.total) == (5, 8)
    assert progress.bar.postfix == "loss 0.2500"
    progress.close()
    assert "\nstep 5/8" not in capsys.readouterr().err


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


# Files


def test_a_resumed_run_drops_the_metrics_that_it_will_log_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with log.Log(config_in(tmp_path), 0, 1.0, {}) as run:
        for step in (1, 2, 3):
            run.record(step, METRICS)
            with run.paused():
                run.write(step)
    first, second, _ = path.read_text().splitlines(keepends=True)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    writers.drop_metrics_after(path, 2)
    assert path.read_text() == first + second
    writers.drop_metrics_after(tmp_path / "nothing.jsonl", 2)
    assert not (tmp_path / "nothing.jsonl").exists()


NO_ROWS = ["", "{", "3", "[]", "{}", "[" * 100_000, '{"step": "1", "loss": 2}']
NO_ROWS += ['{"step": 1, "loss": null}', '{"loss": 2.0}', "\N{REPLACEMENT CHARACTER}}"]


@pytest.mark.parametrize("line", NO_ROWS, ids=range(len(NO_ROWS)))
def test_a_line_that_is_no_row_of_metrics_stops_no_run(tmp_path, line):
    config = config_in(tmp_path)
    with log.Log(config, 0, 1.0, {}) as run:
        run.record(1, METRICS)
        with run.paused():
            run.write(1)
    path = tmp_path / "metrics.jsonl"
    row = path.read_bytes()
    path.write_bytes(b"\xff}\n" + line.encode() + b"\n" + row + line.encode())
    (tmp_path / "loss.png").unlink()
    with log.Log(config, 1, 1.0, {}):
        assert path.read_bytes() == row
        path.write_bytes(row + line.encode())
    assert (tmp_path / "loss.png").exists()


def test_a_log_leaves_metrics_events_a_grid_and_a_plot(tmp_path):
    tiles = np.zeros((6, 8, 8, 1), np.uint8)
    with log.Log(config_in(tmp_path), 0, 1.0, {}) as run:
        run.record(1, METRICS)
        with run.paused():
            run.write(1)
            run.grid(1, tiles, ["a", "b"])
    names = {re.sub(r"\.out\..*", "", path.name) for path in tmp_path.iterdir()}
    assert names == {"metrics.jsonl", "events", "samples", "loss.png"}
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["0000001.png"]
    width, height = Image.open(tmp_path / "samples/0000001.png").size
    assert height == 2 * 66 + 2
    assert width > 3 * 66
    assert Image.open(tmp_path / "loss.png").size[0] > 100


def event_values(workdir: Path) -> Iterator[tuple[int, Any]]:
    """(step, value) of what TensorBoard is given; a record has its length before it, and CRCs."""
    for path in sorted((workdir).glob("events*")):
        stored = path.read_bytes()
        while stored:
            (size,) = struct.unpack("<Q", stored[:8])
            event = Event.FromString(stored[12 : 12 + size])
            yield from ((event.step, value) for value in event.summary.value)
            stored = stored[16 + size :]


def test_tensorboard_has_groups_the_config_and_what_runs_are_compared_by(tmp_path):
    config = replace(config_in(tmp_path), eval=dict(every=1))
    with log.Log(config, 0, 1.0, {}) as run:
        run.record(1, METRICS)
        with run.paused():
            run.write(1)
        run.scores(1, {"fid": 8.0})
    values = [value for _, value in event_values(tmp_path)]
    scalars = {value.tag: value.simple_value for value in values if value.HasField("simple_value")}
    speed = {"speed/images_per_second", "speed/tflops_per_second"}
    assert scalars.keys() == {f"train/{name}" for name in METRICS} | speed | {"eval/fid"}
    assert (scalars["train/mse"], scalars["eval/fid"]) == (0.75, 8.0)

    plugins = {value.tag: value.metadata.plugin_data for value in values}
    (text,) = [value for value in values if value.tag == "config/text_summary"]
    assert config.to_json() in text.tensor.string_val[0].decode()
    experiment, session = (
        HParamsPluginData.FromString(plugins[f"_hparams_/{name}"].content)
        for name in ("experiment", "session_start_info")
    )
    compared = {metric.name.tag for metric in experiment.experiment.metric_infos}
    assert compared == {"train/loss", "train/grad_norm", "speed/images_per_second", "eval/fid"}
    hparams = session.session_start_info.hparams
    assert hparams["optim.learning_rate"].number_value == config.optim.learning_rate
    assert hparams["data.flip"].bool_value
    assert hparams["data.name"].string_value == "digits"
    assert hparams["optim.grad_clip"].string_value == "None"
    assert {field.name for field in experiment.experiment.hparam_infos} == set(hparams)


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


# loss.png


@pytest.mark.parametrize(
    "parts, lines",
    [
        ([], ["loss"]),
        (["mse", "vb"], ["loss", "squared error", "variational"]),
        (["loss_quarter_1", "loss_quarter_3"], ["loss", "t in its first", "third"]),
    ],
)
def test_the_plot_has_a_line_for_the_loss_and_for_each_part_that_it_has(
    tmp_path, monkeypatch, parts, lines
):
    row = {"step": 1, "loss": 1.0} | dict.fromkeys(parts, 0.5)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    shown = []
    monkeypatch.setattr(Axes, "plot", lambda axes, *values, label, **style: shown.append(label))
    writers.plot_loss(tmp_path)
    assert len(shown) == len(lines)
    for label, words in zip(shown, lines, strict=True):
        assert label.startswith(words)


def test_the_plot_shows_the_band_of_the_same_recipe_as_far_as_the_run_went(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "CONFIGS", tmp_path)
    config = config_in(tmp_path)
    assert writers.known_band(config) is None
    of_another_version = json.loads(config.to_json()) | {"no_more": {}}
    entry = {"config": json.loads(config.to_json()), "band": [[2, 0.5, 1.5], [4, 0.25, 1.25]]}
    bands = {"old": {"config": of_another_version, "band": []}, "tiny": entry}
    (tmp_path / "bands.json").write_text(json.dumps(bands))
    for other in (dict(optim=dict(learning_rate=0.5)), dict(train=dict(batch_size=32))):
        assert writers.known_band(replace(config, **other)) is None
    band = writers.known_band(replace(config, train=dict(seed=3, workdir="elsewhere")))

    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    shown = []
    monkeypatch.setattr(Axes, "fill_between", lambda axes, *edges, **style: shown.append(edges))
    writers.plot_loss(tmp_path, band)
    (edges,) = shown
    assert [edge.tolist() for edge in edges] == [[2], [0.5], [1.5]]


def test_the_bands_that_were_measured_are_those_of_the_presets_as_they_are():
    measured = json.loads((cli.CONFIGS / "bands.json").read_text())
    assert "digits_flow" in measured
    for name in measured:
        config = cli.load_preset(name)
        steps = writers.known_band(config)[:, 0]
        assert (steps == np.arange(1, len(steps) + 1) * config.train.log_every).all()
        assert steps[-1] == config.train.steps


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


def test_weights_and_biases_is_given_the_same_run_again_and_everything_logged(
    tmp_path, monkeypatch
):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, sorted(values)))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options["id"])
        return Run()

    wandb = types.SimpleNamespace(init=init, Image=np.asarray)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = config_in(tmp_path, wandb=True)
    for start in (0, 1):
        with log.Log(config, start, 1.0, {}) as run:
            run.record(start + 1, METRICS)
            with run.paused():
                run.write(start + 1)
                run.grid(start + 1, np.zeros((1, 8, 8, 1), np.uint8), ["0"])
    names = sorted([*METRICS, "images_per_second", "tflops_per_second"])
    identity = calls[0]
    assert re.fullmatch("tiny-[0-9a-f]{8}", identity)
    assert calls == [
        *[identity, (1, names), (1, ["samples"]), "finish"],
        *[identity, (2, names), (2, ["samples"]), "finish"],
    ]
