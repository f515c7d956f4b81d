"""Why the parameters must vary in space: python benchmarks/layout.py [--steps STEPS]

Trains `digits_layout` twice on the digits, as it is and with the mask's vectors pooled to one for the whole image, and draws 1,000 samples
of the classes and masks of real digits. Prints how far the ink of the samples is where the mask asks for it, as intersection over union,
and the share of the samples that an SVC fitted on the real digits puts in the class asked for. The workdirs are runs/layout-*.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from digits import judge  # noqa: E402
from dit import config as dit_config  # noqa: E402
from dit import model as dit_model  # noqa: E402
from dit.data import ink, open_dataset  # noqa: E402
from sample import Sample, completed, make_sampler  # noqa: E402

SAMPLES = 1000


class PooledMaskEmbedding(dit_model.MaskEmbedding):
    """The mask as one global vector: what a class or a caption is to the network."""

    def __call__(self, mask: jax.Array) -> jax.Array:
        return super().__call__(mask).mean(axis=1, keepdims=True)  # [B, 1, D]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Mean intersection over union of masks `[N, H, W]` of 0 and 1."""
    return float((np.minimum(a, b).sum(axis=(1, 2)) / np.maximum(a, b).sum(axis=(1, 2))).mean())


@dataclass(frozen=True)
class Options:
    steps: int = 1500  # of each run


def main() -> None:
    options, preset = dit_config.parse(Options, sys.argv[1:], "benchmarks/layout.py", __doc__), dit_config.load("digits_layout")
    preset = dataclasses.replace(preset, train=dataclasses.replace(preset.train, steps=options.steps, sample_every=0)).validate()
    records = open_dataset(preset.data).records
    chosen = np.random.default_rng(0).permutation(len(records))[:SAMPLES]
    labels, masks = records.labels[chosen], records.masks[chosen]
    sample = make_sampler(preset, completed(Sample("", out="x.npz"), preset))

    def measure(name: str, model, asked: np.ndarray) -> None:
        images = np.asarray(sample(model, None, (jnp.asarray(labels), jnp.asarray(asked)), jnp.arange(SAMPLES)))
        accuracy, distance = judge(images.reshape(SAMPLES, -1) / 127.5 - 1, labels)
        rows.append(f"{name:<44}{iou(masks, ink(images)):>8.3f}{accuracy:>12.1%}{distance:>10.2f}")

    rows, spatial = [], dit_model.MaskEmbedding
    for name, embedding in {"spatial": spatial, "pooled": PooledMaskEmbedding}.items():
        dit_model.MaskEmbedding = embedding
        config = dataclasses.replace(preset, name=f"layout-{name}")
        model = train.train(config).ema
        measure({"spatial": "one vector a token (SPADE's idea)", "pooled": "(b) the mask pooled to one global vector"}[name], model, masks)
        if name == "spatial":
            measure("(a) the same model without a mask", model, np.full_like(masks, 2))
    dit_model.MaskEmbedding = spatial
    print(f"\n{'condition':<44}{'IoU':>8}{'accuracy':>12}{'Frechet':>10}")
    print("\n".join(rows))
    other = np.concatenate([np.roll(np.flatnonzero(labels == k), 1) for k in range(10)])
    same = np.concatenate([np.flatnonzero(labels == k) for k in range(10)])
    print(f"{'another real digit of the class, for scale':<44}{iou(masks[same], masks[other]):>8.3f}")


if __name__ == "__main__":
    with dit_config.input_errors("benchmarks/layout.py"):
        main()
