"""Denoising diffusion: the forward process, its posterior, the network's reading, the hybrid loss, respacing.

Ho et al. (arXiv 2006.11239), Nichol & Dhariwal (arXiv 2102.09672), Hang et al. (min-SNR, arXiv 2303.09556). With abar_t the
product of 1 - beta_s up to t, and abar_{-1} = 1:

    (1)  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise
    (2)  q(x_{t-1} | x_t, x_0) = N(posterior mean, posterior variance), where
         mean = beta_t sqrt(abar_{t-1}) / (1 - abar_t) x_0 + (1 - abar_{t-1}) sqrt(1 - beta_t) / (1 - abar_t) x_t
         variance = beta_t (1 - abar_{t-1}) / (1 - abar_t)
    (3)  x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), the network predicting eps
    (4)  log variance = f log beta_t + (1 - f) log(posterior variance), f = (v + 1) / 2, the network predicting v
    (5)  vb_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0 the negative log likelihood of 8-bit x_0; in bits
    (6)  loss = |noise - eps|^2 + vb_t, eps held constant inside vb_t; t uniform
    (7)  min-SNR: |noise - eps|^2 times min(SNR_t, gamma) / SNR_t, SNR_t = abar_t / (1 - abar_t)

Images x are `[B, H, W, C]` in [-1, 1]; times t are int `[B]`, from 0 to len(timesteps) - 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm


class Gaussian(NamedTuple):
    """p(x_{t-1} | x_t): mean and log variance, and the x_0 they were computed from; `[B, H, W, C]` each."""

    mean: jax.Array
    log_variance: jax.Array
    pred_x0: jax.Array


class Losses(NamedTuple):
    """Means over the pixels, `[B]` each: the squared error of the noise, and the variational term (5) in bits."""

    mse: jax.Array
    vb: jax.Array


class Bits(NamedTuple):
    """Bits per dimension, `[B]`: the whole bound, the prior's part, and the terms (5), `[T, B]`, from t = 0 up."""

    total: jax.Array
    prior: jax.Array
    vb: jax.Array


def beta_schedule(name: str, num_steps: int) -> np.ndarray:
    """Float64 `[T]`: linear from 1e-4 to 0.02 (at T = 1000, scaled as 1 / T), or cosine."""
    if name == "linear":
        return np.linspace(1e-4, 0.02, num_steps, dtype=np.float64) * 1000 / num_steps
    abar = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - abar[1:] / abar[:-1], 0.999)


def at(table: np.ndarray, t: jax.Array, ndim: int = 4) -> jax.Array:
    """The float64 table's entries at times t `[B]`, as float32 `[B, 1, 1, 1]`."""
    return jnp.asarray(table, jnp.float32)[t].reshape(-1, *(1,) * (ndim - 1))


def split_output(model_output: jax.Array, channels: int) -> tuple[jax.Array, jax.Array | None]:
    """The network's eps and, where it has learned the variance, its v; `[B, H, W, C]` each."""
    return model_output[..., :channels], model_output[..., channels:] if model_output.shape[-1] > channels else None


class DDPM:
    """A diffusion of `num_steps` timesteps, seen at `timesteps` (all, unless respaced). The tables are float64 `[len(timesteps)]`.

    variance: `learned_range` (4), `fixed_small` (the posterior's) or `fixed_large` (beta_t).
    """

    def __init__(self, num_steps: int = 1000, schedule: str = "linear", variance: str = "learned_range",
                 min_snr_gamma: float | None = None, timesteps: np.ndarray | None = None):
        self.num_steps, self.schedule, self.variance, self.min_snr_gamma = num_steps, schedule, variance, min_snr_gamma
        betas = beta_schedule(schedule, num_steps)
        alphas_cumprod = np.cumprod(1 - betas)
        if timesteps is not None:  # respaced: the betas that give the kept steps their old abar
            alphas_cumprod = alphas_cumprod[timesteps]
            betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        self.timesteps = np.arange(num_steps) if timesteps is None else np.asarray(timesteps)
        self.betas, self.alphas_cumprod = betas, alphas_cumprod
        self.alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - alphas_cumprod)  # (2)
        first = self.posterior_variance[1] if len(betas) > 1 else betas[0]  # it is 0 at t = 0, where no logarithm is
        self.posterior_log_variance = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_x0 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - alphas_cumprod)
        self.posterior_mean_xt = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - alphas_cumprod)

    def respaced(self, num_steps: int) -> "DDPM":
        """The same diffusion seen at `num_steps` of its timesteps, evenly spaced, the first and the last among them."""
        kept = np.round(np.linspace(self.num_steps - 1, 0, num_steps)).astype(int)[::-1]
        return DDPM(self.num_steps, self.schedule, self.variance, self.min_snr_gamma, timesteps=kept)

    # The forward process

    def q_sample(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """(1)"""
        return at(np.sqrt(self.alphas_cumprod), t) * x0 + at(np.sqrt(1 - self.alphas_cumprod), t) * noise

    def q_posterior(self, x0: jax.Array, xt: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(2): mean, and log variance (that of t = 1 at t = 0)."""
        return at(self.posterior_mean_x0, t) * x0 + at(self.posterior_mean_xt, t) * xt, at(self.posterior_log_variance, t)

    # What the network's output says

    def pred_x0(self, eps: jax.Array, xt: jax.Array, t: jax.Array) -> jax.Array:
        """(3)"""
        return at(1 / np.sqrt(self.alphas_cumprod), t) * xt - at(np.sqrt(1 / self.alphas_cumprod - 1), t) * eps

    def pred_eps(self, x0: jax.Array, xt: jax.Array, t: jax.Array) -> jax.Array:
        """(3), solved for eps."""
        return (at(1 / np.sqrt(self.alphas_cumprod), t) * xt - x0) / at(np.sqrt(1 / self.alphas_cumprod - 1), t)

    def p_mean_variance(self, model_output: jax.Array, xt: jax.Array, t: jax.Array, correct=None) -> Gaussian:
        """p(x_{t-1} | x_t) from the network's output `[B, H, W, C or 2C]`; the predicted x_0 is first passed through `correct`."""
        eps, v = split_output(model_output, xt.shape[-1])
        pred_x0 = self.pred_x0(eps, xt, t)
        pred_x0 = correct(pred_x0) if correct else pred_x0
        mean, small = self.q_posterior(pred_x0, xt, t)
        if self.variance == "learned_range":
            fraction = (v + 1) / 2
            log_variance = fraction * at(np.log(self.betas), t) + (1 - fraction) * small  # (4)
        elif self.variance == "fixed_small":
            log_variance = jnp.broadcast_to(small, mean.shape)
        else:  # beta_t, but the posterior's own at t = 0, where it is the likelihood's width
            log_variance = jnp.broadcast_to(jnp.where(t.reshape(-1, 1, 1, 1) == 0, small, at(np.log(self.betas), t)), mean.shape)
        return Gaussian(mean, log_variance, pred_x0)

    # The loss

    def variational_term(self, model_output: jax.Array, x0: jax.Array, xt: jax.Array, t: jax.Array) -> jax.Array:
        """(5), per sample: the mean over the pixels, in bits, `[B]`."""
        true_mean, true_log_variance = self.q_posterior(x0, xt, t)
        mean, log_variance, _ = self.p_mean_variance(model_output, xt, t)
        kl = 0.5 * (log_variance - true_log_variance - 1 + jnp.exp(true_log_variance - log_variance)
                    + jnp.square(true_mean - mean) * jnp.exp(-log_variance))
        nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * log_variance)
        return jnp.where(t == 0, nll.mean(axis=(1, 2, 3)), kl.mean(axis=(1, 2, 3))) / np.log(2)

    def losses(self, model_output: jax.Array, x0: jax.Array, xt: jax.Array, t: jax.Array, noise: jax.Array) -> Losses:
        """The two parts of (6). With a fixed variance the network is trained on mse alone, and vb is 0."""
        eps, v = split_output(model_output, x0.shape[-1])
        mse = jnp.square(noise - eps).mean(axis=(1, 2, 3))
        if self.variance != "learned_range":
            return Losses(mse, jnp.zeros_like(mse))
        held = jnp.concatenate([jax.lax.stop_gradient(eps), v], axis=-1)
        return Losses(mse, self.variational_term(held, x0, xt, t))

    def loss(self, model, key: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(6) and (7), averaged over x `[B, H, W, C]` with labels y `[B]`, and its parts; `key` is one key, or one a sample `[B]`."""
        t_keys, noise_keys = jnp.unstack(jax.vmap(jax.random.split)(jax.random.split(key, len(x)) if key.ndim == 0 else key), axis=1)
        t = jax.vmap(lambda k: jax.random.randint(k, (), 0, len(self.timesteps)))(t_keys)
        noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(noise_keys)
        xt = self.q_sample(x, t, noise)
        mse, vb = self.losses(model(xt, jnp.asarray(self.timesteps)[t], y), x, xt, t, noise)
        weight = 1.0
        if self.min_snr_gamma is not None:
            snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
            weight = at(np.minimum(snr, self.min_snr_gamma) / snr, t, ndim=1)  # (7)
        return jnp.mean(weight * mse + vb), {"mse": mse.mean(), "vb": vb.mean()}

    def bits_per_dim(self, denoise, key: jax.Array, x0: jax.Array) -> Bits:
        """The variational bound on the 8-bit images x0 `[B, H, W, C]`; `denoise(x, t)` is the network. One pass a timestep."""
        def term(_, t):
            noise = jax.random.normal(jax.random.fold_in(key, t), x0.shape)
            ts = jnp.full(len(x0), t)
            xt = self.q_sample(x0, ts, noise)
            return None, self.variational_term(denoise(xt, jnp.asarray(self.timesteps)[ts]), x0, xt, ts)

        _, vb = jax.lax.scan(term, None, jnp.arange(len(self.timesteps)))  # [T, B]
        last = self.alphas_cumprod[-1]  # KL(q(x_T | x_0) || N(0, 1))
        prior = 0.5 * (last * jnp.square(x0) - last - np.log(1 - last)).mean(axis=(1, 2, 3)) / np.log(2)
        return Bits(vb.sum(axis=0) + prior, prior, vb)


def discretized_gaussian_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """log P(x) of 8-bit pixels x in [-1, 1] under a Gaussian, binned 1/255 to either side, the outermost bins open. In nats."""
    upper, lower = ((x + side / 255 - mean) * jnp.exp(-log_scale) for side in (1, -1))
    inside = jnp.where(x > 0.999, 1.0, norm.cdf(upper)) - jnp.where(x < -0.999, 0.0, norm.cdf(lower))
    return jnp.log(jnp.maximum(inside, 1e-12))
