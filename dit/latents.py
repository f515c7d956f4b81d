"""Images to VAE latents on disk: python -m dit.latents imagenet2012 --vae VAE_DIR --size 256 --out latents/imagenet256

Each image of a TFDS data set is cropped to the centre, and the mean and the standard deviation of its posterior, and of its mirror
image's, are kept in float16: 32 KiB at 256x256, 42 GB for ImageNet. OUT is a TFDS folder in ArrayRecord, which Grain reads too. Killed and
started again, it goes on at the first shard that is missing, to the same bytes.
"""

import json
import re
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import multihost_utils

from dit import config as dit_config
from dit import data
from dit.config import InputError, require
from dit.images import from_uint8
from dit.log import Progress
from dit.sharding import batch_sharding, connect, make_mesh, map_parts, parts_of, replicated
from dit.weights import load_vae


AT_ONCE = 2**19  # pixels that the VAE encodes at a time on each device: 8 images at 256x256


@dataclass(frozen=True)
class LatentOptions:
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATASET")]  # a TFDS data set of images with one label
    vae: str  # folder of a diffusers AutoencoderKL: config.json and its weights
    out: str  # folder to write; --data.latents of train.py
    size: int = 256  # side of the cropped image, in pixels; a multiple of 8
    split: str = "train"  # TFDS split
    batch_size: int = 32  # images at a time, on each device
    shard_size: int = 1024  # images in one file
    distributed: bool = False  # several hosts, which share the folder OUT: call jax.distributed.initialize() first


@partial(jax.jit, static_argnames="parts")
def encode(vae, images: jax.Array, parts: int = 1) -> jax.Array:
    """uint8 `[B, H, W, 3]` to float16 `[B, 2, h, w, 8]`: mean and standard deviation, of the image and of its mirror image."""
    def both_sides(images):
        moments = []
        for side in (images, images[:, :, ::-1]):
            mean, log_variance = vae.encode(from_uint8(side))
            moments.append(jnp.concatenate([mean, jnp.exp(0.5 * log_variance)], axis=-1))
        return jnp.stack(moments, axis=1).astype(jnp.float16)

    return map_parts(both_sides, images, parts)


def read(records: data.Decoded, i: int) -> dict[str, np.ndarray] | None:
    """Record i, or None, said, where it cannot be decoded."""
    try:
        return records[i]
    except data.Undecodable as error:
        print(f"skipped: {error}", file=sys.stderr, flush=True)
        return None


def encoded(vae, records: data.Decoded, indices: range, batch_size: int, mesh) -> Iterator[dict[str, np.ndarray]]:
    """The latents of the records that can be decoded, in order; the next batch is decoded while the devices are at work."""
    with ThreadPoolExecutor(16) as pool:
        at_work = []
        for first in [*range(indices.start, indices.stop, batch_size), None]:
            chunk = range(0) if first is None else range(first, min(first + batch_size, indices.stop))
            found = [record for record in pool.map(lambda i: read(records, i), chunk) if record is not None]
            for moments, labels in at_work:
                yield from ({"latent": latent, "label": label} for latent, label in zip(np.asarray(moments), labels))
            at_work = []
            if found:
                images = np.stack([found[min(i, len(found) - 1)]["image"] for i in range(batch_size)])  # the last repeated
                parts = parts_of(batch_size // mesh.devices.size, AT_ONCE // images[0, ..., 0].size)
                at_work = [(encode(vae, jax.device_put(images, batch_sharding(mesh)), parts), [record["label"] for record in found])]


def write_shard(path: Path, features, examples: Iterator[dict[str, np.ndarray]]) -> int:
    """Writes examples as an ArrayRecord file, whole or not at all, and returns their number."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    unfinished, count = path.with_name("unfinished-" + path.name), 0
    writer = ArrayRecordWriter(str(unfinished), "group_size:1")  # read one by one, in any order
    for count, example in enumerate(examples, start=1):
        proto = tf_example_pb2.Example.FromString(features.serialize_example(example))
        writer.write(proto.SerializeToString(deterministic=True))  # the order of its fields is the process's own otherwise
    writer.close()
    unfinished.rename(path)
    return count


def check_settings(out: Path, settings: dict) -> None:
    """Writes the settings to OUT, or raises InputError where those that it was begun with are others."""
    file = out / "latents.json"
    if jax.process_index() == 0 and not file.exists():
        file.with_suffix(".tmp").write_text(json.dumps(settings, indent=2) + "\n")
        file.with_suffix(".tmp").rename(file)
    multihost_utils.sync_global_devices("the settings are there")
    try:
        begun = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"--out: {str(file)!r} should hold the settings that the folder was begun with, and is damaged") from error
    for name, value in settings.items():
        was = begun.get(name)
        require(was == value, f"--out: {str(out)!r} was begun with {name}", was, f"{value!r}, or --out another folder")


def write_info(out: Path, features, split: str, shards: list[Path]) -> int:
    """Makes a TFDS folder of the shards, and returns the number of their records."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    lengths = [ArrayRecordReader(str(shard)).num_records() for shard in shards]
    template = tfds.core.ShardedFileTemplate(data_dir=out, dataset_name=shards[0].name.split("-")[0], split=split,
                                             filetype_suffix="array_record")
    info = tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=sum(shard.stat().st_size for shard in shards),
                               filename_template=template)
    tfds.folder_dataset.write_metadata(data_dir=out, features=features, split_infos=[info], check_data=False,
                                       description="Mean and standard deviation of VAE posteriors, by dit.latents.")
    return sum(lengths)


def run(options: LatentOptions) -> None:
    """Encodes what the options ask for. Raises InputError."""
    import tensorflow_datasets as tfds

    require(options.size > 0 and options.size % 8 == 0, "--size", options.size, "a multiple of 8, the VAE's factor")
    require(min(options.batch_size, options.shard_size) > 0, "--batch-size and --shard-size", (options.batch_size, options.shard_size),
            "more than 0")
    require(not options.split.startswith("all"), "--split", options.split, "one split, such as train or validation")
    require(options.name != "digits", "DATASET", options.name, "a TFDS data set of colour images")
    out = Path(options.out)
    connect(options.distributed, "--distributed")
    config = data.tfds_data(options.name, options.split, options.size)
    require(config.channels == 3, "DATASET", options.name, "one of colour images, which the VAE takes")
    records, names = data.decoded(config)
    require(records.source.__getitems__([0])[0][records.label_key] >= 0, "--split", options.split, "a split with labels")
    vae = load_vae(options.vae)
    checksum = 0
    for leaf in jax.tree.leaves(vae):
        checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_settings(out, {"dataset": options.name, "split": options.split, "size": options.size, "shard_size": options.shard_size,
                             "vae_crc32": checksum})
    except OSError as error:
        raise InputError(f"--out: {options.out!r} should be a folder that can be written ({error.strerror})") from error

    devices = jax.local_devices()
    mesh = make_mesh(dit_config.Mesh(), len(devices), devices=devices)
    vae, side, N = jax.device_put(vae, replicated(mesh)), options.size // 8, len(records)
    features = tfds.features.FeaturesDict({
        "latent": tfds.features.Tensor(shape=(2, side, side, 8), dtype=np.float16, encoding="bytes"),
        "label": tfds.features.ClassLabel(names=names)})
    split, count = re.match(r"\w+", options.split).group(), -(-N // options.shard_size)
    shards = [out / f"{re.sub(r'[^a-z0-9_]', '_', options.name)}_latents-{split}.array_record-{i:05d}-of-{count:05d}" for i in range(count)]
    mine = list(enumerate(shards))[jax.process_index()::jax.process_count()]
    progress = Progress(N, "images", sum(min(options.shard_size, N - i * options.shard_size) for i, s in enumerate(shards) if s.exists()))
    for i, shard in mine:
        if not shard.exists():
            indices = range(i * options.shard_size, min((i + 1) * options.shard_size, N))
            write_shard(shard, features, progress.over(encoded(vae, records, indices, options.batch_size * len(devices), mesh)))
    multihost_utils.sync_global_devices("all shards are written")
    if jax.process_index() == 0:
        written = write_info(out, features, split, shards)
        print(f"wrote {out}: latents of {written:,} images and their mirror images, {progress.rate:,.1f} images/s"
              + f", {N - written:,} skipped that cannot be decoded" * (written < N))


def main(argv: list[str] | None = None) -> None:
    with dit_config.input_errors("dit.latents"):
        run(dit_config.parse(LatentOptions, sys.argv[1:] if argv is None else argv, "python -m dit.latents", __doc__))


if __name__ == "__main__":
    main()
