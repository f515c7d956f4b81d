"""The command, end to end, on runs of the embedded digits."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, TINY_FLOW, awaken, run_sample, run_train, show_condition, tiny_config
from PIL import Image

import sample
from dit import checkpoint, generation, images, intact, sampling
from dit.config import InputError, replace
from dit.images import to_uint8
from dit.state import make_model, make_objective, make_state

ROOT = Path(__file__).resolve().parent.parent
TILE = 64 + 2  # pixels of a grid from one image of 8x8 to the next


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose weights, average and last, are awake and differ."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"

    def awake_state(config, mesh):
        state = make_state(config, mesh)
        placements = jax.tree.map(lambda leaf: leaf.sharding, state)
        model = jax.device_put(state.model, jax.devices()[0])
        awake = dataclasses.replace(
            state,
            model=awaken(model, 0.05),
            emas=(awaken(model, 0.05, seed=9), awaken(model, 0.05, seed=10)),
        )
        return jax.device_put(awake, placements)

    options = "--train.steps 2 --train.checkpoint-every 1 --optim.ema-decay 0.5 0.25".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit.run.make_state", awake_state)
        run_train(*TINY, "--workdir", workdir, *options)
    return workdir


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """A model with masks, trained for three steps and then awakened."""
    workdir = tmp_path_factory.mktemp("runs") / "layout"
    options = "--train.steps 3 --train.sample-every 3 --data.mask-classes 2".split()
    run_train(*TINY, "--workdir", workdir, *options)
    assert Image.open(workdir / "samples/0000003.png").height == 10 * TILE + 2
    model, config = checkpoint.load(workdir)
    awake = workdir.with_name("awake")
    checkpoint.save_weights(awake, awaken(model), config, tuple("0123456789"))
    return awake


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A model with masks trained by flow matching for three steps, and then awakened."""
    workdir = tmp_path_factory.mktemp("runs") / "flow"
    options = "--train.steps 3 --train.sample-every 3 --data.mask-classes 2".split()
    run_train(*TINY_FLOW, "--workdir", workdir, *options)
    assert Image.open(workdir / "samples/0000003.png").height == 10 * TILE + 2
    model, config = checkpoint.load(workdir)
    awake = workdir.with_name("awake")
    checkpoint.save_weights(awake, awaken(model, 0.05), config, tuple("0123456789"))
    return awake


def draw(run, tmp_path, *flags):
    """Images and labels of an .npz."""
    out = run_sample(run, "--steps", "5", "--out", tmp_path / "x.npz", *flags)
    assert out == tmp_path / "x.npz"
    arrays = np.load(out)
    assert set(arrays) == {"arr_0", "arr_1"}
    assert arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].dtype == np.int64
    return arrays["arr_0"], arrays["arr_1"]


# What is written


def test_npz_holds_images_and_labels_in_the_order_asked_for(run, tmp_path):
    flags = "--classes 8 3 5 --per-class 2".split()
    pictures, labels = draw(run, tmp_path, *flags)
    assert pictures.shape == (6, 8, 8, 1)
    assert pictures.std() > 0
    assert labels.tolist() == [8, 8, 3, 3, 5, 5]
    _, labels = draw(run, tmp_path, "--per-class", "1")
    assert labels.tolist() == list(range(10))


def test_png_is_a_labelled_grid_one_class_a_row_and_says_where_it_is(run, tmp_path):
    out = tmp_path / "x.png"
    flags = "--classes 3 5 --per-class 4 --steps 3".split()
    command = [sys.executable, "sample.py", str(run), *flags, "--out", str(out)]
    answer = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == f"wrote {out}\n"
    width, height = Image.open(out).size
    assert height == 2 * TILE + 2
    assert 4 * TILE < width < 5 * TILE


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_sampled(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/checkpoints/2/ema/_METADATA").unlink()
    damaged, _ = draw(tmp_path / "run", tmp_path)
    expected = "checkpoint 2: ema/_METADATA is missing; using 1\n"
    assert capsys.readouterr().out.startswith(expected)
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    before, _ = draw(tmp_path / "run", tmp_path)
    np.testing.assert_array_equal(damaged, before)


def test_any_checkpoint_that_is_kept_is_sampled(refused, run, tmp_path):
    newest, _ = draw(run, tmp_path)
    first, _ = draw(run, tmp_path, "--step", "1")
    assert (first != newest).any()
    for path, step in [(run / "checkpoints/1", 1), (run / "checkpoints/2", 2)]:
        named, _ = draw(path, tmp_path)
        np.testing.assert_array_equal(named, first if step == 1 else newest)
    out = ["--out", tmp_path / "y.png"]
    words = f"sample.py: step: 3 should be one of 2, 1, which {str(run)!r} keeps"
    assert refused(run_sample, run, "--step", "3", *out) == words
    assert refused(run_sample, run / "checkpoints/3", *out) == words
    line = refused(run_sample, run, "--step", "-1", *out)
    assert "--step: -1 should be 0 or more" in line
    assert not (tmp_path / "y.png").exists()


def test_a_workdir_without_a_checkpoint_is_refused(refused, tmp_path):
    line = refused(run_sample, tmp_path, "--out", tmp_path / "x.png")
    words = r"workdir: '.*' should hold an intact checkpoint in checkpoints/ \(train.py writes"
    assert re.search(words, line)


# Options


def test_batch_size_does_not_change_a_sample_and_seed_does(run, tmp_path):
    flags = "--classes 3 4 --per-class 10 --sampler ddim --eta 0.5 --guidance 2".split()
    whole, _ = draw(run, tmp_path, *flags)
    parts, _ = draw(run, tmp_path, *flags, "--batch-size", "7")  # on 8 devices: batches of 8
    other, _ = draw(run, tmp_path, *flags, "--seed", "1")
    assert np.abs(whole.astype(int) - parts).max() <= 1
    assert (whole != other).mean() > 0.5


@pytest.mark.slow
def test_every_option_changes_what_it_should(run, tmp_path):
    base_flags = ["--classes", "3", "--sampler", "ddim"]
    base, _ = draw(run, tmp_path, *base_flags)
    for flags in (
        ["--guidance", "3"],
        ["--no-ema"],
        ["--ema-decay", "0.25"],
        ["--eta", "1"],
        ["--sampler", "ddpm"],
        ["--steps", "9"],
    ):
        assert (draw(run, tmp_path, *base_flags, *flags)[0] != base).any(), flags
    dtypes = ("float32", "bfloat16")  # nearly all pixels of DDIM's images are 0 or 255
    exact, rounded = (draw(run, tmp_path, "--sampler", "ddpm", "--dtype", d)[0] for d in dtypes)
    assert (exact != rounded).any()
    first, _ = draw(run, tmp_path, *base_flags, "--ema-decay", "0.5")
    np.testing.assert_array_equal(first, base)
    guided_flags = [*base_flags, "--guidance", "3"]
    guided, _ = draw(run, tmp_path, *guided_flags)
    partly, _ = draw(run, tmp_path, *guided_flags, "--guidance-interval", "20", "60")
    never, _ = draw(run, tmp_path, *guided_flags, "--guidance-interval", "500", "600")
    assert (partly != guided).any()
    assert (partly != base).any()
    assert np.abs(never.astype(int) - base).max() <= 1


@pytest.mark.slow
def test_the_samplers_and_options_of_flow(flow, tmp_path):
    base_flags = ["--classes", "3", "--guidance", "3"]
    base, _ = draw(flow, tmp_path, *base_flags)
    np.testing.assert_array_equal(draw(flow, tmp_path, *base_flags, "--sampler", "heun")[0], base)
    half = np.zeros((8, 8))
    half[:, 4:] = 1
    for flags in (
        ["--sampler", "euler"],
        ["--guidance", "1"],
        ["--guidance-interval", "0.1", "0.5"],
        ["--mask", save_picture(tmp_path / "mask.png", half)],
        ["--style", save_picture(tmp_path / "style.png", np.arange(64).reshape(8, 8))],
    ):
        assert (draw(flow, tmp_path, *base_flags, *flags)[0] != base).any(), flags
    many, _ = draw(flow, tmp_path, "--classes", "3", "--steps", "2000", "--per-class", "1")
    assert many.shape == (1, 8, 8, 1), "more steps than DDPM has timesteps"


@pytest.fixture(scope="module")
def guide(flow):
    """A smaller model that predicts what `flow` predicts."""
    _, config = checkpoint.load(flow)
    config = replace(config, model=dict(hidden_size=12, num_heads=3, depth=1))
    model = awaken(make_model(config, jax.random.key(3)), 0.05)
    checkpoint.save_weights(flow.with_name("guide"), model, config, tuple("0123456789"))
    return flow.with_name("guide")


@pytest.mark.slow
def test_a_smaller_model_or_an_earlier_step_guides_in_place_of_the_null_class(
    run, flow, guide, tmp_path
):
    for guided, name in [(flow, guide), (run, "1")]:
        plain, _ = draw(guided, tmp_path, "--classes", "3")
        flags = ["--classes", "3", "--guidance", "30"]
        by_class, _ = draw(guided, tmp_path, *flags)
        by_guide, _ = draw(guided, tmp_path, *flags, "--guide-with", name)
        by_itself, _ = draw(guided, tmp_path, *flags, "--guide-with", guided)
        assert (by_guide != by_class).any()
        assert (by_guide != plain).any()
        assert np.abs(by_itself.astype(int) - plain).max() <= 1


@pytest.mark.parametrize(
    "flags, words",
    [
        (["1"], "--guide-with: '1' should be given with a --guidance other than 1"),
        (["7", "--guidance", "2"], "--guide-with: step: 7 should be one of 2, 1, which "),
        (
            ["nowhere", "--guidance", "2"],
            "--guide-with: workdir: 'nowhere' should be a run's folder, and there is none",
        ),
    ],
)
def test_a_guide_that_is_not_there_is_refused(refused, run, tmp_path, flags, words):
    out = tmp_path / "x.png"
    assert words in refused(run_sample, run, "--guide-with", *flags, "--out", out)


@pytest.mark.slow
def test_a_guide_of_another_kind_is_refused(refused, run, flow, layout, tmp_path):
    flags = ["--guidance", "2", "--out", tmp_path / "x.png"]
    line = refused(run_sample, run, "--guide-with", layout, *flags)
    assert "--guide-with: data.mask_classes: 2 should be the guided model's 0" in line
    line = refused(run_sample, layout, "--guide-with", flow, *flags)
    assert "--guide-with: objective.name: 'flow' should be the guided model's 'ddpm'" in line


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--sampler", "ddim"],
            "--sampler: 'ddim' should be heun or euler: objective.name is flow",
        ),
        (["--eta", "0.5"], "--eta: 0.5 should be 0 with --sampler heun: only ddim has it"),
        (
            ["--guidance-interval", "100", "800"],
            "--guidance-interval: (100.0, 800.0) should be of times of flow, from 0 to 1",
        ),
    ],
)
def test_options_that_flow_has_not_are_refused(refused, flow, tmp_path, flags, words):
    assert words in refused(run_sample, flow, *flags, "--out", tmp_path / "x.png")


def test_what_the_options_leave_open_is_the_runs():
    config = tiny_config(train=dict(sampler="ddpm", sample_steps=7), data=dict(vae="v"))
    completed = sample.complete(sample.Sample("x"), config)
    assert (completed.sampler, completed.steps, completed.vae) == ("ddpm", 7, "v")
    assert (completed.out, completed.per_class) == ("x/samples.png", 8)
    asked = sample.Sample("x", sampler="ddim", steps=5, vae="w", per_class=2, out="./x.png")
    assert sample.complete(asked, config) == asked


def test_classes_go_by_number_name_or_synonym():
    names = ("tench, Tinca tinca", "crane (bird)", "maillot", "maillot, tank suit")
    names += ("golden retriever",)
    words = ("4", "Golden Retriever", "tinca tinca", "tank suit", "maillot, tank suit")
    assert [sample.class_number("--classes", word, names) for word in words] == [4, 4, 0, 3, 3]
    several = r"'maillot' should be one of the numbers 2 \(maillot\), 3 \(maillot, tank suit\)"
    with pytest.raises(InputError, match=several):
        sample.class_number("--classes", "maillot", names)
    with pytest.raises(InputError, match="the nearest is 'golden retriever'"):
        sample.class_number("--classes", "golden retreiver", names)


def test_a_name_that_is_a_number_goes_before_the_number():
    names = ("1", "10", "2")  # of folders, in their order
    assert [sample.class_number("--classes", word, names) for word in ("1", "2", "10", "0")] == [
        0,
        2,
        1,
        0,
    ]
    with pytest.raises(InputError, match="--classes: 3 should be from 0 to 2"):
        sample.class_number("--classes", "3", names)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--classes", "3", "10"], "--classes: 10 should be from 0 to 9: the model has 10 classes"),
        (["--classes", "-1"], "--classes: -1 should be from 0 to 9"),
        (
            ["--classes", "cat"],
            "--classes: 'cat' should be a number from 0 to 9 or the name of a class",
        ),
        (["--classes", "²"], "--classes: '²' should be a number from 0 to 9 or the name of a"),
        (
            ["--num-samples", "0", "--out", "x.npz"],
            "--num-samples: 0 should be from 1 to 10 million",
        ),
        (
            ["--num-samples", "9", "--out", "x.png"],
            "--num-samples: 9 should be given with an --out that ends in .npz",
        ),
        (
            ["--vae", "somewhere"],
            "--vae: 'somewhere' should be left out: the model makes pixels, not latents",
        ),
        (["--steps", "102"], "--steps: 102 should be from 1 to the model's 101 timesteps"),
        (["--steps", "0"], "--steps: 0 should be more than 0"),
        (["--eta", "2"], "--eta: 2.0 should be a probability, from 0 to 1"),
        (["--cfg-channels", "2"], "--cfg-channels: 2 should be from 1 to 1"),
        (["--cfg-channels", "1"], "1 should be given with a --guidance other than 1"),
        (["--labels", "balanced"], "--labels: 'balanced' should be given with --num-samples"),
        (["--resize-mask"], "--resize-mask: True should be given with --mask"),
        (["--style-strength", "0.5"], "--style-strength: 0.5 should be given with --style"),
        (
            ["--guidance-interval", "20", "60"],
            "--guidance-interval: (20.0, 60.0) should be given with a --guidance other than 1",
        ),
        (["--cfg-channels", "0"], "--cfg-channels: 0 should be more than 0"),
        (["--per-class", "0"], "--per-class: 0 should be more than 0"),
        (["--batch-size", "0"], "--batch-size: 0 should be more than 0"),
        (["--out", "x.jpg"], "x.jpg' should be a .png, .gif or .npz file"),
        (["--out", "nowhere/x.png"], "--out: 'nowhere/x.png' should be in a folder that exists"),
        (
            ["--sampler", "euler"],
            "--sampler: 'euler' should be ddim or ddpm: objective.name is ddpm",
        ),
        (["--sampler", "plms"], "--sampler"),
        (
            ["--sampler", "ddpm", "--eta", "0.5"],
            "--eta: 0.5 should be 0 with --sampler ddpm: only ddim has it",
        ),
        (["--dtype", "float16"], "--dtype"),
        (["--ema-decay", "0.7"], "--ema-decay: 0.7 should be one of the run's, 0.5, 0.25"),
        (
            ["--ema-decay", "0.5", "--no-ema"],
            "--ema-decay: 0.5 should be left out with --no-ema",
        ),
        (["--guidance", "nan"], "--guidance: nan should be a finite number"),
        (
            ["--guidance-interval", "500", "100"],
            "--guidance-interval: (500.0, 100.0) should be LOW and a HIGH above it",
        ),
        (
            ["--interpolate", "3", "10"],
            "--interpolate: 10 should be from 0 to 9: the model has 10 classes",
        ),
        (
            ["--interpolate", "3", "8", "--classes", "3"],
            "--classes: '3' should be left out with --interpolate",
        ),
        (
            ["--interpolate", "3", "8", "--per-class", "1"],
            "--per-class: 1 should be more than 1 with --interpolate",
        ),
        (
            ["--interpolate", "3", "8", "--out", "x.npz"],
            "--interpolate: ('3', '8') should be given with an --out that ends in .png or .gif",
        ),
        (
            ["--frames", "3", "--out", "x.npz"],
            "--frames: 3 should be given with an --out that ends in .png or .gif",
        ),
        (["--frames", "1"], "--frames: 1 should be more than 1"),
        (["--seed", "-1"], "--seed: -1 should be from 0 to 2^32 - 1"),
        (["--style-strength", "2"], "--style-strength: 2.0 should be a probability, from 0 to 1"),
        (["--style", "nothing.png"], "--style: 'nothing.png' should be a picture"),
        (
            ["--mask", "m.png"],
            "--mask: 'm.png' should be left out: the model was trained without masks",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(refused, run, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(run_sample, run, *flags)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_vae_is_asked_for_where_the_model_makes_latents():
    config = tiny_config(data=dict(latents="x", image_size=64))
    options = sample.complete(sample.Sample("."), config)
    with pytest.raises(InputError, match="^--vae: None should be the folder of a VAE: the model"):
        sample.check(options, config)


def test_an_out_that_cannot_be_written_is_refused(refused, run, tmp_path):
    (tmp_path / "x.png").mkdir()
    line = refused(run_sample, run, "--out", tmp_path / "x.png")
    assert "should be a file that can be written" in line


# Which condition is drawn, and where it stands


SHOWN_CLASSES = 13


def brightness(y):
    """Of labels, or of weights of the classes."""
    if y.ndim == 2:
        y = y @ jnp.arange(y.shape[1], dtype=jnp.float32)
    return 0.05 * y.reshape(-1, 1, 1, 1)


def shade(x0) -> int:
    return int(to_uint8(jnp.float32(x0)))


@pytest.fixture
def shown(tmp_path, monkeypatch) -> Path:
    """A folder of weights of 13 classes in colour, for which a model stands in that shows them."""
    config = tiny_config(
        data=dict(channels=3, num_classes=SHOWN_CLASSES),
        objective=dict(variance="fixed_small"),
    )
    names = tuple(f"class {k}, a synonym" for k in range(SHOWN_CLASSES))
    folder = tmp_path / "weights"
    checkpoint.save_weights(folder, make_model(config, jax.random.key(0)), config, names)
    stand_in = show_condition(config, brightness)
    monkeypatch.setattr(checkpoint, "load", lambda *args: (stand_in, config))
    return folder


@pytest.fixture
def grids(monkeypatch) -> list[tuple]:
    """What was drawn as grids: (images, row names, column names)."""
    drawn = []
    before = images.draw_grid

    def draw_grid(*arguments):
        drawn.append(arguments)
        return before(*arguments)

    monkeypatch.setattr(images, "draw_grid", draw_grid)
    return drawn


@pytest.mark.parametrize(
    "words, expected",
    [([], generation.spread_classes(SHOWN_CLASSES)), (["9", "class 2, a synonym", "4"], [9, 2, 4])],
)
def test_each_row_of_a_grid_is_of_the_class_that_stands_before_it(
    shown, tmp_path, grids, words, expected
):
    flags = ["--classes", *words, "--per-class", "3"] if words else ["--per-class", "3"]
    out = run_sample(shown, *flags, "--out", tmp_path / "x.png")
    pictures, names, _ = grids[0]
    assert names == [f"class {k}" for k in expected]
    rows = pictures.reshape(len(names), 3, -1).astype(int)
    sheet = np.asarray(Image.open(out).convert("L"), int)
    for number, (k, row) in enumerate(zip(expected, rows, strict=True)):
        value = shade(0.05 * k)
        np.testing.assert_allclose(row, value, atol=1)
        middle = 2 + number * TILE + 32
        assert sheet[middle, -TILE // 2] == pytest.approx(value, abs=1), "in the picture too"


def test_an_npz_has_every_class_and_a_grid_ten(shown, tmp_path):
    flags = ["--per-class", "1"]
    _, labels = draw(shown, tmp_path, *flags)
    assert labels.tolist() == list(range(SHOWN_CLASSES))
    out = run_sample(shown, *flags, "--out", tmp_path / "x.png")
    assert Image.open(out).height == 10 * TILE + 2


def test_the_label_beside_an_image_is_what_the_image_shows(shown, tmp_path):
    flags = "--num-samples 20 --classes 3 5 8 --batch-size 6".split()
    pictures, labels = draw(shown, tmp_path, *flags)
    assert set(labels) == {3, 5, 8}
    for picture, label in zip(pictures, labels, strict=True):
        np.testing.assert_allclose(picture.astype(int), shade(0.05 * label), atol=1)


def test_cfg_channels_are_the_channels_that_are_guided_away_from_the_null_class(shown, tmp_path):
    flags = "--classes 4 --per-class 2 --guidance 2".split()
    guided, plain = shade(2 * 0.05 * 4 - 0.05 * SHOWN_CLASSES), shade(0.05 * 4)
    assert abs(guided - plain) > 10
    pictures, _ = draw(shown, tmp_path, *flags)
    np.testing.assert_allclose(pictures.astype(int), guided, atol=1)
    pictures, _ = draw(shown, tmp_path, *flags, "--cfg-channels", "1")
    np.testing.assert_allclose(pictures[..., :1].astype(int), guided, atol=1)
    np.testing.assert_allclose(pictures[..., 1:].astype(int), plain, atol=1)


# From noise to image, and from class to class


@pytest.mark.parametrize("flags", [["--sampler", "ddim"], ["--sampler", "ddpm"]])
def test_frames_go_from_the_noise_to_the_image_in_a_strip_and_in_a_gif(run, tmp_path, grids, flags):
    flags = ["--classes", "3", "5", "--steps", "5", *flags]
    final, _ = draw(run, tmp_path, *flags, "--per-class", "1")
    run_sample(run, *flags, "--frames", "4", "--out", tmp_path / "x.png")
    strip, row_names, column_names = grids.pop()
    strip = strip.reshape(2, 4, 8, 8, 1)
    process = make_objective(intact.stored_config(run, 2))
    keys = sampling.sample_keys(0, jnp.arange(2))
    noise = sampling.sample_noise(keys, process.num_steps, (8, 8, 1))
    np.testing.assert_array_equal(strip[:, 0], to_uint8(noise))
    np.testing.assert_allclose(strip[:, -1].astype(int), final, atol=1)
    assert row_names == ["3", "5"]
    levels = process.noise_levels(5)[np.array([0, 2, 3, 5])]
    assert column_names == [f"noise {level:.2f}" for level in levels]

    out = run_sample(run, *flags, "--per-class", "1", "--frames", "4", "--out", tmp_path / "x.gif")
    for state, (shown, names, titles) in enumerate(grids):
        np.testing.assert_array_equal(shown, strip[:, state])
        assert (names, titles) == (row_names, [column_names[state]])
    with Image.open(out) as movie:
        assert movie.n_frames == 4
        movie.seek(3)
        last = np.asarray(movie.convert("L"), int)
    assert last[-TILE // 2, -TILE // 2] == pytest.approx(int(final[1, 4, 4, 0]), abs=8)


def test_interpolation_goes_from_one_class_to_the_other_in_the_same_noise(run, tmp_path, grids):
    run_sample(run, "--interpolate", "3", "8", "--steps", "5", "--out", tmp_path / "x.png")
    row, row_names, column_names = grids.pop()
    for image, label in [(row[0], "3"), (row[-1], "8")]:
        alone, _ = draw(run, tmp_path, "--classes", label, "--per-class", "1")
        np.testing.assert_allclose(image.astype(int), alone[0], atol=1)
    assert (row_names, column_names[0], column_names[-1]) == ([""], "3", "8")
    assert column_names[1:3] == ["14%", "29%"]
    flags = ["--interpolate", "3", "8", "--per-class", "3", "--frames", "2"]
    run_sample(run, *flags, "--out", tmp_path / "x.png")
    strip, row_names, column_names = grids.pop()
    assert (len(strip), row_names, column_names[-1]) == (6, ["3", "50%", "8"], "noise 0.00")
    np.testing.assert_array_equal(strip[0], strip[2])


def test_interpolation_mixes_the_two_classes_by_equal_steps(shown, tmp_path, grids):
    flags = ["--interpolate", "class 12", "2", "--per-class", "6"]
    run_sample(shown, *flags, "--out", tmp_path / "x.png")
    row, _, _ = grids.pop()
    for image, label in zip(row, [12, 10, 8, 6, 4, 2], strict=True):
        np.testing.assert_allclose(image.astype(int), shade(0.05 * label), atol=1)


def test_an_out_without_a_folder_lands_in_the_runs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--classes", "3", "--per-class", "1", "--steps", "2"]
    assert run_sample(run, *flags, "--out", "own.png") == run / "own.png"
    assert run_sample(run, *flags) == run / "samples.png"
    assert run_sample(run, *flags, "--out", "./own.png") == Path("own.png")
    assert [path.name for path in tmp_path.iterdir()] == ["own.png"]
    for name in ("own.png", "samples.png"):
        (run / name).unlink()


# Many samples


class DiesOnce:
    """`generation.make_draw` whose function is killed at its third batch, once."""

    def __init__(self, monkeypatch):
        self.drawn = []
        self.killed = False
        self.make_draw = generation.make_draw
        monkeypatch.setattr(generation, "make_draw", self)

    def __call__(self, *args, **options):
        draw = self.make_draw(*args, **options)

        def dies(model, vae, first):
            if first == 16 and not self.killed:
                self.killed = True
                raise KeyboardInterrupt
            self.drawn.append(first)
            return draw(model, vae, first)

        return dies


MANY = "--num-samples 41 --steps 3 --batch-size 8 --sampler ddpm".split()


def test_many_samples_go_on_where_they_were_killed(refused, run, tmp_path, monkeypatch):
    whole, labels = draw(run, tmp_path, *MANY)
    assert len(whole) == 41
    assert len(np.unique(labels)) > 5
    assert labels.min() >= 0 and labels.max() <= 9
    _, more = draw(run, tmp_path, *MANY, "--num-samples", "53")
    np.testing.assert_array_equal(more[:41], labels)  # a label is a function of (seed, index)

    calls = DiesOnce(monkeypatch)
    out = tmp_path / "y.npz"
    with pytest.raises(SystemExit):
        run_sample(run, *MANY, "--out", out)
    assert not out.exists()
    line = refused(run_sample, run, *MANY, "--seed", "1", "--out", out)
    assert "was begun with seed 0 rather than 1; remove it, or name another folder" in line
    line = refused(run_sample, run, *MANY, "--classes", "3", "--out", out)
    assert "was begun with classes [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] rather than [3]" in line
    (tmp_path / "y.npz.done/0").mkdir(parents=True)  # of another, killed while it removed its parts
    run_sample(run, *MANY, "--out", out)
    assert calls.drawn == [0, 8, 16, 24, 32, 40], "what was drawn is not drawn again"
    np.testing.assert_array_equal(np.load(out)["arr_0"], whole)
    np.testing.assert_array_equal(np.load(out)["arr_1"], labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz", "y.npz"]


def test_parts_of_another_checkpoint_are_not_taken_for_this_one(
    refused, run, tmp_path, monkeypatch
):
    shutil.copytree(run, tmp_path / "run")
    DiesOnce(monkeypatch)
    flags = [tmp_path / "run", *MANY, "--out", tmp_path / "x.npz"]
    with pytest.raises(SystemExit):
        run_sample(*flags)
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    assert "was begun with step 2 rather than 1" in refused(run_sample, *flags)


def test_folders_and_files_that_hold_no_parts_of_ours_are_refused(refused, run, tmp_path):
    (tmp_path / "z.npz.parts").mkdir()
    np.save(tmp_path / "z.npz.parts/000000000.npy", np.zeros((8, 8, 8, 1), np.uint8))
    (tmp_path / "w.npz.parts").touch()
    for name in ("z.npz", "w.npz"):
        line = refused(run_sample, run, *MANY, "--out", tmp_path / name)
        assert "--out: " in line
        assert "should be new, or hold the request.json that it was begun with" in line


# Pictures that condition the samples


def save_picture(path, values, mode="L") -> str:
    Image.fromarray(np.asarray(values, np.uint8)).convert(mode).save(path)
    return str(path)


def test_a_mask_is_read_in_any_form_and_moves_the_sample_where_it_changes(layout, tmp_path):
    flags = ["--classes", "3", "--sampler", "ddim"]
    half = np.zeros((8, 8))
    half[:, 4:] = 1
    asked, _ = draw(layout, tmp_path, *flags, "--mask", save_picture(tmp_path / "a.png", half))
    for mode in ("L", "1", "RGB"):
        same = save_picture(tmp_path / "b.png", half * 255, mode)
        np.testing.assert_array_equal(draw(layout, tmp_path, *flags, "--mask", same)[0], asked)
    large = save_picture(tmp_path / "c.png", half.repeat(2, axis=0).repeat(2, axis=1))
    resized = ["--mask", large, "--resize-mask"]
    np.testing.assert_array_equal(draw(layout, tmp_path, *flags, *resized)[0], asked)
    guided, _ = draw(layout, tmp_path, *flags, *resized, "--guidance", "3")
    assert (guided != asked).any()

    nothing, _ = draw(layout, tmp_path, *flags)
    inverse = save_picture(tmp_path / "d.png", 1 - half)
    other, _ = draw(layout, tmp_path, *flags, "--mask", inverse)
    assert (nothing != asked).any()
    assert (other != asked).any()
    assert (nothing != other).any()


def test_a_palette_of_a_mask_stays_the_labels_that_it_is(tmp_path):
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8) % 3
    picture = Image.new("P", (8, 8))
    picture.putpalette([200, 10, 10, 30, 90, 5, 255, 255, 255])
    picture.putdata(labels.ravel().tolist())
    picture.save(tmp_path / "m.png")
    config = tiny_config(data=dict(mask_classes=3))
    options = sample.Sample("x", mask=str(tmp_path / "m.png"))
    mask = sample.read_mask(options, config)
    np.testing.assert_array_equal(mask, labels)
    assert mask.dtype == np.uint8
    assert sample.read_mask(sample.Sample("x"), config) is None


def test_style_gives_the_samples_the_pictures_statistics(run, tmp_path):
    style = np.clip(np.random.default_rng(0).normal(170, 30, (16, 16)), 0, 255)
    flags = ["--per-class", "2", "--style", save_picture(tmp_path / "style.png", style)]
    plain, _ = draw(run, tmp_path, "--per-class", "2")
    styled, _ = draw(run, tmp_path, *flags)
    half, _ = draw(run, tmp_path, *flags, "--style-strength", "0.5")
    none, _ = draw(run, tmp_path, *flags, "--style-strength", "0")
    np.testing.assert_array_equal(none, plain)

    def distance(pictures):
        means = pictures.mean(axis=(1, 2)) - style.mean()
        deviations = pictures.std(axis=(1, 2)) - style.std()
        return np.abs([means, deviations]).mean()

    assert distance(styled) < distance(plain) / 10
    assert distance(styled) < distance(half) < distance(plain)


def test_parts_of_another_mask_are_not_taken_for_this_one(refused, layout, tmp_path, monkeypatch):
    mask = tmp_path / "m.png"
    flags = [layout, "--num-samples", "11", "--steps", "2", "--mask", mask]
    flags += ["--out", tmp_path / "x.npz"]

    def killed(*args):
        raise KeyboardInterrupt

    save_picture(mask, np.zeros((8, 8)))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(generation, "write_npz", killed)
        run_sample(*flags)
    save_picture(mask, np.ones((8, 8)))  # the same name
    assert "was begun with pictures [" in refused(run_sample, *flags)


def test_masks_and_styles_that_cannot_be_are_refused(refused, run, layout, tmp_path):
    out = ["--out", tmp_path / "x.png"]
    mask = save_picture(tmp_path / "m.png", np.full((8, 8), 2))
    line = refused(run_sample, layout, "--mask", mask, *out)
    assert "--mask: 2 should be labels from 0 to 1: the model's masks have 2 classes" in line
    large = save_picture(tmp_path / "l.png", np.zeros((16, 8)))
    line = refused(run_sample, layout, "--mask", large, *out)
    assert "--mask: '8x16' should be 8x8, or be resized with --resize-mask" in line
    (tmp_path / "no.png").write_bytes(b"no picture")
    line = refused(run_sample, layout, "--mask", tmp_path / "no.png", *out)
    assert "--mask: " in line
    assert "should be a picture" in line
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    line = refused(run_sample, run, "--style", tmp_path / "deep.png", *out)
    assert "of 8 bits a channel, unlike its 'I;16'" in line
    assert not (tmp_path / "x.png").exists()


def test_a_grey_style_is_taken_by_a_model_in_colour_with_a_word(tmp_path, capsys):
    config, pixels = tiny_config(data=dict(channels=3)), np.arange(64).reshape(8, 8)
    grey = save_picture(tmp_path / "grey.png", pixels)
    style = sample.read_style(sample.Sample("x", style=grey), config, None)
    np.testing.assert_array_equal(to_uint8(style), pixels[None, ..., None].repeat(3, axis=-1))
    expected = f"--style: '{grey}' is grey, and so will the samples be on average\n"
    assert capsys.readouterr().out == expected
    coloured = np.stack([pixels, pixels, 2 * pixels], axis=-1).astype(np.uint8)
    Image.fromarray(coloured).save(tmp_path / "coloured.png")
    sample.read_style(sample.Sample("x", style=str(tmp_path / "coloured.png")), config, None)
    assert capsys.readouterr().out == ""
