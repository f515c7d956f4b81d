"""The diffusion: its tables, posterior, loss and respacing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken, tiny_model

from dit.ddpm import DDPM, discretized_gaussian_log_likelihood, losses_by_quarter

SCHEDULES = ["linear", "cosine"]
VARIANCES = ["learned_range", "fixed_small", "fixed_large"]
TIMES = jnp.array([0, 20, 52])  # of a diffusion of 53 timesteps: the first, one between, the last


def images(batch=3, seed=0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x0, noise, and a network's output with variance logits."""
    x0, noise, eps, v = jax.random.normal(jax.random.key(seed), (4, batch, 2, 3, 5))
    return jnp.tanh(x0), noise, jnp.concatenate([eps, jnp.tanh(v)], axis=-1)


def with_v(eps: jax.Array, v: float) -> jax.Array:
    """A network's output: its eps, and the same v for every pixel."""
    return jnp.concatenate([eps, jnp.full_like(eps, v)], axis=-1)


# Tables


def test_the_linear_table_is_its_definition():
    betas = np.linspace(1e-4, 0.02, 1000)
    linear = DDPM(1000, "linear")
    np.testing.assert_allclose(linear.betas, betas, rtol=1e-15)
    last = np.exp(np.log1p(-betas).sum())
    np.testing.assert_allclose(linear.alphas_cumprod[-1], last, rtol=1e-12)
    scaled = np.linspace(1e-3, 0.2, 100)
    np.testing.assert_allclose(DDPM(100, "linear").betas, scaled, rtol=1e-12)


def test_the_cosine_table_is_its_definition():
    def f(t: np.ndarray) -> np.ndarray:
        return np.cos((t / 37 + 0.008) / 1.008 * np.pi / 2) ** 2

    cosine = DDPM(37, "cosine")
    expected = f(np.arange(1, 37)) / f(np.zeros(1))
    np.testing.assert_allclose(cosine.alphas_cumprod[:-1], expected, rtol=1e-12)
    assert cosine.betas.max() == 0.999


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_are_float64(schedule):
    d = DDPM(37, schedule)
    tables = [d.betas, d.alphas_cumprod, d.posterior_variance]
    assert {table.dtype for table in tables} == {np.dtype(np.float64)}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_posterior_is_bayes_rule(schedule):
    """From the precisions of q(x_t | x_{t-1}) and q(x_{t-1} | x_0): an independent route."""
    d = DDPM(41, schedule)
    t = np.array([1, 7, 39])
    beta, previous = d.betas[t], d.alphas_cumprod[t - 1]
    precision = (1 - beta) / beta + 1 / (1 - previous)
    of_x0 = np.sqrt(previous) / (1 - previous) / precision
    of_xt = np.sqrt(1 - beta) / beta / precision
    np.testing.assert_allclose(d.posterior_variance[t], 1 / precision, rtol=1e-10)
    np.testing.assert_allclose(d.posterior_mean_x0[t], of_x0, rtol=1e-10)
    np.testing.assert_allclose(d.posterior_mean_xt[t], of_xt, rtol=1e-10)


def test_the_posterior_of_time_zero_is_the_image_and_its_log_variance_that_of_time_one():
    d = DDPM(41)
    assert d.posterior_variance[0] == 0
    assert d.posterior_mean_x0[0] == pytest.approx(1)
    assert d.posterior_mean_xt[0] == 0
    expected = np.log(d.posterior_variance[[1, *range(1, 41)]])
    np.testing.assert_allclose(d.posterior_log_variance, expected, rtol=1e-14)


# The forward process, and what the network predicts


def test_q_sample_has_the_tables_mean_and_variance():
    d, (x0, noise, _) = DDPM(53), images()
    signal = np.sqrt(d.alphas_cumprod[TIMES]).reshape(3, 1, 1, 1) * x0
    scaled_noise = np.sqrt(1 - d.alphas_cumprod[TIMES]).reshape(3, 1, 1, 1) * noise
    zero = jnp.zeros_like(x0)
    np.testing.assert_allclose(d.q_sample(x0, TIMES, zero), signal, rtol=1e-6)
    np.testing.assert_allclose(d.q_sample(zero, TIMES, noise), scaled_noise, rtol=1e-6)


def test_the_true_noise_gives_back_the_image_and_the_image_the_noise():
    d, (x0, noise, _) = DDPM(53), images()
    xt = d.q_sample(x0, TIMES, noise)
    np.testing.assert_allclose(d.pred_x0(noise, xt, TIMES), x0, atol=1e-3)
    np.testing.assert_allclose(d.pred_eps(x0, xt, TIMES), noise, atol=1e-4)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_true_noise_gives_the_true_posterior(variance):
    d, (x0, noise, _) = DDPM(53, variance=variance), images()
    xt = d.q_sample(x0, TIMES, noise)
    output = with_v(noise, -1.0) if variance == "learned_range" else noise
    p = d.p_mean_variance(output, xt, TIMES)
    mean, log_variance = d.q_posterior(x0, xt, TIMES)
    np.testing.assert_allclose(p.mean, mean, atol=1e-5)
    if variance == "fixed_large":
        betas = np.log(d.betas[[20, 52]])
        np.testing.assert_allclose(p.log_variance[1:, 0, 0, 0], betas, rtol=1e-5)
        np.testing.assert_allclose(p.log_variance[0], log_variance[0, 0, 0, 0], rtol=1e-5)
    else:
        expected = jnp.broadcast_to(log_variance, mean.shape)
        np.testing.assert_allclose(p.log_variance, expected, rtol=1e-5)
        divergence = d.variational_term(output, x0, xt, TIMES)[1:]
        np.testing.assert_allclose(divergence, 0, atol=1e-5)


def test_the_learned_variance_lies_between_the_posteriors_and_beta():
    d, (x0, noise, _) = DDPM(53), images()
    smallest = np.log(d.posterior_variance[[1, 20, 52]])
    largest = np.log(d.betas[[0, 20, 52]])
    for v, expected in [(-1, smallest), (0, (smallest + largest) / 2), (1, largest)]:
        p = d.p_mean_variance(with_v(noise, v), x0, TIMES)
        np.testing.assert_allclose(p.log_variance[:, 0, 0, 0], expected, rtol=1e-5)


def test_a_correction_of_the_predicted_image_acts_on_the_mean():
    d, (x0, _, output) = DDPM(53), images()
    t = jnp.array([10, 20, 52])
    free = d.p_mean_variance(4 * output, x0, t)
    clipped = d.p_mean_variance(4 * output, x0, t, lambda x: jnp.clip(x, -1, 1))
    assert jnp.abs(free.pred_x0).max() > 1
    assert jnp.abs(clipped.pred_x0).max() <= 1
    expected, _ = d.q_posterior(clipped.pred_x0, x0, t)
    np.testing.assert_allclose(clipped.mean, expected, rtol=1e-6)


# The variational term


def log_density(x: jax.Array, mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """Of a Gaussian, but for a constant."""
    return -0.5 * (log_variance + (x - mean) ** 2 / jnp.exp(log_variance))


def test_the_divergence_of_gaussians_is_that_of_samples():
    d, (x0, noise, output) = DDPM(53), images(batch=1)
    t = jnp.array([20])
    xt = d.q_sample(x0, t, noise)
    q = d.q_posterior(x0, xt, t)
    p = d.p_mean_variance(output, xt, t)
    mean, log_variance = q
    draws = jax.random.normal(jax.random.key(5), (20_000, *x0.shape[1:]))
    samples = mean + jnp.exp(0.5 * log_variance) * draws
    log_ratio = log_density(samples, *q) - log_density(samples, p.mean, p.log_variance)
    bits = float(log_ratio.mean() / np.log(2))
    assert float(d.variational_term(output, x0, xt, t)[0]) == pytest.approx(bits, rel=0.02)


@pytest.mark.parametrize("mean, scale", [(0.1, 0.02), (-0.99, 0.3), (1.5, 1.0)])
def test_the_likelihoods_of_all_256_levels_sum_to_one(mean, scale):
    levels = (jnp.arange(256) / 127.5 - 1).reshape(1, 1, 256, 1)
    means = jnp.full_like(levels, mean)
    likelihoods = jnp.exp(discretized_gaussian_log_likelihood(levels, means, jnp.log(scale)))
    assert float(likelihoods.sum()) == pytest.approx(1, abs=2e-5)


def test_the_term_of_time_zero_is_the_negative_log_likelihood():
    d, (x0, noise, output) = DDPM(53), images(batch=1)
    t = jnp.array([0])
    xt = d.q_sample(x0, t, noise)
    p = d.p_mean_variance(output, xt, t)
    log_likelihood = discretized_gaussian_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
    bits = -float(log_likelihood.mean() / np.log(2))
    assert float(d.variational_term(output, x0, xt, t)[0]) == pytest.approx(bits)


# The loss


def test_the_squared_error_trains_eps_alone_and_the_variational_term_the_variance_alone():
    d, (x0, noise, output) = DDPM(53), images()
    xt = d.q_sample(x0, TIMES, noise)

    def sums(output: jax.Array) -> jax.Array:
        return jnp.stack([part.sum() for part in d.losses(output, x0, xt, TIMES, noise)])

    of_mse, of_vb = jax.jacrev(sums)(output)
    assert of_mse[..., :5].all()
    assert not of_mse[..., 5:].any()
    assert not of_vb[..., :5].any()
    assert of_vb[..., 5:].any()


def test_the_squared_error_is_that_of_the_noise():
    d, (x0, noise, output) = DDPM(53), images()
    xt = d.q_sample(x0, TIMES, noise)
    expected = jnp.square(noise - output[..., :5]).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(d.losses(output, x0, xt, TIMES, noise).mse, expected, rtol=1e-6)


def test_the_loss_gives_the_network_every_original_time_and_no_other():
    seen = []

    def network(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        seen.append(t)
        return jnp.zeros((*x.shape[:-1], 2))

    x, condition = jnp.zeros((700, 1, 1, 1)), {"y": jnp.zeros(700, int)}
    _, parts = DDPM(50).respaced(7).loss(network, jax.random.key(0), x, condition)
    times = np.asarray(seen[0])
    assert set(times) == {0, 8, 16, 24, 33, 41, 49}
    assert float(parts["loss_quarter_1_share"]) == pytest.approx((times <= 8).mean())
    assert float(parts["loss_quarter_4_share"]) == pytest.approx((times == 49).mean())


def test_the_loss_gives_the_network_the_whole_condition():
    seen = {}

    def network(x: jax.Array, t: jax.Array, **condition: jax.Array) -> jax.Array:
        seen.update(condition)
        return jnp.zeros((*x.shape[:-1], 2))

    condition = {"y": jnp.arange(3), "mask": jnp.ones((3, 4, 4), int)}
    DDPM(53).loss(network, jax.random.key(0), jnp.zeros((3, 4, 4, 1)), condition)
    assert seen.keys() == condition.keys()
    for name, value in condition.items():
        np.testing.assert_array_equal(seen[name], value)


def test_the_loss_is_the_sum_of_its_parts_and_one_key_a_sample_equals_one_key():
    d, model = DDPM(53), awaken(tiny_model())
    x = jnp.tanh(jax.random.normal(jax.random.key(0), (6, 6, 6, 2)))
    y, key = jnp.arange(6), jax.random.key(3)
    loss_of = jax.jit(d.loss)
    loss, parts = loss_of(model, key, x, {"y": y})
    assert float(loss) == pytest.approx(float(parts["mse"] + parts["vb"]), rel=1e-6)
    quarters = sum(float(parts[f"loss_quarter_{k}"]) for k in (1, 2, 3, 4))
    assert float(loss) == pytest.approx(quarters, rel=1e-6)
    keys = jax.random.split(key, 6)
    first, _ = loss_of(model, keys[:3], x[:3], {"y": y[:3]})
    second, _ = loss_of(model, keys[3:], x[3:], {"y": y[3:]})
    assert float(loss) == pytest.approx(float(first + second) / 2, rel=1e-5)


@pytest.mark.parametrize("last", [0.74, 1.0])  # nothing of the last quarter, or its very end
def test_the_quarters_of_t_have_the_means_of_their_own_losses(last):
    losses = np.random.default_rng(0).uniform(1, 2, 100).astype(np.float32)
    t = np.concatenate([np.linspace(0, 0.7, 97), [0.25, 0.5, last]]).astype(np.float32)
    halves = [losses_by_quarter(losses[i::2], t[i::2]) for i in (0, 1)]  # as on two devices
    found = jax.tree.map(lambda a, b: float(a + b) / 2, *halves)
    for k, (low, high) in enumerate([(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.1)]):
        is_in = (t >= low) & (t < high)
        share = found[f"loss_quarter_{k + 1}_share"]
        assert share == pytest.approx(is_in.mean(), abs=1e-6)
        part = found[f"loss_quarter_{k + 1}"]
        assert part == pytest.approx(losses[is_in].sum() / 100, rel=1e-5)


def test_min_snr_weighs_the_error_by_the_capped_ratio():
    def no_noise(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.zeros_like(x)  # so the expected error is 1 at every timestep

    def loss(gamma: float) -> tuple[float, float]:
        d = DDPM(50, "cosine", "fixed_small", gamma)
        x, condition = jnp.zeros((2000, 1, 1, 1)), {"y": jnp.zeros(2000, int)}
        weighed, parts = d.loss(no_noise, jax.random.key(0), x, condition)
        return float(weighed), float(parts["mse"])

    abar = DDPM(50, "cosine").alphas_cumprod
    weight = np.minimum(1, 5.0 * (1 - abar) / abar).mean()
    assert weight < 0.9
    weighed, mse = loss(gamma=5.0)
    assert mse == pytest.approx(1, abs=0.1)
    assert weighed == pytest.approx(weight, abs=0.05)
    weighed, mse = loss(gamma=1e9)
    assert weighed == pytest.approx(mse, rel=1e-5)


# Respacing


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 10, 100])
def test_respacing_keeps_the_cumulative_products_and_the_original_times(schedule, n):
    d = DDPM(100, schedule)
    respaced = d.respaced(n)
    times = respaced.timesteps
    assert len(times) == len(set(times)) == n
    assert times[-1] == 99
    assert n == 1 or times[0] == 0
    abar = respaced.alphas_cumprod
    np.testing.assert_allclose(abar, d.alphas_cumprod[times], rtol=1e-14)
    np.testing.assert_allclose(np.cumprod(1 - respaced.betas), abar, rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_respacing_to_all_steps_changes_nothing(schedule):
    d = DDPM(100, schedule)
    respaced = d.respaced(100)
    np.testing.assert_array_equal(respaced.timesteps, d.timesteps)
    np.testing.assert_allclose(respaced.betas, d.betas, rtol=1e-9)
    np.testing.assert_allclose(respaced.posterior_variance, d.posterior_variance, rtol=1e-9)
