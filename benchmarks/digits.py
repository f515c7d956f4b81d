"""Judges a model of the digits: python benchmarks/digits.py runs/digits [sample.py's options]

Draws 100 images a class, unguided, and prints two figures: the share that an SVC fitted on the real
digits puts in the class that was asked for, and the Frechet distance between samples and real
digits in pixel space ([-1, 1], 64 dimensions). For scale it prints the same figures of real digits.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

import sample
from dit import cli
from dit.metrics import frechet_distance, gaussian_of


def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """The real digits as rows `[1797, 64]` in [-1, 1], and their labels `[1797]`."""
    rows, labels = load_digits(return_X_y=True)
    return rows / 8 - 1, labels


def pixel_rows(images: np.ndarray) -> np.ndarray:
    """uint8 images `[N, H, W, C]` as rows `[N, H W C]` in [-1, 1]."""
    return images.reshape(len(images), -1) / 127.5 - 1


def accuracy(images: np.ndarray, labels: np.ndarray) -> float:
    """The share of uint8 digits `[N, 8, 8, 1]` that an SVC puts in the class of their label."""
    rows, real_labels = real_digits()
    classifier = SVC(C=10).fit(rows, real_labels)
    return classifier.score(pixel_rows(images), labels)


def distance(images: np.ndarray) -> float:
    """The Frechet distance of uint8 digits `[N, 8, 8, 1]` to the real ones, in pixel space."""
    rows, _ = real_digits()
    return frechet_distance(gaussian_of(pixel_rows(images)), gaussian_of(rows))


def judge_real_digits() -> tuple[float, float]:
    """Accuracy and Frechet distance of one half of the real digits, judged by the other."""
    rows, labels = real_digits()
    a, b, labels_a, labels_b = train_test_split(
        rows, labels, test_size=0.5, random_state=0, stratify=labels
    )
    classifier = SVC(C=10).fit(a, labels_a)
    return classifier.score(b, labels_b), frechet_distance(gaussian_of(a), gaussian_of(b))


def draw(options: sample.Sample) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 `[1000, 8, 8, 1]`, and their labels `[1000]`. Raises InputError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "digits.npz"
        arrays = np.load(sample.run(dataclasses.replace(options, out=str(out))))
        return arrays["arr_0"], arrays["arr_1"]


def main() -> None:
    argv = [*sys.argv[1:], "--per-class", "100"]
    options = cli.parse(sample.Sample, argv, "benchmarks/digits.py", __doc__)
    share, frechet = judge_real_digits()
    print(
        f"real digits, one half against the other: accuracy {share:.1%}, "
        f"Frechet distance {frechet:.2f}"
    )
    images, labels = draw(options)
    share, frechet = accuracy(images, labels), distance(images)
    print(f"{len(images)} samples: accuracy {share:.1%}, Frechet distance {frechet:.2f}")


if __name__ == "__main__":
    with cli.exit_status("benchmarks/digits.py"):
        main()
