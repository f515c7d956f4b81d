"""Samplers, as free functions over a denoising function, and classifier-free guidance, written once.

`denoise(x, t)` takes x `[B, H, W, C]` and the original timestep t `[B]` and answers as the network does. Each sampler is one
`lax.scan` from pure noise to an image, to be called under one `jit`. Everything random in sample i comes from keys[i].

    DDPM (Ho et al., 2006.11239):  x_{t-1} ~ p(x_{t-1} | x_t)
    DDIM (Song et al., 2010.02502, Eq. 12):  x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1} - sigma^2) eps + sigma noise,
        sigma = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1})
    guidance (Ho & Salimans, 2207.12598):  eps = eps(null) + scale (eps(y) - eps(null)), within an interval of the noise level
        (Kynkaanniemi et al., 2404.07724)
"""

import jax
import jax.numpy as jnp
import numpy as np

from dit.ddpm import DDPM, at, split_output


def guided(model, y, null_class, scale: float = 1.0, cfg_channels: int | None = None,
           interval: tuple[float, float] | None = None):
    """The denoising function of a model and labels y `[B]`, guided by `scale` away from the null class.

    Where the model takes more than a label, y and null_class are tuples of the same length.

    cfg_channels: guide only the first so many channels (3 is the published DiT's behaviour); None guides all.
    interval: guide only at original timesteps in [low, high); None guides always.
    The variance is the conditional half's. Scale 1 is the conditional model itself, at half the cost.
    """
    if scale == 1.0:
        return lambda x, t: model(x, t, y)

    def denoise(x, t):
        both = jax.tree.map(lambda a, nothing: jnp.concatenate([a, jnp.full_like(a, nothing)]), y, null_class)
        conditional, unconditional = jnp.split(model(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both), 2)
        channels = x.shape[-1] if cfg_channels is None else cfg_channels
        strength = scale if interval is None else jnp.where((t >= interval[0]) & (t < interval[1]), scale, 1.0).reshape(-1, 1, 1, 1)
        eps = unconditional[..., :channels] + strength * (conditional - unconditional)[..., :channels]
        return jnp.concatenate([eps, conditional[..., channels:]], axis=-1)

    return denoise


def clip_pixels(x0: jax.Array) -> jax.Array:
    """Holds a prediction of x_0 within [-1, 1], where pixels are."""
    return jnp.clip(x0, -1, 1)


def sample_keys(seed: int, indices: jax.Array) -> jax.Array:
    """One key a sample, a function of (seed, index) alone: `[B]`."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(indices)


def draw(keys: jax.Array, t: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise of time t for each key: `[B, *shape]`."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape))(keys)


def ddpm(process: DDPM, denoise, keys: jax.Array, shape: tuple[int, int, int], num_steps: int, correct=None) -> jax.Array:
    """Ancestral sampling of `[B, *shape]` in `num_steps` steps; `correct` is what is done to each prediction of x_0."""
    process = process.respaced(num_steps)

    def step(x, t):
        ts = jnp.full(len(keys), t)
        mean, log_variance, _ = process.p_mean_variance(denoise(x, jnp.asarray(process.timesteps)[ts]), x, ts, correct)
        return mean + jnp.where(t > 0, 1.0, 0.0) * jnp.exp(0.5 * log_variance) * draw(keys, t, shape), None

    return jax.lax.scan(step, draw(keys, process.num_steps, shape), jnp.arange(num_steps)[::-1])[0]


def ddim(process: DDPM, denoise, keys: jax.Array, shape: tuple[int, int, int], num_steps: int, eta: float = 0.0,
         correct=None) -> jax.Array:
    """DDIM sampling of `[B, *shape]`: deterministic at eta 0, as noisy as DDPM at eta 1."""
    process = process.respaced(num_steps)
    previous = process.alphas_cumprod_prev
    sigma = eta * np.sqrt(process.posterior_variance)  # (1 - abar_{t-1}) / (1 - abar_t) times beta_t, respaced

    def step(x, t):
        ts = jnp.full(len(keys), t)
        eps, _ = split_output(denoise(x, jnp.asarray(process.timesteps)[ts]), shape[-1])
        x0 = process.pred_x0(eps, x, ts)
        if correct:
            x0 = correct(x0)
            eps = process.pred_eps(x0, x, ts)
        x = at(np.sqrt(previous), ts) * x0 + at(np.sqrt(np.maximum(1 - previous - sigma**2, 0)), ts) * eps
        return x + (at(sigma, ts) * draw(keys, t, shape) if eta else 0), None

    return jax.lax.scan(step, draw(keys, process.num_steps, shape), jnp.arange(num_steps)[::-1])[0]
