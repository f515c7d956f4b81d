"""Layer normalisation whose shift and scale are regressed from a condition (adaLN).

    (1) layer_norm(x) = (x - mean(x)) / sqrt(var(x) + 1e-6), over the channels, without parameters, in float32
    (2) modulate(x, shift, scale) = layer_norm(x) (1 + scale) + shift
    (3) shift, scale, gate, ... = W silu(c) + b, each as wide as x     (Peebles & Xie, arXiv 2212.09748, section 3.2)

adaLN-Zero starts with W = 0 and b = 0: no shift, no scale, and every gate shut.

B batch, T tokens, D channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx


def layer_norm(x: jax.Array) -> jax.Array:
    """(1), in float32 whatever the type of x `[..., D]`."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """(2), in float32; shift and scale are `[B, 1, D]`, or `[B, T, D]` where they vary in space. Returns x's type."""
    return (layer_norm(x) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(x.dtype)


class Modulation(nnx.Module):
    """(3): c `[B, 1 or T, D]` to a tuple of `num_vectors` arrays of c's shape."""

    def __init__(self, hidden_size: int, num_vectors: int, *, kernel_init=nnx.initializers.zeros, dtype=jnp.float32, rngs: nnx.Rngs):
        self.num_vectors = num_vectors
        self.linear = nnx.Linear(hidden_size, num_vectors * hidden_size, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

    def __call__(self, c: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.split(self.linear(nnx.silu(c)), self.num_vectors, axis=-1))
