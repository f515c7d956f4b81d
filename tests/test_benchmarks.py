"""The benchmarks' table, command line and curves. They time nothing here."""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import ablation
import class_conditioning
import conftest
import health
import jax
import jax.numpy as jnp
import layout
import numpy as np
import optax
import pytest
import sampling as benchmarked
import scaling
import table
import train_step
from conftest import awaken, tiny_config

from dit import cli, intact, sampling, sharding, writers
from dit.config import Objective, replace
from dit.imagenet.diffusers import write_diffusers
from dit.model import count_parameters
from dit.state import make_init, make_model, make_objective

pytestmark = pytest.mark.slow

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


def test_the_peers_loss_and_optimizer_stand_in_for_others(monkeypatch):
    monkeypatch.setattr(train_step, "check_peer", lambda peer: None)
    flags = "--presets digits_flow --optim.name muon --objective.label-dropout 0.3".split()
    _, (config,) = train_step.parse(flags)
    assert (config.objective.name, config.optim.name) == ("ddpm", "adamw")
    assert (config.objective.label_dropout, config.optim.learning_rate) == (0.3, 4e-3)
    _, (alone,) = train_step.parse([*flags, "--peer", "none"])
    assert (alone.objective.name, alone.optim.name) == ("flow", "muon")


@pytest.mark.parity
def test_ours_and_diffusers_take_turns(tmp_path, capfd):
    path = tmp_path / "rows.jsonl"
    argv = ["--peer", "diffusers", "--modes", "eager", "--dtype", "float32", "--json", str(path)]
    run(train_step, "train_step.py", *TINY, "--rounds", "2", *argv)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["case"] for row in rows} == {"digits, float32, batch 2, remat none"}
    assert {row["peer"] for row in rows[:4]} == {"diffusers, eager"}
    for row in rows[:4]:
        assert row["peer_figure"] > 0
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


# sampling.py


@pytest.mark.parity
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_pipeline_makes_the_images_that_ours_makes(tmp_path, monkeypatch, guidance):
    """By DDIM on all timesteps: on fewer, diffusers steps to times that it does not visit."""
    import torch
    from torch_dit import stub_torchvision

    stub_torchvision()
    from diffusers.pipelines.dit import pipeline_dit

    config = tiny_config(
        objective=dict(num_steps=11),
        data=dict(latents="x", image_size=64, num_classes=1000),
    )
    model = awaken(make_model(config, jax.random.key(0)))
    write_diffusers(tmp_path / "weights", model)
    labels, keys = [3, 207, 999], sampling.sample_keys(0, jnp.arange(3))
    condition = {"y": jnp.array(labels)}
    scale = None if guidance == 1 else guidance
    denoise = sampling.guided(model, condition, {"y": jnp.full(3, 1000)}, scale)
    ours = sampling.ddim(make_objective(config), denoise, keys, (8, 8, 4), 11)

    noise = np.asarray(sampling.sample_noise(keys, 11, (8, 8, 4)))
    start = torch.tensor(noise).permute(0, 3, 1, 2)
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda **options: start)
    pipeline = benchmarked.make_pipeline(tmp_path / "weights", config, "ddim")
    size = float(jnp.abs(ours).max())  # the pipeline clips what it returns to [-1, 1]
    monkeypatch.setattr(benchmarked.NoVAE.config, "scaling_factor", size)
    theirs = pipeline(labels, guidance, num_inference_steps=11, output_type="np").images
    np.testing.assert_allclose(size * (2 * theirs - 1), ours, atol=1e-5 * size)
    assert float(ours.std()) > 0.1 * size


@pytest.mark.parity
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_ours_and_the_pipeline_take_turns(tmp_path, capfd, sampler):
    path = tmp_path / "rows.jsonl"
    sizes = "--model.hidden-size 20 --model.num-heads 5 --model.depth 2 --num-samples 2".split()
    argv = ["--sampler", sampler, *"--steps 3 --rounds 2".split(), *sizes, "--json", str(path)]
    peers = ["--peer-dtypes", "float32", "bfloat16"]
    run(benchmarked, "sampling.py", *argv, *peers)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["peer"] for row in rows] == ["DiTPipeline, float32", "DiTPipeline, bfloat16"]
    case = f"digits, {sampler} 3, guidance 4, float32, batch 2"
    for row in rows:
        assert (row["benchmark"], row["case"], row["unit"]) == ("sampling", case, "images/s")
        assert row["ratio"] == row["figure"] / row["peer_figure"]
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith(case)]
    sides = [line.removeprefix(case + ": ").split()[0] for line in printed]
    assert sides == ["ours", "DiTPipeline,", "DiTPipeline,"] * 2


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--presets", "digits_layout"], "data.mask_classes"),
        (["--steps", "1001"], "--steps: 1001 should be from 1 to the model's 1000 timesteps"),
        (["--sampler", "heun"], "--sampler"),
    ],
)
def test_what_the_pipeline_cannot_sample_is_refused(refused, argv, words):
    assert words in refused(partial(run, benchmarked), "sampling.py", *argv)


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


# health.py


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Three runs that differ in their seeds."""
    folders = [tmp_path_factory.mktemp("runs") / str(seed) for seed in (1, 2, 3)]
    for seed, folder in enumerate(folders):
        argv = ["--train.seed", str(seed), "--train.steps", "3", "--workdir", str(folder)]
        conftest.run_train(*conftest.TINY, *argv)
    return list(map(str, folders))


def test_the_band_is_around_the_losses_that_runs_of_any_seed_have(
    seeds, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(health, "BANDS", tmp_path / "bands.json")
    monkeypatch.setattr(writers, "CONFIGS", tmp_path)
    run(health, "health.py", *seeds[:2])
    last = capsys.readouterr().out.split("\n| 3 | ")[1].split(" |\n")[0].split(" | ")
    shares = [float(cell.split("%")[0]) for cell in last[2:]]
    assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=2)

    *_, other = seeds
    config = intact.stored_config(Path(other), 3)
    assert writers.known_band(replace(config, data=dict(flip=True))) is None
    steps, low, high = writers.known_band(config).T
    assert steps.tolist() == [1, 2, 3]
    losses = [row["loss"] for _, row in writers.read_metrics(Path(other) / "metrics.jsonl")]
    for loss, least, most in zip(losses, low, high, strict=True):
        assert least < loss < most < 3 * least


def test_a_band_is_of_runs_that_differ_in_their_seeds_alone(seeds, tmp_path, refused):
    conftest.run_train(*conftest.TINY, "--train.steps", "2", "--workdir", tmp_path / "short")
    command = partial(run, health)
    assert "two or more" in refused(command, "health.py", seeds[0])
    assert "another one in each run" in refused(command, "health.py", seeds[0], seeds[0])
    assert "of the recipe" in refused(command, "health.py", seeds[0], str(tmp_path / "short"))


@pytest.mark.parametrize("times", [dict(times="uniform"), dict(time_mean=0.8, time_std=0.8)])
def test_the_shares_of_times_are_those_that_are_drawn(times):
    objective = Objective(name="flow", **times)
    shares = health.shares_of_times(objective)
    flow = make_objective(replace(tiny_config(), objective=dataclasses.asdict(objective)))
    drawn = jax.vmap(flow.draw_time)(jax.random.split(jax.random.key(0), 10_007))
    counts, _ = np.histogram(drawn, bins=4, range=(0, 1))
    np.testing.assert_allclose(counts / counts.sum(), shares, atol=0.02)


# Ablations


@pytest.mark.parametrize("preset", ["digits", "digits_flow", "cifar10_tiny"])
def test_every_arm_of_every_study_is_a_config_of_its_own(preset):
    options = ablation.Options(preset=preset)
    for study, arms in ablation.studies(preset).items():
        configs = [ablation.config_of(study, *arm, options, 0) for arm in arms.items()]
        folders = {config.validate().workdir for config in configs}
        assert len(folders) == (1 if study == "average" else len(arms))


def test_an_average_of_a_run_with_several_is_that_of_its_own_run(tmp_path, monkeypatch):
    """In place of what the weights draw, their norm is the figure at each of the four steps."""
    monkeypatch.setattr(ablation, "FOLDER", tmp_path)
    monkeypatch.setattr(cli, "load_preset", lambda name: tiny_config())
    monkeypatch.setattr(ablation.generation, "generate", lambda model, *_: optax.tree.norm(model))
    monkeypatch.setattr(ablation, "JUDGES", {"digits": lambda norm, *_: {"norm": float(norm)}})
    options, decay = ablation.Options(steps=4), ablation.AVERAGES[-1]
    arms = ablation.studies("digits")["average"]
    arms["alone"] = ablation.Arm({"optim": dict(ema_decay=decay)})
    figures = {
        name: ablation.run("average", name, arms[name], options, 0).figures["norm"]
        for name in ("none", str(decay), "alone")
    }
    assert len(list(tmp_path.iterdir())) == 2
    np.testing.assert_array_equal(figures[str(decay)], figures["alone"])
    assert (figures["none"] != figures["alone"])[:, 1].all()
    assert figures["none"][:, 0].tolist() == [1, 2, 3, 4]


# The condition, in a small network and in a layout


def test_every_way_to_tell_the_class_is_trained_and_judged(monkeypatch, capsys):
    monkeypatch.setattr(class_conditioning, "SAMPLES", 20)
    monkeypatch.setattr(class_conditioning, "SAMPLE_STEPS", 3)
    monkeypatch.setattr(class_conditioning, "DEPTH", 1)
    run(class_conditioning, "class_conditioning.py", "--steps", "51")
    lines = capsys.readouterr().out.splitlines()[-4:]
    for line, name in zip(lines, class_conditioning.DESIGNS, strict=True):
        assert line.startswith(name)
        *_, loss, accuracy, distance = line.split()
        assert 0 < float(loss) < 2 and accuracy.endswith("%") and float(distance) > 0


def test_a_layout_is_drawn_by_a_vector_a_token_and_by_one_for_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layout, "SAMPLES", 20)
    monkeypatch.setattr("dit.model.MaskEmbedding", layout.MaskEmbedding)  # undone in the end
    monkeypatch.setattr(cli, "load_preset", lambda name: tiny_config(data=dict(mask_classes=2)))
    run(layout, "layout.py", "--steps", "2")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert all(0 < float(row[-3]) < 1 and row[-2].endswith("%") for row in rows[:3])
    assert float(rows[3][-1]) > 0.3, "two digits of a class have much in common"
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "layout-spatial",
        "layout-pooled",
    }
