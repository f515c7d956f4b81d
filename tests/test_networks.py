"""The networks that others trained compute in float32 on every device."""

import jax
import jax.numpy as jnp
import pytest
from conftest import equations
from flax import nnx

from dit.imagenet.inception import Inception
from dit.imagenet.vae import VAE

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


def assert_highest(f, module: nnx.Module, *shape: int, dtype=jnp.float32) -> None:
    """Every product and convolution of f(module, x) is of the highest precision, and float32."""
    jaxpr = jax.make_jaxpr(f)(module, jax.ShapeDtypeStruct(shape, dtype))
    found = equations(jaxpr, "dot_general", "conv_general_dilated")
    assert "conv_general_dilated" in {equation.primitive.name for equation in found}
    assert {equation.params["precision"] for equation in found} == {HIGHEST}
    assert {var.aval.dtype for equation in found for var in equation.invars} == {
        jnp.dtype("float32")
    }


@pytest.mark.parametrize("default", [None, "bfloat16"])
def test_every_product_of_the_vae_is_of_the_highest_precision(default):
    vae = jax.eval_shape(lambda: VAE((8, 8, 12, 16), 1, 4, rngs=nnx.Rngs(0)))
    with jax.default_matmul_precision(default):
        assert_highest(VAE.encode, vae, 2, 16, 16, 3)
        assert_highest(VAE.decode, vae, 2, 2, 2, 4)


@pytest.mark.parametrize("default", [None, "bfloat16"])
def test_every_product_of_inception_is_of_the_highest_precision(default):
    inception = jax.eval_shape(lambda: Inception(rngs=nnx.Rngs(0)))
    with jax.default_matmul_precision(default):
        assert_highest(Inception.__call__, inception, 2, 32, 32, 3, dtype=jnp.uint8)
