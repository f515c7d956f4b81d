"""Distances between sets of images, from their features: numbers in and numbers out.

(1) Frechet distance of two Gaussians (Heusel et al., arXiv 1706.08500):
        |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^{1/2})
(2) inception score (Salimans et al., arXiv 1606.03498):  exp E KL(p(y | x) || p(y))
(3) precision: the share of samples within the 3-nearest-neighbour radius of a real image;
    recall: the converse (Kynkaanniemi et al., arXiv 1904.06991)

N, M number of images, D number of features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NEIGHBOURS = 3
ROWS = 1000  # of a matrix of distances that are computed at a time


class Gaussian(NamedTuple):
    mean: np.ndarray  # float64 [D]
    covariance: np.ndarray  # float64 [D, D]


class Moments:
    """Mean and covariance, in float64, of vectors `[N, D]` that come in batches."""

    def __init__(self):
        self.count = 0
        self.sum = 0.0
        self.outer = 0.0

    def add(self, x: np.ndarray) -> None:
        x = np.asarray(x, np.float64)
        self.count += len(x)
        self.sum = self.sum + x.sum(axis=0)
        self.outer = self.outer + x.T @ x

    def gaussian(self) -> Gaussian:
        mean = self.sum / self.count
        scatter = self.outer - self.count * np.outer(mean, mean)
        return Gaussian(mean, scatter / (self.count - 1))


def gaussian_of(x: np.ndarray) -> Gaussian:
    """The Gaussian of rows x `[N, D]`."""
    moments = Moments()
    moments.add(x)
    return moments.gaussian()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """(1), through the eigenvalues of a symmetric matrix: covariances may be singular."""
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T  # S_1^{1/2}
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(np.square(a.mean - b.mean).sum() + spread)


def inception_score(logits: np.ndarray, split: int = 5000) -> float:
    """(2) of logits `[N, classes]`: the mean over splits of 5,000, as ADM's evaluator takes it."""

    def score(part: np.ndarray) -> float:
        log_p = np.asarray(jax.nn.log_softmax(part), np.float64)
        p = np.exp(log_p)
        divergence = (p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1)
        return float(np.exp(divergence.mean()))

    return float(np.mean([score(logits[i : i + split]) for i in range(0, len(logits), split)]))


def precision_recall(samples: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """(3) of features `[N, D]` and `[M, D]`, each of more than 3 rows."""
    return coverage(samples, real), coverage(real, samples)


def coverage(queries: np.ndarray, features: np.ndarray) -> float:
    """The share of the queries that lie within the radius of any of the features."""
    radius = squared_radii(features)
    covered = [
        (np.asarray(squared_distances(queries[i : i + ROWS], features)) <= radius).any(axis=1)
        for i in range(0, len(queries), ROWS)
    ]
    return float(np.concatenate(covered).mean())


def squared_radii(features: np.ndarray) -> np.ndarray:
    """The squared distance of each row to its 3rd nearest neighbour, itself not counted: `[N]`."""
    radii = []
    for i in range(0, len(features), ROWS):
        distances = squared_distances(features[i : i + ROWS], features)
        radii.append(np.partition(distances, NEIGHBOURS, axis=1)[:, NEIGHBOURS])
    return np.concatenate(radii)


@jax.jit
def squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """Between rows of a `[N, D]` and of b `[M, D]`: `[N, M]`."""
    products = jnp.matmul(a, b.T, precision="highest")
    lengths = jnp.square(a).sum(axis=1)[:, None] + jnp.square(b).sum(axis=1)[None]
    return jnp.maximum(lengths - 2 * products, 0)
