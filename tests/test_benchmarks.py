"""The benchmarks' table, command line and curves. They time nothing here."""

import json
import sys
from functools import partial

import jax
import pytest
import scaling
import table
import train_step
from conftest import tiny_config

from dit import cli, sharding
from dit.config import replace
from dit.model import count_parameters
from dit.state import make_init

TINY = """--presets digits --model.hidden-size 20 --model.num-heads 5 --model.depth 2
    --train.batch-size 2 --steps 1 --rounds 1""".split()


def run(module, prog: str, *argv: str) -> None:
    """What `python benchmarks/X.py *argv` does, in this process."""
    sys.argv = [prog, *argv]
    with cli.exit_status(prog):
        module.main()


@pytest.fixture(autouse=True)
def restore_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


# The table


def test_a_row_has_medians_and_their_ratio():
    row = table.make_row("b", "c", "images/s", [3.0, 11.0, 5.0], "peer", [2.0, 4.0])
    found = {name: row[name] for name in table.COLUMNS[2:]}
    assert found == dict(
        unit="images/s",
        figure=5.0,
        least=3.0,
        most=11.0,
        peer="peer",
        peer_figure=3.0,
        ratio=5 / 3,
    )


def test_what_does_not_fit_is_a_row_without_a_ratio():
    row = table.make_row("b", "c", "images/s", [5.0], "peer", [])
    assert row["peer_figure"] == "does not fit" and "ratio" not in row
    row = table.make_row("b", "c", "images/s", [], "peer", [5.0])
    assert row["figure"] == "does not fit" and not {"ratio", "least", "most"} & row.keys()


def test_files_of_rows_join_one_table(tmp_path, capsys, refused):
    paths = [str(tmp_path / name) for name in ("one.jsonl", "two.jsonl")]
    first = table.make_row("data", "digits", "images/s", [16_833.0])
    second = {"benchmark": "sampling", "case": "ddim", "figure": 0.25}  # some keys suffice
    table.report([first], paths[0])
    table.report([second], paths[1])
    capsys.readouterr()
    run(table, "table.py", *paths)
    lines = capsys.readouterr().out.split("\n")
    assert "| data | digits | images/s | 16,833 | 16,833 | 16,833 |  |  |  |" in lines
    assert "| sampling | ddim |  | 0.25 |  |  |  |  |  |" in lines
    assert "should be a file" in refused(
        partial(run, table), "table.py", *paths, str(tmp_path / "three")
    )


# train_step.py


def test_ours_alone_is_timed_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "rows.jsonl"
    run(train_step, "train_step.py", *TINY, "--peer", "none", "--json", str(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    units = ["images/s", "TFLOP/s", "% of products", "GiB at the peak", "GiB planned"]
    assert [row["unit"] for row in rows] == units
    for row in rows:
        assert row["case"] == "digits, float32, batch 2, remat none"
        assert 0 < row["least"] <= row["figure"] <= row["most"] and "peer" not in row


def test_flags_change_every_preset():
    flags = "--presets digits cifar10 --peer none --dtype float32 --model.depth 7".split()
    _, configs = train_step.parse(flags)
    assert [config.name for config in configs] == ["digits", "cifar10"]
    assert [config.model.hidden_size for config in configs] == [128, 384]
    for config in configs:
        assert (config.model.depth, config.train.dtype) == (7, "float32")


@pytest.mark.parity
def test_ours_and_diffusers_take_turns(tmp_path, capfd):
    path = tmp_path / "rows.jsonl"
    argv = ["--peer", "diffusers", "--modes", "eager", "--dtype", "bfloat16", "--json", str(path)]
    run(train_step, "train_step.py", *TINY, "--rounds", "2", *argv)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["case"] for row in rows} == {"digits, bfloat16, batch 2, remat none"}
    for row in rows[:4]:
        assert row["peer"] == "diffusers, eager" and row["peer_figure"] > 0
        assert row["ratio"] == row["figure"] / row["peer_figure"]
    printed = [line.split(":")[0] for line in capfd.readouterr().out.splitlines() if "," in line]
    assert printed[:4] == ["digits, ours", "digits, eager"] * 2


def test_shares_are_of_the_fastest_product_of_either_side():
    def figures(rate: float, product: float) -> dict:
        both = {"device": "cpu", "images/s": 1.0, "GiB at the peak": 1.0}
        return both | {"TFLOP/s": rate, "product TFLOP/s": product}

    measured = {"ours": [figures(1.0, 4.0), figures(3.0, 5.0)], "eager": [figures(1.0, 8.0), {}]}
    rows = train_step.make_rows(tiny_config(), measured, "torch_dit")
    shares = next(row for row in rows if row["unit"] == "% of products")
    assert (shares["least"], shares["most"], shares["peer_figure"]) == (12.5, 37.5, 12.5)
    nothing = train_step.make_rows(tiny_config(), {"ours": [{}, {}], "eager": [{}]}, "torch_dit")
    assert {row["figure"] for row in nothing} == {"does not fit"}


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--presets", "digist"], "preset: 'digist'"),
        (["--presets", "digits", "--model.depth", "0"], "model.depth: 0 should be more than 0"),
        (["--rounds", "0"], "--rounds: 0 should be more than 0"),
        (["--peer", "nowhere.py:DiT"], "--peer: 'nowhere.py:DiT' should be"),
        (["--presets", "digits_layout"], "data.mask_classes"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(refused, argv, words, monkeypatch):
    monkeypatch.setattr(train_step, "find_spec", lambda package: True)  # PyTorch is
    assert words in refused(partial(run, train_step), "train_step.py", *argv)


def test_peers_need_pytorch(refused, monkeypatch):
    monkeypatch.setattr(train_step, "find_spec", lambda package: None)
    assert "--peer: 'torch_dit' should be installed" in refused(
        partial(run, train_step), "train_step.py"
    )


# scaling.py


@pytest.mark.parametrize("power", [-1.0, 0.0, 1.5])
def test_the_exponent_of_a_power(power):
    x = [3, 6, 24]
    assert scaling.exponent(x, [7 * n**power for n in x]) == pytest.approx(power)


def test_each_axis_grows_alone():
    config = tiny_config()
    for axis in scaling.AXES:
        grown = scaling.grow(config, axis, 3).validate()
        factors = {name: size(grown) / size(config) for name, size in scaling.AXES.items()}
        assert factors == dict.fromkeys(scaling.AXES, 1) | {axis: 9 if axis == "tokens" else 3}


def test_what_the_backward_pass_keeps_is_the_weights_and_something_for_each_image():
    sizes = [
        scaling.kept_bytes(replace(tiny_config(), train=dict(batch_size=n))) for n in (2, 3, 5)
    ]
    image = sizes[1] - sizes[0]
    assert sizes[2] - sizes[1] == 2 * image > 0
    parameters = 4 * count_parameters(jax.eval_shape(make_init(tiny_config())).model)
    assert 0.8 < (sizes[0] - 2 * image) / parameters < 1.2


def test_the_state_of_a_device_shrinks_with_fsdp(monkeypatch):
    monkeypatch.setattr(scaling, "FSDP", (1, 8))
    monkeypatch.setattr(sharding, "SMALL", 100)
    whole, part = scaling.bytes_a_device(tiny_config(model=dict(hidden_size=40, depth=1)))
    assert whole / 8 < part < whole / 6  # small tensors stay whole


def test_the_curves_of_a_step():
    options = scaling.Options(tiny_config(), doublings=1, steps=1, rounds=2)
    configs = [scaling.grow(options.config, "batch", n) for n in (1, 2)]
    seconds, temporaries = scaling.curves_of_a_step(options, "batch", configs)
    assert seconds["peer_figure"] == pytest.approx(1)
    assert seconds["least"] <= seconds["figure"] <= seconds["most"]
    assert 0 < temporaries["peer_figure"] < 1
    assert temporaries["figure"] == pytest.approx(temporaries["peer_figure"], abs=0.3)
    assert "at batch 16, 32" in temporaries["case"]
