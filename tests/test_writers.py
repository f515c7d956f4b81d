import json
import re
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from test_log import METRICS, config_in

from dit import cli, log, writers
from dit.config import replace


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
    for other in dict(batch_size=32), dict(init_from="weights"), dict(log_every=7):
        assert writers.known_band(replace(config, train=other)) is None
    assert writers.known_band(replace(config, optim=dict(learning_rate=0.5))) is None
    without_effect = dict(train=dict(seed=3, workdir="elsewhere"), model=dict(remat="dots"))
    band = writers.known_band(replace(config, **without_effect))

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
