"""What digits.py and cifar10.py share: the samples of a run, and the figures they are judged by.

(1) accuracy: the share of the images that a classifier puts in the class that was asked for
(2) Frechet distance of their features to those of real images
(3) neighbour ratio: the median distance from an image to the nearest training image, over that of
    real images to the nearest training image but themselves. Copies of training images have 0.
(4) near copies: the share of the images that are nearer to a training image than 95 % of those real
    images are; of these 5 % are

Real images have figures of their own, the best that there can be, which stand beside the samples'.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import sample
from dit.metrics import ROWS, Gaussian, frechet_distance, gaussian_of, squared_distances

NEAR = 0.05  # the share of real images that count as near copies

Figures = dict[str, float]


class Real(NamedTuple):
    """Features of real images."""

    reference: Gaussian  # that (2) is the distance to
    training: np.ndarray  # [M, D]
    distances: np.ndarray  # of real images, to the nearest training image but themselves: [K]


def judge_features(
    features: np.ndarray, predicted: np.ndarray, labels: np.ndarray, real: Real
) -> Figures:
    """(1) to (4) of images whose features are `[N, D]`, and classes predicted and asked for."""
    distances = nearest(features, real.training)[0][:, 0]
    return {
        "accuracy": float((predicted == labels).mean()),
        "frechet_distance": frechet_distance(gaussian_of(features), real.reference),
        "neighbour_ratio": float(np.median(distances) / np.median(real.distances)),
        "near_copies": float((distances < np.quantile(real.distances, NEAR)).mean()),
    }


def nearest(
    queries: np.ndarray, features: np.ndarray, count: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The distances of queries `[N, D]` to the nearest of features `[M, D]`, the least first, and
    their indices: `[N, count]` each.
    """
    found = [
        jax.lax.top_k(-squared_distances(queries[i : i + ROWS], features), count)
        for i in range(0, len(queries), ROWS)
    ]
    negative, indices = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return np.sqrt(-negative), indices


def print_table(rows: dict[str, Figures], space: str) -> None:
    print(f"{'':<28}{'accuracy':>10}{'Frechet':>10}{'neighbours':>12}{'near copies':>13}")
    for name, row in rows.items():
        scores = f"{row['accuracy']:>10.1%}{row['frechet_distance']:>10.3f}"
        neighbours = f"{row['neighbour_ratio']:>12.2f}{row['near_copies']:>13.1%}"
        print(f"{name:<28}{scores}{neighbours}")
    print(f"Frechet distance in {space}")


def draw(options: sample.Sample) -> tuple[np.ndarray, np.ndarray]:
    """What sample.py draws: images, uint8 `[N, H, W, C]`, and labels `[N]`. Raises InputError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "samples.npz"
        arrays = np.load(sample.run(dataclasses.replace(options, out=str(out))))
        return arrays["arr_0"], arrays["arr_1"]
