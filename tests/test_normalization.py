"""The law of each conditional normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken
from flax import nnx

from dit.model import count_parameters
from dit.normalization import (
    SPADE,
    AdaIN,
    AdaLN,
    AdaLNZero,
    ConditionalBatchNorm,
    FiLM,
    instance_norm,
    layer_norm,
    modulate,
    normalise,
)

B, H, W, C, E, K = 3, 7, 5, 11, 13, 4
PLACES = (0, 1, 2)  # of a batch of features


def feature(seed=0, shape=(B, H, W, C)) -> jax.Array:
    """Noise of deviation 3 around a mean of its own in each channel."""
    means = jnp.arange(1.0, shape[-1] + 1)
    noise = jax.random.normal(jax.random.key(seed), shape)
    return 3 * noise + means.reshape(*[1] * (len(shape) - 1), -1)


def vector() -> jax.Array:
    """A condition `[B, E]`."""
    return jax.random.normal(jax.random.key(1), (B, E))


def batch_normal(x: jax.Array) -> jax.Array:
    return normalise(x, PLACES, 1e-5)


# Norms


@pytest.mark.parametrize(
    "norm, axes", [(layer_norm, (-1,)), (instance_norm, (1, 2)), (batch_normal, PLACES)]
)
def test_norms_take_their_statistics_over_their_axes(norm, axes):
    y = norm(feature())
    np.testing.assert_allclose(y.mean(axis=axes), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(axis=axes), 1, atol=1e-4)


# AdaIN


def statistics(x: jax.Array) -> np.ndarray:
    """The mean and deviation of each channel, `[B, 2 C]`."""
    return np.concatenate([x.mean(axis=(1, 2)), x.std(axis=(1, 2))], axis=-1)


def test_adain_gives_the_content_exactly_the_styles_statistics():
    x, style = feature(0), 2 * feature(1, (1, 4, 3, C)) - 5
    expected = statistics(style).repeat(B, axis=0)
    np.testing.assert_allclose(statistics(AdaIN()(x, style)), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(AdaIN()(x, x), x, rtol=1e-5, atol=1e-5)


def test_adains_strength_goes_a_part_of_the_way():
    x, style = feature(0), feature(1)
    quarter = 0.75 * x + 0.25 * AdaIN()(x, style)
    np.testing.assert_allclose(AdaIN(0.25)(x, style), quarter, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(AdaIN(0.0)(x, style), x)


def test_adain_does_not_see_a_positive_affine_change_of_the_contents_channels():
    x, style = feature(0), feature(1)
    scale = jax.random.uniform(jax.random.key(2), (1, 1, 1, C), minval=0.1, maxval=9)
    changed = scale * x + feature(3, (1, 1, 1, C))
    expected = AdaIN()(x, style)
    np.testing.assert_allclose(AdaIN()(changed, style), expected, rtol=1e-3, atol=1e-3)
    assert jnp.abs(AdaIN()(-x, style) - expected).max() > 1, "a negative one shows"


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -0.2])  # in float32 35 x 0.1 / 35 is not 0.1
def test_adain_of_a_constant_channel_is_the_styles_mean(constant):
    x, style = jnp.full((1, H, W, C), constant), feature(1)[:1]
    mean = jnp.broadcast_to(style.mean(axis=(1, 2), keepdims=True), x.shape)
    np.testing.assert_allclose(AdaIN()(x, style), mean, rtol=1e-5)


# FiLM and conditional batch norm


def unchanged(x: jax.Array) -> jax.Array:
    return x


GROUP_NORM = nnx.GroupNorm(C, num_groups=1, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("norm", [unchanged, instance_norm, GROUP_NORM])
def test_film_starts_as_the_norm_it_stands_behind(norm):
    x = feature()
    np.testing.assert_array_equal(FiLM(E, C, norm, rngs=nnx.Rngs(0))(x, vector()), norm(x))


def test_film_with_a_constant_condition_is_an_affine_layer():
    film = awaken(FiLM(E, C, rngs=nnx.Rngs(0)))
    x, c = feature(), jnp.broadcast_to(vector()[:1], (B, E))
    shift = film(jnp.zeros_like(x), c)
    scale = film(jnp.ones_like(x), c) - shift
    assert jnp.ptp(shift, axis=PLACES).max() == 0, "one shift a channel"
    np.testing.assert_allclose(film(x, c), shift + scale * x, rtol=1e-4, atol=1e-4)
    assert jnp.abs(film(x, c) - film(x, c + 1)).max() > 0.1


def batch_norm(**options) -> ConditionalBatchNorm:
    return ConditionalBatchNorm(E, C, rngs=nnx.Rngs(0), **options)


def film_like(norm: ConditionalBatchNorm, inner) -> FiLM:
    """FiLM with the weights of a conditional batch norm, behind another norm."""
    film = FiLM(E, C, inner, rngs=nnx.Rngs(5))
    film.modulation = norm.film.modulation
    return film


def test_conditional_batch_norm_is_film_on_batch_statistics():
    norm, x, c = awaken(batch_norm()), feature(), vector()

    def on_batch_statistics(x: jax.Array) -> jax.Array:
        variance = x.var(axis=PLACES, keepdims=True)
        return (x - x.mean(axis=PLACES, keepdims=True)) / jnp.sqrt(variance + 1e-5)

    trained, _ = norm.train(x, c)
    expected = film_like(norm, on_batch_statistics)(x, c)
    np.testing.assert_allclose(trained, expected, rtol=1e-4, atol=1e-4)


def test_conditional_batch_norm_with_mean_0_and_variance_1_is_film():
    norm, start = awaken(batch_norm()), batch_norm()
    norm.mean, norm.variance = start.mean, start.variance
    x, c = feature(), vector()
    expected = film_like(norm, unchanged)(x, c)
    np.testing.assert_allclose(norm(x, c), expected, rtol=1e-4, atol=1e-4)


def test_conditional_batch_norm_starts_as_batch_norm_in_training_and_inference():
    norm = start = batch_norm(momentum=0.8)
    reference = nnx.BatchNorm(C, momentum=0.8, epsilon=1e-5, rngs=nnx.Rngs(0))
    c = vector()
    for seed in range(3):
        x = feature(seed)
        y, norm = norm.train(x, c)
        expected = reference(x, use_running_average=False)
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)
    expected = reference(feature(9), use_running_average=True)
    np.testing.assert_allclose(norm(feature(9), c), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(start.mean[...], jnp.zeros((1, 1, 1, C)))  # it is as it was


def test_a_shared_embedding_makes_a_layers_cost_independent_of_the_number_of_classes():
    layers, classes = 5, 1000
    embedding = count_parameters(nnx.Embed(classes, E, rngs=nnx.Rngs(0)))
    conditional = embedding + layers * count_parameters(batch_norm())
    assert conditional == classes * E + layers * (2 * C * E + 2 * C)
    one_norm = count_parameters(nnx.BatchNorm(C, rngs=nnx.Rngs(0)))  # a gamma and a beta
    norms_of_each_class = layers * classes * one_norm
    assert conditional < norms_of_each_class / 5


# SPADE


def one_hot(labels: jax.Array) -> jax.Array:
    return jax.nn.one_hot(labels, K)


def spade() -> SPADE:
    return awaken(SPADE(K, C, hidden_size=6, norm=unchanged, rngs=nnx.Rngs(0)), scale=0.3)


def test_spade_varies_in_space_with_the_mask_and_only_with_it():
    layer, x = spade(), jnp.ones((1, H, W, C))
    inside = np.s_[:, 2:-2, 2:-2]  # two convolutions see the border two pixels deep
    uniform = layer(x, one_hot(jnp.full((1, H, W), 2)))[inside]
    assert jnp.ptp(uniform, axis=(1, 2)).max() < 1e-5 * jnp.abs(uniform).max()
    halves = layer(x, one_hot(jnp.zeros((1, H, W), int).at[:, 4:].set(1)))[inside]
    assert jnp.ptp(halves, axis=(1, 2)).max() > 0.1


def test_exchanging_the_labels_of_a_mask_exchanges_gamma_and_beta():
    layer = spade()
    zero = jnp.zeros((1, 7, 14, C))
    labels = jnp.zeros((1, 7, 14), int).at[:, :, 7:].set(3)

    def gamma_and_beta(labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the left and of the right region, inside, where no convolution sees the other."""
        beta = layer(zero, one_hot(labels))
        gamma = layer(zero + 1, one_hot(labels)) - beta
        both = jnp.concatenate([gamma, beta], axis=-1)
        return both[:, 3, 3], both[:, 3, 10]

    left, right = gamma_and_beta(labels)
    swapped_left, swapped_right = gamma_and_beta(3 - labels)
    np.testing.assert_allclose(swapped_left, right, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(swapped_right, left, rtol=1e-4, atol=1e-4)
    assert jnp.abs(left - right).max() > 0.1


def test_labels_have_no_order():
    layer, permuted = spade(), spade()
    x, order = feature(), jnp.array([2, 0, 3, 1])
    labels = jax.random.randint(jax.random.key(5), (B, H, W), 0, K)
    kernel = permuted.shared.kernel[...]
    permuted.shared.kernel.set_value(kernel[:, :, jnp.argsort(order)])
    expected = layer(x, one_hot(labels))
    relabelled = one_hot(order[labels])
    np.testing.assert_allclose(permuted(x, relabelled), expected, rtol=1e-4, atol=1e-4)
    assert jnp.abs(layer(x, relabelled) - expected).max() > 0.1


def test_spade_is_gamma_and_beta_of_the_mask_behind_its_norm():
    layer = awaken(SPADE(K, C, hidden_size=6, rngs=nnx.Rngs(0)), scale=0.3)
    x, labels = feature(), jax.random.randint(jax.random.key(5), (B, H, W), 0, K)
    hidden = nnx.relu(layer.shared(one_hot(labels)))
    expected = (1 + layer.gamma(hidden)) * instance_norm(x) + layer.beta(hidden)
    np.testing.assert_allclose(layer(x, one_hot(labels)), expected, rtol=1e-5, atol=1e-5)


def test_spade_starts_as_its_norm():
    x, labels = feature(), jnp.zeros((B, H, W), int)
    layer = SPADE(K, C, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(x, one_hot(labels)), instance_norm(x))


def test_spade_resizes_the_mask_and_needs_one_for_each_image():
    layer, x = spade(), feature(shape=(B, 6, 4, C))
    coarse = jax.random.randint(jax.random.key(5), (B, 3, 2), 0, K)
    fine = coarse.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(layer(x, one_hot(coarse)), layer(x, one_hot(fine)))
    with pytest.raises((TypeError, ValueError)):
        layer(x, one_hot(coarse[:2]))


# adaLN


def tokens_and_condition() -> tuple[jax.Array, jax.Array]:
    """x `[B, 5, C]` and c `[B, 1, C]`."""
    return feature(shape=(B, 5, C)), jax.random.normal(jax.random.key(1), (B, 1, C))


def test_adaln_zero_starts_as_the_identity():
    x, c = tokens_and_condition()
    layer = AdaLNZero(C, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(x, c, jnp.cos), x)
    np.testing.assert_array_equal(layer(x, c.repeat(5, axis=1), jnp.cos), x)


def test_adaln_does_not_start_as_the_identity():
    x, c = tokens_and_condition()
    assert jnp.abs(AdaLN(C, rngs=nnx.Rngs(0))(x, c, jnp.cos) - x).max() > 0.5


def test_adaln_from_zero_is_a_pre_norm_residual():
    x, c = tokens_and_condition()
    layer = AdaLN(C, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(x, c, jnp.sin), x + jnp.sin(layer_norm(x)))


def test_adaln_is_shift_and_scale_in_this_order():
    x, c = tokens_and_condition()
    layer = awaken(AdaLN(C, rngs=nnx.Rngs(0)))
    shift, scale = jnp.split(layer.modulation.linear(nnx.silu(c)), 2, axis=-1)
    expected = x + jnp.sin((1 + scale) * layer_norm(x) + shift)
    np.testing.assert_allclose(layer(x, c, jnp.sin), expected, rtol=1e-5, atol=1e-5)


def test_adaln_zero_is_shift_scale_and_gate_in_this_order():
    x, c = tokens_and_condition()
    layer = awaken(AdaLNZero(C, rngs=nnx.Rngs(0)))
    shift, scale, gate = jnp.split(layer.modulation.linear(nnx.silu(c)), 3, axis=-1)
    expected = x + gate * jnp.sin(modulate(x, shift, scale))
    np.testing.assert_allclose(layer(x, c, jnp.sin), expected, rtol=1e-5, atol=1e-5)
