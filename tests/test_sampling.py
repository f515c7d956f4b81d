import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken, tiny_model

from dit import sampling
from dit.ddpm import DDPM

MEAN, DEVIATION = 0.3, 0.5  # of the Gaussian data whose denoiser has a closed form
SHAPE = (3, 1, 2)


def gaussian_denoiser(d: DDPM):
    """E[noise | x_t] for x_0 ~ N(MEAN, DEVIATION^2), at original times."""
    a = np.asarray(d.alphas_cumprod)
    slope, root = np.sqrt(1 - a) / (a * DEVIATION**2 + 1 - a), np.sqrt(a)
    def denoise(x, t):
        s, r = (jnp.asarray(table, jnp.float32)[t].reshape(-1, 1, 1, 1) for table in (slope, root))
        return s * (x - r * MEAN)
    return denoise


def keys(n: int, seed=0):
    return sampling.sample_keys(seed, jnp.arange(n))


def test_ddim_converges_to_the_flow_at_first_order():
    """The probability flow of Gaussian data carries x_T to MEAN + DEVIATION (x_T - sqrt(abar) MEAN) / sqrt(variance of x_T)."""
    d = DDPM(1000, "linear")
    abar = d.alphas_cumprod[-1]
    start = sampling.draw(keys(7), d.num_steps, SHAPE)
    exact = MEAN + DEVIATION * (start - np.sqrt(abar) * MEAN) / np.sqrt(abar * DEVIATION**2 + 1 - abar)
    errors = [float(jnp.abs(sampling.ddim(d, gaussian_denoiser(d), keys(7), SHAPE, n) - exact).max()) for n in (10, 20, 40, 80)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < 0.06 and (orders > 0.9).all() and (orders < 1.1).all(), (errors, orders)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ancestral_sampling_recovers_mean_and_variance(sampler, schedule):
    d = DDPM(1000, schedule, "fixed_large" if sampler == "ddpm" else "fixed_small")
    if sampler == "ddpm":
        x = jax.jit(lambda k: sampling.ddpm(d, gaussian_denoiser(d), k, SHAPE, 1000))(keys(2000))
    else:
        x = jax.jit(lambda k: sampling.ddim(d, gaussian_denoiser(d), k, SHAPE, 500, eta=1.0))(keys(2000))
    standard_error = DEVIATION / np.sqrt(x.size)
    assert abs(float(x.mean()) - MEAN) < 4 * standard_error
    assert abs(float(x.std()) - DEVIATION) < 4 * standard_error + 0.005


def test_ddim_at_eta_1_is_ddpm_with_the_posteriors_variance():
    d = DDPM(100, "cosine", "fixed_small")
    a = sampling.ddpm(d, gaussian_denoiser(d), keys(5), SHAPE, 10)
    b = sampling.ddim(d, gaussian_denoiser(d), keys(5), SHAPE, 10, eta=1.0)
    np.testing.assert_allclose(a, b, atol=1e-5)
    c = sampling.ddim(d, gaussian_denoiser(d), keys(5), SHAPE, 10)
    assert jnp.abs(a - c).max() > 0.1


@pytest.mark.parametrize("sampler", [sampling.ddpm, sampling.ddim])
@pytest.mark.parametrize("n", [1, 7, 50])
def test_samplers_visit_the_respaced_times_from_the_last_to_zero(sampler, n):
    seen = []
    def network(x, t):
        jax.debug.callback(lambda t: seen.append(int(t)), t[0], ordered=True)
        return jnp.zeros_like(x)
    d = DDPM(50, variance="fixed_small")
    jax.block_until_ready(sampler(d, network, keys(2), SHAPE, n))
    assert seen == d.respaced(n).timesteps[::-1].tolist() and seen[0] == 49 and (n == 1 or seen[-1] == 0)


@pytest.mark.parametrize("sampler", [sampling.ddpm, sampling.ddim])
def test_a_sample_depends_on_seed_and_index_alone(sampler):
    model, d = awaken(tiny_model(num_classes=7), scale=0.05), DDPM(50)
    def draw(indices, seed=0):
        indices = jnp.asarray(indices)
        denoise = sampling.guided(model, indices % 7, 7, 2.0)
        return sampler(d, denoise, sampling.sample_keys(seed, indices), (6, 6, 2), 5, correct=sampling.clip_pixels)
    many = draw(range(11))
    np.testing.assert_allclose(draw([4]), many[4:5], atol=2e-5)
    np.testing.assert_allclose(draw([9, 2]), many[jnp.array([9, 2])], atol=2e-5)
    assert jnp.abs(draw([4], seed=1) - many[4:5]).max() > 0.1 and jnp.abs(many[0] - many[7]).max() > 0.1  # both of class 0


def model_and_batch():
    model = awaken(tiny_model(num_classes=7))
    return model, jax.random.normal(jax.random.key(0), (3, 6, 6, 2)), jnp.array([0, 49, 99]), jnp.array([1, 0, 6])


def test_guidance_1_is_the_conditional_model_and_0_the_unconditional():
    model, x, t, y = model_and_batch()
    conditional, null = model(x, t, y), model(x, t, jnp.full(3, 7))
    np.testing.assert_array_equal(sampling.guided(model, y, 7)(x, t), conditional)
    np.testing.assert_allclose(sampling.guided(model, y, 7, 0.0)(x, t)[..., :2], null[..., :2], rtol=1e-5, atol=1e-5)
    for scale in (1.0 + 1e-7, 3.0):
        guided = sampling.guided(model, y, 7, scale)(x, t)
        np.testing.assert_allclose(guided[..., :2], (null + scale * (conditional - null))[..., :2], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(guided[..., 2:], conditional[..., 2:], rtol=1e-4, atol=1e-5)  # the variance


def test_cfg_channels_guide_the_first_channels_alone():
    model, x, t, y = model_and_batch()
    all_channels, one = sampling.guided(model, y, 7, 3.0)(x, t), sampling.guided(model, y, 7, 3.0, cfg_channels=1)(x, t)
    np.testing.assert_array_equal(one[..., :1], all_channels[..., :1])
    np.testing.assert_allclose(one[..., 1:], model(x, t, y)[..., 1:], rtol=1e-4, atol=1e-5)
    assert jnp.abs(one[..., 1] - all_channels[..., 1]).max() > 1e-2


def test_guidance_interval_holds_from_low_to_below_high():
    model, x, t, y = model_and_batch()
    out = sampling.guided(model, y, 7, 3.0, interval=(49, 99))(x, t)
    free, guided = model(x, t, y), sampling.guided(model, y, 7, 3.0)(x, t)
    np.testing.assert_allclose(out[jnp.array([0, 2])], free[jnp.array([0, 2])], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out[1], guided[1], rtol=1e-5, atol=1e-5)


def test_the_start_is_the_same_noise_for_any_number_of_steps():
    first = []
    def network(x, t):
        jax.debug.callback(lambda x: first.append(np.asarray(x)), x, ordered=True)
        return jnp.zeros_like(x)
    d = DDPM(50, variance="fixed_small")
    for n in (2, 5):
        jax.block_until_ready(sampling.ddim(d, network, keys(2), SHAPE, n))
    np.testing.assert_array_equal(first[0], first[2])
    assert abs(float(sampling.draw(keys(999), 50, SHAPE).std()) - 1) < 0.03
