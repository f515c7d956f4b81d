"""The law of each conditional normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import awaken
from flax import nnx

from dit.model import count_parameters
from dit.normalization import (SPADE, AdaIN, AdaLN, AdaLNZero, ConditionalBatchNorm, FiLM, instance_norm, layer_norm, modulate, normalise)

B, H, W, C, E, K = 3, 7, 5, 11, 13, 4


def feature(seed=0, shape=(B, H, W, C)):
    return 3 * jax.random.normal(jax.random.key(seed), shape) + jnp.arange(1.0, shape[-1] + 1).reshape((1,) * (len(shape) - 1) + (-1,))


def statistics(x):
    return np.concatenate([x.mean(axis=(1, 2)), x.std(axis=(1, 2))], axis=-1)


# AdaIN


def test_adain_gives_the_content_exactly_the_styles_statistics():
    x, style = feature(0), 2 * feature(1, (1, 4, 3, C)) - 5
    np.testing.assert_allclose(statistics(AdaIN()(x, style)), statistics(style).repeat(B, axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(AdaIN()(x, x), x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(AdaIN(0.25)(x, style), 0.75 * x + 0.25 * AdaIN()(x, style), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(AdaIN(0.0)(x, style), x)


def test_adain_does_not_see_a_positive_affine_change_of_the_contents_channels():
    x, style = feature(0), feature(1)
    scale, shift = jax.random.uniform(jax.random.key(2), (1, 1, 1, C), minval=0.1, maxval=9), feature(3, (1, 1, 1, C))
    np.testing.assert_allclose(AdaIN()(scale * x + shift, style), AdaIN()(x, style), rtol=1e-3, atol=1e-3)
    assert jnp.abs(AdaIN()(-x, style) - AdaIN()(x, style)).max() > 1, "a negative one turns the picture over"


@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -0.2])  # the mean of 35 times 0.1 is not 0.1 in float32
def test_adain_of_a_constant_channel_is_the_styles_mean(constant):
    np.testing.assert_allclose(AdaIN()(jnp.full((1, H, W, C), constant), feature(1)[:1]), jnp.broadcast_to(
        feature(1)[:1].mean(axis=(1, 2), keepdims=True), (1, H, W, C)), rtol=1e-5)


# FiLM and conditional batch norm


def test_film_with_a_constant_condition_is_an_affine_layer():
    film = awaken(FiLM(E, C, rngs=nnx.Rngs(0)))
    c = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (1, E)), (B, E))
    zero, one = film(jnp.zeros((B, H, W, C)), c), film(jnp.ones((B, H, W, C)), c)
    assert jnp.ptp(zero, axis=(0, 1, 2)).max() == 0, "one shift a channel"
    x = feature()
    np.testing.assert_allclose(film(x, c), zero + (one - zero) * x, rtol=1e-4, atol=1e-4)
    assert jnp.abs(film(x, c) - film(x, c + 1)).max() > 0.1


GROUP_NORM = nnx.GroupNorm(C, num_groups=1, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("norm", [lambda x: x, instance_norm, GROUP_NORM])
def test_film_starts_as_the_norm_it_stands_behind(norm):
    x, c = feature(), jax.random.normal(jax.random.key(1), (B, E))
    np.testing.assert_array_equal(FiLM(E, C, norm, rngs=nnx.Rngs(0))(x, c), norm(x))


def batch_norm(**options):
    return ConditionalBatchNorm(E, C, rngs=nnx.Rngs(0), **options)


def test_conditional_batch_norm_is_film_on_batch_statistics():
    norm, c, x = awaken(batch_norm()), jax.random.normal(jax.random.key(1), (B, E)), feature()
    film = FiLM(E, C, lambda x: (x - x.mean(axis=(0, 1, 2), keepdims=True)) / jnp.sqrt(x.var(axis=(0, 1, 2), keepdims=True) + 1e-5),
                rngs=nnx.Rngs(5))
    film.modulation = norm.film.modulation
    np.testing.assert_allclose(norm.train(x, c)[0], film(x, c), rtol=1e-4, atol=1e-4)
    bare = FiLM(E, C, rngs=nnx.Rngs(5))  # and without its statistics, which start as mean 0 and variance 1, plain FiLM
    bare.modulation, norm.mean, norm.variance = norm.film.modulation, batch_norm().mean, batch_norm().variance
    np.testing.assert_allclose(norm(x, c), bare(x, c), rtol=1e-4, atol=1e-4)


def test_conditional_batch_norm_starts_as_batch_norm_in_training_and_inference():
    norm, reference = batch_norm(momentum=0.8), nnx.BatchNorm(C, momentum=0.8, epsilon=1e-5, rngs=nnx.Rngs(0))
    c, before = jax.random.normal(jax.random.key(1), (B, E)), norm
    for seed in range(3):
        y, norm = norm.train(feature(seed), c)
        np.testing.assert_allclose(y, reference(feature(seed), use_running_average=False), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(norm(feature(9), c), reference(feature(9), use_running_average=True), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(before.mean[...], jnp.zeros((1, 1, 1, C)))  # the norm it came from is as it was


def test_a_shared_embedding_makes_the_cost_of_a_layer_independent_of_the_number_of_classes():
    layers, classes = 5, 1000
    conditional = nnx.Embed(classes, E, rngs=nnx.Rngs(0)).embedding[...].size + layers * count_parameters(batch_norm())
    assert conditional == classes * E + layers * (2 * C * E + 2 * C)
    own_table = layers * classes * 2 * C  # a gamma and a beta of its own for each class and layer
    assert own_table == layers * count_parameters(nnx.BatchNorm(C, rngs=nnx.Rngs(0))) * classes and conditional < own_table / 5


# SPADE


def mask(labels):
    return jax.nn.one_hot(labels, K)


def spade():
    return awaken(SPADE(K, C, hidden_size=6, norm=lambda x: x, rngs=nnx.Rngs(0)), scale=0.3)


def test_spade_varies_in_space_with_the_mask_and_only_with_it():
    layer, x = spade(), jnp.ones((1, H, W, C))
    inner = layer(x, mask(jnp.full((1, H, W), 2)))[:, 2:-2, 2:-2]  # two convolutions see the border two pixels deep
    assert jnp.ptp(inner, axis=(1, 2)).max() < 1e-5 * jnp.abs(inner).max()
    halves = layer(x, mask(jnp.zeros((1, H, W), int).at[:, 4:].set(1)))
    assert jnp.ptp(halves[:, 2:-2, 2:-2], axis=(1, 2)).max() > 0.1


def test_exchanging_the_labels_of_a_mask_exchanges_gamma_and_beta():
    layer, one, zero = spade(), jnp.ones((1, 7, 14, C)), jnp.zeros((1, 7, 14, C))
    labels = jnp.zeros((1, 7, 14), int).at[:, :, 7:].set(3)

    def gamma_and_beta(labels):  # inside the two regions, where no convolution sees another
        beta = layer(zero, mask(labels))
        return [jnp.concatenate([(layer(one, mask(labels)) - beta)[:, 3, x], beta[:, 3, x]]) for x in (3, 10)]

    (left, right), (swapped_left, swapped_right) = gamma_and_beta(labels), gamma_and_beta(3 - labels)
    np.testing.assert_allclose(swapped_left, right, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(swapped_right, left, rtol=1e-4, atol=1e-4)
    assert jnp.abs(left - right).max() > 0.1


def test_labels_have_no_order():
    layer, x, order = spade(), feature(shape=(B, H, W, C)), jnp.array([2, 0, 3, 1])
    labels = jax.random.randint(jax.random.key(5), (B, H, W), 0, K)
    permuted = spade()
    permuted.shared.kernel.set_value(permuted.shared.kernel[...][:, :, jnp.argsort(order)])
    np.testing.assert_allclose(permuted(x, mask(order[labels])), layer(x, mask(labels)), rtol=1e-4, atol=1e-4)
    assert jnp.abs(layer(x, mask(order[labels])) - layer(x, mask(labels))).max() > 0.1


def test_spade_starts_as_its_norm_and_resizes_the_mask():
    layer, x = SPADE(K, C, rngs=nnx.Rngs(0)), feature(shape=(B, 6, 4, C))
    coarse = jax.random.randint(jax.random.key(5), (B, 3, 2), 0, K)
    np.testing.assert_array_equal(layer(x, mask(coarse)), instance_norm(x))
    layer = spade()
    np.testing.assert_array_equal(layer(x, mask(coarse)), layer(x, mask(coarse.repeat(2, axis=1).repeat(2, axis=2))))
    with pytest.raises((TypeError, ValueError)):
        layer(x, mask(coarse[:2]))  # two masks for three images


# adaLN


def test_adaln_zero_is_the_identity_residual_at_initialisation_and_adaln_is_not():
    x, c = feature(shape=(B, 5, C)), jax.random.normal(jax.random.key(1), (B, 1, C))
    branches = [lambda x: x + 1, jnp.sin]
    np.testing.assert_array_equal(AdaLNZero(C, 2, rngs=nnx.Rngs(0))(x, c, *branches), x)
    np.testing.assert_array_equal(AdaLNZero(C, 2, rngs=nnx.Rngs(0))(x, c.repeat(5, axis=1), *branches), x)
    assert jnp.abs(AdaLN(C, 2, rngs=nnx.Rngs(0))(x, c, *branches) - x).max() > 0.5
    plain = AdaLN(C, 1, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))  # without a condition, a pre-norm residual
    np.testing.assert_array_equal(plain(x, c, jnp.sin), x + jnp.sin(layer_norm(x)))


def test_adaln_zero_is_shift_scale_and_gate_in_this_order():
    x, c = feature(shape=(B, 5, C)), jax.random.normal(jax.random.key(1), (B, 1, C))
    layer = awaken(AdaLNZero(C, 2, rngs=nnx.Rngs(0)))
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(layer.linear(nnx.silu(c)), 6, axis=-1)
    y = x + gate1 * jnp.sin(modulate(x, shift1, scale1))
    np.testing.assert_allclose(layer(x, c, jnp.sin, jnp.cos), y + gate2 * jnp.cos(modulate(y, shift2, scale2)), rtol=1e-5, atol=1e-5)


def test_norms_take_their_statistics_over_their_axes():
    x = feature()
    for norm, axes in ((layer_norm, (-1,)), (instance_norm, (1, 2)), (lambda x: normalise(x, (0, 1, 2), 1e-5), (0, 1, 2))):
        np.testing.assert_allclose(norm(x).mean(axis=axes), 0, atol=1e-5)
        np.testing.assert_allclose(norm(x).std(axis=axes), 1, atol=1e-4)
