"""What a run reports: progress, `metrics.jsonl`, TensorBoard, Weights & Biases, `loss.png`.

Only process 0 writes. Metrics are fetched one step late, so that the device always has a step to
work on, and are checked then: a loss that is not finite stops the run.
"""

import contextlib
import dataclasses
import json
import math
import shlex
import statistics
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from tqdm import tqdm

from dit.chips import GIB, find_chip
from dit.cli import CONFIGS
from dit.config import Config, InputError, diverged, from_fields
from dit.ddpm import SHARE
from dit.images import save_grid

Metrics = dict[str, float]

# In TensorBoard these are speed/NAME, the others train/NAME or eval/NAME
SPEED = ("images_per_second", "tflops_per_second", "mfu", "data_seconds", "peak_memory_gib")
COMPARED = ("train/loss", "train/grad_norm", "speed/images_per_second")  # between runs


def say(text: str) -> None:
    """Prints a line on process 0, above a progress bar if there is one."""
    if jax.process_index() == 0:
        tqdm.write(text)
        sys.stdout.flush()


class Progress:
    """A bar on a terminal, and elsewhere a line at most every five seconds. Process 0 only."""

    def __init__(self, total: int, unit: str, done: int = 0, file: IO[str] | None = None):
        self.total = total
        self.unit = unit
        self.first = done
        self.done = done
        self.file = file or sys.stderr
        self.started = time.monotonic()
        self.printed = -math.inf
        is_hidden = not sys.stderr.isatty() or jax.process_index() != 0
        self.bar = tqdm(
            total=total, initial=done, unit=f" {unit}", dynamic_ncols=True, disable=is_hidden
        )

    @property
    def rate(self) -> float:
        """Units a second, since the start."""
        return (self.done - self.first) / (time.monotonic() - self.started)

    @property
    def time_left(self) -> str:
        """Of the units that remain, as long as those before them took: [hours:]minutes:seconds."""
        seconds_each = (time.monotonic() - self.started) / (self.done - self.first)
        return tqdm.format_interval((self.total - self.done) * seconds_each)

    def advance(self, count: int, note: str | None = None) -> None:
        """Counts `count` more units; `note` stands behind the count in place of the rate."""
        self.done += count
        self.bar.update(count)
        if note is not None:
            self.bar.set_postfix_str(note, refresh=False)
        is_due = time.monotonic() - self.printed > 5 or self.done >= self.total
        if self.bar.disable and is_due and jax.process_index() == 0:
            words = f"{self.rate:,.1f} {self.unit}s/s" if note is None else note
            is_first = self.printed == -math.inf  # of which little can be said
            if self.done < self.total and not is_first:
                words += f"  {self.time_left} left"
            self.printed = time.monotonic()
            print(f"{self.unit} {self.done}/{self.total}  {words}", file=self.file, flush=True)

    def over(self, items: Iterable) -> Iterator:
        """The items, each counted as it goes by."""
        for item in items:
            self.advance(1)
            yield item

    def close(self) -> None:
        self.bar.close()


def with_progress(batches: Iterable[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """Batches of images, each counted when the next is asked for."""
    progress = Progress(total, "image")
    for images in batches:
        yield images
        progress.advance(len(images))
    progress.close()


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

    def __enter__(self) -> "Log":
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


class Writers:
    """The files of process 0: JSON lines, TensorBoard and, on request, Weights & Biases.

    What a disk does not take is left out, and warned of once.
    """

    def __init__(self, config: Config, start: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self.config = config
        self.workdir = config.workdir
        drop_metrics_after(self.workdir / "metrics.jsonl", start)
        self.jsonl = (self.workdir / "metrics.jsonl").open("a", buffering=1)
        # not SummaryWriter, whose thread ends where a write fails: then it waits for ever
        self.board = EventsWriter(str(self.workdir / "events"))
        self.event(start + 1, session_log=SessionLog(status=SessionLog.START))  # hides later ones
        self.describe(start + 1)
        self.wandb = start_wandb(config) if config.train.wandb else None
        self.failed = False

    def event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.board.write_event(Event(step=step, wall_time=time.time(), **content))
        self.board.flush()

    def describe(self, step: int) -> None:
        """The config as text, and as hyperparameters, which TensorBoard compares runs by."""
        from tensorboardX import summary

        sections = json.loads(self.config.to_json())
        name = sections.pop("name")
        fields = {
            f"{section}.{field}": value if isinstance(value, (bool, int, float)) else str(value)
            for section, values in sections.items()
            for field, value in values.items()
        }
        compared = [*COMPARED]
        compared += ["eval/fid"] if self.config.eval.every else []
        compared += ["eval/held_out_loss"] if self.config.eval.split else []
        experiment, session, _ = summary.hparams({"name": name} | fields, dict.fromkeys(compared))
        self.event(step, summary=summary.text("config", f"```\n{self.config.to_json()}\n```"))
        self.event(step, summary=experiment)
        self.event(step, summary=session)

    @contextlib.contextmanager
    def failures_noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.failed:
                say(f"warning: {self.workdir}: metrics or pictures are not written ({error})")
            self.failed = True

    def metrics(self, step: int, values: Metrics, group: str) -> None:
        from tensorboardX import summary

        with self.failures_noted():
            self.jsonl.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                tag = f"{'speed' if name in SPEED else group}/{name}"
                self.event(step, summary=summary.scalar(tag, value))
        if self.wandb:
            self.wandb.log(values, step=step)

    def grid(self, step: int, images: np.ndarray, row_names: list[str]) -> None:
        from PIL import Image
        from tensorboardX import summary

        path = self.workdir / "samples" / f"{step:07d}.png"
        with self.failures_noted():
            save_grid(path, images, row_names)
            sheet = Image.open(path)
            image = summary.image("samples", np.asarray(sheet), dataformats="HWC")
            self.event(step, summary=image)
            if self.wandb:
                import wandb

                self.wandb.log({"samples": wandb.Image(sheet)}, step=step)

    def close(self) -> None:
        with self.failures_noted():
            self.board.close()
            self.jsonl.close()
            plot_loss(self.workdir, known_band(self.config))
        if self.wandb:
            self.wandb.finish()


def start_wandb(config: Config) -> Any:
    """A Weights & Biases run whose id is the same when the workdir is resumed."""
    import wandb

    checksum = zlib.crc32(str(config.workdir.resolve()).encode())
    return wandb.init(
        project="dit",
        name=config.name,
        id=f"{config.name}-{checksum:08x}",
        resume="allow",
        dir=str(config.workdir),
        config=dataclasses.asdict(config),
    )


def drop_metrics_after(path: Path, step: int) -> None:
    """Drops metrics logged after `step`, which a resumed run logs again, and damaged lines."""
    if not path.exists():
        return
    kept = [line + "\n" for line, row in read_metrics(path) if row["step"] <= step]
    path.write_text("".join(kept))


def read_metrics(path: Path) -> Iterator[tuple[str, Metrics]]:
    """The lines of a metrics.jsonl and their rows, without those that are not as written."""
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line, parse_int=float)
        except (ValueError, RecursionError):
            continue
        is_row = isinstance(row, dict) and "step" in row
        if is_row and all(isinstance(value, float) for value in row.values()):
            yield line, row


# loss.png

AVERAGE = "held_out_loss_ema_"  # and its decay: of an average but the first
PANELS = [
    {
        "loss": "loss",
        "mse": "squared error of the noise",
        "vb": "variational term (bits)",
        "held_out_loss": "of held-out images",
        "held_out_loss_ema": "of held-out images, averaged weights",
    },
    {
        "loss_quarter_1": "t in its first quarter, next to the image",
        "loss_quarter_2": "second quarter",
        "loss_quarter_3": "third quarter",
        "loss_quarter_4": "last quarter, next to noise",
    },
]


def recipe(config: Config) -> tuple:
    """What the loss in a run's log depends on, but for the seed."""
    train, optim = config.train, config.optim
    last_step = train.steps if optim.schedule == "cosine" else None
    logged = (train.batch_size, train.dtype, train.log_every, last_step)
    return config.model, config.objective, config.data, optim, logged


def known_band(config: Config) -> np.ndarray | None:
    """Rows of (step, low, high): between what the loss of other seeds of this recipe has been.

    None where benchmarks/health.py has not measured it.
    """
    path = CONFIGS / "bands.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for entry in known.values():
        with contextlib.suppress(InputError):  # a field that is no more
            if recipe(from_fields(Config, entry["config"])) == recipe(config):
                return np.array(entry["band"])
    return None


def plot_loss(workdir: Path, band: np.ndarray | None = None) -> None:
    """`loss.png` from `metrics.jsonl`: the losses against the step, all and by quarter of t."""
    from matplotlib.figure import Figure

    rows = [row for _, row in read_metrics(workdir / "metrics.jsonl")]
    names = {name for row in rows for name in row}
    averages = sorted(name for name in names if name.startswith(AVERAGE))
    others = {name: f"the same, of decay {name.removeprefix(AVERAGE)}" for name in averages}
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for axes, labels in zip(panels, (PANELS[0] | others, PANELS[1]), strict=True):
        for name, label in labels.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:  # not every run has all of them
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.grid(alpha=0.3)
    if band is not None and rows:
        steps, low, high = band[band[:, 0] <= rows[-1]["step"]].T
        panels[0].fill_between(steps, low, high, alpha=0.2, label="loss of other seeds")
    for axes in panels:
        if axes.lines:  # above, where it hides no curve
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize="small")
    figure.savefig(workdir / "loss.png", dpi=120)
