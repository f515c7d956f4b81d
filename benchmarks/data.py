"""Images/s that the input delivers: python benchmarks/data.py [--seconds 5] [--rounds 3]

Reads batches as train.py does, and does nothing with them: digits and CIFAR-10 from memory, JPEGs
of ImageNet decoded at 256x256 when they are read, and random latents in a temporary folder, of as
many files as a batch has images. The sources take turns. Their peer is what training takes on one
H100 at 40 % of its peak. Files are in the page cache after the first round, so a slow disk does not
show.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from table import make_row, report

from dit import cli
from dit.chips import find_chip
from dit.config import Data, InputError, PositiveFloat, PositiveInt
from dit.data import Dataset, batches, open_dataset, tfds_config
from dit.imagenet import latents
from dit.model import TRAINING_FLOPS, multiply_adds
from dit.state import make_model
from dit.tfds import open_tfds

BATCH = 256
NUM_LATENTS = 8192
IMAGES_IN_A_FILE = 32
MFU = 0.4
FEEDS = {  # presets that train on a source
    "CIFAR-10, in memory": ("cifar10",),
    "latents of 256x256": ("imagenet256_s2", "imagenet256_b2"),
}


@dataclass(frozen=True)
class Options:
    seconds: PositiveFloat = 5.0  # seconds of reading, for each source and round
    rounds: PositiveInt = 3  # rounds of reading
    json: str | None = None  # file to append the table's rows to


# Sources


def open_jpegs() -> Dataset:
    """ImageNet, however much of it there is, decoded when it is read."""
    return Dataset(*open_tfds(tfds_config("imagenet2012", "train", 256)))


def random_latents(indices: range) -> Iterator[latents.Example]:
    for i in indices:
        rng = np.random.default_rng(i)
        mean = 5 * rng.standard_normal((2, 32, 32, 4))
        std = 0.1 * rng.random((2, 32, 32, 4))
        yield {"latent": np.concatenate([mean, std], axis=-1).astype(np.float16), "label": i % 1000}


def open_latents(folder: str) -> Dataset:
    """Writes random latents of 256x256 images, and opens them."""
    options = latents.MakeLatents("random", "", folder, shard_size=IMAGES_IN_A_FILE)
    features = latents.features_of(options.size, tuple(f"class {k}" for k in range(1000)))
    shards = latents.plan_shards(options, NUM_LATENTS)
    for shard in shards:
        latents.write_shard(shard.path, features, random_latents(shard.indices))
    latents.write_info(Path(folder), features, "train", [shard.path for shard in shards])
    config = cli.load_preset("imagenet256_b2").data
    return open_dataset(replace(config, latents=folder))


def open_sources(folder: str) -> dict[str, Dataset]:
    """Every source that this machine has; says which it has not."""
    cifar10 = Data(name="cifar10", image_size=32, channels=3)
    sources = {
        "digits, in memory": partial(open_dataset, Data()),
        "CIFAR-10, in memory": partial(open_dataset, cifar10),
        "ImageNet's JPEGs at 256x256, decoded when read": open_jpegs,
        "latents of 256x256": partial(open_latents, folder),
    }
    found = {}
    for name, open_source in sources.items():
        try:
            found[name] = open_source()
        except InputError as error:
            print(f"without {name}: {error}")
    return found


# Rates


def rate(dataset: Dataset, seconds: float) -> float:
    """Images/s of batches, after those that are read beforehand."""
    stream = batches(dataset, BATCH, seed=0)
    for _ in range(8):
        next(stream)
    start = time.perf_counter()
    images = 0
    while time.perf_counter() < start + seconds:
        images += len(next(stream)["label"])
    taken = time.perf_counter() - start
    stream.close()
    return images / taken


def demand(preset: str) -> float:
    """Images/s that training takes on one H100."""
    config = cli.load_preset(preset)
    model = jax.eval_shape(partial(make_model, config), jax.random.key(0))
    return MFU * find_chip("H100").peak / (TRAINING_FLOPS * multiply_adds(model))


def main() -> None:
    options = cli.parse(Options, sys.argv[1:], "benchmarks/data.py", __doc__)
    with tempfile.TemporaryDirectory() as folder:
        sources = open_sources(folder)
        rates = {name: [] for name in sources}
        for _ in range(options.rounds):
            for name, dataset in sources.items():
                rates[name].append(rate(dataset, options.seconds))

    rows = []
    for name, measured in rates.items():
        presets = FEEDS.get(name, ())
        for preset in presets:
            peer = f"{preset} on one H100 at {MFU:.0%} MFU"
            rows.append(make_row("data", name, "images/s", measured, peer, [demand(preset)]))
        if not presets:
            rows.append(make_row("data", name, "images/s", measured))
    report(rows, options.json)


if __name__ == "__main__":
    with cli.exit_status("benchmarks/data.py"):
        main()
