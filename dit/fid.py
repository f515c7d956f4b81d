"""FID and its kin: python -m dit.fid x.npz --reference STATS.npz|DATASET --inception pt_inception-2015-12-05-6726825d.pth

    (1) Frechet distance of two Gaussians (Heusel et al., arXiv 1706.08500):
            |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^{1/2})
        of Inception's pooled features for FID, of the first 7 channels of mixed_6/conv for sFID (Nash et al., arXiv 2103.03841)
    (2) inception score (Salimans et al., arXiv 1606.03498):  exp E KL(p(y | x) || p(y)), over 5,000 samples at a time
    (3) precision: the share of samples within the 3-nearest-neighbour radius of a real image, in pooled features; recall: the converse
        (Kynkaanniemi et al., arXiv 1904.06991)

The choices are those of ADM's evaluator, and so are its reference files (mu, sigma, mu_s, sigma_s, arr_0); pytorch-fid's (mu, sigma) will
do for FID. FID falls with the number of samples: 50,000 are usual.
"""

import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dit import config as dit_config
from dit.config import InputError, one_line, require
from dit.data import Dataset, open_dataset, tfds_data
from dit.images import open_npz
from dit.inception import Features, Inception
from dit.log import Progress
from dit.sharding import batch_sharding, make_mesh, replicated
from dit.weights import load_inception

NEIGHBOURS = 3
REFERENCES = 10_000  # real images that precision and recall look at, as ADM's files hold them


class Gaussian(NamedTuple):
    mean: np.ndarray  # float64 [D]
    covariance: np.ndarray  # float64 [D, D]


class Moments:
    """Mean and covariance of vectors `[N, D]` that come in batches, in float64."""

    def __init__(self):
        self.count, self.sum, self.outer = 0, 0.0, 0.0

    def add(self, x: np.ndarray) -> None:
        x = np.asarray(x, np.float64)
        self.count, self.sum, self.outer = self.count + len(x), self.sum + x.sum(axis=0), self.outer + x.T @ x

    def gaussian(self) -> Gaussian:
        mean = self.sum / self.count
        return Gaussian(mean, (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1))


class Activations:
    """What is kept of a set of images: the moments of both features, the logits, and pooled features for precision and recall."""

    def __init__(self, keep: int = 50_000):
        self.pool, self.spatial, self.keep = Moments(), Moments(), keep
        self.kept, self.logits = [], []

    def add(self, features: Features) -> None:
        pool, spatial, logits = (np.asarray(a) for a in features)
        room = max(self.keep - self.pool.count, 0)
        self.kept.append(pool[:room])
        self.logits.append(logits[:room])
        self.pool.add(pool)
        self.spatial.add(spatial)


@dataclass
class Reference:
    """Statistics of real images, and where there are images too, pooled features `[N, 2048]` of some."""

    pool: Gaussian
    spatial: Gaussian | None
    features: np.ndarray | None


# The metrics


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """(1), through the eigenvalues of a symmetric matrix, so that singular covariances do no harm."""
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    return float(np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def inception_score(logits: np.ndarray, split: int = 5000) -> float:
    """(2) of logits `[N, 1008]`: the mean over the splits."""
    def score(part: np.ndarray) -> float:
        log_p = np.asarray(jax.nn.log_softmax(part), np.float64)
        p = np.exp(log_p)
        return float(np.exp((p * (log_p - np.log(p.mean(axis=0)))).sum(axis=1).mean()))

    return float(np.mean([score(logits[i:i + split]) for i in range(0, len(logits), split)]))


@jax.jit
def squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """Between rows of a `[N, D]` and of b `[M, D]`: `[N, M]`."""
    products = jnp.matmul(a, b.T, precision="highest")
    return jnp.maximum(jnp.square(a).sum(axis=1)[:, None] - 2 * products + jnp.square(b).sum(axis=1)[None], 0)


def radii(features: np.ndarray) -> np.ndarray:
    """The squared distance of each row to its 3rd nearest neighbour, itself not counted: `[N]`."""
    return np.concatenate([np.partition(squared_distances(features[i:i + 1000], features), NEIGHBOURS, axis=1)[:, NEIGHBOURS]
                           for i in range(0, len(features), 1000)])


def coverage(queries: np.ndarray, features: np.ndarray) -> float:
    """The share of the queries that lie within the radius of any of the features."""
    r = radii(features)
    return float(np.concatenate([(np.asarray(squared_distances(queries[i:i + 1000], features)) <= r).any(axis=1)
                                 for i in range(0, len(queries), 1000)]).mean())


def precision_recall(samples: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """(3) of pooled features `[N, D]` and `[M, D]`, each of more than 3 rows."""
    return coverage(samples, real), coverage(real, samples)


def scores(activations: Activations, reference: Reference) -> dict[str, float]:
    """{"fid", "sfid", "inception_score", "precision", "recall"}, as far as the reference allows."""
    found = {"fid": frechet_distance(activations.pool.gaussian(), reference.pool)}
    if reference.spatial is not None:
        found["sfid"] = frechet_distance(activations.spatial.gaussian(), reference.spatial)
    found["inception_score"] = inception_score(np.concatenate(activations.logits))
    kept = np.concatenate(activations.kept)
    if reference.features is not None and min(len(kept), len(reference.features)) > NEIGHBOURS:
        found["precision"], found["recall"] = precision_recall(kept, reference.features)
    return found


def warn_of_few(samples: int) -> None:
    if samples < 2048:
        print(f"warning: {samples} samples are fewer than the 2048 features: their covariance is singular and FID comes out too large")


# Images to activations


def look(inception: Inception, batches: Iterator[np.ndarray], total: int, keep: int = 50_000) -> Activations:
    """The activations of uint8 batches `[B, H, W, C]`, each spread over all local devices."""
    devices = jax.local_devices()
    mesh = make_mesh(dit_config.Mesh(), len(devices), devices=devices)
    inception, extract = jax.device_put(inception, replicated(mesh)), jax.jit(lambda inception, x: inception(x))
    activations, progress, largest = Activations(keep), Progress(total, "images"), 0
    for images in batches:
        N, largest = len(images), max(largest, len(images))
        padded = np.minimum(np.arange(-(-largest // len(devices)) * len(devices)), N - 1)  # one shape, so one compilation
        features = extract(inception, jax.device_put(images[padded], batch_sharding(mesh)))
        activations.add(jax.tree.map(lambda a: a[:N], features))
        progress.advance(N)
    return activations


def dataset_batches(dataset: Dataset) -> Iterator[np.ndarray]:
    N = len(dataset.records)
    for first in range(0, N, 64):
        yield np.stack([dataset.records[i]["image"] for i in range(first, min(first + 64, N))])


def open_reference(name: str, split: str, image_size: int, inception: Inception, save: str | None = None) -> Reference:
    """The reference of an .npz of statistics or images, or of a data set. `save` keeps its statistics. Raises InputError."""
    if name.endswith(".npz"):
        return read_reference(Path(name), inception)
    dataset = open_dataset(tfds_data(name, split, image_size))
    require(len(dataset.records) > 1, "--split", split, "one of more than one image")
    activations = look(inception, dataset_batches(dataset), len(dataset.records), REFERENCES)
    pool, spatial = activations.pool.gaussian(), activations.spatial.gaussian()
    if save:
        np.savez(save, mu=pool.mean, sigma=pool.covariance, mu_s=spatial.mean, sigma_s=spatial.covariance)
    return Reference(pool, spatial, np.concatenate(activations.kept))


def read_reference(path: Path, inception: Inception) -> Reference:
    try:
        file = np.load(path)
        names, gaussians = set(file.files), {}
        for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if {mean, covariance} <= names:
                gaussians[mean] = Gaussian(np.asarray(file[mean], np.float64), np.asarray(file[covariance], np.float64))
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"--reference: {str(path)!r} should be an .npz of statistics or images ({one_line(error)})") from error
    for mean, size in (("mu", 2048), ("mu_s", 2023)):
        if mean in gaussians:
            m, c = gaussians[mean]
            require(m.shape == (size,) and c.shape == (size, size), f"--reference: {path}: {mean} and its covariance",
                    (m.shape, c.shape), f"of {size} features, those of this Inception")
            require(np.isfinite(m).all() and np.isfinite(c).all(), f"--reference: {path}: {mean} and its covariance", "nan or infinity",
                    "finite")
    if "arr_0" in names:
        shape, batches = open_npz(path)
        require(shape[0] > 1, f"--reference: {path}: arr_0", list(shape), "more than one image")
        activations = look(inception, batches, shape[0], REFERENCES)
        pool = gaussians.get("mu") or activations.pool.gaussian()
        spatial = gaussians.get("mu_s") or (None if "mu" in gaussians else activations.spatial.gaussian())
        return Reference(pool, spatial, np.concatenate(activations.kept))
    require("mu" in gaussians, f"--reference: {path}", sorted(names), "mu and sigma, or images in arr_0")
    return Reference(gaussians["mu"], gaussians.get("mu_s"), None)


# The command


@dataclass(frozen=True)
class Fid:
    samples: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SAMPLES.npz")]  # arr_0, uint8 [N, H, W, C], as sample.py writes
    reference: str  # an .npz of statistics or images, or the name of a data set, decoded at the samples' size
    inception: str  # the weights that pytorch-fid publishes, pt_inception-2015-12-05-6726825d.pth
    split: str = "train"  # of the reference data set
    save_reference: str | None = None  # keep the data set's statistics in this .npz, for --reference the next time


def run(options: Fid) -> dict[str, float]:
    """The scores, printed one a line. Raises InputError."""
    shape, batches = open_npz(Path(options.samples))
    N, H, _, _ = shape
    require(N > 1, f"{options.samples}: arr_0", list(shape), "more than one image")
    save = options.save_reference
    require(save is None or (save.endswith(".npz") and Path(save).parent.is_dir() and not Path(save).is_dir()), "--save-reference", save,
            "an .npz file in a folder that exists")
    require(save is None or not options.reference.endswith(".npz"), "--save-reference", save, "given with a data set as --reference")
    inception = load_inception(options.inception)
    warn_of_few(N)
    reference = open_reference(options.reference, options.split, H, inception, save)
    found = scores(look(inception, batches, N), reference)
    for name, value in found.items():
        print(f"{name:<16}{value:>12.4f}")
    for name in [name for name in ("sfid", "precision", "recall") if name not in found]:
        print(f"{name:<16}{'-':>12}  the reference has no {'mu_s and sigma_s' if name == 'sfid' else 'images in arr_0'}")
    return found


def main(argv: list[str] | None = None) -> None:
    with dit_config.input_errors("dit.fid"):
        run(dit_config.parse(Fid, sys.argv[1:] if argv is None else argv, "python -m dit.fid", __doc__))


if __name__ == "__main__":
    main()
