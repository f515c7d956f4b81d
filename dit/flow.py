"""Flow matching along straight lines: path, velocity, loss.

Lipman et al. (arXiv 2210.02747), Liu et al. (arXiv 2209.03003), Ma et al. (SiT, arXiv 2401.08740),
Esser et al. (logit-normal times, arXiv 2403.03206), Li & He (JiT, arXiv 2511.13720). Time runs as
in SiT, from 0, the image, to 1, pure noise; JiT's runs the other way:

(1) x_t = (1 - t) x_0 + t noise
(2) v = dx_t / dt = noise - x_0 = (x_t - x_0) / t
(3) x_0 = x_t - t v, the network predicting v, or its own prediction
(4) loss = |v - its prediction|^2; t uniform, or sigmoid(mean + deviation normal)
(5) where the network predicts x_0, both velocities of (4) are (x_t - x_0) / max(t, 0.05) (JiT)

Images x are `[B, H, W, C]`, times t are `[B]`. The network is given 1000 t, as large as the
timesteps of DDPM, which its sinusoids tell apart.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dit.ddpm import PIXELS, losses_by_quarter, times_and_noise

SMALLEST_TIME = 0.05  # by which (5) divides


def per_image(t: jax.Array) -> jax.Array:
    """t `[B]` as `[B, 1, 1, 1]`."""
    return t.reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Flow:
    """Flow matching with a network that predicts `v` or `x0`.

    `times` to train on are `uniform` in [0, 1), or `logit_normal`: of a normal logit of mean
    `time_mean` and deviation `time_std`.
    """

    prediction: str
    times: str
    time_mean: float
    time_std: float

    time_scale = 1000  # of t, to what the network is given

    def steps(self, num_steps: int) -> np.ndarray:
        """The equal steps from noise to image, each from a t to an s below it: `[num_steps, 2]`."""
        times = self.noise_levels(num_steps)
        return np.stack([times[:-1], times[1:]], axis=1).astype(np.float32)

    def noise_levels(self, num_steps: int) -> np.ndarray:
        """The weight of the noise in (1) before the first of so many steps and after each."""
        return np.linspace(1, 0, num_steps + 1)

    def draw_time(self, key: jax.Array) -> jax.Array:
        """A time to train on, a scalar."""
        if self.times == "uniform":
            return jax.random.uniform(key)
        return jax.nn.sigmoid(self.time_mean + self.time_std * jax.random.normal(key))

    def q_sample(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """(1)"""
        return (1 - per_image(t)) * x0 + per_image(t) * noise

    def pred_x0(self, model_output: jax.Array, xt: jax.Array, t: jax.Array) -> jax.Array:
        """(3)"""
        return model_output if self.prediction == "x0" else xt - per_image(t) * model_output

    def velocity(
        self,
        model_output: jax.Array,
        xt: jax.Array,
        t: jax.Array,
        correct: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """(2) from the network's output `[B, H, W, C]`, at times above 0.

        `correct` changes the prediction of x_0, such as by clipping it, before it is used.
        """
        x0 = self.pred_x0(model_output, xt, t)
        if correct is not None:
            x0 = correct(x0)
        return (xt - x0) / per_image(t)

    def loss(
        self, model: Callable, key: jax.Array, x: jax.Array, condition: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(4), averaged over x `[B, H, W, C]`, and by quarter of t.

        `key` is one key for the batch, or one a sample `[B]`.
        """
        t, noise = times_and_noise(key, x, self.draw_time)
        xt = self.q_sample(x, t, noise)
        model_output = model(xt, self.time_scale * t, **condition)
        losses = self.losses(model_output, x, t, noise)
        return losses.mean(), losses_by_quarter(losses, t)

    def losses(
        self, model_output: jax.Array, x0: jax.Array, t: jax.Array, noise: jax.Array
    ) -> jax.Array:
        """(4), or (5), of each sample, the mean over its pixels: `[B]`."""
        if self.prediction == "x0":
            error = (x0 - model_output) / per_image(jnp.maximum(t, SMALLEST_TIME))
        else:
            error = noise - x0 - model_output
        return jnp.square(error).mean(axis=PIXELS)
