"""Samplers and guidance."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken, tiny_config, tiny_model
from jax.extend.core import jaxprs_in_params

from dit import sampling
from dit.config import Data
from dit.data import drop_condition, null_condition
from dit.ddpm import DDPM, at
from dit.flow import Flow
from dit.state import run_keys

MEAN, DEVIATION = 0.3, 0.5  # of the Gaussian data whose denoiser has a closed form
SHAPE = (3, 1, 2)
SAMPLERS = [sampling.ddpm, sampling.ddim]
FLOW_SAMPLERS = [sampling.euler, sampling.heun]

T = jnp.array([49])
SEVEN = Data(num_classes=7)
MASKED = Data(num_classes=7, mask_classes=2)


# Samplers


def gaussian_denoiser(d: DDPM) -> sampling.Denoise:
    """E[noise | x_t] for x_0 ~ N(MEAN, DEVIATION^2), at original times."""
    abar = d.alphas_cumprod
    slope = np.sqrt(1 - abar) / (abar * DEVIATION**2 + 1 - abar)
    mean = np.sqrt(abar) * MEAN  # of x_t

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        return at(slope, t) * (x - at(mean, t))

    return denoise


def keys(n: int, seed=0) -> jax.Array:
    return sampling.sample_keys(seed, jnp.arange(n))


def test_no_sample_shares_a_key_with_training_from_the_same_seed():
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    of_run = jnp.stack(run_keys(tiny_config(train=dict(seed=3))))
    of_steps = fold(of_run[1], jnp.arange(50))
    of_parts = jax.vmap(lambda key: jax.random.split(key, 3))(of_steps)  # data, dropping, noise
    of_samples = keys(50, seed=3)
    of_noise = jax.vmap(fold, in_axes=(0, None))(of_samples, jnp.arange(50))
    used = [of_run, of_steps, of_parts, of_samples, of_noise]
    rows = np.concatenate([jax.random.key_data(some).reshape(-1, 2) for some in used])
    assert len(np.unique(rows, axis=0)) == len(rows) == 2 + 50 + 150 + 50 + 2500


def test_ddim_converges_to_the_flow_at_first_order():
    """The probability flow of Gaussian data is known: it keeps x_t's distance in deviations."""
    d = DDPM(1000, "linear")
    abar = d.alphas_cumprod[-1]
    start = sampling.sample_noise(keys(7), d.num_steps, SHAPE)
    deviation = np.sqrt(abar * DEVIATION**2 + 1 - abar)  # of x_T
    exact = MEAN + DEVIATION * (start - np.sqrt(abar) * MEAN) / deviation
    errors = []
    for n in (10, 20, 40, 80):
        x = sampling.ddim(d, gaussian_denoiser(d), keys(7), SHAPE, n)
        errors.append(float(jnp.abs(x - exact).max()))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < 0.08
    assert (np.abs(orders - 1) < 0.1).all(), orders


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddpm_recovers_mean_and_variance(schedule):
    d = DDPM(1000, schedule, "fixed_large")
    denoise = gaussian_denoiser(d)
    check_moments(jax.jit(lambda k: sampling.ddpm(d, denoise, k, SHAPE, 1000))(keys(2000)))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_at_eta_1_recovers_mean_and_variance(schedule):
    d = DDPM(1000, schedule, "fixed_small")
    denoise = gaussian_denoiser(d)
    check_moments(jax.jit(lambda k: sampling.ddim(d, denoise, k, SHAPE, 500, eta=1.0))(keys(2000)))


def check_moments(x: jax.Array) -> None:
    standard_error = DEVIATION / np.sqrt(x.size)
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * standard_error)
    assert float(x.std()) == pytest.approx(DEVIATION, abs=4 * standard_error + 0.005)


def test_ddim_at_eta_1_is_ddpm_with_the_posteriors_variance():
    d = DDPM(100, "cosine", "fixed_small")
    denoise = gaussian_denoiser(d)
    ancestral = sampling.ddpm(d, denoise, keys(5), SHAPE, 10)
    noisy = sampling.ddim(d, denoise, keys(5), SHAPE, 10, eta=1.0)
    deterministic = sampling.ddim(d, denoise, keys(5), SHAPE, 10)
    np.testing.assert_allclose(ancestral, noisy, atol=1e-5)
    assert jnp.abs(ancestral - deterministic).max() > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("n", [1, 7, 50])
def test_samplers_visit_the_respaced_times_from_the_last_to_zero(sampler, n):
    seen = []

    def network(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda t: seen.append(int(t)), t[0], ordered=True)
        return jnp.zeros_like(x)

    d = DDPM(50, variance="fixed_small")
    jax.block_until_ready(sampler(d, network, keys(2), SHAPE, n))
    assert seen == d.respaced(n).timesteps[::-1].tolist()
    assert seen[0] == 49
    assert n == 1 or seen[-1] == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_depends_on_seed_and_index_alone(sampler):
    model, d = awaken(tiny_model(num_classes=7), scale=0.05), DDPM(50)

    def draw(indices, seed=0) -> jax.Array:
        indices = jnp.asarray(indices)
        condition = {"y": indices % 7}
        denoise = sampling.guided(model, condition, null_condition(condition, SEVEN), 2.0)
        sample_keys = sampling.sample_keys(seed, indices)
        return sampler(d, denoise, sample_keys, (6, 6, 2), 5, correct=sampling.clip_pixels)

    many = draw(range(11))
    np.testing.assert_allclose(draw([4]), many[4:5], atol=2e-5)
    np.testing.assert_allclose(draw([9, 2]), many[jnp.array([9, 2])], atol=2e-5)
    assert jnp.abs(draw([4], seed=1) - many[4:5]).max() > 0.1
    assert jnp.abs(many[0] - many[7]).max() > 0.1, "two samples of class 0"


def test_the_start_is_the_same_noise_for_any_number_of_steps():
    seen = []

    def network(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x, ordered=True)
        return jnp.zeros_like(x)

    d = DDPM(50, variance="fixed_small")
    for n in (2, 5):
        jax.block_until_ready(sampling.ddim(d, network, keys(2), SHAPE, n))
    np.testing.assert_array_equal(seen[0], seen[2])
    noise = sampling.sample_noise(keys(999), 50, SHAPE)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)


# Samplers of flow matching


def make_flow(prediction: str) -> Flow:
    return Flow(prediction, "uniform", 0.0, 1.0)


def gaussian_x0(x, t):
    """E[x_0 | x_t] for x_0 ~ N(MEAN, DEVIATION^2), at t in [0, 1]."""
    gain = (1 - t) * DEVIATION**2 / ((1 - t) ** 2 * DEVIATION**2 + t**2)
    return MEAN + gain * (x - (1 - t) * MEAN)


def gaussian_network(prediction: str) -> sampling.Denoise:
    """What a perfect network predicts of that data, at a thousand times t."""

    def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
        t = t.reshape(-1, 1, 1, 1) / 1000
        x0 = gaussian_x0(x, t)
        return x0 if prediction == "x0" else (x - x0) / t

    return denoise


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize(
    "sampler, order, largest", [(sampling.euler, 1, 0.05), (sampling.heun, 2, 0.005)]
)
def test_flow_samplers_converge_at_their_order(sampler, order, largest, prediction):
    """The flow of Gaussian data is known: it keeps x_t's distance in deviations."""
    exact = MEAN + DEVIATION * sampling.sample_noise(keys(7), 1, SHAPE)
    errors = []
    for n in (8, 16, 32, 64):
        x = sampler(make_flow(prediction), gaussian_network(prediction), keys(7), SHAPE, n)
        errors.append(float(jnp.abs(x - exact).max()))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < largest
    assert (np.abs(orders - order) < 0.2).all(), orders


def numpy_sample(method: str, start: np.ndarray, num_steps: int) -> np.ndarray:
    """Euler's or Heun's method in float64 for dx/dt = (x - E[x_0 | x]) / t, E within [0.2, 0.4]."""

    def slope(x: np.ndarray, t: float) -> np.ndarray:
        return (x - np.clip(gaussian_x0(x, t), 0.2, 0.4)) / t

    x, h = start, 1 / num_steps
    for i in range(num_steps, 0, -1):
        guess = x - h * slope(x, i * h)
        if method == "heun" and i > 1:
            guess = x - h / 2 * (slope(x, i * h) + slope(guess, (i - 1) * h))
        x = guess
    return x


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
@pytest.mark.parametrize("n", [1, 2, 11])
def test_flow_samplers_equal_numpys(sampler, prediction, n):
    start = np.asarray(sampling.sample_noise(keys(97), 1, SHAPE), np.float64)
    denoise = gaussian_network(prediction)

    def clip(x0: jax.Array) -> jax.Array:
        return jnp.clip(x0, 0.2, 0.4)

    x = sampler(make_flow(prediction), denoise, keys(97), SHAPE, n, correct=clip)
    free = sampler(make_flow(prediction), denoise, keys(97), SHAPE, n)
    np.testing.assert_allclose(x, numpy_sample(sampler.__name__, start, n), atol=1e-5)
    assert n == 1 or jnp.abs(x - free).max() > 0.01, "clipping has an effect"


@pytest.mark.parametrize(
    "sampler, times",
    [
        (sampling.euler, [1000, 750, 500, 250]),
        (sampling.heun, [1000, 750, 750, 500, 500, 250, 250]),
    ],
)
def test_flow_samplers_visit_equal_steps_from_noise_to_the_last_before_the_image(sampler, times):
    seen = []

    def network(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda t: seen.append(float(t)), t[0], ordered=True)
        return jnp.zeros_like(x)

    jax.block_until_ready(sampler(make_flow("v"), network, keys(2), SHAPE, 4))
    assert seen == times


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_a_sample_of_flow_depends_on_seed_and_index_alone(sampler):
    model = awaken(tiny_model(num_classes=7, learn_sigma=False), scale=0.05)

    def draw(indices, seed=0) -> jax.Array:
        indices = jnp.asarray(indices)
        condition = {"y": indices % 7}
        denoise = sampling.guided(model, condition, null_condition(condition, SEVEN), 2.0)
        return sampler(make_flow("v"), denoise, sampling.sample_keys(seed, indices), (6, 6, 2), 3)

    many = draw(range(11))
    np.testing.assert_allclose(draw([9, 2]), many[jnp.array([9, 2])], atol=2e-5)
    assert jnp.abs(draw([4], seed=1) - many[4:5]).max() > 0.1
    assert jnp.abs(many[0] - many[7]).max() > 0.1, "two samples of class 0"


# Trajectories

PROCESSES = [
    (sampling.ddpm, DDPM(50, variance="fixed_small")),
    (sampling.ddim, DDPM(50, variance="fixed_small")),
    (sampling.euler, make_flow("v")),
    (sampling.heun, make_flow("v")),
]


@pytest.mark.parametrize("sampler, process", PROCESSES)
def test_a_trajectory_is_what_the_network_saw_and_then_the_image(sampler, process):
    seen = []

    def network(x: jax.Array, t: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x, t: seen.append((x, float(t[0]))), x, t, ordered=True)
        return 0.1 * x

    draw = partial(sampler, process, network, keys(2), SHAPE, 7)
    image, whole = jax.block_until_ready(draw(trajectory=True, frames=100))
    states = slice(None, None, 2) if sampler is sampling.heun else slice(None)
    given, times = zip(*seen[states], strict=True)
    np.testing.assert_allclose(whole.x, [*given, image], atol=1e-6)
    if isinstance(process, Flow):
        levels = np.array(times) / 1000
    else:
        levels = np.sqrt(1 - process.alphas_cumprod[np.array(times, int)])
    np.testing.assert_allclose(whole.noise_level, [*levels, 0], atol=1e-6)

    np.testing.assert_allclose(draw(), image, atol=1e-6)
    _, some = draw(trajectory=True, frames=4)
    for all_states, few in zip(whole, some, strict=True):
        np.testing.assert_allclose(few, all_states[np.array([0, 2, 5, 7])], atol=1e-6)


@pytest.mark.parametrize("sampler, process", PROCESSES)
def test_a_trajectory_takes_the_memory_of_its_frames_whatever_the_steps(sampler, process):
    def draw(keys: jax.Array) -> tuple:
        return sampler(process, lambda x, t: x, keys, (8, 8, 4), 50, trajectory=True, frames=5)

    arrays = variables(jax.make_jaxpr(draw)(keys(2)).jaxpr)
    assert max(array.size for array in arrays) == 5 * 2 * 8 * 8 * 4


def variables(jaxpr) -> list:
    """The types of everything that a traced computation makes, also inside its inner ones."""
    inner = [inner for e in jaxpr.eqns for inner in jaxprs_in_params(e.params)]
    made = [variable.aval for equation in jaxpr.eqns for variable in equation.outvars]
    return made + [aval for jaxpr in inner for aval in variables(jaxpr)]


# The null condition


def test_the_null_condition_is_the_class_and_the_mask_past_the_last_in_the_same_shapes():
    condition = {"y": jnp.array([1, 0, 6]), "mask": jnp.ones((3, 4, 4), jnp.uint8)}
    null = null_condition(condition, MASKED)
    np.testing.assert_array_equal(null["y"], [7, 7, 7])
    np.testing.assert_array_equal(null["mask"], np.full((3, 4, 4), 2))
    assert null["mask"].dtype == jnp.uint8
    assert null_condition({"y": jnp.array([3])}, SEVEN).keys() == {"y"}
    mixtures = null_condition({"y": jnp.full((3, 8), 0.125)}, SEVEN)
    np.testing.assert_array_equal(mixtures["y"], jax.nn.one_hot(null["y"], 8))


def dropped(label_dropout: float, mask_dropout: float, count=2000) -> tuple[np.ndarray, np.ndarray]:
    """Which labels and which masks of a batch drop_condition replaced by null."""
    objective = dict(label_dropout=label_dropout, mask_dropout=mask_dropout)
    config = tiny_config(data=dict(mask_classes=2), objective=objective)
    condition = {"y": jnp.full(count, 4), "mask": jnp.ones((count, 2, 2), jnp.uint8)}
    after = drop_condition(condition, jax.random.key(0), config)
    y, mask = np.asarray(after["y"]), np.asarray(after["mask"])
    assert set(y.tolist()) <= {4, 10}
    assert set(mask.ravel().tolist()) <= {1, 2}
    assert (mask == mask[:, :1, :1]).all(), "a mask is dropped as a whole"
    return y == 10, mask[:, 0, 0] == 2


@pytest.mark.parametrize("label_dropout, mask_dropout", [(0, 0), (0.1, 0.3), (0, 1), (1, 1)])
def test_labels_and_masks_are_dropped_with_their_probabilities(label_dropout, mask_dropout):
    labels, masks = dropped(label_dropout, mask_dropout)
    for share, probability in [(labels.mean(), label_dropout), (masks.mean(), mask_dropout)]:
        standard_error = (probability * (1 - probability) / len(labels)) ** 0.5
        assert share == pytest.approx(probability, abs=4 * standard_error)


def test_a_label_is_dropped_only_with_its_mask():
    labels, masks = dropped(0.1, 0.3)
    assert labels.any()
    assert masks[labels].all()
    assert not labels[masks].all()


# Guidance


def network() -> tuple[Callable, jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """A model of seven classes, x, a condition, and its null condition."""
    condition = {"y": jnp.array([1, 0, 6])}
    x = jax.random.normal(jax.random.key(0), (3, 6, 6, 2))
    return awaken(tiny_model(num_classes=7)), x, condition, null_condition(condition, SEVEN)


def test_guidance_1_is_the_conditional_model():
    model, x, condition, null = network()
    plain = sampling.guided(model, condition, null)(x, T)
    np.testing.assert_array_equal(plain, model(x, T, **condition))
    guided = sampling.guided(model, condition, null, 1.0)(x, T)
    np.testing.assert_allclose(guided, plain, rtol=1e-4, atol=1e-4)


def test_guidance_0_is_the_model_of_the_null_class_num_classes():
    model, x, condition, null = network()
    guided = sampling.guided(model, condition, null, 0.0)(x, T)
    expected = model(x, T, jnp.full(3, 7))
    np.testing.assert_allclose(guided[..., :2], expected[..., :2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0 + 1e-7, 3.0])
def test_guidance_goes_from_null_through_the_conditional_and_keeps_its_variance(scale):
    model, x, condition, null = network()
    guided = sampling.guided(model, condition, null, scale)(x, T)
    conditional, unconditional = model(x, T, **condition), model(x, T, jnp.full(3, 7))
    expected = unconditional + scale * (conditional - unconditional)
    np.testing.assert_allclose(guided[..., :2], expected[..., :2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(guided[..., 2:], conditional[..., 2:], rtol=1e-4, atol=1e-5)


def test_guidance_leads_away_from_the_null_mask_too():
    model = awaken(tiny_model(num_classes=7, mask_classes=2), scale=0.3)
    _, x, condition, _ = network()
    condition["mask"] = jnp.zeros((3, 6, 6), int).at[:, :3].set(1)
    null = null_condition(condition, MASKED)
    guided = sampling.guided(model, condition, null, 0.0)(x, T)
    expected = model(x, T, jnp.full(3, 7), jnp.full((3, 6, 6), 2))
    np.testing.assert_allclose(guided[..., :2], expected[..., :2], rtol=1e-4, atol=1e-4)


def test_cfg_channels_guide_the_first_channels_alone():
    model, x, condition, null = network()
    guided = sampling.guided(model, condition, null, 3.0)(x, T)
    first = sampling.guided(model, condition, null, 3.0, cfg_channels=1)(x, T)
    conditional = model(x, T, **condition)
    np.testing.assert_array_equal(first[..., :1], guided[..., :1])
    np.testing.assert_allclose(first[..., 1:], conditional[..., 1:], rtol=1e-4, atol=1e-5)
    assert jnp.abs(first[..., 1] - guided[..., 1]).max() > 1e-2


def test_the_guidance_interval_holds_from_low_to_below_high():
    model, x, condition, null = network()
    within = sampling.guided(model, condition, null, 3.0, interval=(49, 99))
    guided = sampling.guided(model, condition, null, 3.0)
    for t, is_guided in [(0, False), (48, False), (49, True), (98, True), (99, False)]:
        t = jnp.array([t])
        expected = guided(x, t) if is_guided else model(x, t, **condition)
        np.testing.assert_allclose(within(x, t), expected, rtol=1e-5, atol=1e-5)
    assert jnp.abs(guided(x, T) - model(x, T, **condition)).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("channels", [None, 1])
def test_autoguidance_leads_from_the_guide_through_the_model_under_the_same_condition(channels):
    model, x, condition, null = network()
    guide = awaken(tiny_model(num_classes=7, depth=1, hidden_size=12, num_heads=3), seed=5)
    ours, theirs = model(x, T, **condition), guide(x, T, **condition)
    denoise = sampling.guided(model, condition, null, 3.0, channels, guide=guide)
    guided = slice(0, channels or 2)
    expected = ours.at[..., guided].set((theirs + 3.0 * (ours - theirs))[..., guided])
    np.testing.assert_allclose(denoise(x, T), expected, rtol=1e-4, atol=1e-4)
    assert jnp.abs(expected - ours).max() > 0.1
    itself = sampling.guided(model, condition, null, 3.0, guide=model)
    np.testing.assert_allclose(itself(x, T), ours, rtol=1e-5, atol=1e-5)
    within = sampling.guided(model, condition, null, 3.0, channels, (49, 99), guide)
    np.testing.assert_allclose(within(x, T), denoise(x, T), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(within(x, T + 50), model(x, T + 50, **condition), atol=1e-5)


def rows_of_each_forward(sampler: Callable, process: DDPM | Flow, **guidance) -> list[int]:
    """How many images the network is given at each call of the compiled sampler."""
    seen = []

    def network(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: seen.append(len(x)), ordered=True)
        return jnp.zeros_like(x)

    condition = {"y": jnp.array([1, 0, 6])}
    denoise = sampling.guided(network, condition, null_condition(condition, SEVEN), **guidance)
    jax.block_until_ready(jax.jit(lambda k: sampler(process, denoise, k, SHAPE, 5))(keys(3)))
    return seen


@pytest.mark.parametrize(
    "sampler, process, times",
    [
        (sampling.ddpm, DDPM(1001, variance="fixed_small"), [1000, 750, 500, 250, 0]),
        (sampling.ddim, DDPM(1001, variance="fixed_small"), [1000, 750, 500, 250, 0]),
        (sampling.euler, make_flow("v"), [1000, 800, 600, 400, 200]),
        (sampling.heun, make_flow("v"), [1000, 800, 800, 600, 600, 400, 400, 200, 200]),
    ],
)
def test_a_step_costs_two_forwards_within_the_interval_and_one_outside(sampler, process, times):
    rows = partial(rows_of_each_forward, sampler, process)
    assert rows() == [3 for _ in times]
    assert rows(scale=2.0) == [6 for _ in times]
    expected = [6 if 300 <= t < 790 else 3 for t in times]
    assert rows(scale=2.0, interval=(300, 790)) == expected
