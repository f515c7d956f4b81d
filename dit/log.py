"""What a run says: a progress bar, `metrics.jsonl`, TensorBoard, Weights & Biases on request, `loss.png`. Process 0 only."""

import dataclasses
import json
import sys
import time
import zlib
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from dit.config import Config
from dit.images import save_grid

# Dense bfloat16 peak of a chip in FLOP/s, by the vendors' data sheets; the key is part of jax's device_kind
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12,
              "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12}


def peak_flops(device_kind: str) -> float | None:
    """The chip's peak in FLOP/s, where it is known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


class Progress:
    """A bar on a terminal; elsewhere a plain line, at most every five seconds. Process 0 only."""

    def __init__(self, total: int, unit: str, done: int = 0):
        self.bar = tqdm(total=total, initial=done, unit=f" {unit}", dynamic_ncols=True, disable=not sys.stderr.isatty())
        self.total, self.unit, self.done, self.before, self.began = total, unit, done, done, time.monotonic()
        self.told = self.began

    def advance(self, count: int) -> None:
        self.bar.update(count)
        self.done += count
        if self.bar.disable and jax.process_index() == 0 and time.monotonic() - self.told > 5:
            self.told = time.monotonic()
            print(f"{self.done:,}/{self.total:,} {self.unit}, {self.rate:,.1f} {self.unit}/s", file=sys.stderr, flush=True)

    @property
    def rate(self) -> float:
        """Units a second since the beginning."""
        return (self.done - self.before) / (time.monotonic() - self.began)

    def over(self, items):
        """The items, each counted as it goes by."""
        for item in items:
            self.advance(1)
            yield item


class Meter:
    """Images/s, TFLOP/s and MFU since the last reading, without the time that `skip` takes out."""

    def __init__(self, flops_per_image: float):
        self.flops_per_image = flops_per_image
        self.peak = peak_flops(jax.devices()[0].device_kind)
        self.reset()

    def reset(self) -> None:
        self.started, self.images = time.perf_counter(), 0

    def skip(self, seconds: float) -> None:
        """Takes time that was not training out of the reading."""
        self.started += seconds

    def read(self) -> dict[str, float]:
        rate = self.images / (time.perf_counter() - self.started)
        flops = rate * self.flops_per_image
        self.reset()
        reading = {"images_per_second": rate, "tflops_per_second": flops / 1e12}
        return reading | ({"mfu": flops / (self.peak * jax.device_count())} if self.peak else {})


class Log:
    """Writes metrics where they are wanted; silent on every process but the first."""

    def __init__(self, config: Config, start: int):
        self.speaks = jax.process_index() == 0
        self.workdir, self.total, self.told, self.rates = config.workdir, config.train.steps, 0.0, ""
        self.wandb = None
        if not self.speaks:
            return
        drop_lines_after(self.workdir / "metrics.jsonl", start)
        self.jsonl = (self.workdir / "metrics.jsonl").open("a", buffering=1)
        self.board = SummaryWriter(str(self.workdir), purge_step=start + 1)
        self.bar = tqdm(total=self.total, initial=start, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty())
        if config.train.wandb:
            import wandb

            self.wandb_image = wandb.Image
            identity = f"{config.name}-{zlib.crc32(str(self.workdir.resolve()).encode()):08x}"  # the same when the run is resumed
            self.wandb = wandb.init(project="dit", name=config.name, id=identity, resume="allow", dir=str(self.workdir),
                                    config=dataclasses.asdict(config))

    def step(self, step: int, loss: float) -> None:
        """Moves the bar."""
        if self.speaks:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(f"loss {loss:.4f}  {self.rates}", refresh=False)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Records a line of metrics, and prints it where there is no terminal for a bar, at most every five seconds."""
        if not self.speaks:
            return
        self.jsonl.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)
        self.rates = (f"{values['images_per_second']:,.0f} images/s  {values['tflops_per_second']:.3g} TFLOP/s"
                      + (f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""))
        if self.bar.disable and (step == self.total or time.monotonic() - self.told > 5):
            self.told = time.monotonic()
            print(f"step {step}/{self.total}  loss {values['loss']:.4f}  {self.rates}", flush=True)

    def grid(self, step: int, images: np.ndarray, row_names: list[str]) -> None:
        """Writes a sample grid to `samples/` and to the boards."""
        if not self.speaks:
            return
        path = self.workdir / "samples" / f"{step:07d}.png"
        save_grid(path, images, row_names)
        self.board.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")
        if self.wandb:
            self.wandb.log({"samples": self.wandb_image(str(path))}, step=step)

    def say(self, text: str) -> None:
        if self.speaks:
            tqdm.write(text)  # above the bar, where there is one
            sys.stdout.flush()

    def close(self) -> None:
        if self.speaks:
            self.bar.close()
            self.board.close()
            self.jsonl.close()
            plot_loss(self.workdir)
            if self.wandb:
                self.wandb.finish()


def drop_lines_after(path: Path, step: int) -> None:
    """Forgets the metrics of steps that a killed run had taken past its last checkpoint."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in lines))


def plot_loss(workdir: Path) -> None:
    """`loss.png` from `metrics.jsonl`: the loss and its two parts against the step."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in {"loss": "loss", "mse": "squared error of the noise", "vb": "variational term (bits)"}.items():
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=label, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(workdir / "loss.png", dpi=120)
