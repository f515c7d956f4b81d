"""Conditional normalisation: a norm removes a feature's statistics, and a condition puts others in their place.

    (1) norm(x) = (x - mean(x)) / sqrt(var(x) + eps)             what the mean is taken over names the norm
    (2) AdaIN(x, s) = std(s) norm(x) + mean(s)                   Huang & Belongie, arXiv 1703.06868, Eq. 8
    (3) FiLM(x, c) = (1 + gamma(c)) x + beta(c)                  Perez et al., arXiv 1709.07871, Eq. 2
    (4) conditional batch norm = FiLM(norm(x), c)                De Vries et al., arXiv 1707.00683, section 3
    (5) SPADE(x, m) = (1 + gamma(m)) norm(x) + beta(m),          Park et al., arXiv 1903.07291, Eq. 1
            gamma and beta maps that a small convolutional network makes of the mask m
    (6) adaLN: x + f(modulate(x)), modulate(x) = (1 + scale(c)) norm(x) + shift(c)        Peebles & Xie, arXiv 2212.09748, section 3.2
    (7) adaLN-Zero: x + gate(c) f(modulate(x)), where shift, scale and gate start at zero

The papers' gamma is 1 + gamma here. In (3) and (4), gamma and beta are linear in c; in (6) and (7), shift, scale and gate are linear in
silu(c). They start at zero, but for (6), where they start as those of any linear layer: at initialisation (3), (4) and (5) are the norm
without the condition, and (7) is the identity.

B batch, H, W height and width, T tokens, C or D channels, E width of a condition, K classes of a mask.
"""

import jax
import jax.numpy as jnp
from flax import nnx

xavier = nnx.initializers.xavier_uniform()
zero_init = nnx.initializers.zeros
BATCH = (0, 1, 2)  # what batch norm takes its statistics over


# Norms without parameters, (1)


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


# Style by statistics


class AdaIN(nnx.Module):
    """(2), without parameters: x `[B, H, W, C]` with the channel means and deviations of style `[B or 1, h, w, C]`.

    0 < strength < 1 goes only part of the way. Exact, up to rounding: no epsilon is added, and a channel of x that is constant becomes the
    style's mean.
    """

    def __init__(self, strength: float = 1.0):
        self.strength = strength

    def __call__(self, x: jax.Array, style: jax.Array) -> jax.Array:
        axes = dict(axis=(1, 2), keepdims=True)
        varies = x.max(**axes) > x.min(**axes)
        normal = jnp.where(varies, (x - x.mean(**axes)) * jax.lax.rsqrt(jnp.where(varies, x.var(**axes), 1)), 0)
        styled = style.std(**axes) * normal + style.mean(**axes)
        return (1 - self.strength) * x + self.strength * styled


# A condition in place of fixed parameters


class Modulation(nnx.Module):
    """The linear layer of (3), (4), (6) and (7): c `[..., E]` to `num_vectors` arrays `[..., C]`."""

    def __init__(self, condition_size: int, num_vectors: int, features: int | None = None, *, kernel_init=zero_init, dtype=jnp.float32,
                 rngs: nnx.Rngs):
        self.num_vectors = num_vectors
        outputs = num_vectors * (features or condition_size)
        self.linear = nnx.Linear(condition_size, outputs, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

    def __call__(self, c: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.split(self.linear(c), self.num_vectors, axis=-1))


class FiLM(nnx.Module):
    """(3), behind any norm or none: x `[B, H, W, C]` and c `[B, E]` to x's shape."""

    def __init__(self, condition_size: int, features: int, norm=lambda x: x, *, kernel_init=zero_init, rngs: nnx.Rngs):
        self.modulation = Modulation(condition_size, 2, features, kernel_init=kernel_init, rngs=rngs)
        self.norm = norm

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        gamma, beta = self.modulation(c[:, None, None])  # [B, 1, 1, C] each
        return (1 + gamma) * self.norm(x) + beta


class ConditionalBatchNorm(nnx.Module):
    """(4): x `[B, H, W, C]` and c `[B, E]`, such as the embedding of a class that all layers share.

    `norm(x, c)` uses the running statistics; `norm.train(x, c)` those of the batch, and returns the norm whose statistics it moved as well.
    """

    def __init__(self, condition_size: int, features: int, *, momentum: float = 0.9, kernel_init=zero_init, rngs: nnx.Rngs):
        self.film = FiLM(condition_size, features, kernel_init=kernel_init, rngs=rngs)
        self.momentum = momentum
        self.mean, self.variance = nnx.BatchStat(jnp.zeros((1, 1, 1, features))), nnx.BatchStat(jnp.ones((1, 1, 1, features)))

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        return self.film((x - self.mean[...]) * jax.lax.rsqrt(self.variance[...] + 1e-5), c)

    def train(self, x: jax.Array, c: jax.Array) -> tuple[jax.Array, "ConditionalBatchNorm"]:
        moved = jax.tree.map(lambda leaf: leaf, self)  # a copy, so that the norm itself stays as it is
        for running, batch in ((moved.mean, x.mean(axis=BATCH, keepdims=True)), (moved.variance, x.var(axis=BATCH, keepdims=True))):
            running[...] = self.momentum * running[...] + (1 - self.momentum) * jax.lax.stop_gradient(batch)
        return self.film(normalise(x, BATCH, 1e-5), c), moved


class SPADE(nnx.Module):
    """(5): x `[B, H, W, C]` and the one-hot mask `[B, h, w, K]`, resized to x, to x's shape. (The paper's norm is batch norm.)"""

    def __init__(self, mask_classes: int, features: int, hidden_size: int = 64, norm=instance_norm, *, kernel_init=zero_init,
                 rngs: nnx.Rngs):
        self.shared = nnx.Conv(mask_classes, hidden_size, (3, 3), rngs=rngs)
        self.gamma = nnx.Conv(hidden_size, features, (3, 3), kernel_init=kernel_init, rngs=rngs)
        self.beta = nnx.Conv(hidden_size, features, (3, 3), kernel_init=kernel_init, rngs=rngs)
        self.norm = norm

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        mask = jax.image.resize(mask, (len(mask), *x.shape[1:3], mask.shape[-1]), "nearest")
        hidden = nnx.relu(self.shared(mask))  # [B, H, W, hidden]
        return (1 + self.gamma(hidden)) * self.norm(x) + self.beta(hidden)


# Transformers


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """(6)'s modulate, in float32; shift and scale are `[B, 1, D]`, or `[B, T, D]` where they vary in space. Returns x's type."""
    return (layer_norm(x) * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(x.dtype)


class AdaLN(Modulation):
    """(6): x `[B, T, D]` through residual branches, one after the other, under the condition c `[B, 1 or T, D]`."""

    def __init__(self, hidden_size: int, num_branches: int = 1, *, kernel_init=xavier, dtype=jnp.float32, rngs: nnx.Rngs):
        super().__init__(hidden_size, 2 * num_branches, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, *branches) -> jax.Array:
        vectors = iter(super().__call__(nnx.silu(c)))
        for branch, shift, scale in zip(branches, vectors, vectors):
            x = x + branch(modulate(x, shift, scale))
        return x


class AdaLNZero(Modulation):
    """(7): as (6), but each branch passes a gate, and all gates start shut."""

    def __init__(self, hidden_size: int, num_branches: int = 1, *, kernel_init=zero_init, dtype=jnp.float32, rngs: nnx.Rngs):
        super().__init__(hidden_size, 3 * num_branches, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, *branches) -> jax.Array:
        vectors = iter(super().__call__(nnx.silu(c)))
        for branch, shift, scale, gate in zip(branches, vectors, vectors, vectors):
            x = x + gate * branch(modulate(x, shift, scale))
        return x
