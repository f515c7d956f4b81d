"""The linear layer: its derivative, and the types and the precision of its products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import equations
from flax import nnx
from jax.sharding import PartitionSpec

import dit.linear
from dit.linear import Linear, affine, multiply, precision_of
from dit.sharding import gather, local_mesh

BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
B, T, I, O = 5, 7, 11, 13  # noqa: E741
NUM_ROWS = B * T


def operands(dtype=F32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x `[B, T, I]`, a kernel `[I, O]` and a bias `[O]`."""
    x_key, kernel_key, bias_key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(x_key, (B, T, I), dtype)
    return x, jax.random.normal(kernel_key, (I, O)), jax.random.normal(bias_key, (O,))


def plain(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype) -> jax.Array:
    """(1), and what JAX makes its derivative."""
    kernel, bias = kernel.astype(dtype), bias.astype(dtype)
    y = jnp.einsum("...i,io->...o", x, kernel, precision="highest")
    return y + jnp.broadcast_to(bias, y.shape)


WEIGHTS = jax.random.normal(jax.random.key(1), (B, T, O))  # dL/dy


def grads(f, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a loss whose derivative by y is `WEIGHTS`, by x, the kernel and the bias."""

    def loss(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return (f(x, kernel, bias, dtype).astype(F32) * WEIGHTS).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*operands(dtype))


# The values


def test_in_float32_it_and_its_derivative_are_jaxs():
    np.testing.assert_allclose(affine(*operands(), F32), plain(*operands(), F32), rtol=1e-6)
    for ours, theirs in zip(grads(affine, F32), grads(plain, F32), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_cpu_makes_the_kernels_gradient_of_its_factors_as_they_lie():
    def dkernel(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda kernel: affine(x, kernel, bias, F32), kernel)[1](dy)

    x, kernel, bias = operands()
    program = jax.jit(dkernel).lower(x, WEIGHTS).compile().as_text()
    assert " dot(" in program
    assert "copy" not in program
    assert "transpose(%" not in program


def test_the_kernels_gradient_is_the_same_whichever_factor_is_the_wider():
    x, dy = np.ones((NUM_ROWS, I)) * np.arange(I), np.ones((NUM_ROWS, O)) * np.arange(O)
    for a, b in ((x, dy), (dy, x)):
        kernel, bias = jnp.zeros((a.shape[1], b.shape[1])), jnp.zeros(b.shape[1])
        _, pullback = jax.vjp(lambda k: affine(jnp.float32(a), k, bias, F32), kernel)  # noqa: B023
        np.testing.assert_allclose(pullback(jnp.float32(b))[0], a.T @ b, rtol=1e-6)


@pytest.mark.parametrize("shape", [(I,), (B, I), (2, 3, 5, I)])
def test_x_may_have_any_leading_axes(shape):
    x, (_, kernel, bias) = jnp.ones(shape), operands()
    dx, dkernel, dbias = jax.grad(lambda *a: affine(*a, F32).sum(), (0, 1, 2))(x, kernel, bias)
    assert (dx.shape, dkernel.shape, dbias.shape) == (shape, (I, O), (O,))
    rows = x.size // I
    np.testing.assert_allclose(dkernel, np.full((I, O), rows))
    np.testing.assert_allclose(dbias, np.full(O, rows))
    np.testing.assert_allclose(dx, np.broadcast_to(kernel.sum(axis=1), shape), rtol=1e-5)


def error(ours: jax.Array, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(ours, np.float64) - exact) / np.linalg.norm(exact))


def test_in_bfloat16_the_gradients_of_parameters_are_float32_and_exacter_than_jaxs():
    x, _, _ = operands(BF16)
    rows = np.asarray(x, np.float64).reshape(NUM_ROWS, I)
    dy = np.asarray(WEIGHTS.astype(BF16), np.float64).reshape(NUM_ROWS, O)
    dx, *ours = grads(affine, BF16)
    _, *theirs = grads(plain, BF16)
    assert dx.dtype == BF16
    assert [leaf.dtype for leaf in ours] == [F32, F32]
    for mine, jaxs, exact in zip(ours, theirs, [rows.T @ dy, dy.sum(axis=0)], strict=True):
        assert error(mine, exact) < 1e-5
        assert error(jaxs, exact) > 1e-3, "rounded to bfloat16"


def test_in_bfloat16_the_output_and_what_goes_back_to_x_are_bfloat16():
    x, kernel, bias = operands(BF16)
    y, back = jax.vjp(lambda *a: affine(*a, BF16), x, kernel, bias)
    assert y.dtype == BF16
    assert [leaf.dtype for leaf in back(y)] == [BF16, F32, F32]
    exact = plain(x.astype(F32), kernel, bias, F32)
    assert 1e-5 < error(y, np.asarray(exact, np.float64)) < 1e-2


def test_the_layer_takes_x_of_any_type_and_keeps_its_parameters_in_float32():
    layer = Linear(I, O, kernel_init=nnx.initializers.ones, dtype=BF16, rngs=nnx.Rngs(0))
    x = jnp.full((B, I), 1.001)  # 1 in bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(layer)} == {F32}
    assert layer(x).dtype == BF16
    np.testing.assert_array_equal(layer(x), I)
    of_x = jax.grad(lambda x: layer(x).astype(F32).sum())(x)
    of_layer = jax.grad(lambda layer: layer(x).astype(F32).sum())(layer)
    assert of_x.dtype == F32
    assert {leaf.dtype for leaf in jax.tree.leaves(of_layer)} == {F32}


def test_a_product_may_leave_its_sums_in_float32():
    a, b = jnp.full((1, 3), 1 + 2**-7, BF16), jnp.ones((3, 1), BF16)
    exact = 3 * (1 + 2**-7)  # has one bit more than bfloat16
    assert float(multiply("ij,jk->ik", a, b, BF16, F32)[0, 0]) == exact
    assert float(multiply("ij,jk->ik", a, b, BF16, BF16)[0, 0]) != exact


# The precision of the products


def traced_products(dtype) -> list:
    def loss(*operands) -> jax.Array:
        return affine(*operands, dtype).astype(F32).sum()

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
    return equations(jax.make_jaxpr(grad)(*operands(dtype)), "dot_general")


@pytest.mark.parametrize("default", [None, "bfloat16"])
def test_float32_products_are_float32_on_every_device_forward_and_backward(default):
    with jax.default_matmul_precision(default):
        found = traced_products(F32)
    assert len(found) == 3  # y, dL/dx and dL/dW
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert {equation.params["precision"] for equation in found} == {highest}
    assert {var.aval.dtype for equation in found for var in equation.invars} == {F32}


@pytest.mark.parametrize("platform, float32_sums", [("gpu", 1), ("cpu", 3)])
def test_bfloat16_products_are_as_fast_as_the_device_can(platform, float32_sums, monkeypatch):
    monkeypatch.setattr(dit.linear, "platform", lambda: platform)
    found = traced_products(BF16)
    assert len(found) == 3
    assert all(jax.lax.Precision.HIGHEST not in e.params["precision"] for e in found)
    assert {var.aval.dtype for equation in found for var in equation.invars} == {BF16}
    assert [e.outvars[0].aval.dtype for e in found].count(F32) == float32_sums, "1 is dL/dW"


def test_the_precision_goes_by_the_type():
    assert precision_of("float32") == jax.lax.Precision.HIGHEST
    assert precision_of(jnp.bfloat16) == jax.lax.Precision.DEFAULT


# On a mesh


def test_gather_leaves_weights_alone_without_a_mesh_and_makes_them_whole_on_one():
    weights = jnp.arange(8.0)
    assert gather(weights) is weights
    mesh = local_mesh()
    sharded = jax.device_put(weights, jax.NamedSharding(mesh, PartitionSpec("data")))
    with jax.set_mesh(mesh):
        whole = jax.jit(gather)(sharded)
    assert whole.sharding.is_fully_replicated
    np.testing.assert_array_equal(whole, weights)
