"""Any TFDS data set of images with one label: found or downloaded, and decoded without TensorFlow.

Images are decoded when they are read. One that is damaged is named and counted, and the next takes
its place, so what stands at an index never changes.
"""

import contextlib
import inspect
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dit.config import Data, InputError, nearest, one_line, require
from dit.images import UNDECODABLE, centre_crop
from dit.prepare import download, faulty_builder, prepare

MAX_DAMAGED = 0.01  # of the records; with more the data set is refused
MAX_NAMED = 20  # damaged records that are told of

Record = dict[str, np.ndarray]  # {"image": uint8 [H, W, C], "label": int32}, or with a "mask"
Batch = dict[str, np.ndarray]  # records, stacked


class Undecodable(InputError):
    """A record whose image is damaged."""


def open_bytes(stored: bytes) -> Image.Image:
    return Image.open(io.BytesIO(stored))


class Decoded:
    """A TFDS data source as records: decoded, cropped and resized when they are read.

    `open_image` opens what the source has of an image.
    """

    def __init__(
        self,
        source: Any,
        image_key: str,
        label_key: str,
        config: Data,
        open_image: Callable[[Any], Image.Image] = open_bytes,
        max_damaged: float = MAX_DAMAGED,
    ):
        self.source = source
        self.image_key = image_key
        self.label_key = label_key
        self.config = config
        self.open_image = open_image
        self.max_damaged = max_damaged
        self.damaged: set[int] = set()
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(os.cpu_count())

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Record:
        """Record i. Raises Undecodable if its image is damaged."""
        return self.decode(i, self.source[i])

    def decode(self, i: int, stored: dict) -> Record:
        label, size = stored[self.label_key], self.config.image_size
        if label < 0:  # TFDS marks a split without labels by -1
            split = self.config.split
            raise InputError(f"data.split: {split!r} should have labels, and has {label}")
        image = self.decode_image(i, stored)
        record = {"image": centre_crop(image, size), "label": np.int32(label)}
        if self.config.mask_classes:
            record["mask"] = self.read_mask(stored)
        return record

    def read(self, indices: Sequence[int]) -> Batch:
        """The records at some indices, decoded in threads. InputError if too many are damaged."""
        indices = [int(i) for i in indices]
        stored = self.source.__getitems__(indices)
        records = list(self.pool.map(self.undamaged, indices, stored))
        return {name: np.stack([record[name] for record in records]) for name in records[0]}

    def undamaged(self, i: int, stored: dict) -> Record:
        """Record i or, if its image is damaged, the next whose image is not."""
        while True:
            try:
                return self.decode(i, stored)
            except Undecodable as error:
                self.count_damaged(i, error)
            i = (i + 1) % len(self)
            stored = self.source[i]

    def count_damaged(self, i: int, error: Undecodable) -> None:
        """Names a damaged record, once. Raises InputError if there are too many."""
        with self.lock:
            is_new = i not in self.damaged
            self.damaged.add(i)
            count = len(self.damaged)
        if count > self.max_damaged * len(self):
            most = f"{self.max_damaged:.0%}"
            raise InputError(
                f"data.name: {self.config.name!r} should have at most {most} damaged records, and "
                f"has {count} or more of {len(self):,}; one is {error}"
            ) from error
        if is_new and count <= MAX_NAMED:  # on every host, as each reads records of its own
            line = f"damaged record {count}, the next takes its place: {error}"
            tqdm.write(line, file=sys.stderr)

    def decode_image(self, i: int, stored: dict) -> np.ndarray:
        """uint8 `[H, W, C]`, whatever colour space the file is in."""
        mode = "L" if self.config.channels == 1 else "RGB"
        try:
            picture = self.open_image(stored[self.image_key]).convert(mode)
        except UNDECODABLE as error:
            name = stored.get("file_name", b"").decode(errors="replace") or f"record {i}"
            raise Undecodable(
                f"{self.config.name}: {name} cannot be decoded ({one_line(error)})"
            ) from error
        return np.asarray(picture).reshape(picture.height, picture.width, -1)

    def read_mask(self, stored: dict) -> np.ndarray:
        """uint8 `[H, W]`, counted from 0. The masks of oxford_iiit_pet are counted from 1."""
        mask, classes = stored["segmentation_mask"], self.config.mask_classes
        low, high = mask.min(), mask.max()
        expected = f"that of masks which hold {low} to {high}"
        require(low > 0 and high <= classes, "data.mask_classes", classes, expected)
        return centre_crop(mask - 1, self.config.image_size, labels=True)[..., 0]


def open_tfds(config: Data) -> tuple[Decoded, tuple[str, ...]]:
    """Any TFDS data set of images with one label, and its class names, without TensorFlow."""
    import tensorflow_datasets as tfds

    builder = tfds_builder(config.name)
    features = builder.info.features
    image_key, label_key = record_keys(builder)
    channels, masks = features[image_key].shape[-1], config.mask_classes
    fits = channels in (config.channels, None)
    require(fits, "data.channels", config.channels, f"{channels}, as in {config.name!r}")
    has_masks = "segmentation_mask" in features
    expected = f"0: {config.name!r} has no segmentation_mask"
    require(not masks or has_masks, "data.mask_classes", masks, expected)
    decoders = {image_key: tfds.decode.SkipDecoding()}
    source = open_split(builder, config.split, decoders=decoders)
    class_names = read_class_names(builder, label_key)
    return Decoded(source, image_key, label_key, config), class_names


def tfds_builder(name: str) -> Any:
    """A prepared TFDS builder. Downloads what is missing; raises InputError if that fails."""
    import tensorflow_datasets as tfds

    # TFDS warns of folders that do not exist, which the InputError below reports
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        locate(name)
        builder = tfds.builder(name, file_format="array_record")
    except Exception as error:  # whatever the code of a builder does
        if "File format" in str(error):
            raise InputError(
                f"data.name: {name!r} was prepared as TFRecord, which only TensorFlow reads; set "
                "TFDS_DATA_DIR to another folder, and it will be prepared there as ArrayRecord"
            ) from error
        names = ["digits", *tfds.list_builders(with_community_datasets=False)]
        if name in names:
            raise faulty_builder(name, error) from error
        expected = "`digits` or a TFDS data set, or a folder of pictures that exists"
        hint = "" if "/" in name else nearest(name, names)
        raise InputError(f"data.name: {name!r} should be {expected}{hint}") from error
    features = dict(builder.info.features)
    kinds = [type(features.get(key)) for key in record_keys(builder)]
    expected = "a TFDS data set of images with one class label"
    is_labelled = kinds == [tfds.features.Image, tfds.features.ClassLabel]
    require(is_labelled, "data.name", name, expected)
    if not builder.is_prepared():
        prepare(builder) if is_own(type(builder)) else download(builder)
    return builder


def is_own(kind: type) -> bool:
    """Whether a class of builders is the user's own."""
    return not kind.__module__.startswith("tensorflow_datasets.")


def locate(name: str) -> None:
    """Tells TFDS the folder of a builder of one's own, which it finds for those in packages."""
    import tensorflow_datasets as tfds
    from etils import epath

    with contextlib.suppress(ValueError):  # it has no code, or its name says more
        kind = tfds.builder_cls(name)
        if is_own(kind):
            kind.pkg_dir_path = epath.Path(inspect.getfile(kind)).parent


def record_keys(builder: Any) -> tuple[str, str]:
    """The names under which records hold the image and its label."""
    return builder.info.supervised_keys or ("image", "label")


def open_split(builder: Any, split: str, **options: Any) -> Any:
    try:
        return builder.as_data_source(split, **options)
    except ValueError as error:
        splits = ", ".join(builder.info.splits)
        raise InputError(
            f"data.split: {split!r} should be one of {splits}, or a slice of one that is not empty"
        ) from error


def rows_of(split: str, name: str, count: int) -> np.ndarray:
    """The rows of the `count` of a split that `split` means, as TFDS writes it: `train[:50%]`.

    Empty where it is no slice of the split `name`.
    """
    if split == name:
        return np.arange(count)

    import tensorflow_datasets as tfds

    whole = tfds.core.SplitInfo(name, shard_lengths=[count], num_bytes=0)
    try:
        slices = tfds.core.ReadInstruction.from_spec(split).to_absolute({name: whole})
        return np.concatenate([np.arange(count)[part.from_ : part.to] for part in slices])
    except (ValueError, NotImplementedError):
        return np.arange(0)


def read_class_names(builder: Any, label_key: str) -> tuple[str, ...]:
    """A name for each label."""
    return class_words(tuple(builder.info.features[label_key].names))


def class_words(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of classes, but words in place of ImageNet's synsets."""
    is_imagenet = len(names) == 1000 and names[0] == "n01440764"
    return imagenet_names() if is_imagenet else names


def imagenet_names() -> tuple[str, ...]:
    """The 1,000 classes of ILSVRC2012, each with its synonyms, separated by commas."""
    from tensorflow_datasets.datasets.siscore.labels import IMAGENET_LABELS_LIST

    return tuple(IMAGENET_LABELS_LIST)
