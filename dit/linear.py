"""The linear layer of a block: products in one type, parameters and their gradients in float32.

(1) y = x W + b, computed in `dtype`
(2) dL/dx = dL/dy W^T, computed in `dtype`
(3) dL/dW = x^T dL/dy and dL/db, the sum of dL/dy, of factors in `dtype`, summed in float32 and left
    so: what devices add up is float32. JAX's own derivative would round it to `dtype` first.

In float32 the products are float32 on every device, neither TF32 nor bfloat16.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dit.sharding import gather, platform


def precision_of(dtype) -> jax.lax.Precision:
    """That makes a product of two arrays of this type as precise as the type is."""
    is_float32 = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if is_float32 else jax.lax.Precision.DEFAULT


def multiply(formula: str, a: jax.Array, b: jax.Array, dtype, out_dtype) -> jax.Array:
    """An einsum of two arrays, cast to `dtype`, whose sums are float32 and then `out_dtype`."""
    a, b = a.astype(dtype), b.astype(dtype)
    # On a CPU a product of bfloat16 has half the speed, float32's, unless it ends in float32.
    sum_dtype = jnp.float32 if platform() == "cpu" else out_dtype
    product = jnp.einsum(
        formula, a, b, precision=precision_of(dtype), preferred_element_type=sum_dtype
    )
    return product.astype(out_dtype)


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype) -> jax.Array:
    """(1): x `[..., I]`, kernel `[I, O]` and bias `[O]` to `[..., O]`."""
    kernel, bias = gather(kernel.astype(dtype)), gather(bias.astype(dtype))
    y = multiply("...i,io->...o", x, kernel, dtype, dtype)
    return y + jnp.broadcast_to(bias, y.shape)


def _forward(x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype) -> tuple[jax.Array, tuple]:
    # not by `affine`: the policy of a jax.checkpoint would not see the product inside it
    return _affine(x, kernel, bias, dtype), (x, kernel)


def _outer(x: jax.Array, dy: jax.Array, dtype) -> jax.Array:
    """(3): x `[M, I]` and dy `[M, O]` to float32 `[I, O]`.

    On a CPU a product over one axis takes its factors as they lie, where one over several copies x;
    and it is the faster with the narrower factor first.
    """
    if x.shape[1] > dy.shape[1]:
        return _outer(dy, x, dtype).T
    return multiply("mi,mo->io", x, dy, dtype, jnp.float32)


def _backward(dtype, saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel = saved
    dx = multiply("...o,io->...i", dy, gather(kernel.astype(dtype)), dtype, x.dtype)  # (2)
    dkernel = _outer(x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), dtype)  # (3)
    dbias = dy.sum(axis=range(dy.ndim - 1), dtype=jnp.float32)  # (3)
    return dx, dkernel, dbias


affine = jax.custom_vjp(_affine, nondiff_argnums=(3,))
affine.defvjp(_forward, _backward)


class Linear(nnx.Linear):
    """(1): x `[..., I]` of any type to `[..., O]` in `dtype`."""

    def __init__(self, inputs: int, outputs: int, *, kernel_init, dtype=jnp.float32, rngs):
        super().__init__(inputs, outputs, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return affine(x.astype(self.dtype), self.kernel[...], self.bias[...], self.dtype)
