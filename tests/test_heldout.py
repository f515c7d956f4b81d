"""The loss on held-out images: of which images, at which times, by which weights, and when."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, awaken, run_train, tiny_config
from jax.tree_util import Partial
from matplotlib.axes import Axes

import train
from dit import checkpoint, heldout, run, writers
from dit.data import Dataset, InMemory
from dit.sharding import make_mesh, replicated
from dit.state import make_model

pytestmark = pytest.mark.slow

NAMES = tuple("0123456789")
FLOW = dict(name="flow", num_steps=1000, schedule="linear")


@pytest.fixture
def splits(monkeypatch):
    """`dark` has 37 images whose squares have a mean of 0.25, `light` 37 of 1."""

    def open_dataset(data):
        shade = {"dark": 64, "light": 255}[data.split]
        images = np.full((37, 8, 8, 1), shade, np.uint8)
        return Dataset(InMemory(images, np.arange(37, dtype=np.int32) % 10), NAMES)

    monkeypatch.setattr(heldout, "open_dataset", open_dataset)


def held_out_loss(split: str, devices=1, **sections):
    sections["eval"] = dict(split=split)
    config = tiny_config(**sections)
    return heldout.make_held_out_loss(config, make_mesh(config, jax.devices()[:devices]))


def test_it_is_of_every_image_of_the_split_that_eval_names(splits):
    """A model that predicts no velocity has E|noise - x_0|^2 = 1 + |x_0|^2."""
    zeros = Partial(lambda x, t, y: jnp.zeros_like(x))
    count = 48 * 64  # pixels of three batches of 16
    for split, square in [("dark", (64 / 127.5 - 1) ** 2), ("light", 1.0)]:
        found = held_out_loss(split, objective=FLOW)(zeros)
        error = ((2 + 4 * square) / count) ** 0.5
        assert found == pytest.approx(1 + square, abs=4 * error)


def test_images_are_spread_over_the_split_and_fill_their_batches(monkeypatch):
    seen = []
    read = InMemory.read
    monkeypatch.setattr(InMemory, "read", lambda *args: seen.extend(args[1]) or read(*args))
    held_out_loss("train", train=dict(batch_size=600))
    assert len(seen) == 1200, "as many as fill two batches"
    assert np.diff(sorted(seen)).max() == 2, "evenly spaced over the 1,797"


def test_a_split_that_is_not_there_is_refused(refused, tmp_path):
    flags = ["--workdir", tmp_path / "run", "--eval.split", "nowhere"]
    line = refused(run_train, *TINY, *flags)
    assert line.startswith("train.py: eval.split: 'nowhere' should be train")
    assert not (tmp_path / "run").exists()


def test_it_is_fixed_and_the_same_on_any_devices(splits):
    model = awaken(make_model(tiny_config(), jax.random.key(0)))
    one = held_out_loss("dark")
    first = one(model)
    assert one(model) == first
    config = tiny_config()
    everywhere = jax.device_put(model, replicated(make_mesh(config)))
    assert held_out_loss("dark", devices=8)(everywhere) == pytest.approx(first, rel=1e-5)
    assert held_out_loss("dark", train=dict(seed=1))(model) != pytest.approx(first, rel=1e-3)


def test_nothing_is_dropped_or_augmented_that_training_drops_or_augments(splits):
    only_in_training = dict(data=dict(augment=1.0), objective=dict(label_dropout=1.0))
    model = awaken(make_model(tiny_config(**only_in_training), jax.random.key(0)))
    plain = held_out_loss("dark", objective=dict(label_dropout=0.0))
    assert held_out_loss("dark", **only_in_training)(model) == plain(model)


def test_a_run_measures_its_last_weights_and_their_average_every_so_often(tmp_path, monkeypatch):
    def make_held_out_loss(config, mesh):
        return lambda model: float(jnp.abs(model.final.linear.kernel[...]).sum())

    monkeypatch.setattr(run, "make_held_out_loss", make_held_out_loss)
    steps = dict(steps=5, checkpoint_every=1, keep_last=9, workdir=str(tmp_path))
    measured = dict(split="test", loss_every=2)
    train.train(tiny_config(train=steps, eval=measured, optim=dict(ema_decay=(0.99, 0.05))))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in lines if "held_out_loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 5]
    of_model = make_held_out_loss(None, None)
    for row in rows:
        losses = []
        for name, ema in [("", False), ("_ema", True), ("_ema_0.05", 0.05)]:
            model, _ = checkpoint.load(tmp_path, ema, step=row["step"])
            losses.append(of_model(model))
            assert row[f"held_out_loss{name}"] == pytest.approx(losses[-1], rel=1e-5)
        assert len({round(loss, 4) for loss in losses}) == 3, losses


def test_the_plot_shows_it_at_the_steps_at_which_it_was_measured(tmp_path, monkeypatch):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    losses = {"held_out_loss": 5.0, "held_out_loss_ema": 4.0, "held_out_loss_ema_0.05": 3.0}
    rows += [{"step": 2} | losses]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = {}

    def plot(axes, steps, values, label, **style):
        lines[label] = (list(steps), list(values))

    monkeypatch.setattr(Axes, "plot", plot)
    monkeypatch.setattr(Axes, "legend", lambda axes, **style: None)
    writers.plot_loss(tmp_path)
    assert lines == {
        "loss": ([1, 2], [3, 2]),
        "of held-out images": ([2], [5]),
        "of held-out images, averaged weights": ([2], [4]),
        "the same, of decay 0.05": ([2], [3]),
    }
