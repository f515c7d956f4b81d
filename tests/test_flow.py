"""Flow matching: its path, times and loss, the last also against NumPy in JiT's own variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken, tiny_model

from dit.ddpm import times_and_noise
from dit.flow import Flow

TIMES = jnp.array([0.02, 0.3, 1.0])
PREDICTIONS = ["v", "x0"]


def make_flow(prediction="v", times="uniform", time_mean=0.0, time_std=1.0) -> Flow:
    return Flow(prediction, times, time_mean, time_std)


def images(seed=0) -> tuple[jax.Array, jax.Array]:
    """x0 and noise."""
    x0, noise = jax.random.normal(jax.random.key(seed), (2, 3, 2, 3, 5))
    return jnp.tanh(x0), noise


# The path


def test_the_path_leads_from_the_image_at_0_to_the_noise_at_1():
    x0, noise = images()
    flow = make_flow()
    np.testing.assert_array_equal(flow.q_sample(x0, jnp.zeros(3), noise), x0)
    np.testing.assert_array_equal(flow.q_sample(x0, jnp.ones(3), noise), noise)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_velocity_is_the_derivative_of_the_path(prediction):
    x0, noise = images()
    flow = make_flow(prediction)
    xt, derivative = jax.jvp(
        lambda t: flow.q_sample(x0, t, noise), (TIMES,), (jnp.ones_like(TIMES),)
    )
    output = {"v": derivative, "x0": x0}[prediction]
    np.testing.assert_allclose(flow.pred_x0(output, xt, TIMES), x0, atol=1e-6)
    np.testing.assert_allclose(flow.velocity(output, xt, TIMES), derivative, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_correction_of_the_predicted_image_acts_on_the_velocity(prediction):
    """One step from t to 0 ends at the corrected image."""
    xt, output = images()
    flow = make_flow(prediction)
    velocity = flow.velocity(4 * output, xt, TIMES, lambda x: jnp.clip(x, -1, 1))
    end = xt - TIMES.reshape(3, 1, 1, 1) * velocity
    expected = jnp.clip(flow.pred_x0(4 * output, xt, TIMES), -1, 1)
    assert jnp.abs(flow.pred_x0(4 * output, xt, TIMES)).max() > 1
    np.testing.assert_allclose(end, expected, atol=1e-5)


def test_the_steps_are_equal_and_lead_from_noise_to_image():
    np.testing.assert_allclose(
        make_flow().steps(4), [[1, 0.75], [0.75, 0.5], [0.5, 0.25], [0.25, 0]]
    )


# Times to train on


def draw_times(flow: Flow, count=20_000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.vmap(flow.draw_time)(keys), np.float64)


def test_uniform_times_are_uniform():
    t = np.sort(draw_times(make_flow(times="uniform", time_mean=3.0)))
    quantiles = (np.arange(len(t)) + 0.5) / len(t)
    assert np.abs(t - quantiles).max() < 2 / len(t) ** 0.5


@pytest.mark.parametrize("mean, deviation", [(0.0, 1.0), (0.8, 0.8)])
def test_logit_normal_times_have_a_normal_logit(mean, deviation):
    t = draw_times(make_flow("v", "logit_normal", mean, deviation))
    logit = np.log(t / (1 - t))
    assert logit.mean() == pytest.approx(mean, abs=4 * deviation / len(t) ** 0.5)
    assert logit.std() == pytest.approx(deviation, rel=4 / len(t) ** 0.5)
    assert (np.abs(logit - mean) < deviation).mean() == pytest.approx(0.683, abs=0.015)


# The loss


def numpy_losses(prediction: str, output, image, t, noise) -> np.ndarray:
    """JiT's v-loss as it stands in the paper, in whose time, 1 - t, images are at 1; float64."""
    output, image, t, noise = (np.asarray(a, np.float64) for a in (output, image, t, noise))
    time = (1 - t).reshape(-1, 1, 1, 1)
    z = time * image + (1 - time) * noise
    if prediction == "v":  # ours is that of noise - image, theirs that of image - noise
        difference = -output - (image - noise)
    else:
        held = np.maximum(1 - time, 0.05)
        difference = (output - z) / held - (image - z) / held
    return (difference**2).mean(axis=(1, 2, 3))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_losses_are_the_papers(prediction):
    x0, noise = images()
    output, _ = images(seed=1)
    losses = make_flow(prediction).losses(output, x0, TIMES, noise)
    expected = numpy_losses(prediction, output, x0, TIMES, noise)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_network_is_given_the_path_a_thousandfold_time_and_the_condition(prediction):
    """And the loss is the mean over what was drawn, by a closed-form network in NumPy too."""
    flow = make_flow(prediction, "logit_normal", 0.8, 0.8)
    x0 = jnp.tanh(jax.random.normal(jax.random.key(1), (31, 2, 3, 1)))
    condition = {"y": jnp.arange(31), "mask": jnp.ones((31, 2, 3), int)}
    key, seen = jax.random.key(2), {}

    def network(x: jax.Array, t: jax.Array, **condition: jax.Array) -> jax.Array:
        seen.update(condition, x=x, t=t)
        return 0.5 * x - t.reshape(-1, 1, 1, 1) / 1000

    loss, parts = flow.loss(network, key, x0, condition)
    t, noise = times_and_noise(key, x0, flow.draw_time)
    time = np.asarray(t, np.float64).reshape(-1, 1, 1, 1)
    xt = (1 - time) * np.asarray(x0, np.float64) + time * np.asarray(noise, np.float64)
    np.testing.assert_allclose(seen["x"], xt, atol=1e-6)
    np.testing.assert_allclose(seen["t"], 1000 * t, rtol=1e-6)
    for name, value in condition.items():
        np.testing.assert_array_equal(seen[name], value)
    losses = numpy_losses(prediction, 0.5 * xt - time, x0, t, noise)
    assert float(loss) == pytest.approx(losses.mean(), rel=1e-5)
    last = np.asarray(t) >= 0.75
    assert float(parts["loss_quarter_4"]) == pytest.approx(losses[last].sum() / 31, rel=1e-5)
    assert float(parts["loss_quarter_4_share"]) == pytest.approx(last.mean(), rel=1e-5)


def test_one_key_a_sample_equals_one_key():
    flow = make_flow()
    model = awaken(tiny_model(learn_sigma=False))
    x = jnp.tanh(jax.random.normal(jax.random.key(0), (6, 6, 6, 2)))
    y, key = jnp.arange(6), jax.random.key(3)
    loss_of = jax.jit(flow.loss)
    loss, _ = loss_of(model, key, x, {"y": y})
    keys = jax.random.split(key, 6)
    first, _ = loss_of(model, keys[:3], x[:3], {"y": y[:3]})
    second, _ = loss_of(model, keys[3:], x[3:], {"y": y[3:]})
    assert float(loss) == pytest.approx(float(first + second) / 2, rel=1e-5)
