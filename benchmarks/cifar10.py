"""Judges a model of CIFAR-10: python benchmarks/cifar10.py RUN [sample.py's options]

A small classifier (classifier.py), trained here on the real images the first time, judges 100
samples a class, unguided unless asked. Beside the figures of real test images stand those of the
samples: the share that it puts in the class that was asked for; the Frechet distance of its
features to those of the training images, which is no FID; the median distance of features to the
nearest training image's, over that of test images (neighbours); and the share that is nearer to a
training image than 95 % of test images are (near copies). --out is a picture of samples, each
before its nearest training images, from the sample that is nearest to one to the farthest; a row is
named after the distance from its sample to the first of them, in medians of test images.

With the Inception weights that pytorch-fid publishes, --inception FILE, the published protocol of
FID follows: 50,000 samples against the training images, with three seeds from --seed on, of each
average that the run keeps, by the evaluation's sampler and steps unless others are asked for.
"""

import dataclasses
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from classifier import Classifier, classify, load_or_train
from judge import NEAR, Figures, Real, draw, judge_features, nearest, print_table

import sample
from dit import cli, intact
from dit.config import AnyPath, Config, LocalPath, PositiveInt, require
from dit.data import open_dataset, tfds_config
from dit.imagenet.fid import Fid
from dit.imagenet.fid import run as run_fid
from dit.imagenet.inception import load_inception
from dit.images import save_grid
from dit.metrics import frechet_distance, gaussian_of
from dit.progress import say

SHOWN = 16  # samples in the picture
NEIGHBOURS = 7  # training images beside each
DRAWS = 10  # of test images, whose mean Frechet distance is printed
FID_SAMPLES = 50_000
FID_SEEDS = 3


@dataclass(frozen=True)
class Options(sample.Sample):
    per_class: PositiveInt = 100  # images of each class
    out: LocalPath = "neighbours.png"  # a picture; without a folder, in WORKDIR_OR_WEIGHTS
    inception: AnyPath | None = None  # pytorch-fid's weights, for FID by the published protocol


class Cifar10(NamedTuple):
    """The real images, as the classifier sees them. Features have a mean variance of 1."""

    classifier: Classifier
    unit: np.ndarray  # of the features
    real: Real
    images: np.ndarray  # those that the model was trained on
    test_features: np.ndarray
    accuracy: float  # on test images


@cache
def real_images(split: str) -> Cifar10:
    """For a model that was trained on a split. Raises InputError."""
    training, test = (
        open_dataset(tfds_config("cifar10", name, 32)).records for name in ("train", "test")
    )
    seen = training.images
    if split != "train":
        seen = open_dataset(tfds_config("cifar10", split, 32)).records.images
    return make_judge(training.images, training.labels, test.images, test.labels, seen)


def make_judge(
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    seen: np.ndarray,
) -> Cifar10:
    """The judge of a model that was trained on the images `seen`."""
    classifier = load_or_train(images, labels)
    features, _ = classify(classifier, images)
    seen_features = features if seen is images else classify(classifier, seen)[0]
    test_features, predicted = classify(classifier, test_images)
    unit = np.sqrt(features.var(axis=0).mean())
    features, seen_features, test_features = (
        some / unit for some in (features, seen_features, test_features)
    )
    distances = nearest(test_features, seen_features)[0][:, 0]
    real = Real(gaussian_of(features), seen_features, distances)
    accuracy = float((predicted == test_labels).mean())
    return Cifar10(classifier, unit, real, seen, test_features, accuracy)


def judge(images: np.ndarray, labels: np.ndarray, split: str) -> Figures:
    """The figures of uint8 images `[N, 32, 32, 3]` of a model that was trained on a split."""
    cifar10 = real_images(split)
    features, predicted = classify(cifar10.classifier, images)
    return judge_features(features / cifar10.unit, predicted, labels, cifar10.real)


def figures_of_test_images(count: int, split: str) -> Figures:
    """The figures of `count` test images, or of all 10,000 if they are fewer."""
    cifar10 = real_images(split)
    features, rng = cifar10.test_features, np.random.default_rng(0)
    count = min(count, len(features))
    chosen = [rng.choice(features, count, replace=False) for _ in range(DRAWS)]
    distances = [frechet_distance(gaussian_of(some), cifar10.real.reference) for some in chosen]
    return {
        "accuracy": cifar10.accuracy,
        "frechet_distance": float(np.mean(distances)),
        "neighbour_ratio": 1.0,
        "near_copies": NEAR,
    }


def save_neighbours(path: str, images: np.ndarray, split: str) -> None:
    """Writes a picture: samples, from the nearest to a training image on, each before those."""
    cifar10 = real_images(split)
    features, _ = classify(cifar10.classifier, images)
    distances, indices = nearest(features / cifar10.unit, cifar10.real.training, NEIGHBOURS)
    order = np.argsort(distances[:, 0])
    shown = order[np.linspace(0, len(order) - 1, SHOWN).astype(int)]
    rows = [[images[i], *cifar10.images[indices[i]]] for i in shown]
    names = [f"{distances[i, 0] / np.median(cifar10.real.distances):.2f}" for i in shown]
    save_grid(path, np.concatenate(rows), names)


def score_by_protocol(options: Options, config: Config) -> None:
    """Prints FID and its kin of 50,000 samples with each of three seeds, for each average that the
    run keeps unless one is asked for. Raises InputError.
    """
    sampler, steps = config.protocol
    request = dataclasses.replace(
        sample_request(options),
        num_samples=FID_SAMPLES,
        sampler=options.sampler or sampler,
        steps=options.steps or steps,
    )
    print(
        f"\nFID of {FID_SAMPLES:,} samples by {request.sampler} in {request.steps} steps, guidance "
        f"{request.guidance:g}, {request.labels} labels"
    )
    all_averages = options.ema and options.ema_decay is None
    decays = config.optim.averages.values() if all_averages else [options.ema_decay]
    with tempfile.TemporaryDirectory() as folder:
        for decay in decays:
            weights = f"average of decay {decay:g}" if options.ema else "last weights"
            fids = fids_of_seeds(
                dataclasses.replace(request, ema_decay=decay), options.inception, folder
            )
            spread = f"from {min(fids):.2f} to {max(fids):.2f}"
            print(f"{weights}, {FID_SEEDS} seeds: FID {np.mean(fids):.2f}, {spread}")


def fids_of_seeds(request: sample.Sample, inception: str, folder: str) -> list[float]:
    """FID with each seed. The folder keeps the statistics of the training images."""
    samples, reference = f"{folder}/samples.npz", f"{folder}/reference.npz"
    fids = []
    for seed in range(request.seed, request.seed + FID_SEEDS):
        sample.run(dataclasses.replace(request, seed=seed, out=samples))
        is_kept = Path(reference).is_file()
        fid = Fid(
            samples,
            reference=reference if is_kept else "cifar10",
            inception=inception,
            save_reference=None if is_kept else reference,
        )
        fids.append(run_fid(fid)["fid"])
    return fids


def sample_request(options: Options) -> sample.Sample:
    """The options that are sample.py's."""
    names = [field.name for field in dataclasses.fields(sample.Sample)]
    return sample.Sample(**{name: getattr(options, name) for name in names})


def check(options: Options, config: Config) -> None:
    """Raises InputError before anything is trained or drawn."""
    data, out = config.data, Path(options.out)
    is_cifar10 = (data.name, data.image_size) == ("cifar10", 32)
    require(is_cifar10, "workdir", options.workdir, "a run on cifar10 at data.image_size 32")
    is_picture = out.suffix == ".png" and out.parent.is_dir()
    require(is_picture, "--out", options.out, "a .png file in a folder that exists")
    if options.inception is not None:
        load_inception(options.inception)
        of_all = not options.classes
        require(of_all, "--classes", options.classes, "left out with --inception: FID is of all")


def main() -> None:
    options = cli.parse(Options, sys.argv[1:], "benchmarks/cifar10.py", __doc__)
    workdir, step, _ = intact.find(Path(options.workdir), options.step)
    if os.path.dirname(options.out) == "":
        options = dataclasses.replace(options, out=str(workdir / options.out))
    config = intact.stored_config(workdir, step)
    check(options, config)
    split = config.data.split
    accuracy = real_images(split).accuracy
    print(f"accuracy of the classifier on real test images: {accuracy:.1%}", flush=True)
    images, labels = draw(sample_request(options))
    print_table(
        {
            "real test images": figures_of_test_images(len(images), split),
            f"{len(images):,} samples": judge(images, labels, split),
        },
        "the small classifier's features, which is no FID",
    )
    save_neighbours(options.out, images, split)
    say(f"wrote {options.out}")
    if options.inception is not None:
        score_by_protocol(options, config)


if __name__ == "__main__":
    with cli.exit_status("benchmarks/cifar10.py"):
        main()
