"""A run's state: the same on any devices; optimizer, schedule, average, and the step's inputs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import awaken, tiny_config

import train
from dit import sharding
from dit.config import Config, Optim
from dit.data import batches, open_dataset
from dit.state import State, learning_rate, make_model, make_optimizer, make_state, update_ema

# A run is the same on any devices


@dataclasses.dataclass
class Run:
    placement: State  # the shardings
    before: State  # on the host, from weights without zeros
    after: State
    metrics: list[dict[str, float]]


def run_steps(config: Config, devices: int, steps=3) -> Run:
    """The first steps of a run on some of the devices."""
    mesh = sharding.make_mesh(config, jax.devices()[:devices])
    state = make_state(config, mesh)
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    model = awaken(jax.device_put(state.model, jax.devices()[0]))
    state = dataclasses.replace(state, model=model, emas=(jax.tree.map(jnp.copy, model),))
    state = jax.device_put(state, placement)
    before = jax.tree.map(np.array, state)  # copies: the step donates its state
    step = train.compile_train_step(config, mesh)
    stream = batches(open_dataset(config.data), config.train.batch_size, 0)
    history = []
    for _ in range(steps):
        state, metrics = step(state, sharding.place_batch(next(stream), mesh))
        history.append({name: float(value) for name, value in metrics.items()})
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    return Run(placement, before, jax.device_get(state), history)


Leaves = dict[str, np.ndarray]


def named_leaves(tree: Any) -> Leaves:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def moment(run: Run, name: str) -> Leaves:
    """Adam's "mu" or "nu"."""
    return named_leaves(optax.tree.get(run.after.opt_state, name))


def where_it_has_gradient(run: Run) -> Leaves:
    """Where a parameter's gradient is more than rounding error, by its second moment.

    Without a gradient, as at the biases of the keys, which softmax does not see, Adam follows the
    signs of rounding errors.
    """
    sizes = {name: np.sqrt(leaf) for name, leaf in moment(run, "nu").items()}
    return {name: size > 1e-3 * size.max() for name, size in sizes.items()}


def movement(run: Run, weights: str, mask: Leaves) -> Leaves:
    """How far the steps moved the "model" or the "ema", 0 outside the mask."""
    before = named_leaves(getattr(run.before, weights))
    after = named_leaves(getattr(run.after, weights))
    return {name: np.where(mask[name], after[name] - before[name], 0) for name in mask}


def assert_close(ours: Leaves, theirs: Leaves, tolerance: float) -> None:
    """Holds each leaf's distance below a part of its norm."""
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        size, distance = np.linalg.norm(leaf), np.linalg.norm(leaf - theirs[name])
        assert size > 0, name
        assert distance <= tolerance * size, name


def assert_same_run(ours: Run, theirs: Run) -> None:
    """Equal up to the order of sums."""
    for a, b in zip(ours.metrics, theirs.metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert int(ours.after.step) == int(theirs.after.step) == len(ours.metrics)
    assert_close(named_leaves(ours.before.model), named_leaves(theirs.before.model), 0)
    assert_close(moment(ours, "mu"), moment(theirs, "mu"), 1e-4)
    assert_close(moment(ours, "nu"), moment(theirs, "nu"), 1e-4)
    mask = where_it_has_gradient(ours)
    assert np.concatenate([leaf.ravel() for leaf in mask.values()]).mean() > 0.95
    for weights in ("model", "ema"):
        assert_close(movement(ours, weights, mask), movement(theirs, weights, mask), 1e-3)


MODEL = dict(hidden_size=40)
OPTIM = dict(learning_rate=1e-3, grad_clip=1.0)


@pytest.fixture(scope="module")
def one_device() -> Run:
    return run_steps(tiny_config(model=MODEL, optim=OPTIM), devices=1)


@pytest.mark.parametrize(
    "changes, devices",
    [
        (dict(), 8),
        (dict(mesh=dict(fsdp=4)), 8),
        (dict(optim=dict(accumulate=4)), 1),
        (dict(optim=dict(accumulate=2), mesh=dict(fsdp=2)), 8),
        (dict(model=dict(remat="full")), 1),
    ],
    ids=["8 devices", "fsdp", "accumulation", "accumulation and fsdp", "remat"],
)
def test_devices_shards_parts_and_remat_do_not_change_a_run(
    one_device, changes, devices, monkeypatch
):
    monkeypatch.setattr(sharding, "SMALL", 100)
    config = tiny_config(
        model=MODEL | changes.get("model", {}),
        optim=OPTIM | changes.get("optim", {}),
        mesh=changes.get("mesh", {}),
    )
    other = run_steps(config, devices)
    shardings = jax.tree.leaves(other.placement)
    assert {leaf.num_devices for leaf in shardings} == {devices}
    is_whole = [leaf.is_fully_replicated for leaf in jax.tree.leaves(other.placement.model)]
    assert all(is_whole) == ("mesh" not in changes)
    assert_same_run(one_device, other)


@pytest.mark.slow
def test_augmentation_is_the_same_on_any_devices_and_in_parts():
    data = dict(augment=0.5)
    one = run_steps(tiny_config(model=MODEL, data=data, optim=OPTIM), devices=1)
    shared = dict(mesh=dict(fsdp=2), data=data, optim=OPTIM | dict(accumulate=2))
    assert_same_run(one, run_steps(tiny_config(model=MODEL, **shared), 8))


@pytest.mark.slow
def test_muon_is_the_same_on_any_devices(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 100)
    optim = OPTIM | dict(name="muon")
    one = run_steps(tiny_config(model=MODEL, optim=optim), devices=1)
    other = run_steps(tiny_config(model=MODEL, optim=optim, mesh=dict(fsdp=2)), devices=8)
    for a, b in zip(one.metrics, other.metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    kernels = {
        name: leaf > -np.inf
        for name, leaf in named_leaves(one.after.model).items()
        if "blocks" in name and leaf.ndim == 3
    }
    assert len(kernels) > 4
    assert_close(movement(one, "model", kernels), movement(other, "model", kernels), 1e-2)


# Schedule and optimizer


def test_the_learning_rate_warms_up_and_stays():
    constant = learning_rate(Optim(learning_rate=2.0, warmup_steps=4), 100)
    assert [float(constant(n)) for n in (0, 2, 4, 99)] == pytest.approx([0, 1, 2, 2])
    assert float(learning_rate(Optim(learning_rate=3.0), 10)(0)) == 3


def test_the_learning_rate_warms_up_and_falls_along_a_half_cosine():
    config = Optim(learning_rate=2.0, warmup_steps=10, schedule="cosine")
    cosine = learning_rate(config, 110)
    rates = [float(cosine(n)) for n in (0, 5, 10, 60, 110)]
    assert rates == pytest.approx([0, 1, 2, 1, 0], abs=1e-6)


PARAMS = {"w": jnp.array([3.0, 4.0])}


def first_update(gradient: list[float], **options) -> tuple[jax.Array, optax.OptState]:
    config = Optim(learning_rate=0.1, **options)
    optimizer = make_optimizer(config, learning_rate(config, 10))
    updates, state = optimizer.update({"w": jnp.array(gradient)}, optimizer.init(PARAMS), PARAMS)
    return updates["w"], state


@pytest.mark.parametrize("grad_clip, norm", [(None, 500), (1.0, 1)])
def test_the_optimizer_clips_the_gradients_global_norm(grad_clip, norm):
    _, state = first_update([300.0, 400.0], grad_clip=grad_clip)
    mu = optax.tree.get(state, "mu")["w"]
    np.testing.assert_allclose(mu, 0.1 * norm * np.array([0.6, 0.8]), rtol=1e-4)


def test_the_optimizer_decays_the_weights():
    update, _ = first_update([0.0, 0.0], weight_decay=0.5)
    np.testing.assert_allclose(update, [-0.15, -0.2], rtol=1e-5)


def test_the_optimizers_moments_decay_by_beta1_and_beta2():
    _, state = first_update([2.0, -1.0], beta1=0.7, beta2=0.9)
    moments = optax.tree.get(state, "mu")["w"], optax.tree.get(state, "nu")["w"]
    np.testing.assert_allclose(moments, [[0.6, -0.3], [0.4, 0.1]], rtol=1e-5)


def test_muon_turns_each_layers_kernel_alone_to_an_orthogonal_matrix_as_large_as_adams_step():
    model = make_model(tiny_config(), jax.random.key(0))

    def random_like(leaf: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    config = Optim(name="muon", learning_rate=0.1)
    optimizer = make_optimizer(config, learning_rate(config, 10))
    grads = jax.tree.map(random_like, model)
    updates, _ = optimizer.update(grads, optimizer.init(model), model)
    gradient, update = (tree.blocks.mlp.up.kernel[...] for tree in (grads, updates))
    for before, after in zip(gradient, update, strict=True):
        u, _, v = np.linalg.svd(before, full_matrices=False)
        ours_u, sizes, ours_v = np.linalg.svd(after, full_matrices=False)
        scale = 0.1 * 0.2 * np.sqrt(max(before.shape))
        assert 0.6 * scale < sizes.min() and sizes.max() < 1.3 * scale  # after 5 steps of Newton's
        np.testing.assert_allclose(-ours_u @ ours_v, u @ v, atol=0.2)
    bias = np.abs(updates.blocks.mlp.up.bias[...])  # Adam's first step is as large everywhere
    np.testing.assert_allclose(bias, bias.max(), rtol=1e-4)


# The average


@pytest.mark.parametrize("step, decay", [(0, 0.1), (8, 0.5), (100_000, 0.99)])
def test_the_average_follows_early_and_averages_late(step, decay):
    ema, model = {"w": jnp.array([0.0])}, {"w": jnp.array([1.0])}
    updated = update_ema(ema, model, jnp.int32(step), 0.99)
    assert float(updated["w"][0]) == pytest.approx(1 - decay, rel=1e-4)


# What a step gives to the objective, optimizer and average, seen with a model of one number


class Spy:
    """An objective with gradient 1 whose metrics are what it was given."""

    def loss(self, model, key, x, condition):
        return model["w"], {"x": x, "keys": jax.random.key_data(key)} | condition


BATCH = 800
RAMP = jnp.arange(64, dtype=jnp.uint8).reshape(1, 8, 8, 1)  # darker on the left


def spied_step(monkeypatch, config: Config, step=0) -> tuple[State, dict[str, jax.Array]]:
    """The state and what the objective was given by a step from w = 1 with an average of 0."""
    monkeypatch.setattr(train, "make_objective", lambda config: Spy())
    model, emas = {"w": jnp.float32(1)}, ({"w": jnp.float32(0)},) * len(config.optim.averages)
    schedule = learning_rate(config.optim, config.train.steps)
    opt_state = make_optimizer(config.optim, schedule).init(model)
    batch = {"image": RAMP.repeat(BATCH, axis=0), "label": jnp.full(BATCH, 4)}
    return train.train_step(config, State(jnp.int32(step), model, emas, opt_state), batch)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_a_late_step_averages_the_new_weights_with_the_configs_decay(monkeypatch, decay):
    config = tiny_config(optim=dict(ema_decay=decay, learning_rate=0.5))
    state, _ = spied_step(monkeypatch, config, step=100_000)
    assert float(state.model["w"]) == pytest.approx(0.5, rel=1e-4)
    assert float(state.ema["w"]) == pytest.approx((1 - decay) * 0.5, rel=2e-3)


def test_the_first_step_averages_with_a_tenth(monkeypatch):
    config = tiny_config(optim=dict(ema_decay=0.9999, learning_rate=0.5))
    state, _ = spied_step(monkeypatch, config, step=0)
    assert float(state.ema["w"]) == pytest.approx(0.9 * 0.5, rel=1e-4)


def test_a_step_updates_each_average_with_its_own_decay(monkeypatch):
    config = tiny_config(optim=dict(ema_decay=(0.9, 0.0, 0.5), learning_rate=0.5))
    state, _ = spied_step(monkeypatch, config, step=100_000)
    averages = [float(ema["w"]) for ema in state.emas]
    assert averages == pytest.approx([0.1 * 0.5, 1.0 * 0.5, 0.5 * 0.5], rel=1e-4)
    assert state.ema is state.emas[0]


def test_each_sample_of_each_step_has_a_key_of_its_own_and_a_step_always_the_same(monkeypatch):
    keys = [spied_step(monkeypatch, tiny_config(), step)[1]["keys"] for step in (0, 1, 1)]
    np.testing.assert_array_equal(keys[1], keys[2])
    assert len(np.unique(np.concatenate(keys), axis=0)) == 2 * BATCH


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_labels_become_the_null_class_with_the_configs_probability(monkeypatch, dropout):
    config = tiny_config(objective=dict(label_dropout=dropout))
    _, given = spied_step(monkeypatch, config)
    y = np.asarray(given["y"])
    assert set(y.tolist()) <= {4, 10}
    standard_error = (dropout * (1 - dropout) / BATCH) ** 0.5
    assert (y == 10).mean() == pytest.approx(dropout, abs=4 * standard_error)


@pytest.mark.parametrize("flip", [False, True])
def test_images_are_scaled_and_mirrored_with_probability_a_half(monkeypatch, flip):
    _, given = spied_step(monkeypatch, tiny_config(data=dict(flip=flip)))
    x = np.asarray(given["x"])
    mirrored = x[:, 0, 0, 0] > x[:, 0, -1, 0]
    assert mirrored.mean() == pytest.approx(0.5 * flip, abs=0.07 * flip)
    pixels = np.asarray(RAMP, np.float32) / np.float32(127.5) - 1
    expected = np.where(mirrored.reshape(-1, 1, 1, 1), pixels[:, :, ::-1], pixels)
    np.testing.assert_allclose(x, expected, atol=1e-6)
