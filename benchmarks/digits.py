"""Judges a model of the digits: python benchmarks/digits.py runs/digits [sample.py's options]

Draws 100 images a class, unguided, and prints two figures: the share that an SVC fitted on the real digits puts in the class that was
asked for, and the Frechet distance between the samples' and the real digits' Gaussians in pixel space ([-1, 1], 64 dimensions). For
scale it prints the same figures of real digits.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from dit import fid  # noqa: E402
from dit.config import input_errors, parse  # noqa: E402


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between the Gaussians of rows a and b `[N, D]`."""
    return fid.frechet_distance(*(fid.Gaussian(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b)))


def judge(images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(accuracy, Frechet distance) of images `[N, 64]` in [-1, 1]."""
    real, real_labels = load_digits(return_X_y=True)
    real = real / 8 - 1
    return SVC(C=10).fit(real, real_labels).score(images, labels), frechet_distance(images, real)


def main() -> None:
    real, labels = load_digits(return_X_y=True)
    real = real / 8 - 1
    a, b, labels_a, labels_b = train_test_split(real, labels, test_size=0.5, random_state=0, stratify=labels)
    print(f"real digits, one half against the other: accuracy {SVC(C=10).fit(a, labels_a).score(b, labels_b):.1%}, "
          f"Frechet distance {frechet_distance(a, b):.2f}")
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/digits.npz"
        argv = [*sys.argv[1:], "--per-class", "100", "--out", out]
        with input_errors("benchmarks/digits.py"):
            sample.run(parse(sample.Sample, argv, "benchmarks/digits.py", __doc__))
        arrays = np.load(out)
    images = arrays["arr_0"].reshape(len(arrays["arr_0"]), -1) / 127.5 - 1
    accuracy, distance = judge(images, arrays["arr_1"])
    print(f"{len(images)} samples: accuracy {accuracy:.1%}, Frechet distance {distance:.2f}")


if __name__ == "__main__":
    main()
