"""Samplers, as free functions over a denoising function, and guidance.

`denoise(x, t)` takes x `[B, H, W, C]` and the network's t `[1]`, DDPM's original timestep or 1000
times flow's time, which all of x is at, and returns what the network does. Each sampler is one
`lax.scan` from pure noise to an image, to be called under one `jit`. Everything random in sample i
comes from keys[i]. With `trajectory` a sampler also returns a Trajectory of at most `frames` states
on the way.

    DDPM (Ho et al., 2006.11239): x_{t-1} ~ p(x_{t-1} | x_t)
    DDIM (Song et al., 2010.02502, Eq. 12):
        x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1} - sigma^2) eps + sigma noise,
        sigma = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1})
    Euler: x_s = x_t + (s - t) v(x_t, t), from t = 1 to 0 in equal steps, each from t to s
    Heun: x_s = x_t + (s - t) (v(x_t, t) + v(z, s)) / 2, where z is Euler's x_s
    guidance (Ho & Salimans, 2207.12598): eps = eps(null) + scale (eps(y) - eps(null)),
        within an interval of the noise level (Kynkaanniemi et al., 2404.07724)
    autoguidance (Karras et al., 2406.02507): a worse model's eps(y) in place of eps(null)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit.ddpm import DDPM, at, split_output
from dit.flow import Flow

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Correction = Callable[[jax.Array], jax.Array] | None  # of each prediction of x_0

SAMPLE_TAG = 2  # folded into the seed's key; `state.run_keys` splits it, which folds in 0 and 1
FRAMES = 9  # of a Trajectory, unless it is asked for more or fewer


class Trajectory(NamedTuple):
    """States x_t of a sampler, evenly chosen from pure noise to the image."""

    x: jax.Array  # [F, B, H, W, C]
    noise_level: np.ndarray  # that of the process, from about 1 to 0; [F]


Result = jax.Array | tuple[jax.Array, Trajectory]  # x_0 [B, H, W, C], with its trajectory if asked


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
    guide: Callable | None = None,
) -> Denoise:
    """The denoising function of a model and a condition, guided away from the null condition.

    guide: a worse model, away from which, under the same condition, it is guided instead.

    scale: None is the conditional model, at half the cost.
    cfg_channels: guide only the first channels (3 is the published DiT's behaviour); None is all.
    interval: guide only where the network's t is in [low, high), elsewhere at half the cost; None
    guides always. The variance is the conditional half's.
    """

    def conditional(x: jax.Array, t: jax.Array) -> jax.Array:
        return model(x, t, **condition)

    if scale is None:
        return conditional
    pairs = jax.tree.map(paired, condition, null)

    def outputs(x: jax.Array, t: jax.Array) -> list[jax.Array]:
        """Of the condition, and of what the guidance leads away from."""
        if guide is not None:
            return [model(x, t, **condition), guide(x, t, **condition)]
        output = model(paired(x, x), t, **pairs)
        return jnp.unstack(output.reshape(len(x), 2, *output.shape[1:]), axis=1)

    def both(x: jax.Array, t: jax.Array) -> jax.Array:
        of_condition, of_null = outputs(x, t)
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
    """One key a sample, a function of (seed, index) alone: `[B]`. Training's keys are others."""
    key = jax.random.fold_in(jax.random.key(seed), SAMPLE_TAG)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def sample_noise(keys: jax.Array, t: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise of time t for each key: `[B, *shape]`."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape))(keys)


def kept_steps(num_steps: int, frames: int) -> np.ndarray:
    """After how many of its steps a sampler keeps a state: evenly from 0 to num_steps, `[F]`."""
    return np.linspace(0, num_steps, min(frames, num_steps + 1)).round().astype(int)


def scan_steps(
    step: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    times: np.ndarray,
    noise_levels: np.ndarray,
    trajectory: bool,
    frames: int,
) -> Result:
    """x `[B, H, W, C]` after a step from (x_t, time) at each of the times, `[N, ...]`.

    noise_levels: before the first step and after each, `[N + 1]`. Of the states on the way only
    those of the trajectory are stored.
    """
    if not trajectory:
        x, _ = jax.lax.scan(lambda x, time: (step(x, time), None), x, times)
        return x
    kept = kept_steps(len(times), frames)
    frame_of_step = np.full(len(times), len(kept))  # past the last: not stored
    frame_of_step[kept[:-1]] = np.arange(len(kept) - 1)

    def store_and_step(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        x, stored = carry
        time, frame = inputs
        return (step(x, time), stored.at[frame].set(x, mode="drop")), None

    empty = jnp.zeros((len(kept), *x.shape), x.dtype)
    (x, stored), _ = jax.lax.scan(store_and_step, (x, empty), (times, frame_of_step))
    return x, Trajectory(stored.at[-1].set(x), noise_levels[kept])


def ddpm(
    process: DDPM,
    denoise: Denoise,
    keys: jax.Array,
    shape: tuple[int, int, int],
    num_steps: int,
    correct: Correction = None,
    trajectory: bool = False,
    frames: int = FRAMES,
) -> Result:
    """Ancestral sampling of `[B, *shape]`."""
    process = process.respaced(num_steps)

    def step(x: jax.Array, t: jax.Array) -> jax.Array:
        times = t[None]
        output = denoise(x, process.original_timesteps(times))
        mean, log_variance, _ = process.p_mean_variance(output, x, times, correct)
        noise = jnp.exp(0.5 * log_variance) * sample_noise(keys, t, shape)
        return jnp.where(t > 0, mean + noise, mean)

    start = sample_noise(keys, process.num_steps, shape)
    times, levels = np.arange(num_steps)[::-1], process.noise_levels(num_steps)
    return scan_steps(step, start, times, levels, trajectory, frames)


def ddim(
    process: DDPM,
    denoise: Denoise,
    keys: jax.Array,
    shape: tuple[int, int, int],
    num_steps: int,
    eta: float = 0.0,
    correct: Correction = None,
    trajectory: bool = False,
    frames: int = FRAMES,
) -> Result:
    """DDIM sampling of `[B, *shape]`: deterministic at eta 0, as noisy as DDPM at eta 1."""
    process = process.respaced(num_steps)
    previous = process.alphas_cumprod_prev
    sigma = eta * np.sqrt(process.posterior_variance)  # the sigma of Eq. 12
    eps_scale = np.sqrt(np.maximum(1 - previous - sigma**2, 0))

    def step(x: jax.Array, t: jax.Array) -> jax.Array:
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
        return x

    start = sample_noise(keys, process.num_steps, shape)
    times, levels = np.arange(num_steps)[::-1], process.noise_levels(num_steps)
    return scan_steps(step, start, times, levels, trajectory, frames)


def flow_velocity(
    flow: Flow, denoise: Denoise, correct: Correction
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The function (x, t), t a scalar, -> v `[B, H, W, C]`."""

    def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
        times = t[None]
        return flow.velocity(denoise(x, flow.time_scale * times), x, times, correct)

    return velocity


def euler(
    flow: Flow,
    denoise: Denoise,
    keys: jax.Array,
    shape: tuple[int, int, int],
    num_steps: int,
    correct: Correction = None,
    trajectory: bool = False,
    frames: int = FRAMES,
) -> Result:
    """Samples `[B, *shape]` by Euler's method, of order 1: `num_steps` forwards."""
    velocity = flow_velocity(flow, denoise, correct)

    def step(x: jax.Array, ends: jax.Array) -> jax.Array:
        t, s = ends
        return x + (s - t) * velocity(x, t)

    start, levels = sample_noise(keys, 1, shape), flow.noise_levels(num_steps)
    return scan_steps(step, start, flow.steps(num_steps), levels, trajectory, frames)


def heun(
    flow: Flow,
    denoise: Denoise,
    keys: jax.Array,
    shape: tuple[int, int, int],
    num_steps: int,
    correct: Correction = None,
    trajectory: bool = False,
    frames: int = FRAMES,
) -> Result:
    """Samples `[B, *shape]` by Heun's method, of order 2: `2 num_steps - 1` forwards.

    The last step is Euler's, since a prediction of x_0 gives no velocity at t = 0.
    """
    velocity = flow_velocity(flow, denoise, correct)

    def step(x: jax.Array, ends: jax.Array) -> jax.Array:
        t, s = ends
        slope = velocity(x, t)
        ahead = x + (s - t) * slope
        slope_ahead = jax.lax.cond(s > 0, lambda: velocity(ahead, s), lambda: slope)
        return x + (s - t) * (slope + slope_ahead) / 2

    start, levels = sample_noise(keys, 1, shape), flow.noise_levels(num_steps)
    return scan_steps(step, start, flow.steps(num_steps), levels, trajectory, frames)
