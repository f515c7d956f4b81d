"""Samplers, as free functions over a denoising function, and guidance.

`denoise(x, t)` takes x `[B, H, W, C]` and the original timestep t `[1]` that all of x is at, and
returns what a network does. Each sampler is one `lax.scan` from pure noise to an image, to be
called under one `jit`. Everything random in sample i comes from keys[i].

    DDPM (Ho et al., 2006.11239): x_{t-1} ~ p(x_{t-1} | x_t)
    DDIM (Song et al., 2010.02502, Eq. 12):
        x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1} - sigma^2) eps + sigma noise,
        sigma = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1})
    guidance (Ho & Salimans, 2207.12598): eps = eps(null) + scale (eps(y) - eps(null)),
        within an interval of the noise level (Kynkaanniemi et al., 2404.07724)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit.ddpm import DDPM, at, split_output

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Correction = Callable[[jax.Array], jax.Array] | None  # of each prediction of x_0


def paired(a: jax.Array, b: jax.Array) -> jax.Array:
    """a_0, b_0, a_1, b_1, ..., `[2 B, ...]`, so that both stay where sample i is computed."""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def guided(
    model: Callable,
    condition: dict[str, jax.Array],
    null: dict[str, jax.Array],
    scale: jax.Array | float | None = None,
    cfg_channels: int | None = None,
    interval: tuple[float, float] | None = None,
) -> Denoise:
    """The denoising function of a model and a condition, guided away from the null condition.

    scale: None is the conditional model, at half the cost.
    cfg_channels: guide only the first channels (3 is the published DiT's behaviour); None is all.
    interval: guide only at original timesteps in [low, high), and save the cost of the others; None
    guides always. The variance is the conditional half's.
    """

    def conditional(x: jax.Array, t: jax.Array) -> jax.Array:
        return model(x, t, **condition)

    if scale is None:
        return conditional
    pairs = jax.tree.map(paired, condition, null)

    def both(x: jax.Array, t: jax.Array) -> jax.Array:
        output = model(paired(x, x), t, **pairs)
        of_condition, of_null = jnp.unstack(output.reshape(len(x), 2, *output.shape[1:]), axis=1)
        channels = x.shape[-1] if cfg_channels is None else cfg_channels
        difference = (of_condition - of_null)[..., :channels]
        eps = of_null[..., :channels] + scale * difference
        return jnp.concatenate([eps, of_condition[..., channels:]], axis=-1)

    if interval is None:
        return both
    low, high = interval

    def within(x: jax.Array, t: jax.Array) -> jax.Array:
        return jax.lax.cond((low <= t[0]) & (t[0] < high), both, conditional, x, t)

    return within


def clip_pixels(x0: jax.Array) -> jax.Array:
    """Holds a prediction of x_0 within [-1, 1], where pixels are."""
    return jnp.clip(x0, -1, 1)


def sample_keys(seed: int, indices: jax.Array) -> jax.Array:
    """One key a sample, a function of (seed, index) alone: `[B]`."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(indices)


def sample_noise(keys: jax.Array, t: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise of time t for each key: `[B, *shape]`."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape))(keys)


def ddpm(
    process: DDPM,
    denoise: Denoise,
    keys: jax.Array,
    shape: tuple[int, int, int],
    num_steps: int,
    correct: Correction = None,
) -> jax.Array:
    """Ancestral sampling of `[B, *shape]`."""
    process = process.respaced(num_steps)

    def step(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        times = t[None]
        output = denoise(x, process.original_timesteps(times))
        mean, log_variance, _ = process.p_mean_variance(output, x, times, correct)
        noise = jnp.exp(0.5 * log_variance) * sample_noise(keys, t, shape)
        return jnp.where(t > 0, mean + noise, mean), None

    start = sample_noise(keys, process.num_steps, shape)
    x, _ = jax.lax.scan(step, start, jnp.arange(num_steps)[::-1])
    return x


def ddim(
    process: DDPM,
    denoise: Denoise,
    keys: jax.Array,
    shape: tuple[int, int, int],
    num_steps: int,
    eta: float = 0.0,
    correct: Correction = None,
) -> jax.Array:
    """DDIM sampling of `[B, *shape]`: deterministic at eta 0, as noisy as DDPM at eta 1."""
    process = process.respaced(num_steps)
    previous = process.alphas_cumprod_prev
    sigma = eta * np.sqrt(process.posterior_variance)  # the sigma of Eq. 12
    eps_scale = np.sqrt(np.maximum(1 - previous - sigma**2, 0))

    def step(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        times = t[None]
        output = denoise(x, process.original_timesteps(times))
        eps, _ = split_output(output, shape[-1])
        x0 = process.pred_x0(eps, x, times)
        if correct is not None:
            x0 = correct(x0)
            eps = process.pred_eps(x0, x, times)
        x = at(np.sqrt(previous), times) * x0 + at(eps_scale, times) * eps
        if eta:
            x = x + at(sigma, times) * sample_noise(keys, t, shape)
        return x, None

    start = sample_noise(keys, process.num_steps, shape)
    x, _ = jax.lax.scan(step, start, jnp.arange(num_steps)[::-1])
    return x
