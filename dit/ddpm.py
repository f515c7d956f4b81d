"""Denoising diffusion: forward process, posterior, the network's prediction, loss, respacing.

Ho et al. (arXiv 2006.11239), Nichol & Dhariwal (arXiv 2102.09672), Hang et al. (min-SNR, arXiv
2303.09556). With abar_t the product of 1 - beta_s up to t, and abar_{-1} = 1:

(1) x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise
(2) q(x_{t-1} | x_t, x_0) = N(posterior mean, posterior variance), where
    mean = beta_t sqrt(abar_{t-1}) / (1 - abar_t) x_0
           + (1 - abar_{t-1}) sqrt(1 - beta_t) / (1 - abar_t) x_t
    variance = beta_t (1 - abar_{t-1}) / (1 - abar_t)
(3) x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), the network predicting eps
(4) log variance = f log beta_t + (1 - f) log(posterior variance), f = (v + 1) / 2, the network
    predicting v
(5) vb_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 the negative log likelihood
    of 8-bit x_0; in bits
(6) loss = |noise - eps|^2 + vb_t, eps held constant inside vb_t; t uniform
(7) min-SNR: |noise - eps|^2 times min(SNR_t, gamma) / SNR_t, where SNR_t = abar_t / (1 - abar_t)

Images x are `[B, H, W, C]` in [-1, 1]. Times t are int `[B]`, from 0 to len(timesteps) - 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

PIXELS = (1, 2, 3)  # the axes of an image
SHARE = "_share"  # behind a metric's name: of a batch, the share of samples that it is of


class Gaussian(NamedTuple):
    """p(x_{t-1} | x_t) and the x_0 that it was computed from; `[B, H, W, C]` each."""

    mean: jax.Array
    log_variance: jax.Array
    pred_x0: jax.Array


class Losses(NamedTuple):
    """Means over the pixels, `[B]` each: squared error of the noise, and (5) in bits."""

    mse: jax.Array
    vb: jax.Array


def beta_schedule(name: str, num_steps: int) -> np.ndarray:
    """Float64 `[num_steps]`: linear from 1e-4 to 0.02 (at 1000 steps, else scaled), or cosine."""
    if name == "linear":
        return np.linspace(1e-4, 0.02, num_steps, dtype=np.float64) * 1000 / num_steps
    abar = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


def at(table: np.ndarray, t: jax.Array, ndim: int = 4) -> jax.Array:
    """The float64 table's entries at times t `[B]`, as float32 `[B, 1, 1, 1]`."""
    return jnp.asarray(table, jnp.float32)[t].reshape(-1, *[1] * (ndim - 1))


def times_and_noise(
    key: jax.Array, x: jax.Array, draw_time: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """A time, drawn from a key of its own, and noise for each sample of x: `[B]`, `[B, H, W, C]`.

    `key` is one key for the batch, or one a sample `[B]`.
    """
    keys = jax.random.split(key, len(x)) if key.ndim == 0 else key
    t_keys, noise_keys = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(noise_keys)
    return jax.vmap(draw_time)(t_keys), noise


def losses_by_quarter(losses: jax.Array, t: jax.Array) -> dict[str, jax.Array]:
    """The parts that the quarters of time have in the mean of the losses `[B]`, and in the batch.

    t `[B]` is in [0, 1], from image to noise. Both are means over the whole batch, as any metric
    is; the mean loss of a quarter, of which a batch may hold no sample, is the ratio of their sums.
    """
    quarters = jnp.minimum(jnp.floor(4 * t), 3)
    metrics = {}
    for k in range(4):
        is_in = quarters == k
        metrics[f"loss_quarter_{k + 1}"] = jnp.where(is_in, losses, 0).mean()
        metrics[f"loss_quarter_{k + 1}{SHARE}"] = is_in.mean()
    return metrics


def split_output(model_output: jax.Array, channels: int) -> tuple[jax.Array, jax.Array | None]:
    """The network's eps and, where it has learned the variance, its v; `[B, H, W, C]` each."""
    if model_output.shape[-1] == channels:
        return model_output, None
    return model_output[..., :channels], model_output[..., channels:]


class DDPM:
    """A diffusion of `num_steps` timesteps, used at `timesteps`: all of them, unless respaced.

    The tables are float64 `[len(timesteps)]`. `variance` is `learned_range` (4), `fixed_small` (the
    posterior's) or `fixed_large` (beta_t).
    """

    time_scale = 1  # the network is given the timesteps as they are

    def __init__(
        self,
        num_steps: int = 1000,
        schedule: str = "linear",
        variance: str = "learned_range",
        min_snr_gamma: float | None = None,
        timesteps: np.ndarray | None = None,
    ):
        self.num_steps = num_steps
        self.schedule = schedule
        self.variance = variance
        self.min_snr_gamma = min_snr_gamma
        betas = beta_schedule(schedule, num_steps)
        abar = np.cumprod(1 - betas)
        if timesteps is not None:  # respaced: the betas that give the kept steps their old abar
            abar = abar[timesteps]
            betas = 1 - abar / np.append(1.0, abar[:-1])
        self.timesteps = np.arange(num_steps) if timesteps is None else np.asarray(timesteps)
        self.betas = betas
        self.alphas_cumprod = abar
        self.alphas_cumprod_prev = np.append(1.0, abar[:-1])
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - abar)  # (2)
        # at t = 0 the variance is 0 and has no logarithm: that of t = 1 stands in
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_x0 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - abar)
        self.posterior_mean_xt = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - abar)

    def respaced(self, num_steps: int) -> "DDPM":
        """The same diffusion at `num_steps` of its timesteps, evenly spaced from first to last."""
        kept = np.round(np.linspace(self.num_steps - 1, 0, num_steps)).astype(int)[::-1]
        return DDPM(self.num_steps, self.schedule, self.variance, self.min_snr_gamma, kept)

    def original_timesteps(self, t: jax.Array) -> jax.Array:
        """What the network is given at times t `[B]`."""
        return jnp.asarray(self.timesteps)[t]

    def noise_levels(self, num_steps: int) -> np.ndarray:
        """The weight of the noise in (1) before the first of so many steps and after each."""
        return np.append(np.sqrt(1 - self.respaced(num_steps).alphas_cumprod[::-1]), 0.0)

    # The forward process

    def q_sample(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """(1)"""
        signal_scale = at(np.sqrt(self.alphas_cumprod), t)
        noise_scale = at(np.sqrt(1 - self.alphas_cumprod), t)
        return signal_scale * x0 + noise_scale * noise

    def q_posterior(
        self, x0: jax.Array, xt: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(2): mean, and log variance (that of t = 1 at t = 0)."""
        mean = at(self.posterior_mean_x0, t) * x0 + at(self.posterior_mean_xt, t) * xt
        return mean, at(self.posterior_log_variance, t)

    # What the network predicts

    def pred_x0(self, eps: jax.Array, xt: jax.Array, t: jax.Array) -> jax.Array:
        """(3)"""
        xt_scale = at(1 / np.sqrt(self.alphas_cumprod), t)
        eps_scale = at(np.sqrt(1 / self.alphas_cumprod - 1), t)
        return xt_scale * xt - eps_scale * eps

    def pred_eps(self, x0: jax.Array, xt: jax.Array, t: jax.Array) -> jax.Array:
        """(3), solved for eps."""
        xt_scale = at(1 / np.sqrt(self.alphas_cumprod), t)
        eps_scale = at(np.sqrt(1 / self.alphas_cumprod - 1), t)
        return (xt_scale * xt - x0) / eps_scale

    def p_mean_variance(
        self,
        model_output: jax.Array,
        xt: jax.Array,
        t: jax.Array,
        correct: Callable[[jax.Array], jax.Array] | None = None,
    ) -> Gaussian:
        """p(x_{t-1} | x_t) from the network's output `[B, H, W, C or 2C]`.

        `correct` changes the prediction of x_0, such as by clipping it, before it is used.
        """
        eps, v = split_output(model_output, xt.shape[-1])
        pred_x0 = self.pred_x0(eps, xt, t)
        if correct is not None:
            pred_x0 = correct(pred_x0)
        mean, smallest = self.q_posterior(pred_x0, xt, t)
        return Gaussian(mean, self._log_variance(v, smallest, t, mean.shape), pred_x0)

    def _log_variance(
        self, v: jax.Array | None, smallest: jax.Array, t: jax.Array, shape: tuple[int, ...]
    ) -> jax.Array:
        """`[B, H, W, C]`, where `smallest` is the posterior's."""
        largest = at(np.log(self.betas), t)
        if self.variance == "learned_range":
            fraction = (v + 1) / 2
            return fraction * largest + (1 - fraction) * smallest  # (4)
        if self.variance == "fixed_small":
            return jnp.broadcast_to(smallest, shape)
        # beta_t, but at t = 0, where this is the width of the likelihood, the posterior's
        is_first = t.reshape(-1, 1, 1, 1) == 0
        return jnp.broadcast_to(jnp.where(is_first, smallest, largest), shape)

    # The loss

    def loss(
        self, model: Callable, key: jax.Array, x: jax.Array, condition: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(6) and (7), averaged over x `[B, H, W, C]`, the means of its parts, and by quarter of t.

        `key` is one key for the batch, or one a sample `[B]`.
        """

        def draw_time(key: jax.Array) -> jax.Array:
            return jax.random.randint(key, (), 0, len(self.timesteps))

        t, noise = times_and_noise(key, x, draw_time)
        xt = self.q_sample(x, t, noise)
        model_output = model(xt, self.original_timesteps(t), **condition)
        mse, vb = self.losses(model_output, x, xt, t, noise)
        losses = self.mse_weight(t) * mse + vb
        quarters = losses_by_quarter(losses, t / len(self.timesteps))
        return losses.mean(), {"mse": mse.mean(), "vb": vb.mean()} | quarters

    def losses(
        self,
        model_output: jax.Array,
        x0: jax.Array,
        xt: jax.Array,
        t: jax.Array,
        noise: jax.Array,
    ) -> Losses:
        """The two parts of (6). With a fixed variance vb is 0: the network is trained on mse."""
        eps, v = split_output(model_output, x0.shape[-1])
        mse = jnp.square(noise - eps).mean(axis=PIXELS)
        if self.variance != "learned_range":
            return Losses(mse, jnp.zeros_like(mse))
        held = jnp.concatenate([jax.lax.stop_gradient(eps), v], axis=-1)
        return Losses(mse, self.variational_term(held, x0, xt, t))

    def mse_weight(self, t: jax.Array) -> jax.Array:
        """The weight of the squared error at times t: (7), or 1."""
        if self.min_snr_gamma is None:
            return jnp.float32(1)
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        return at(np.minimum(snr, self.min_snr_gamma) / snr, t, ndim=1)  # [B]

    def variational_term(
        self, model_output: jax.Array, x0: jax.Array, xt: jax.Array, t: jax.Array
    ) -> jax.Array:
        """(5) of each sample, the mean over its pixels, in bits: `[B]`."""
        true_mean, true_log_variance = self.q_posterior(x0, xt, t)
        mean, log_variance, _ = self.p_mean_variance(model_output, xt, t)
        log_ratio = true_log_variance - log_variance
        distance = jnp.square(true_mean - mean) * jnp.exp(-log_variance)
        kl = 0.5 * (jnp.exp(log_ratio) - log_ratio - 1 + distance)
        nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
        nats = jnp.where(t == 0, nll.mean(axis=PIXELS), kl.mean(axis=PIXELS))
        return nats / np.log(2)


def discretized_gaussian_log_likelihood(
    x: jax.Array, mean: jax.Array, log_scale: jax.Array
) -> jax.Array:
    """log P(x), in nats, of 8-bit pixels x in [-1, 1] under a Gaussian.

    Bins reach 1/255 to either side of a pixel's value; the outermost two are open.
    """
    precision = jnp.exp(-log_scale)
    above = norm.cdf((x + 1 / 255 - mean) * precision)
    below = norm.cdf((x - 1 / 255 - mean) * precision)
    above = jnp.where(x > 0.999, 1.0, above)
    below = jnp.where(x < -0.999, 0.0, below)
    return jnp.log(jnp.maximum(above - below, 1e-12))
