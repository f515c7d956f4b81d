"""Judges a model of the digits: python benchmarks/digits.py runs/digits [sample.py's options]

Draws 100 images a class, unguided, and prints four figures beside those of real digits: the share
that an SVC puts in the class that was asked for; the Frechet distance in pixel space ([-1, 1], 64
dimensions); the median distance to the nearest training image, over that of each training image to
the nearest other (neighbours); and the share that is nearer to a training image than 95 % of those
are to another (near copies). A model that repeats its training images shows in the last two.

The judges are the digits that the run has not seen, after `--data.split 'train[:50%]'`, or all of
them where it was trained on all. Of the real digits' figures, accuracy is that of an SVC on digits
that it was not fitted on. The Frechet distance is that of the run's training images to the others;
without others, that of as many of them as there are samples, drawn again with replacement. The last
two are 1 and 5 % by their definition.
"""

import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from judge import NEAR, Figures, Real, draw, judge_features, nearest, print_table
from sklearn.datasets import load_digits
from sklearn.model_selection import KFold, cross_val_score
from sklearn.svm import SVC

import sample
from dit import cli, intact
from dit.config import require
from dit.data import split_rows
from dit.metrics import frechet_distance, gaussian_of

FEWEST = 300  # digits to judge by
DRAWS = 10  # of real digits, whose mean Frechet distance is printed


class Digits(NamedTuple):
    """The real digits, as those see them that judge a model trained on a split."""

    rows: np.ndarray  # those that judge, as rows [M, 64] in [-1, 1]
    labels: np.ndarray  # [M]
    classifier: SVC  # fitted on them
    real: Real  # features are pixels
    are_seen: bool  # whether the model was trained on those that judge


def pixel_rows(images: np.ndarray) -> np.ndarray:
    """uint8 images `[N, H, W, C]` as rows `[N, H W C]` in [-1, 1]."""
    return images.reshape(len(images), -1) / 127.5 - 1


@cache
def real_digits(split: str) -> Digits:
    """For a model that was trained on a split. Raises InputError if too few are left to judge."""
    pixels, labels = load_digits(return_X_y=True)
    rows = pixels / 8 - 1
    seen = split_rows(split, len(rows))
    unseen = np.setdiff1d(np.arange(len(rows)), seen)
    enough = len(unseen) == 0 or len(unseen) >= FEWEST
    require(enough, "data.split", split, f"train, or leave {FEWEST} digits to judge by")
    judges = unseen if len(unseen) else seen
    training = rows[seen]
    classifier = SVC(C=10).fit(rows[judges], labels[judges])
    others = nearest(training, training, 2)[0][:, 1]  # each but itself
    real = Real(gaussian_of(rows[judges]), training, others)
    return Digits(rows[judges], labels[judges], classifier, real, len(unseen) == 0)


def judge(images: np.ndarray, labels: np.ndarray, split: str) -> Figures:
    """The figures of uint8 digits `[N, 8, 8, 1]` of a model that was trained on a split."""
    digits = real_digits(split)
    rows = pixel_rows(images)
    return judge_features(rows, digits.classifier.predict(rows), labels, digits.real)


def figures_of_real_digits(count: int, split: str) -> Figures:
    """The figures of real digits, to hold those of `count` samples against."""
    digits = real_digits(split)
    folds = KFold(10, shuffle=True, random_state=0)
    accuracy = cross_val_score(SVC(C=10), digits.rows, digits.labels, cv=folds).mean()
    rng, training = np.random.default_rng(0), digits.real.training
    others = [rng.choice(training, count) for _ in range(DRAWS)] if digits.are_seen else [training]
    distances = [frechet_distance(gaussian_of(rows), digits.real.reference) for rows in others]
    return {
        "accuracy": float(accuracy),
        "frechet_distance": float(np.mean(distances)),
        "neighbour_ratio": 1.0,
        "near_copies": NEAR,
    }


def main() -> None:
    argv = [*sys.argv[1:], "--per-class", "100"]
    options = cli.parse(sample.Sample, argv, "benchmarks/digits.py", __doc__)
    workdir, step, _ = intact.find(Path(options.workdir), options.step)
    data = intact.stored_config(workdir, step).data
    require(data.name == "digits", "workdir", options.workdir, "a run on the digits")
    judges = len(real_digits(data.split).rows)
    print(f"judged by {judges} real digits, of a run on data.split {data.split!r}")
    images, labels = draw(options)
    print_table(
        {
            "real digits": figures_of_real_digits(len(images), data.split),
            f"{len(images):,} samples": judge(images, labels, data.split),
        },
        "pixel space",
    )


if __name__ == "__main__":
    with cli.exit_status("benchmarks/digits.py"):
        main()
