"""Why the parameters must vary in space: python benchmarks/layout.py [--steps STEPS]

Trains `digits_layout` twice on the digits: as it is, and with the mask's vectors pooled to one for
the whole image. Draws 1,000 samples of the classes and masks of real digits. Prints how well the
ink of the samples covers the mask that was asked for, as intersection over union, the share of the
samples that an SVC fitted on the real digits puts in the class that was asked for, and the Frechet
distance of benchmarks/digits.py. The workdirs are runs/layout-*.
"""

import dataclasses
import sys
from dataclasses import dataclass

import jax
import numpy as np
from digits import judge

import dit.model
from dit import cli, generation
from dit.config import Config, PositiveInt, replace
from dit.data import ink_masks, open_dataset
from dit.model import DiT, MaskEmbedding
from dit.sharding import local_mesh
from train import train

SAMPLES = 1000


@dataclass(frozen=True)
class Options:
    steps: PositiveInt = 1500  # training steps of each run


class PooledMaskEmbedding(MaskEmbedding):
    """The mask as one vector for the image, which is what a class or a caption is to the model."""

    def __call__(self, mask: jax.Array) -> jax.Array:
        return super().__call__(mask).mean(axis=1, keepdims=True)  # [B, 1, D]


def train_with(embedding: type[MaskEmbedding], config: Config) -> DiT:
    """The averaged weights of a run whose model embeds its masks so."""
    dit.model.MaskEmbedding = embedding
    return train(config).ema


def draw(model: DiT, config: Config, condition: dict[str, np.ndarray]) -> np.ndarray:
    """One image for each row of the condition, uint8 `[SAMPLES, 8, 8, 1]`."""
    sampler, steps = config.sampler, config.train.sample_steps
    draw_batch = generation.make_draw(
        config, local_mesh(), condition, SAMPLES, sampler=sampler, steps=steps
    )
    return draw_batch(model, None, 0)


def mean_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Mean intersection over union of masks `[N, H, W]` of 0 and 1."""
    intersection = np.minimum(a, b).sum(axis=(1, 2))
    union = np.maximum(a, b).sum(axis=(1, 2))
    return float((intersection / union).mean())


def iou_of_another_digit(masks: np.ndarray, labels: np.ndarray) -> float:
    """The mean intersection over union of each mask and that of another digit of its class."""
    members = [np.flatnonzero(labels == k) for k in range(10)]
    others = [np.roll(indices, 1) for indices in members]
    return mean_iou(masks[np.concatenate(members)], masks[np.concatenate(others)])


def main() -> None:
    options = cli.parse(Options, sys.argv[1:], "benchmarks/layout.py", __doc__)
    config = cli.load_preset("digits_layout")
    config = replace(config, train=dict(steps=options.steps, sample_every=0))
    records = open_dataset(config.data).records
    chosen = np.random.default_rng(0).permutation(len(records))[:SAMPLES]
    labels, masks = records.labels[chosen], records.masks[chosen]

    spatial = train_with(MaskEmbedding, dataclasses.replace(config, name="layout-spatial"))
    pooled = train_with(PooledMaskEmbedding, dataclasses.replace(config, name="layout-pooled"))
    with_mask = generation.make_condition(labels, config, masks)
    without = generation.make_condition(labels, config)
    images = {
        "one vector a token (SPADE's idea)": draw(spatial, config, with_mask),
        "(a) the same model without a mask": draw(spatial, config, without),
        "(b) the mask pooled to one global vector": draw(pooled, config, with_mask),
    }

    print(f"\n{'condition':<44}{'IoU':>8}{'accuracy':>12}{'Frechet':>10}")
    for name, drawn in images.items():
        iou = mean_iou(masks, ink_masks(drawn))
        scores = judge(drawn, labels, config.data.split)
        shown = f"{scores['accuracy']:>12.1%}{scores['frechet_distance']:>10.2f}"
        print(f"{name:<44}{iou:>8.3f}{shown}")
    iou = iou_of_another_digit(masks, labels)
    print(f"{'another real digit of the class, for scale':<44}{iou:>8.3f}")


if __name__ == "__main__":
    with cli.exit_status("benchmarks/layout.py"):
        main()
