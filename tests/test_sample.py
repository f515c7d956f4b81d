import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, awaken, largest_difference, tiny_config
from PIL import Image

import sample
import train
from dit import checkpoint
from dit.config import InputError, Mesh
from dit.data import imagenet_names
from dit.sharding import make_mesh, replicated
from dit.state import make_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose weights, average and last, are awake and differ."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    before = train.make_state

    def awake_state(config, mesh):
        state = before(config, mesh)
        placements = jax.tree.map(lambda leaf: leaf.sharding, state)
        model = jax.device_put(state.model, jax.devices()[0])
        return jax.device_put(dataclasses.replace(state, model=awaken(model, 0.05), ema=awaken(model, 0.05, seed=9)), placements)

    train.make_state = awake_state
    try:
        train.main([*TINY, "--workdir", str(workdir), "--train.steps", "2", "--optim.ema-decay", "0.5"])
    finally:
        train.make_state = before
    return workdir


def draw(run, tmp_path, *flags):
    sample.main([str(run), "--steps", "5", "--out", str(tmp_path / "x.npz"), *flags])
    arrays = np.load(tmp_path / "x.npz")
    assert set(arrays) == {"arr_0", "arr_1"} and arrays["arr_0"].dtype == np.uint8 and arrays["arr_1"].dtype == np.int64
    return arrays["arr_0"], arrays["arr_1"]


def test_load_gives_the_average_unless_told_otherwise(run):
    (ema, config), (last, _) = checkpoint.load(run), checkpoint.load(run, ema=False)
    assert config.name == "digits" and largest_difference(ema, last) > 1e-3
    fresh = jax.eval_shape(lambda: make_model(config, jax.random.key(0)))
    assert [leaf.shape for leaf in jax.tree.leaves(ema)] == [leaf.shape for leaf in jax.tree.leaves(fresh)]
    assert ema(jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, int)).shape == (1, 8, 8, 2)


def test_npz_holds_images_and_labels_in_the_order_asked_for(run, tmp_path):
    images, labels = draw(run, tmp_path, "--classes", "3", "5", "8", "--per-class", "2")
    assert images.shape == (6, 8, 8, 1) and labels.tolist() == [3, 3, 5, 5, 8, 8] and images.std() > 0
    images, labels = draw(run, tmp_path, "--per-class", "1")
    assert labels.tolist() == list(range(10))


@pytest.mark.parametrize("flags", [["--sampler", "ddpm"], ["--sampler", "ddim", "--eta", "0.5", "--guidance", "2"]])
def test_batch_size_does_not_change_a_sample_and_seed_does(run, tmp_path, flags):
    whole, _ = draw(run, tmp_path, "--classes", "3", "4", "--per-class", "10", *flags)
    parts, _ = draw(run, tmp_path, "--classes", "3", "4", "--per-class", "10", "--batch-size", "7", *flags)  # 8 devices: batches of 8
    other, _ = draw(run, tmp_path, "--classes", "3", "4", "--per-class", "10", "--seed", "1", *flags)
    assert np.abs(whole.astype(int) - parts).max() <= 1 and (whole != other).mean() > 0.5


def test_every_option_changes_what_it_should(run, tmp_path):
    base, _ = draw(run, tmp_path, "--classes", "3", "--sampler", "ddim")
    for flags in (["--guidance", "3"], ["--no-ema"], ["--eta", "1"], ["--sampler", "ddpm"], ["--steps", "9"]):
        assert (draw(run, tmp_path, "--classes", "3", "--sampler", "ddim", *flags)[0] != base).any(), flags
    guided, _ = draw(run, tmp_path, "--classes", "3", "--sampler", "ddim", "--guidance", "3")
    partly, _ = draw(run, tmp_path, "--classes", "3", "--sampler", "ddim", "--guidance", "3", "--guidance-interval", "20", "60")
    never, _ = draw(run, tmp_path, "--classes", "3", "--sampler", "ddim", "--guidance", "3", "--guidance-interval", "500", "600")
    assert (partly != guided).any() and (partly != base).any() and np.abs(never.astype(int) - base).max() <= 1


def test_classes_go_by_number_name_or_synonym():
    names = ("tench, Tinca tinca", "crane (bird)", "maillot", "maillot, tank suit", "golden retriever")
    words = ("4", "Golden Retriever", "tinca tinca", "tank suit", "maillot, tank suit")
    assert [sample.class_number(word, names) for word in words] == [4, 4, 0, 3, 3]
    with pytest.raises(InputError, match=r"'maillot' should be one of the numbers 2 \(maillot\), 3 \(maillot, tank suit\)"):
        sample.class_number("maillot", names)
    with pytest.raises(InputError, match="the nearest is 'golden retriever'"):
        sample.class_number("golden retreiver", names)


def test_a_grid_of_many_classes_shows_ten(run):
    config = checkpoint.load(run)[1]
    many = dataclasses.replace(config, data=dataclasses.replace(config.data, num_classes=1000, class_names=imagenet_names()))
    assert len(sample.completed(sample.Sample("", out="x.png"), many).classes) == 10
    assert len(sample.completed(sample.Sample("", out="x.npz"), many).classes) == 1000


def test_many_samples_go_on_where_they_were_killed(refused, run, tmp_path, monkeypatch):
    flags = ["--num-samples", "41", "--steps", "3", "--batch-size", "8", "--sampler", "ddpm"]
    whole, labels = draw(run, tmp_path, *flags)
    assert len(whole) == 41 and len(np.unique(labels)) > 5 and labels.min() >= 0 and labels.max() <= 9
    _, more = draw(run, tmp_path, *flags[2:], "--num-samples", "53")
    np.testing.assert_array_equal(more[:41], labels)  # a label is a function of (seed, index)

    out, made, before = tmp_path / "y.npz", [], sample.make_draw

    def dies(*args):
        drawn = before(*args)

        def draw(labels, first):
            made.append(first)
            if len(made) == 3:
                raise KeyboardInterrupt
            return drawn(labels, first)

        return draw

    monkeypatch.setattr(sample, "make_draw", dies)
    with pytest.raises(KeyboardInterrupt):
        sample.main([str(run), *flags, "--out", str(out)])
    assert not out.exists() and "with seed 0 rather than 1" in refused(sample.main, run, *flags, "--seed", "1", "--out", out)
    sample.main([str(run), *flags, "--out", str(out)])
    assert made == [0, 8, 16, 16, 24, 32, 40], "what was drawn is not drawn again"
    np.testing.assert_array_equal(np.load(out)["arr_0"], whole)
    np.testing.assert_array_equal(np.load(out)["arr_1"], labels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npz", "y.npz"]
    (tmp_path / "z.npz.parts").mkdir()  # of which no one knows what it holds
    np.save(tmp_path / "z.npz.parts/000000000.npy", whole[:8])
    assert "should be a folder of parts of this request" in refused(sample.main, run, *flags, "--out", tmp_path / "z.npz")
    (tmp_path / "w.npz.parts").touch()
    assert "should be a folder of parts of this request" in refused(sample.main, run, *flags, "--out", tmp_path / "w.npz")


def test_the_images_are_the_same_for_any_number_of_devices(run):
    model, config = checkpoint.load(run)
    options = sample.completed(sample.Sample("", steps=5, guidance=2.0, out="x.npz"), config)
    labels = np.arange(10, dtype=np.int32)
    images = []
    for count in (1, 8):
        mesh = make_mesh(Mesh(), count, devices=jax.devices()[:count])
        images.append(sample.make_draw(jax.device_put(model, replicated(mesh)), None, config, options, mesh)(labels, 3).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1 and images[0].std() > 10


def test_png_is_a_labelled_grid_one_class_a_row(run, tmp_path, capsys):
    out = tmp_path / "x.png"
    sample.main([str(run), "--classes", "3", "5", "--per-class", "4", "--steps", "3", "--out", str(out)])
    width, height = Image.open(out).size
    assert height == 2 * 66 + 2 and width > 4 * 66 and f"wrote {out}" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    (["--classes", "3", "10"], "--classes: 10 should be from 0 to 9: the model has 10 classes"),
    (["--classes", "-1"], "--classes: -1 should be from 0 to 9"),
    (["--classes", "cat"], "--classes: 'cat' should be a number from 0 to 9 or the name of a class; the nearest is"),
    (["--num-samples", "0", "--out", "x.npz"], "--num-samples: 0 should be more than 0"),
    (["--num-samples", "9", "--out", "x.png"], "--num-samples: 9 should be given with an --out that ends in .npz"),
    (["--vae", "somewhere"], "--vae: 'somewhere' should be left out: the model makes pixels, not latents"),
    (["--steps", "102"], "--steps: 102 should be from 1 to the model's 101 timesteps"),
    (["--steps", "0"], "--steps: 0 should be from 1"),
    (["--eta", "2"], "--eta: 2.0 should be from 0 to 1"),
    (["--cfg-channels", "2"], "--cfg-channels: 2 should be from 1 to 1"),
    (["--per-class", "0"], "--per-class: 0 should be more than 0"),
    (["--out", "x.jpg"], "--out: 'x.jpg' should be a .png or .npz file"),
    (["--out", "nowhere/x.png"], "--out: 'nowhere/x.png' should be in a folder that exists"),
    (["--sampler", "euler"], "--sampler"),
    (["--classes", "²"], "--classes: '²' should be a number from 0 to 9 or the name of a class"),
    (["--guidance", "nan"], "--guidance: nan should be a number"),
    (["--guidance-interval", "500", "100"], "--guidance-interval: (500.0, 100.0) should be LOW and a HIGH above it"),
    (["--seed", "-1"], "--seed: -1 should be from 0 to 2^32 - 1"),
])
def test_options_that_cannot_be_are_refused(refused, run, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(sample.main, run, *flags)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """A model with masks, trained for three steps and then awakened."""
    workdir = tmp_path_factory.mktemp("runs") / "layout"
    train.main([*TINY, "--workdir", str(workdir), "--train.steps", "3", "--train.sample-every", "3", "--data.mask-classes", "2"])
    assert Image.open(workdir / "samples/0000003.png").height == 10 * 66 + 2
    model, config = checkpoint.load(workdir)
    awake = workdir.with_name("awake")
    checkpoint.save_weights(awake, awaken(jax.device_put(model, jax.devices()[0]), 0.1), config)
    return awake


def save_mask(path, values, mode="L"):
    Image.fromarray(np.asarray(values, np.uint8)).convert(mode).save(path)
    return str(path)


def test_a_mask_is_read_in_any_form_and_moves_the_sample_where_it_changes(layout, tmp_path):
    flags = ["--classes", "3", "--sampler", "ddim"]
    half = np.zeros((8, 8))
    half[:, 4:] = 1
    asked, _ = draw(layout, tmp_path, *flags, "--mask", save_mask(tmp_path / "a.png", half))
    for same in (save_mask(tmp_path / "b.png", half * 255), save_mask(tmp_path / "c.png", half * 255, "1"),
                 save_mask(tmp_path / "d.png", half * 255, "RGB")):
        np.testing.assert_array_equal(draw(layout, tmp_path, *flags, "--mask", same)[0], asked)
    large = save_mask(tmp_path / "e.png", half.repeat(2, axis=0).repeat(2, axis=1))
    np.testing.assert_array_equal(draw(layout, tmp_path, *flags, "--mask", large, "--resize-mask")[0], asked)
    nothing, _ = draw(layout, tmp_path, *flags)
    other, _ = draw(layout, tmp_path, *flags, "--mask", save_mask(tmp_path / "f.png", 1 - half))
    assert (nothing != asked).any() and (other != asked).any() and (nothing != other).any()
    assert (draw(layout, tmp_path, *flags, "--mask", large, "--resize-mask", "--guidance", "3")[0] != asked).any()


def test_style_gives_the_samples_the_pictures_statistics(run, tmp_path):
    style = np.clip(np.random.default_rng(0).normal(170, 30, (16, 16)), 0, 255)
    path = save_mask(tmp_path / "style.png", style)
    plain, _ = draw(run, tmp_path, "--per-class", "2")
    styled, _ = draw(run, tmp_path, "--per-class", "2", "--style", path)
    half, _ = draw(run, tmp_path, "--per-class", "2", "--style", path, "--style-strength", "0.5")
    none, _ = draw(run, tmp_path, "--per-class", "2", "--style", path, "--style-strength", "0")
    np.testing.assert_array_equal(none, plain)
    distance = [np.abs([images.mean(axis=(1, 2)) - style.mean(), images.std(axis=(1, 2)) - style.std()]).mean()
                for images in (styled, half, plain)]
    assert distance[0] < distance[2] / 10 and distance[0] < distance[1] < distance[2]


def test_parts_of_another_mask_are_not_taken_for_this_one(refused, layout, tmp_path, monkeypatch):
    flags = [layout, "--num-samples", "11", "--steps", "2", "--mask", tmp_path / "m.png", "--out", tmp_path / "x.npz"]
    save_mask(tmp_path / "m.png", np.zeros((8, 8)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "write_npz", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        sample.main([str(flag) for flag in flags])
    save_mask(tmp_path / "m.png", np.ones((8, 8)))  # the same name
    assert "with pictures [" in refused(sample.main, *flags)


def test_masks_and_styles_that_cannot_be_are_refused(refused, run, layout, tmp_path):
    out = ["--out", tmp_path / "x.png"]
    mask = save_mask(tmp_path / "m.png", np.full((8, 8), 2))
    assert "--mask: 2 should be labels from 0 to 1: the model's masks have 2 classes" in refused(sample.main, layout, "--mask", mask, *out)
    large = save_mask(tmp_path / "l.png", np.zeros((16, 8)))
    assert "--mask: '8x16' should be 8x8, or be resized with --resize-mask" in refused(sample.main, layout, "--mask", large, *out)
    assert "should be left out: the model was trained without masks" in refused(sample.main, run, "--mask", mask, *out)
    (tmp_path / "no.png").write_bytes(b"no picture")
    assert "--mask: " in (line := refused(sample.main, layout, "--mask", tmp_path / "no.png", *out)) and "should be a picture" in line
    assert "--style: " in refused(sample.main, run, "--style", tmp_path / "nothing.png", *out)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep.png")
    assert "a picture of 8 bits a channel, unlike its 'I;16'" in refused(sample.main, run, "--style", tmp_path / "deep.png", *out)
    assert "--style-strength: 2.0 should be from 0 to 1" in refused(sample.main, run, "--style", mask, "--style-strength", "2", *out)
    colour = tiny_config(data=dict(channels=3))
    with pytest.raises(InputError, match="--style: .* should be a picture in colour, as the model's are"):
        sample.read_style(mask, colour, None)
    assert not (tmp_path / "x.png").exists()


def test_a_workdir_without_a_checkpoint_is_refused(refused, tmp_path):
    line = refused(sample.main, tmp_path, "--out", tmp_path / "x.png")
    assert re.search(r"workdir: '.*' should hold an intact checkpoint in checkpoints/ \(train.py writes them\)", line)
