"""The metrics of a run: fetched, checked, averaged, and handed to dit/writers.py.

Only process 0 writes. Metrics are fetched one step late, so that the device always has a step to
work on, and are checked then: a loss that is not finite stops the run.
"""

import contextlib
import math
import shlex
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Self

import jax
import numpy as np

from dit.chips import GIB, find_chip
from dit.config import Config, diverged
from dit.ddpm import SHARE
from dit.progress import Progress, say
from dit.writers import Metrics, Writers


def peak_memory() -> Metrics:
    """{"peak_memory_gib": ...} of this process's first device; {} where it does not tell: a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {} if peak is None else {"peak_memory_gib": peak / GIB}


class Clock:
    """Images/s, TFLOP/s and MFU of the time between `start` and `stop`, since the last reading."""

    def __init__(self, flops_per_image: float):
        self.flops_per_image = flops_per_image
        self.chip = find_chip(jax.devices()[0].device_kind)
        self.seconds = 0.0
        self.images = 0
        self.start()

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self.started

    def read(self) -> Metrics:
        """To be called while it is stopped."""
        images_per_second = self.images / self.seconds
        flops_per_second = images_per_second * self.flops_per_image
        self.seconds = 0.0
        self.images = 0
        reading = {
            "images_per_second": images_per_second,
            "tflops_per_second": flops_per_second / 1e12,
        }
        if self.chip:
            reading["mfu"] = flops_per_second / (self.chip.peak * jax.device_count())
        return reading | peak_memory()


def means(sums: Metrics) -> Metrics:
    """Means of what a log has added up over "steps".

    What only a share of the samples has is divided by the sum of these shares, and left out where
    that is 0.
    """
    found = {}
    for name, total in sums.items():
        divisor = sums.get(name + SHARE, sums["steps"])
        if name != "steps" and not name.endswith(SHARE) and divisor > 0:
            found[name] = total / divisor
    return found


class Log:
    """The metrics of a run, from step `start` on: fetched, checked, averaged and written.

    `unwritten` is what the run had added up since its last line when it was saved.
    """

    def __init__(self, config: Config, start: int, flops_per_image: float, unwritten: Metrics):
        self.config = config
        self.clock = Clock(flops_per_image)
        self.progress = Progress(config.train.steps, "step", start, sys.stdout)
        self.rates = ""
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []
        self.unwritten = dict(unwritten)  # sums since the last line; "steps" is their number
        self.shown = deque(maxlen=config.train.log_every)  # metrics whose means progress shows
        self.writers = Writers(config, start) if jax.process_index() == 0 else None
        self.profile = Profile(config, start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.profile.close()
        self.progress.close()
        if self.writers:
            self.writers.close()

    def record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Keeps a step's metrics, which may still be computed, and fetches those before it."""
        self.fetch()
        self.pending.append((step, metrics))
        self.clock.images += self.config.train.batch_size
        if self.profile.is_due(step):
            self.fetch()
            self.profile.turn()

    def fetch(self) -> None:
        """Waits for the pending metrics. Raises Diverged if they are not finite."""
        for step, metrics in self.pending:
            values = {name: float(value) for name, value in metrics.items()}
            loss, grad_norm = values["loss"], values["grad_norm"]
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                what = f"loss: {loss} with gradient norm {grad_norm} at step {step}"
                raise diverged(what, self.config.workdir / "checkpoints")
            for name, value in {"steps": 1, **values}.items():
                self.unwritten[name] = self.unwritten.get(name, 0) + value
            self.shown.append(values)
            words = [
                f"{name} {statistics.fmean(row[name] for row in self.shown):.4f}"
                for name in ("loss", "mse")  # whose variational part jumps
                if name in values
            ]
            self.progress.advance(1, "  ".join(filter(None, [*words, self.rates])))
        self.pending.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for the pending metrics, and leaves the time of what follows out of the rates."""
        self.fetch()
        self.clock.stop()
        yield
        self.clock.start()

    def write(self, step: int) -> None:
        """Writes the means of the metrics since the last call, and the rates."""
        values = means(self.unwritten)
        self.unwritten.clear()
        reading = self.clock.read()
        images, tflops = reading["images_per_second"], reading["tflops_per_second"]
        self.rates = f"{images:,.0f} images/s  {tflops:.3g} TFLOP/s"
        if "mfu" in reading:
            self.rates += f"  MFU {reading['mfu']:.1%}"
        if "peak_memory_gib" in reading:
            self.rates += f"  {reading['peak_memory_gib']:.1f} GiB"
        if self.writers:
            self.writers.metrics(step, values | reading, "train")

    def scores(self, step: int, scores: Metrics) -> None:
        """Writes the scores of an evaluation."""
        if self.writers:
            self.writers.metrics(step, scores, "eval")

    def grid(self, step: int, images: np.ndarray, row_names: list[str]) -> None:
        """Writes a sample grid of uint8 `[rows * columns, H, W, C]` to `samples/`."""
        if self.writers:
            self.writers.grid(step, images, row_names)


class Profile:
    """A trace by JAX's profiler of `train.profile_steps` steps, after the first, which warms up.

    Of process 0 and its devices. A run that ends sooner ends it.
    """

    def __init__(self, config: Config, start: int):
        self.folder = config.workdir / "profile"
        steps = config.train.profile_steps if jax.process_index() == 0 else 0
        self.turns = [start + 1, start + 1 + steps] if steps else []
        self.is_on = False

    def is_due(self, step: int) -> bool:
        """Whether it begins or ends when this step is done."""
        return step in self.turns

    def turn(self) -> None:
        """Begins, or ends and says how the trace is seen."""
        if self.is_on:
            self.close()
        else:
            jax.profiler.start_trace(self.folder)
            self.is_on = True

    def close(self) -> None:
        if self.is_on:
            self.is_on = False
            jax.profiler.stop_trace()
            folder = shlex.quote(str(self.folder))
            say(f"the profile opens by: xprof --logdir {folder} (after pip install xprof)")
