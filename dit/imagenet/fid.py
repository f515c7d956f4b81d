"""FID and its kin: python -m dit.imagenet.fid SAMPLES.npz --reference STATS.npz --inception FILE

FID is the Frechet distance between Inception's pooled features of samples and of real images, and
sFID (Nash et al., arXiv 2103.03841) that between spatial features. Inception score, precision and
recall stand beside them; dit/metrics.py has the formulas. The choices are those of ADM's evaluator,
and so are its reference files (mu, sigma, mu_s, sigma_s, arr_0); pytorch-fid's (mu, sigma) will do
for FID. FID falls with the number of samples: 50,000 are usual.
"""

from dit.signals import StopRequest

if __name__ == "__main__":
    StopRequest().end_at_once("dit.imagenet.fid")

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dit import cli
from dit.config import Config, InputError, LocalPath, one_line, require

Samples = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SAMPLES.npz")]


@dataclass(frozen=True)
class Fid:
    samples: Samples  # arr_0, uint8 [N, H, W, C], as sample.py writes
    reference: str  # an .npz of statistics or images, or a data set, read at the samples' size
    inception: str  # the weights that pytorch-fid publishes, pt_inception-2015-12-05-6726825d.pth
    split: str = "train"  # split of the reference data set
    save_reference: LocalPath | None = None  # an .npz for the data set's statistics, for next time


if __name__ == "__main__":  # --help and bad input are answered before jax is imported
    cli.use_compilation_cache()
    with cli.exit_status("dit.imagenet.fid"):
        OPTIONS = cli.parse(Fid, sys.argv[1:], "python -m dit.imagenet.fid", __doc__)

import jax
import numpy as np

from dit import metrics
from dit.data import Dataset, open_dataset, tfds_config
from dit.files import renaming, whole
from dit.generation import Check, draw_batches, draw_labels, make_condition, make_draw
from dit.imagenet.inception import Features, load_inception
from dit.images import BATCH, open_npz
from dit.metrics import Gaussian, Moments
from dit.model import DiT
from dit.progress import say, with_progress
from dit.sharding import local_mesh, place, place_rows, replicated

POOL_FEATURES = 2048
SPATIAL_FEATURES = 2023
REFERENCES = 10_000  # real images for precision and recall, as many as ADM's files hold

Scores = dict[str, float]
Extract = Callable[[np.ndarray, int], Features]


# Images to features to scores


@dataclass
class Statistics:
    """What is kept of a set of images. A reference may have the first alone, or the first two."""

    pool: Gaussian
    spatial: Gaussian | None
    pool_rows: np.ndarray | None = None  # pooled features [M, 2048] of the first M images
    logit_rows: np.ndarray | None = None  # [M, 1008]


def make_extract(file: str, mesh: jax.sharding.Mesh) -> Extract:
    """The function (images `[n, H, W, C]`, rows) -> NumPy features of n rows, on all devices.

    The network sees at least `rows` images at a time, so that a smaller last batch takes no second
    compilation. Raises InputError.
    """
    inception = place(load_inception(file), replicated(mesh))
    compute = jax.jit(lambda inception, images: inception(images), out_shardings=replicated(mesh))

    def extract(images: np.ndarray, rows: int) -> Features:
        features = compute(inception, place_rows(images, rows, mesh))
        return jax.tree.map(lambda a: np.asarray(a)[: len(images)], features)

    return extract


def measure(batches: Iterable[np.ndarray], extract: Extract, keep: int = 50_000) -> Statistics:
    """The statistics of uint8 images that come in batches `[n, H, W, C]`, the largest first.

    Rows of features and logits are kept of the first `keep` images.
    """
    pool, spatial = Moments(), Moments()
    pool_rows, logit_rows = [], []
    rows = 0
    for images in batches:
        rows = max(rows, len(images))
        features = extract(images, rows)
        room = max(keep - pool.count, 0)
        pool_rows.append(features.pool[:room])
        logit_rows.append(features.logits[:room])
        pool.add(features.pool)
        spatial.add(features.spatial)
    kept = np.concatenate(pool_rows), np.concatenate(logit_rows)
    return Statistics(pool.gaussian(), spatial.gaussian(), *kept)


def scores_of(samples: Statistics, reference: Statistics) -> Scores:
    """{"fid", "sfid", "inception_score", "precision", "recall"}, as far as the reference allows."""
    scores = {"fid": metrics.frechet_distance(samples.pool, reference.pool)}
    if reference.spatial is not None:
        scores["sfid"] = metrics.frechet_distance(samples.spatial, reference.spatial)
    scores["inception_score"] = metrics.inception_score(samples.logit_rows)
    ours, theirs = samples.pool_rows, reference.pool_rows
    if theirs is not None and min(len(ours), len(theirs)) > metrics.NEIGHBOURS:
        scores["precision"], scores["recall"] = metrics.precision_recall(ours, theirs)
    return scores


def warn_of_few(samples: int) -> None:
    if samples < POOL_FEATURES:
        say(
            f"warning: {samples} samples are fewer than the {POOL_FEATURES} features: their "
            "covariance is singular and FID comes out too large"
        )


# References


def open_reference(
    option: str,
    name: str,
    split: str,
    size: int,
    extract: Extract,
    save: str | None = None,
    channels: int = 3,
) -> Statistics:
    """The reference in an .npz of statistics or images, or that of a data set at a size in pixels.

    `save` is a file for the data set's statistics. `channels` are those of a folder's pictures.
    Raises InputError, naming `option`, or data.name and data.split of a data set.
    """
    if name.endswith(".npz"):
        return read_reference(option, Path(name), extract)
    dataset = open_dataset(tfds_config(name, split, size, channels))
    count = len(dataset.records)
    require(count > 1, "data.split", split, "one of more than one image")
    batches = with_progress(dataset_batches(dataset), count)
    reference = measure(batches, extract, REFERENCES)
    if save is not None:
        write_statistics(Path(save), reference)
    return reference


def dataset_batches(dataset: Dataset) -> Iterator[np.ndarray]:
    count = len(dataset.records)
    for first in range(0, count, BATCH):
        indices = range(first, min(first + BATCH, count))
        yield dataset.records.read(indices)["image"]


def read_reference(option: str, path: Path, extract: Extract) -> Statistics:
    """The reference in an .npz. Statistics go before those of the images beside them."""
    names, pool, spatial, rows = read_statistics(option, path)
    if "arr_0" not in names:
        expected = "mu and sigma, or images in arr_0"
        require(pool is not None, f"{option}: {path}", sorted(names), expected)
        return Statistics(pool, spatial, rows)
    shape, batches = open_npz(path)
    require(shape[0] > 1, f"{option}: {path}: arr_0", list(shape), "more than one image")
    measured = measure(with_progress(batches, shape[0]), extract, REFERENCES)
    if pool is None:
        pool, spatial = measured.pool, spatial or measured.spatial
    return Statistics(pool, spatial, measured.pool_rows)


def read_statistics(
    option: str, path: Path
) -> tuple[set[str], Gaussian | None, Gaussian | None, np.ndarray | None]:
    """The names in an .npz, its Gaussians of pooled and of spatial features, and pooled features
    `[N, 2048]`, each if any.
    """
    try:
        with np.load(path) as file:
            names = set(file.files)
            pool = read_gaussian(file, "mu", "sigma")
            spatial = read_gaussian(file, "mu_s", "sigma_s")
            rows = file["features"] if "features" in names else None
    except Exception as error:  # NumPy and zipfile raise nearly anything
        raise InputError(
            f"{option}: {str(path)!r} should be an .npz of statistics or images ({one_line(error)})"
        ) from error
    check_gaussian(f"{option}: {path}: mu", pool, POOL_FEATURES)
    check_gaussian(f"{option}: {path}: mu_s", spatial, SPATIAL_FEATURES)
    if rows is not None:
        shape, expected = list(rows.shape), f"[N, {POOL_FEATURES}] and finite"
        fits = rows.ndim == 2 and rows.shape[1] == POOL_FEATURES and np.isfinite(rows).all()
        require(fits, f"{option}: {path}: features", shape, expected)
    return names, pool, spatial, rows


def read_gaussian(file: Any, mean: str, covariance: str) -> Gaussian | None:
    if mean not in file.files or covariance not in file.files:
        return None
    return Gaussian(np.asarray(file[mean], np.float64), np.asarray(file[covariance], np.float64))


def check_gaussian(name: str, gaussian: Gaussian | None, size: int) -> None:
    """Raises InputError unless it is finite and of `size` features."""
    if gaussian is None:
        return
    name = f"{name} and its covariance"
    shapes = tuple(a.shape for a in gaussian)
    expected = f"of {size} features, those of this Inception"
    require(shapes == ((size,), (size, size)), name, shapes, expected)
    is_finite = all(np.isfinite(a).all() for a in gaussian)
    require(is_finite, name, "nan or infinity", "finite")


def write_statistics(path: Path, reference: Statistics) -> None:
    """Writes a reference's statistics as ADM's evaluator names them, and features for precision
    and recall.
    """
    (mu, sigma), (mu_s, sigma_s) = reference.pool, reference.spatial
    arrays = dict(mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, features=reference.pool_rows)
    with whole(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)


# The evaluation of a training run


def make_evaluation(
    config: Config, vae: Any, mesh: jax.sharding.Mesh, check_stop: Check = lambda: None
) -> Callable[[DiT], Scores]:
    """The function (model) -> scores of `eval.num_samples` fresh samples, drawn on all devices.

    vae is None for pixels. `check_stop` is called before each batch. Raises InputError. Each host
    measures the reference on its own, so that one which refuses it leaves none waiting.
    """
    count, batch_size = config.eval.num_samples, config.eval.batch_size
    warn_of_few(count)
    extract = make_extract(config.eval.inception, mesh)
    name = config.eval.reference or config.data.name
    split, size = config.data.split, config.data.image_size
    extract_here = make_extract(config.eval.inception, local_mesh())
    channels = config.data.channels
    with renaming({"data.name": "eval.reference"} if config.eval.reference else {}):
        reference = open_reference(
            "eval.reference", name, split, size, extract_here, channels=channels
        )
    labels = draw_labels(
        config.eval.labels, config.train.seed, np.arange(config.data.num_classes), count
    )
    sampler, steps = config.protocol
    say(
        f"scores are of {count:,} samples by {sampler} in {steps} steps, guidance "
        f"{config.eval.guidance:g}, {config.eval.labels} labels"
    )
    draw = make_draw(
        config,
        mesh,
        make_condition(labels, config),
        batch_size,
        sampler=sampler,
        steps=steps,
        guidance=config.eval.guidance,
        seed=config.train.seed,
    )

    def evaluate(model: DiT) -> Scores:
        batches = draw_batches(draw, model, vae, count, batch_size, check_stop)
        return scores_of(measure(batches, extract), reference)

    return evaluate


# The command


def run(options: Fid) -> Scores:
    """The scores, printed one a line. Raises InputError."""
    shape, batches = open_npz(Path(options.samples))
    count, size = shape[:2]
    require(count > 1, f"{options.samples}: arr_0", list(shape), "more than one image")
    check_save(options)
    extract = make_extract(options.inception, local_mesh())
    warn_of_few(count)
    with renaming({"data.name": "--reference", "data.split": "--split"}):
        reference = open_reference(
            "--reference",
            options.reference,
            options.split,
            size,
            extract,
            options.save_reference,
            channels=shape[3],
        )
    samples = measure(with_progress(batches, count), extract)
    scores = scores_of(samples, reference)
    for name, value in scores.items():
        print(f"{name:<16}{value:>12.4f}")
    for name in ("sfid", "precision", "recall"):
        if name not in scores:
            missing = "mu_s and sigma_s" if name == "sfid" else "images in arr_0"
            print(f"{name:<16}{'-':>12}  the reference has no {missing}")
    return scores


def check_save(options: Fid) -> None:
    """Raises InputError if --save-reference cannot be written, or there is nothing to save."""
    save = options.save_reference
    if save is None:
        return
    path = Path(save)
    can_be_file = path.suffix == ".npz" and os.access(path.parent, os.W_OK) and not path.is_dir()
    require(can_be_file, "--save-reference", save, "an .npz file in a folder to write to")
    is_dataset = not options.reference.endswith(".npz")
    require(is_dataset, "--save-reference", save, "given with a data set as --reference")


if __name__ == "__main__":
    with cli.exit_status("dit.imagenet.fid"):
        run(OPTIONS)
