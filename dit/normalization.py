"""Conditional normalisation: a norm removes a feature's statistics, a condition sets new ones.

(1) norm(x) = (x - mean(x)) / sqrt(var(x) + eps); the norm's name says what the mean is taken over
(2) AdaIN(x, s) = std(s) norm(x) + mean(s)               Huang & Belongie, arXiv 1703.06868, Eq. 8
(3) FiLM(x, c) = (1 + gamma(c)) x + beta(c)              Perez et al., arXiv 1709.07871, Eq. 2
(4) conditional batch norm = FiLM(norm(x), c)            De Vries et al., arXiv 1707.00683, sec. 3
(5) SPADE(x, m) = (1 + gamma(m)) norm(x) + beta(m)       Park et al., arXiv 1903.07291, Eq. 1
        gamma and beta are maps that a small convolutional network makes of the mask m
(6) adaLN: x + f(modulate(x)), modulate(x) = (1 + scale(c)) norm(x) + shift(c)
                                                         Peebles & Xie, arXiv 2212.09748, sec. 3.2
(7) adaLN-Zero: x + gate(c) f(modulate(x)), where shift, scale and gate start at zero

The papers' gamma is 1 + gamma here. In (3) and (4) gamma and beta are linear in c; in (6) and (7)
shift, scale and gate are linear in silu(c). All start at zero, except in (6), which starts like any
linear layer. So at initialisation (3), (4) and (5) are the norm alone, and (7) is the identity.

B batch, H, W height and width, T tokens, C or D channels, E width of a condition, K mask classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dit.linear import Linear

xavier = nnx.initializers.xavier_uniform()
zero_init = nnx.initializers.zeros

Layer = Callable[[jax.Array], jax.Array]


# (1), norms without parameters


def normalise(x: jax.Array, axes: tuple[int, ...], epsilon: float) -> jax.Array:
    """(1) over some axes, in float32 whatever the type of x."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=axes, keepdims=True) + epsilon)


def layer_norm(x: jax.Array) -> jax.Array:
    """Over the channels of x `[..., D]`."""
    return normalise(x, (-1,), 1e-6)


def instance_norm(x: jax.Array) -> jax.Array:
    """Over the places of each channel of x `[B, H, W, C]`."""
    return normalise(x, (1, 2), 1e-5)


# (2), a style image in place of parameters


class AdaIN(nnx.Module):
    """(2), without parameters: x `[B, H, W, C]` and style `[B or 1, h, w, C]` to x's shape.

    The result has the style's channel means and deviations, up to rounding: no epsilon is added,
    and a constant channel of x becomes the style's mean. A strength below 1 goes part of the way.
    """

    def __init__(self, strength: float = 1.0):
        self.strength = strength

    def __call__(self, x: jax.Array, style: jax.Array) -> jax.Array:
        places = dict(axis=(1, 2), keepdims=True)
        varies = x.max(**places) > x.min(**places)
        variance = jnp.where(varies, x.var(**places), 1.0)
        centred = (x - x.mean(**places)) * jax.lax.rsqrt(variance)
        normal = jnp.where(varies, centred, 0.0)
        styled = style.std(**places) * normal + style.mean(**places)
        return (1 - self.strength) * x + self.strength * styled


# (3) to (7), a condition in place of parameters


class Modulation(nnx.Module):
    """The linear layer of (3), (4), (6), (7): c `[..., E]` to `num_vectors` arrays `[..., C]`.

    They are float32; `dtype` is the type of the product.
    """

    def __init__(
        self,
        condition_size: int,
        num_vectors: int,
        features: int | None = None,
        *,
        kernel_init=zero_init,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_vectors = num_vectors
        outputs = num_vectors * (features or condition_size)
        self.linear = Linear(
            condition_size, outputs, kernel_init=kernel_init, dtype=dtype, rngs=rngs
        )

    def __call__(self, c: jax.Array) -> list[jax.Array]:
        vectors = self.linear(c).astype(jnp.float32)
        return jnp.split(vectors, self.num_vectors, axis=-1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """(6)'s modulate of x `[B, T, D]`, in float32.

    shift and scale are `[B, 1, D]`, or `[B, T, D]` where they vary in space.
    """
    return layer_norm(x) * (1 + scale) + shift


class FiLM(nnx.Module):
    """(3) behind a norm, or behind none: x `[B, H, W, C]` and c `[B, E]` to x's shape."""

    def __init__(self, condition_size: int, features: int, norm: Layer = lambda x: x, *, rngs):
        self.modulation = Modulation(condition_size, 2, features, rngs=rngs)
        self.norm = norm

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        gamma, beta = self.modulation(c[:, None, None])  # [B, 1, 1, C] each
        return (1 + gamma) * self.norm(x) + beta


class ConditionalBatchNorm(nnx.Module):
    """(4): x `[B, H, W, C]` and c `[B, E]`, such as a class embedding that all layers share.

    `norm(x, c)` uses the running statistics. `norm.train(x, c)` uses those of the batch, and also
    returns a norm with updated running statistics.
    """

    def __init__(self, condition_size: int, features: int, *, momentum: float = 0.9, rngs):
        self.film = FiLM(condition_size, features, rngs=rngs)
        self.momentum = momentum
        self.mean = nnx.BatchStat(jnp.zeros((1, 1, 1, features)))
        self.variance = nnx.BatchStat(jnp.ones((1, 1, 1, features)))

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        normal = (x - self.mean[...]) * jax.lax.rsqrt(self.variance[...] + 1e-5)
        return self.film(normal, c)

    def train(self, x: jax.Array, c: jax.Array) -> tuple[jax.Array, "ConditionalBatchNorm"]:
        batch = (0, 1, 2)
        updated = jax.tree.map(lambda leaf: leaf, self)  # a copy: the norm itself stays as it is
        updated.mean[...] = self._moved(self.mean, x.mean(axis=batch, keepdims=True))
        updated.variance[...] = self._moved(self.variance, x.var(axis=batch, keepdims=True))
        return self.film(normalise(x, batch, 1e-5), c), updated

    def _moved(self, running: nnx.BatchStat, batch: jax.Array) -> jax.Array:
        return self.momentum * running[...] + (1 - self.momentum) * jax.lax.stop_gradient(batch)


class SPADE(nnx.Module):
    """(5): x `[B, H, W, C]` and a one-hot mask `[B, h, w, K]`, resized to x, to x's shape.

    The paper's norm is batch norm.
    """

    def __init__(
        self,
        mask_classes: int,
        features: int,
        hidden_size: int = 64,
        norm: Layer = instance_norm,
        *,
        rngs: nnx.Rngs,
    ):
        window = (3, 3)
        self.shared = nnx.Conv(mask_classes, hidden_size, window, rngs=rngs)
        self.gamma = nnx.Conv(hidden_size, features, window, kernel_init=zero_init, rngs=rngs)
        self.beta = nnx.Conv(hidden_size, features, window, kernel_init=zero_init, rngs=rngs)
        self.norm = norm

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        H, W = x.shape[1:3]
        mask = jax.image.resize(mask, (len(mask), H, W, mask.shape[-1]), "nearest")
        hidden = nnx.relu(self.shared(mask))  # [B, H, W, hidden_size]
        return (1 + self.gamma(hidden)) * self.norm(x) + self.beta(hidden)


class AdaLN(nnx.Module):
    """(6): x `[B, T, D]` and c `[B, 1 or T, D]` through a residual branch."""

    def __init__(self, hidden_size: int, *, kernel_init=xavier, rngs: nnx.Rngs):
        self.modulation = Modulation(hidden_size, 2, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, branch: Layer) -> jax.Array:
        shift, scale = self.modulation(nnx.silu(c))
        return x + branch(modulate(x, shift, scale))


class AdaLNZero(nnx.Module):
    """(7): as (6), but a gate multiplies the branch, and everything starts at zero."""

    def __init__(self, hidden_size: int, *, kernel_init=zero_init, rngs: nnx.Rngs):
        self.modulation = Modulation(hidden_size, 3, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, branch: Layer) -> jax.Array:
        shift, scale, gate = self.modulation(nnx.silu(c))
        return x + gate * branch(modulate(x, shift, scale))
