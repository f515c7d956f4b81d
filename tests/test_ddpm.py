import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken, tiny_model

from dit.ddpm import DDPM, discretized_gaussian_log_likelihood

SCHEDULES = ["linear", "cosine"]
VARIANCES = ["learned_range", "fixed_small", "fixed_large"]


def images(batch=3, seed=0):
    """x0, x_t, noise and a network's output with variance logits."""
    x0, noise, eps, v = jax.random.normal(jax.random.key(seed), (4, batch, 2, 3, 5))
    return jnp.tanh(x0), noise, jnp.concatenate([eps, jnp.tanh(v)], axis=-1)


def test_linear_and_cosine_tables_against_their_definitions():
    betas = np.linspace(1e-4, 0.02, 1000)
    linear = DDPM(1000, "linear")
    assert linear.betas.dtype == linear.alphas_cumprod.dtype == linear.posterior_variance.dtype == np.float64
    np.testing.assert_allclose(linear.betas, betas, rtol=1e-15)
    np.testing.assert_allclose(linear.alphas_cumprod[-1], np.exp(np.log1p(-betas).sum()), rtol=1e-12)
    f = lambda t: np.cos((t / 37 + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    cosine = DDPM(37, "cosine")
    np.testing.assert_allclose(cosine.alphas_cumprod[:-1], (f(np.arange(1, 37)) / f(0)), rtol=1e-12)
    assert cosine.betas.max() == 0.999
    np.testing.assert_allclose(DDPM(100, "linear").betas, np.linspace(1e-3, 0.2, 100), rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_is_bayes_rule(schedule):
    """q(x_{t-1} | x_t, x_0) from the precisions of q(x_t | x_{t-1}) and q(x_{t-1} | x_0), an independent route."""
    d = DDPM(41, schedule)
    for t in (1, 7, 39):
        previous = d.alphas_cumprod[t - 1]
        precision = (1 - d.betas[t]) / d.betas[t] + 1 / (1 - previous)
        np.testing.assert_allclose(d.posterior_variance[t], 1 / precision, rtol=1e-10)
        np.testing.assert_allclose(d.posterior_mean_x0[t], np.sqrt(previous) / (1 - previous) / precision, rtol=1e-10)
        np.testing.assert_allclose(d.posterior_mean_xt[t], np.sqrt(1 - d.betas[t]) / d.betas[t] / precision, rtol=1e-10)
    assert d.posterior_variance[0] == 0 and d.posterior_mean_x0[0] == pytest.approx(1) and d.posterior_mean_xt[0] == 0
    np.testing.assert_allclose(d.posterior_log_variance, np.log(d.posterior_variance[[1, *range(1, 41)]]), rtol=1e-14)


def test_q_sample_has_the_tables_mean_and_variance_and_is_undone_by_the_true_noise():
    d, (x0, noise, _) = DDPM(53), images()
    t = jnp.array([0, 20, 52])
    xt = d.q_sample(x0, t, noise)
    np.testing.assert_allclose(d.q_sample(x0, t, jnp.zeros_like(noise))[1], np.sqrt(d.alphas_cumprod[20]) * x0[1], rtol=1e-6)
    np.testing.assert_allclose(d.q_sample(jnp.zeros_like(x0), t, noise)[2], np.sqrt(1 - d.alphas_cumprod[52]) * noise[2], rtol=1e-6)
    np.testing.assert_allclose(d.pred_x0(noise, xt, t), x0, atol=1e-3)
    np.testing.assert_allclose(d.pred_eps(x0, xt, t), noise, atol=1e-4)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_true_noise_gives_the_true_posterior(variance):
    d, (x0, noise, out) = DDPM(53, variance=variance), images()
    t = jnp.array([0, 20, 52])
    xt = d.q_sample(x0, t, noise)
    out = jnp.concatenate([noise, jnp.full_like(noise, -1.0)], axis=-1) if variance == "learned_range" else noise
    p, (mean, log_variance) = d.p_mean_variance(out, xt, t), d.q_posterior(x0, xt, t)
    np.testing.assert_allclose(p.mean, mean, atol=1e-5)
    if variance != "fixed_large":
        np.testing.assert_allclose(p.log_variance, jnp.broadcast_to(log_variance, mean.shape), rtol=1e-5)
        np.testing.assert_allclose(d.variational_term(out, x0, xt, t)[1:], 0, atol=1e-5)  # the divergence of equals
    else:
        np.testing.assert_allclose(p.log_variance[1:, 0, 0, 0], np.log(d.betas[[20, 52]]), rtol=1e-5)
        np.testing.assert_allclose(p.log_variance[0], log_variance[0, 0, 0, 0], rtol=1e-5)


def test_learned_variance_lies_between_the_posteriors_and_beta():
    d, (x0, noise, _) = DDPM(53), images()
    t = jnp.array([0, 20, 52])
    for v, expected in [(-1, np.log(d.posterior_variance[[1, 20, 52]])), (1, np.log(d.betas[[0, 20, 52]]))]:
        p = d.p_mean_variance(jnp.concatenate([noise, jnp.full_like(noise, v)], axis=-1), x0, t)
        np.testing.assert_allclose(p.log_variance[:, 0, 0, 0], expected, rtol=1e-5)


def test_clipping_holds_the_predicted_image_within_the_pixels():
    d, (x0, _, out) = DDPM(53), images()
    t = jnp.array([10, 20, 52])
    free, clipped = d.p_mean_variance(4 * out, x0, t), d.p_mean_variance(4 * out, x0, t, lambda x: jnp.clip(x, -1, 1))
    assert jnp.abs(free.pred_x0).max() > 1 and jnp.abs(clipped.pred_x0).max() <= 1
    np.testing.assert_allclose(clipped.mean, d.q_posterior(clipped.pred_x0, x0, t)[0], rtol=1e-6)


def test_divergence_of_gaussians_against_sampling():
    d, (x0, noise, out) = DDPM(53), images(batch=1)
    t = jnp.array([20])
    xt = d.q_sample(x0, t, noise)
    mean, log_variance = d.q_posterior(x0, xt, t)
    p = d.p_mean_variance(out, xt, t)
    draws = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(jax.random.key(5), (20_000, *x0.shape[1:]))
    log_ratio = (-0.5 * (log_variance + (draws - mean) ** 2 / jnp.exp(log_variance))
                 + 0.5 * (p.log_variance + (draws - p.mean) ** 2 / jnp.exp(p.log_variance)))
    assert float(d.variational_term(out, x0, xt, t)[0]) == pytest.approx(float(log_ratio.mean() / np.log(2)), rel=0.02)


def test_the_likelihood_of_all_256_levels_is_one_and_serves_at_time_zero():
    levels = (jnp.arange(256) / 127.5 - 1).reshape(1, 1, 256, 1)
    for mean, scale in [(0.1, 0.02), (-0.99, 0.3), (1.5, 1.0)]:
        total = jnp.exp(discretized_gaussian_log_likelihood(levels, jnp.full_like(levels, mean), jnp.log(scale))).sum()
        assert float(total) == pytest.approx(1, abs=2e-5)
    d, (x0, noise, out) = DDPM(53), images(batch=1)
    t = jnp.array([0])
    xt = d.q_sample(x0, t, noise)
    p = d.p_mean_variance(out, xt, t)
    nll = -discretized_gaussian_log_likelihood(x0, p.mean, 0.5 * p.log_variance).mean() / np.log(2)
    assert float(d.variational_term(out, x0, xt, t)[0]) == pytest.approx(float(nll))


def test_the_variational_term_trains_the_variance_alone():
    d, (x0, noise, out) = DDPM(53), images()
    t = jnp.array([0, 20, 52])
    xt = d.q_sample(x0, t, noise)
    of_mse, of_vb = (jax.grad(lambda o: d.losses(o, x0, xt, t, noise)[part].sum())(out) for part in (0, 1))
    assert of_mse[..., :5].all() and not of_mse[..., 5:].any()
    assert not of_vb[..., :5].any() and of_vb[..., 5:].any()
    np.testing.assert_allclose(d.losses(out, x0, xt, t, noise).mse, jnp.square(noise - out[..., :5]).mean(axis=(1, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 10, 100])
def test_respacing_keeps_the_cumulative_products_and_the_original_times(schedule, n):
    d = DDPM(100, schedule)
    r = d.respaced(n)
    assert len(r.timesteps) == n == len(set(r.timesteps)) and r.timesteps[-1] == 99 and (n == 1 or r.timesteps[0] == 0)
    np.testing.assert_allclose(r.alphas_cumprod, d.alphas_cumprod[r.timesteps], rtol=1e-14)
    np.testing.assert_allclose(np.cumprod(1 - r.betas), r.alphas_cumprod, rtol=1e-9)
    if n == 100:
        np.testing.assert_allclose(r.betas, d.betas, rtol=1e-9)
        np.testing.assert_allclose(r.posterior_variance, d.posterior_variance, rtol=1e-9)


def test_the_loss_hands_the_network_original_times_all_of_them_and_no_other():
    seen = []
    network = lambda x, t, y: (seen.append(t), jnp.zeros((*x.shape[:-1], 2)))[1]  # noqa: E731
    x = jnp.zeros((700, 1, 1, 1))
    DDPM(50).respaced(7).loss(network, jax.random.key(0), x, jnp.zeros(700, int))
    assert set(np.asarray(seen[0])) == {0, 8, 16, 24, 33, 41, 49}


def test_the_loss_is_the_mean_of_its_parts_and_one_key_a_sample_equals_one_key():
    d, model = DDPM(53), awaken(tiny_model())
    x, y, key = jnp.tanh(jax.random.normal(jax.random.key(0), (6, 6, 6, 2))), jnp.arange(6), jax.random.key(3)
    loss_of = jax.jit(d.loss)
    loss, parts = loss_of(model, key, x, y)
    assert float(loss) == pytest.approx(float(parts["mse"] + parts["vb"]), rel=1e-6)
    keys = jax.random.split(key, 6)
    halves = [loss_of(model, keys[i], x[i], y[i])[0] for i in (slice(0, 3), slice(3, 6))]
    assert float(loss) == pytest.approx(float(sum(halves) / 2), rel=1e-5)


def test_min_snr_weighs_by_the_capped_ratio():
    gamma, x = 5.0, jnp.zeros((2000, 1, 1, 1))
    zero = lambda x, t, y: jnp.zeros_like(x)  # noqa: E731  predicts no noise: the expected mse is 1 at every timestep
    d = DDPM(50, "cosine", "fixed_small", gamma)
    snr = d.alphas_cumprod / (1 - d.alphas_cumprod)
    loss, parts = d.loss(zero, jax.random.key(0), x, jnp.zeros(2000, int))
    assert float(parts["mse"]) == pytest.approx(1, abs=0.1)
    assert float(loss) == pytest.approx(np.minimum(1, gamma / snr).mean(), abs=0.05) and np.minimum(1, gamma / snr).mean() < 0.9
    exact = DDPM(50, "cosine", "fixed_small", 1e9).loss(zero, jax.random.key(0), x, jnp.zeros(2000, int))[0]
    assert float(exact) == pytest.approx(float(parts["mse"]), rel=1e-5)


def test_bits_per_dim_of_a_perfect_network_is_the_entropy_of_the_data():
    """For independent Gaussian pixels of width s the true reverse step is a Gaussian too: given it, the bound is tight."""
    s, d = 0.2, DDPM(200, "cosine")
    abar, previous = d.alphas_cumprod, d.alphas_cumprod_prev
    slope = np.sqrt(1 - abar) / (abar * s**2 + 1 - abar)
    log_variance = -np.log((1 - d.betas) / d.betas + 1 / (previous * s**2 + 1 - previous))
    v = 2 * (log_variance - d.posterior_log_variance) / (np.log(d.betas) - d.posterior_log_variance) - 1

    def denoise(x, t):
        slope_t, v_t = (jnp.asarray(table, jnp.float32)[t].reshape(-1, 1, 1, 1) for table in (slope, v))
        return jnp.concatenate([slope_t * x, jnp.broadcast_to(v_t, x.shape)], axis=-1)

    x0 = jnp.round(s * jax.random.normal(jax.random.key(0), (300, 5, 5, 1)) * 127.5) / 127.5
    bits = jax.jit(lambda k, x: d.bits_per_dim(denoise, k, x))(jax.random.key(1), x0)
    assert bits.total.shape == (300,) and bits.vb.shape == (200, 300) and float(jnp.abs(bits.prior).max()) < 1e-3
    np.testing.assert_allclose(bits.total, bits.vb.sum(axis=0) + bits.prior, rtol=1e-5)
    likelihood = (0.5 * np.log(2 * np.pi * s**2) + 0.5 * np.square(x0) / s**2).mean() / np.log(2) + np.log2(127.5)
    assert float(bits.total.mean()) == pytest.approx(likelihood, abs=0.03)
