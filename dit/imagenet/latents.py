"""Images to VAE latents: python -m dit.imagenet.latents DATASET --vae VAE_DIR --out OUT

DATASET is a TFDS data set, or a folder with a subfolder of pictures for each class. Each is cropped
to the centre. The mean and the standard deviation of its posterior, and of its mirror image's, are
kept in float16: 32 KiB at 256x256, 42 GB for ImageNet. OUT is a TFDS folder in ArrayRecord, which
Grain reads too. Killed and started again, it goes on at the first shard that is missing, to the
same bytes.
"""

from dit.signals import StopRequest

if __name__ == "__main__":
    StopRequest().end_at_once("dit.imagenet.latents")

import functools
import math
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from dit import cli
from dit.config import LATENT_CHANNELS, VAE_FACTOR, LocalPath, PositiveInt, require
from dit.hosts import (
    command_refused_together,
    connect_hosts,
    ended_together,
    refused_together,
)

DatasetName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATASET")]


@dataclass(frozen=True)
class MakeLatents:
    name: DatasetName  # a TFDS data set of colour images with one label, or a folder of pictures
    vae: str  # folder of a diffusers AutoencoderKL: config.json and its weights
    out: LocalPath  # folder to write; --data.latents of train.py
    size: PositiveInt = 256  # side of the cropped image, in pixels; a multiple of 8
    split: str = "train"  # split to encode, or a slice of it, such as train[:90%]
    batch_size: PositiveInt = 32  # images at a time, on each device
    shard_size: PositiveInt = 1024  # images in one file
    distributed: bool = False  # join other hosts, which share the folder OUT


if __name__ == "__main__":  # --help and bad input are answered before jax is imported
    cli.use_compilation_cache()
    joins = cli.joins_hosts(sys.argv[1:])
    with cli.exit_status("dit.imagenet.latents"), command_refused_together(joins):
        OPTIONS = cli.parse(MakeLatents, sys.argv[1:], "python -m dit.imagenet.latents", __doc__)

import jax
import jax.numpy as jnp
import numpy as np

from dit.data import open_decoded, tfds_config
from dit.files import claim_folder, renaming, whole
from dit.folder import is_folder, split_name
from dit.generation import num_vae_parts
from dit.imagenet.vae import VAE, load_vae
from dit.images import from_uint8
from dit.progress import Progress, say
from dit.sharding import local_mesh, map_parts, place_rows, replicated
from dit.tfds import Decoded, Record, Undecodable

Example = dict[str, Any]  # {"latent": float16 [2, h, w, 8], "label": int}


# Images to latents


@functools.partial(jax.jit, static_argnames="parts")
def encode(vae: VAE, images: jax.Array, parts: int = 1) -> jax.Array:
    """uint8 `[B, H, W, 3]` to float16 `[B, 2, h, w, 8]`, in equal parts to save memory.

    Mean and standard deviation of the image, then of its mirror image.
    """

    def moments(images: jax.Array) -> jax.Array:
        mean, log_variance = vae.encode(from_uint8(images))
        return jnp.concatenate([mean, jnp.exp(0.5 * log_variance)], axis=-1)  # [B, h, w, 8]

    def both_sides(images: jax.Array) -> jax.Array:
        sides = [moments(images), moments(images[:, :, ::-1])]
        return jnp.stack(sides, axis=1).astype(jnp.float16)

    return map_parts(both_sides, images, parts)


def read(records: Decoded, i: int) -> Record | None:
    """Record i. None, after a line on stderr, if its image is damaged."""
    try:
        return records[i]
    except Undecodable as error:
        print(f"skipped: {error}", file=sys.stderr, flush=True)
        return None


def decoded_batches(records: Decoded, indices: range, batch_size: int) -> Iterator[list[Record]]:
    """The records that can be decoded, in order, read by threads."""
    for first in range(indices.start, indices.stop, batch_size):
        chunk = range(first, min(first + batch_size, indices.stop))
        batch = records.pool.map(functools.partial(read, records), chunk)
        if decoded := [record for record in batch if record is not None]:
            yield decoded


def encode_records(
    vae: VAE, records: Decoded, indices: range, batch_size: int, mesh: jax.sharding.Mesh
) -> Iterator[Example]:
    """The latents of the records that can be decoded, in order.

    The devices encode one batch while the next is decoded.
    """
    parts = num_vae_parts(batch_size, records.config.image_size, mesh.devices.size)
    before = ()
    for batch in decoded_batches(records, indices, batch_size):
        yield from before
        images = np.stack([record["image"] for record in batch])
        before = examples(encode(vae, place_rows(images, batch_size, mesh), parts), batch)
    yield from before


def examples(moments: jax.Array, batch: list[Record]) -> Iterator[Example]:
    """One for each record; further rows of `moments` are padding."""
    for latent, record in zip(np.asarray(moments), batch, strict=False):
        yield {"latent": latent, "label": record["label"]}


# Latents to files


def features_of(size: int, class_names: tuple[str, ...]) -> Any:
    """What TFDS is told of the records: the latents of images of `size` pixels, and labels."""
    import tensorflow_datasets as tfds

    side = size // VAE_FACTOR
    shape = (2, side, side, 2 * LATENT_CHANNELS)
    latent = tfds.features.Tensor(shape=shape, dtype=np.float16, encoding="bytes")
    label = tfds.features.ClassLabel(names=class_names)
    return tfds.features.FeaturesDict({"latent": latent, "label": label})


class Shard(NamedTuple):
    path: Path
    indices: range  # of the records that it holds


def plan_shards(options: MakeLatents, num_records: int) -> list[Shard]:
    """The files that hold the latents, under the names that TFDS expects."""
    count = math.ceil(num_records / options.shard_size)
    name = re.sub(r"[^a-z0-9_]", "_", set_name(options))
    prefix = f"{name}_latents-{split_name(options.split)}.array_record"
    shards = []
    for i in range(count):
        path = Path(options.out) / f"{prefix}-{i:05d}-of-{count:05d}"
        start = i * options.shard_size
        stop = min(start + options.shard_size, num_records)
        shards.append(Shard(path, range(start, stop)))
    return shards


def set_name(options: MakeLatents) -> str:
    """The data set's name, or that of its folder, which TFDS wants to begin with a letter."""
    if not is_folder(options.name):
        return options.name
    return f"folder_{Path(options.name).resolve().name.lower()}"


def write_shard(path: Path, features: Any, examples: Iterator[Example]) -> None:
    """Writes examples as an ArrayRecord file."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    with whole(path) as unfinished:  # whose name TFDS does not take for a shard's
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")  # read one by one, in any order
        for example in examples:
            proto = tf_example_pb2.Example.FromString(features.serialize_example(example))
            # TFDS leaves the order of the fields to the process
            writer.write(proto.SerializeToString(deterministic=True))
        writer.close()


def write_info(out: Path, features: Any, split: str, shards: list[Path]) -> int:
    """Makes a TFDS folder of the shards, and returns the number of their records."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    lengths = [ArrayRecordReader(str(shard)).num_records() for shard in shards]
    template = tfds.core.ShardedFileTemplate(
        data_dir=out,
        dataset_name=shards[0].name.split("-")[0],
        split=split,
        filetype_suffix="array_record",
    )
    info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=lengths,
        num_bytes=sum(shard.stat().st_size for shard in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=out,
        features=features,
        split_infos=[info],
        check_data=False,
        description="Mean and standard deviation of VAE posteriors, by dit.imagenet.latents.",
    )
    return sum(lengths)


# The command


def run(options: MakeLatents) -> None:
    """Encodes what the options ask for. Raises InputError."""
    connect_hosts(options.distributed, "--distributed")
    with refused_together(options.distributed):
        check(options)
        records, class_names = open_records(options)
        vae = load_vae(options.vae)
    claim(options, vae)

    features = features_of(options.size, class_names)
    shards = plan_shards(options, len(records))
    mine = shards[jax.process_index() :: jax.process_count()]
    missing = [shard for shard in mine if not shard.path.exists()]
    total, left = (sum(len(shard.indices) for shard in part) for part in (mine, missing))
    progress = Progress(total, "image", total - left)

    mesh = local_mesh()
    vae = jax.device_put(vae, replicated(mesh))
    batch_size = options.batch_size * mesh.devices.size
    with ended_together(options.distributed):  # until all shards are written
        for shard in missing:
            latents = encode_records(vae, records, shard.indices, batch_size, mesh)
            write_shard(shard.path, features, progress.over(latents))
        progress.close()
    if jax.process_index() == 0:
        paths = [shard.path for shard in shards]
        count = write_info(Path(options.out), features, split_name(options.split), paths)
        report(options, count, len(records) - count, progress.rate)


def check(options: MakeLatents) -> None:
    size, split, name = options.size, options.split, options.name
    expected = f"a multiple of {VAE_FACTOR}, the VAE's factor"
    require(size % VAE_FACTOR == 0, "--size", size, expected)
    is_one = not split.startswith("all")
    require(is_one, "--split", split, "one split, such as train or validation")
    require(name != "digits", "DATASET", name, "a TFDS data set of colour images")


def open_records(options: MakeLatents) -> tuple[Decoded, tuple[str, ...]]:
    """The images, cropped as they are read, and the names of their classes. Raises InputError."""
    with renaming({"data.name": "DATASET", "data.split": "--split"}):
        config = tfds_config(options.name, options.split, options.size)
        has_colours = config.channels == 3
        require(has_colours, "DATASET", options.name, "one of colour images, which the VAE takes")
        records, class_names = open_decoded(config)
    first = records.source[0]
    is_labelled = first[records.label_key] >= 0
    require(is_labelled, "--split", options.split, "a split with labels")
    return records, class_names


def claim(options: MakeLatents, vae: VAE) -> None:
    """Makes the folder OUT for these options and this VAE, or checks that it was made for them.

    Raises InputError.
    """
    checksum = 0
    for leaf in jax.tree.leaves(vae):
        checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
    request = {
        "dataset": options.name,
        "split": options.split,
        "size": options.size,
        "shard_size": options.shard_size,
        "vae_crc32": checksum,
    }
    out = Path(options.out)
    with refused_together(options.distributed):
        if jax.process_index() == 0:
            claim_folder(out, request, "--out")
    with refused_together(options.distributed):
        require(out.is_dir(), "--out", options.out, "a folder that all hosts share")
        claim_folder(out, request, "--out")


def report(options: MakeLatents, written: int, skipped: int, rate: float) -> None:
    line = f"wrote {options.out}: latents of {written:,} images and their mirror images"
    line += f", {rate:,.1f} images/s"
    if skipped:
        line += f", {skipped:,} skipped that cannot be decoded"
    say(line)


if __name__ == "__main__":
    with cli.exit_status("dit.imagenet.latents"):
        run(OPTIONS)
