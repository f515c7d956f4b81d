import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import awaken, tiny_config

import train
from dit import sharding
from dit.config import Optim
from dit.data import batches, open_dataset
from dit.sharding import map_parts
from dit.state import State, abstract_state, learning_rate, make_optimizer, make_state, mean_over_parts, update_ema


def run(config, devices, steps=3):
    """The state and metrics after some steps on the given devices, from weights without zeros."""
    mesh = sharding.make_mesh(config.mesh, config.train.batch_size, config.optim.accumulate, jax.devices()[:devices])
    state = make_state(config, mesh)
    placements = jax.tree.map(lambda leaf: leaf.sharding, state)
    awake = awaken(jax.device_put(state.model, jax.devices()[0]))
    state = jax.device_put(dataclasses.replace(state, model=awake, ema=jax.tree.map(jnp.copy, awake)), placements)
    step, stream = train.compile_train_step(config, mesh), batches(open_dataset(config.data), config.train.batch_size, 0)
    history = []
    for _ in range(steps):
        state, metrics = step(state, sharding.place_batch(next(stream), mesh))
        history.append(jax.device_get(metrics))
    return state, history


def assert_same_run(a, b):
    """Equal up to the order of sums. Adam divides by the gradient's size, so the few parameters that have none move by noise."""
    (state_a, history_a), (state_b, history_b) = a, b
    for x, y in zip(history_a, history_b, strict=True):
        for name in x:
            assert float(x[name]) == pytest.approx(float(y[name]), rel=2e-4), name
    for x, y in zip(jax.tree.leaves(state_a.opt_state), jax.tree.leaves(state_b.opt_state), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-2, atol=1e-3 * max(float(jnp.abs(x).max()), 1e-8))
    for x, y in [(state_a.model, state_b.model), (state_a.ema, state_b.ema)]:
        pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
        apart = np.concatenate([np.abs(np.asarray(a) - np.asarray(b)).ravel() for a, b in pairs])
        assert (apart > 2e-5).mean() < 0.01 and apart.max() < 0.01


SGD_LIKE = dict(learning_rate=1e-3, grad_clip=1.0)


@pytest.fixture(scope="module")
def one_device():
    return run(tiny_config(model=dict(hidden_size=40), optim=SGD_LIKE), devices=1)


@pytest.mark.parametrize("changed, devices", [
    (dict(), 8),
    (dict(mesh=dict(fsdp=4)), 8),
    (dict(optim=dict(accumulate=4)), 1),
    (dict(optim=dict(accumulate=2), mesh=dict(fsdp=2)), 8),
    (dict(model=dict(remat=True)), 1),
], ids=["8 devices", "fsdp", "accumulation", "accumulation and fsdp", "remat"])
def test_devices_shards_parts_and_remat_do_not_change_a_run(one_device, changed, devices, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 100)
    sections = {"model": dict(hidden_size=40) | changed.get("model", {}), "optim": SGD_LIKE | changed.get("optim", {}),
                "mesh": changed.get("mesh", {})}
    other = run(tiny_config(**sections), devices)
    spread = {leaf.sharding.num_devices for leaf in jax.tree.leaves(other[0])}
    assert spread == {devices}
    sharded = [not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(other[0].model)]
    assert any(sharded) == ("mesh" in changed)
    assert_same_run(one_device, other)


def test_the_rule_shards_the_largest_axis_that_divides_and_never_the_layers(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 100)
    config = tiny_config(model=dict(hidden_size=40, depth=80), mesh=dict(fsdp=8))  # more layers than channels
    mesh = sharding.make_mesh(config.mesh, 16)
    model = abstract_state(config, mesh).model
    spec = lambda leaf: tuple(leaf.sharding.spec)  # noqa: E731
    assert spec(model.blocks.attention.qkv.kernel) == (None, None, "fsdp")  # [80, 40, 120]
    assert spec(model.blocks.mlp.down.kernel) == (None, "fsdp", None)  # [80, 160, 40]
    assert spec(model.blocks.attention.proj.bias) == (None, "fsdp")  # [80, 40]: the layer axis divides too
    assert spec(model.label_embed.embedding) == (None, "fsdp")  # [11, 40]
    assert spec(model.final.linear.bias) == (None,)  # small
    opt_state = abstract_state(config, mesh).opt_state
    assert any(spec(leaf) == (None, None, "fsdp") for leaf in jax.tree.leaves(opt_state)), "the optimizer's memory is not sharded"


def test_mesh_refusals(refused):
    tiny = ["digits", "--model.hidden-size", "20", "--model.num-heads", "5"]
    assert "train.batch_size: 12 should be a multiple of the 8 devices" in refused(train.main, *tiny, "--train.batch-size", "12")
    assert "train.batch_size: 24 should be a multiple of the 8 devices times optim.accumulate = 2" in refused(
        train.main, *tiny, "--train.batch-size", "24", "--optim.accumulate", "2")
    assert "mesh.data and mesh.fsdp: (-1, 3) should be such that" in refused(train.main, *tiny, "--mesh.fsdp", "3")


def test_mean_over_parts_is_the_mean_and_runs_part_by_part():
    x = jnp.arange(12.0).reshape(12, 1)
    f = lambda batch: {"mean": batch.mean(), "square": jnp.square(batch).mean()}  # noqa: E731
    for parts in (1, 2, 3, 12):
        out = mean_over_parts(f, x, parts)
        assert float(out["mean"]) == pytest.approx(5.5) and float(out["square"]) == pytest.approx(float(jnp.square(x).mean()))
    assert "f32[4,1]" in str(jax.make_jaxpr(lambda x: mean_over_parts(f, x, 3))(x))


def test_learning_rate_warms_up_then_stays_or_falls():
    constant = learning_rate(Optim(learning_rate=2.0, warmup_steps=4), 100)
    assert [float(constant(n)) for n in (0, 2, 4, 99)] == pytest.approx([0, 1, 2, 2])
    cosine = learning_rate(Optim(learning_rate=2.0, warmup_steps=10, schedule="cosine"), 110)
    assert [float(cosine(n)) for n in (0, 5, 10, 60, 110)] == pytest.approx([0, 1, 2, 1, 0], abs=1e-6)
    assert float(learning_rate(Optim(learning_rate=3.0), 10)(0)) == 3


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_one_after_the_other_are_the_whole_in_its_order(parts):
    x = jnp.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(map_parts(lambda rows: rows * 2, x, parts), x * 2)


def test_the_optimizer_clips_and_decays_as_asked():
    params, grads = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([300.0, 400.0])}
    plain, clipped = make_optimizer(Optim(learning_rate=0.1), 10), make_optimizer(Optim(learning_rate=0.1, grad_clip=1.0), 10)
    assert optax.tree.norm(optax.tree.get(clipped.update(grads, clipped.init(params), params)[1], "mu")) == pytest.approx(0.1, rel=1e-4)
    assert optax.tree.norm(optax.tree.get(plain.update(grads, plain.init(params), params)[1], "mu")) == pytest.approx(50, rel=1e-4)
    decayed = make_optimizer(Optim(learning_rate=0.1, weight_decay=0.5), 10)
    updates, _ = decayed.update({"w": jnp.zeros(2)}, decayed.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.15, -0.2], rtol=1e-5)


def test_ema_follows_early_and_averages_late():
    ema, model = {"w": jnp.array([0.0])}, {"w": jnp.array([1.0])}
    assert float(update_ema(ema, model, jnp.int32(0), 0.99)["w"][0]) == pytest.approx(0.9)  # decay (1 + 0) / (10 + 0)
    assert float(update_ema(ema, model, jnp.int32(8), 0.99)["w"][0]) == pytest.approx(0.5)
    assert float(update_ema(ema, model, jnp.int32(100_000), 0.99)["w"][0]) == pytest.approx(0.01)


def test_label_dropout_flips_and_keys_reach_the_network(monkeypatch):
    class Spy:
        def loss(self, model, key, x, y):
            return 0 * model["w"], {"x": x, "y": y, "keys": jax.random.key_data(key)}

    monkeypatch.setattr(train, "make_objective", lambda config: Spy())
    images = jnp.arange(64, dtype=jnp.uint8).reshape(1, 8, 8, 1).repeat(800, axis=0)
    for dropout, flip in [(0.0, False), (1.0, True), (0.3, True)]:
        config = tiny_config(objective=dict(label_dropout=dropout), data=dict(flip=flip))
        model = {"w": jnp.float32(1)}
        state = State(jnp.int32(0), model, model, make_optimizer(config.optim, 1).init(model))
        step, batch = jax.jit(train.make_train_step(config)), {"image": images, "label": jnp.full(800, 4)}
        after, seen = step(state, batch)
        keys = np.concatenate([seen["keys"], step(after, batch)[1]["keys"], step(state, batch)[1]["keys"]])
        assert len(np.unique(keys, axis=0)) == 1600, "each sample of each step has a key of its own, and step n always the same"
        x, y = seen["x"], np.asarray(seen["y"])
        mirrored = np.asarray(x[:, 0, 0, 0] > x[:, 0, -1, 0])
        assert set(y.tolist()) <= {4, 10}
        assert (y == 10).mean() == pytest.approx(dropout, abs=0.06 * (0 < dropout < 1))
        assert mirrored.mean() == pytest.approx(0.5 * flip, abs=0.07 * flip)
        expected = np.where(mirrored.reshape(-1, 1, 1, 1), images[:1, :, ::-1], images[:1]) / np.float32(127.5) - 1
        np.testing.assert_allclose(x, expected, atol=1e-6)
