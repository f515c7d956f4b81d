"""The files of a run's metrics: `metrics.jsonl`, TensorBoard, Weights & Biases, `loss.png`."""

import contextlib
import dataclasses
import json
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dit.cli import CONFIGS
from dit.config import Config, InputError, from_fields
from dit.images import save_grid
from dit.progress import say
from dit.resume import differences

Metrics = dict[str, float]

# In TensorBoard these are speed/NAME, the others train/NAME or eval/NAME
SPEED = ("images_per_second", "tflops_per_second", "mfu", "data_seconds", "peak_memory_gib")
COMPARED = ("train/loss", "train/grad_norm", "speed/images_per_second")  # between runs


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


def are_alike(ours: Config, theirs: Config) -> bool:
    """Whether the losses in two runs' logs come of one recipe, but for the seed."""
    same_lines = ours.train.log_every == theirs.train.log_every
    return same_lines and differences(ours, theirs).keys() <= {"train.seed"}


def known_band(config: Config) -> np.ndarray | None:
    """Rows of (step, low, high): between what the loss of other seeds of this recipe has been.

    None where benchmarks/health.py has not measured it.
    """
    path = CONFIGS / "bands.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for entry in known.values():
        with contextlib.suppress(InputError):  # a field that is no more
            if are_alike(config, from_fields(Config, entry["config"])):
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
