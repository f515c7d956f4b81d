"""The paper's ablation of the conditioning, in small: python benchmarks/conditioning.py [--steps 1000] [--seeds 3] [--preset digits]

Trains in-context, cross-attention, adaLN, adaLN-Zero, and adaLN-Zero with its zero taken away (its modulation initialised as any linear
layer), all else equal, and prints the loss and the Frechet distance in pixel space at the end, mean and standard deviation over the seeds.
Writes both against the step as runs/conditioning/PRESET.png. (Peebles & Xie, Figure 5, from worst to best: in-context, cross-attention,
adaLN, adaLN-Zero.)
"""

import dataclasses
import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from digits import frechet_distance  # noqa: E402
from dit import config as dit_config  # noqa: E402
from dit import model as dit_model  # noqa: E402
from dit.checkpoint import steps as checkpoint_steps  # noqa: E402
from dit.checkpoint import Checkpoints  # noqa: E402
from dit.data import open_dataset  # noqa: E402
from dit.normalization import AdaLNZero  # noqa: E402
from dit.sharding import make_mesh  # noqa: E402
from dit.state import abstract_state  # noqa: E402
from sample import Sample, completed, make_sampler  # noqa: E402

DESIGNS = {"in-context": "in_context", "cross-attention": "cross_attention", "adaLN": "adaln", "adaLN-Zero": "adaln_zero",
           "adaLN-Zero without its zero": "adaln_zero"}
POINTS = 4  # of the curve of the Frechet distance


@dataclass(frozen=True)
class Options:
    steps: int = 1000  # of each run
    seeds: int = 3  # runs of each design
    preset: str = "digits"  # of pixels, without masks
    samples: int = 1000  # behind each Frechet distance; more than the image has values, or their covariance is singular


def run(name: str, options: Options, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(step, loss) and (step, Frechet distance) of one run, which is kept in runs/conditioning and resumed."""
    preset = dit_config.load(options.preset)
    workdir = f"runs/conditioning/{options.preset}-{name.replace(' ', '-')}-{seed}"
    config = dataclasses.replace(
        preset, model=dataclasses.replace(preset.model, conditioning=DESIGNS[name]),
        train=dataclasses.replace(preset.train, steps=options.steps, seed=seed, sample_every=0, workdir=workdir, sampler="ddim",
                                  checkpoint_every=options.steps // POINTS, keep_last=POINTS, sample_steps=50)).validate()
    awake = functools.partial(AdaLNZero, kernel_init=nnx.initializers.xavier_uniform())
    dit_model.AdaLNZero = awake if name.endswith("without its zero") else AdaLNZero
    train.train(config)
    rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    sample, labels = make_sampler(config, completed(Sample("", out="x.npz"), config)), np.arange(options.samples) % config.data.num_classes
    dataset, distances = open_dataset(config.data), []
    real = dataset.records.images[:10_000].reshape(-1, np.prod(config.input_shape)) / 127.5 - 1
    checkpoints = Checkpoints(Path(workdir), POINTS, 0)
    for step in sorted(checkpoint_steps(Path(workdir))):
        ema = checkpoints.restore(step, abstract_state(config, make_mesh(config.mesh, config.train.batch_size))).ema
        images = np.asarray(sample(ema, None, jnp.asarray(labels), jnp.arange(options.samples)))
        distances.append((step, frechet_distance(images.reshape(options.samples, -1) / 127.5 - 1, real)))
    checkpoints.close()
    return np.array([(row["step"], row["loss"]) for row in rows]), np.array(distances)


def main() -> None:
    options = dit_config.parse(Options, sys.argv[1:], "benchmarks/conditioning.py", __doc__)
    data = dit_config.load(options.preset).data
    dit_config.require(not data.latents and not data.mask_classes, "--preset", options.preset, "one of pixels, without masks")
    for name, value, least in (("steps", options.steps, POINTS), ("seeds", options.seeds, 1), ("samples", options.samples, 2)):
        dit_config.require(value >= least, f"--{name}", value, f"at least {least}")
    found = {name: [run(name, options, seed) for seed in range(options.seeds)] for name in DESIGNS}
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    print(f"\n{'design':<30}{'loss':>10}{'+-':>8}{'Frechet':>10}{'+-':>8}   ({options.seeds} seeds, {options.steps} steps, "
          f"{jax.devices()[0].device_kind})")
    for name, runs in found.items():
        last = []
        for k, ax in enumerate(axes):
            curves = np.stack([pair[k] for pair in runs])  # [seeds, points, 2]
            mean, spread = curves[..., 1].mean(axis=0), curves[..., 1].std(axis=0)
            ax.plot(curves[0, :, 0], mean, "o-" if k else "-", label=name, markersize=3)
            ax.fill_between(curves[0, :, 0], mean - spread, mean + spread, alpha=0.2)
            tail = curves[:, -5:, 1].mean(axis=1) if k == 0 else curves[:, -1, 1]  # the loss is noisy: its last five lines
            last += [tail.mean(), tail.std()]
        print(f"{name:<30}{last[0]:>10.4f}{last[1]:>8.4f}{last[2]:>10.3f}{last[3]:>8.3f}")
    for ax, label in zip(axes, ("loss", "Frechet distance in pixel space")):
        ax.set(xlabel="step", ylabel=label, yscale="log")
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(ROOT / f"runs/conditioning/{options.preset}.png", dpi=120)


if __name__ == "__main__":
    with dit_config.input_errors("benchmarks/conditioning.py"):
        main()
