"""What a style does to CIFAR-10 samples: python benchmarks/style.py WORKDIR [--samples SAMPLES]

Draws samples of a CIFAR-10 model without a style, and with the statistics of a real image of low,
of ordinary and of high contrast. Prints how far the samples' channel means and deviations are from
the style's, and the share that a small classifier (classifier.py), trained here on the real images
the first time, puts in the class that was asked for.
"""

import dataclasses
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from classifier import classify, load_or_train
from PIL import Image

from dit import cli, intact
from dit.config import PositiveInt, require
from dit.data import open_dataset
from sample import Sample
from sample import run as run_sample

Workdir = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORKDIR")]


@dataclass(frozen=True)
class Options:
    workdir: Workdir  # folder of a CIFAR-10 run
    samples: PositiveInt = 500  # samples with each style


def statistics(images: np.ndarray) -> np.ndarray:
    """Channel means and deviations `[N, 2 C]` of uint8 images `[N, H, W, C]`, in [-1, 1]."""
    x = images / 127.5 - 1
    return np.concatenate([x.mean(axis=(1, 2)), x.std(axis=(1, 2))], axis=1)


def choose_styles(real: np.ndarray) -> dict[str, int]:
    """The indices of three images, by their contrast: of light, and between red and blue."""
    red, _, blue, *deviations = real.T
    order = np.argsort(np.sum(deviations, axis=0) + np.abs(red - blue))
    return {"faint": order[100], "ordinary": order[len(order) // 2], "strong": order[-100]}


def draw(options: Options, style: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Samples, uint8 `[N, 32, 32, 3]`, with an image's style, and their labels `[N]`."""
    with tempfile.TemporaryDirectory() as folder:
        picture, out = Path(folder) / "style.png", Path(folder) / "samples.npz"
        if style is not None:
            Image.fromarray(style).save(picture)
        request = Sample(
            options.workdir,
            num_samples=options.samples,
            guidance=2.0,
            style=None if style is None else str(picture),
            out=str(out),
        )
        arrays = np.load(run_sample(request))
        return arrays["arr_0"], arrays["arr_1"]


def main() -> None:
    options = cli.parse(Options, sys.argv[1:], "benchmarks/style.py", __doc__)
    workdir = Path(options.workdir)
    step, _ = intact.newest(workdir)
    data = intact.stored_config(workdir, step).data
    is_cifar10 = data.name == "cifar10"
    require(is_cifar10, "WORKDIR", options.workdir, "the folder of a CIFAR-10 run")

    dataset = open_dataset(data)
    classifier = load_or_train(dataset.records.images, dataset.records.labels)
    held_out = open_dataset(dataclasses.replace(data, split="test")).records
    images, labels = held_out.images[:2000], held_out.labels[:2000]
    share = (classify(classifier, images)[1] == labels).mean()
    print(f"the classifier on held-out real images: {share:.1%}")

    images, labels = draw(options, style=None)
    plain = statistics(images)
    plain_share = (classify(classifier, images)[1] == labels).mean()
    header = f"{'style':<12}{'distance without':>18}{'with':>10}{'ratio':>8}"
    print(header + f"{'accuracy without':>18}{'with':>8}")
    real = statistics(dataset.records.images)
    for name, index in choose_styles(real).items():
        images, labels = draw(options, dataset.records.images[index])
        share = (classify(classifier, images)[1] == labels).mean()
        without = np.abs(plain - real[index]).mean()
        with_style = np.abs(statistics(images) - real[index]).mean()
        ratio = without / with_style
        distances = f"{without:>18.4f}{with_style:>10.4f}{ratio:>8.1f}"
        print(f"{name:<12}{distances}{plain_share:>18.1%}{share:>8.1%}")


if __name__ == "__main__":
    with cli.exit_status("benchmarks/style.py"):
        main()
