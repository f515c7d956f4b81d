"""Data: source -> batch -> what the network sees. A batch is a function of (seed, step).

Batches are dicts of NumPy arrays: `image` uint8 `[B, H, W, C]`, or `latent` float16
`[B, 2, h, w, 8]` (mean and standard deviation of the posterior, of the image and of its mirror
image); `label` int32 `[B]`; and `mask` uint8 `[B, H, W]` where the model has one. Scaling, flips
and noise run on the device, in `augment`.
"""

import difflib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dit.config import LATENT_CHANNELS, VAE_FACTOR, Config, Data, InputError, one_line, require
from dit.images import centre_crop, from_uint8

MEMORY_LIMIT = 4 << 30  # bytes of decoded images to keep in memory; more are decoded each epoch

Record = dict[str, np.ndarray]  # {"image": uint8 [H, W, C], "label": int32}, or with a "latent"
Condition = dict[str, jax.Array]  # what the model is told beside x and t: "y", and "mask" if any


@dataclass(frozen=True)
class Dataset:
    records: Sequence[Record]
    class_names: tuple[str, ...]  # one a label


class Undecodable(InputError):
    """A record whose image is damaged."""


def open_dataset(config: Data) -> Dataset:
    """The data set of a config. Raises InputError if it is missing or not what the config says."""
    if config.latents:
        return open_latents(config)
    if config.name == "digits":
        return open_digits(config)
    return open_images(config)


def check_classes(config: Data, class_names: tuple[str, ...]) -> None:
    count = len(class_names)
    expected = f"{count}, the classes of {config.name!r}"
    require(config.num_classes == count, "data.num_classes", config.num_classes, expected)


# Images in memory


class InMemory:
    """Images uint8 `[N, H, W, C]`, labels int32 `[N]` and masks uint8 `[N, H, W]`, if any."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, masks: np.ndarray | None = None):
        self.images = images
        self.labels = labels
        self.masks = masks

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Record:
        record = {"image": self.images[i], "label": self.labels[i]}
        if self.masks is not None:
            record["mask"] = self.masks[i]
        return record


def open_digits(config: Data) -> Dataset:
    """The 1,797 real 8x8 digits of scikit-learn (UCI, Alpaydin & Kaynak 1998), 17 grey levels."""
    class_names = tuple("0123456789")
    check_classes(config, class_names)
    shape = (config.image_size, config.channels)
    expected = "(8, 1), those of 'digits'"
    require(shape == (8, 1), "data.image_size and data.channels", shape, expected)
    masks = config.mask_classes
    require(masks in (0, 2), "data.mask_classes", masks, "2 for 'digits': paper and ink")

    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    ink = ink_masks(images) if masks else None
    return Dataset(InMemory(images, labels.astype(np.int32), ink), class_names)


def ink_masks(images: np.ndarray) -> np.ndarray:
    """Where images uint8 `[N, H, W, 1]` have ink, `[N, H, W]`.

    1 in the cells of 2 x 2 pixels that are a third full or fuller, else 0.
    """
    N, H, W, _ = images.shape
    cells = images.reshape(N, H // 2, 2, W // 2, 2).mean(axis=(2, 4)) >= 85
    return cells.repeat(2, axis=1).repeat(2, axis=2).astype(np.uint8)


# Images of TFDS


class Decoded:
    """A TFDS data source as records: decoded, cropped and resized on access, in any thread."""

    def __init__(self, source: Any, image_key: str, label_key: str, config: Data):
        self.source = source
        self.image_key = image_key
        self.label_key = label_key
        self.config = config

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Record:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        stored = self.source.__getitems__(indices)
        return [self.read(record, i) for record, i in zip(stored, indices, strict=True)]

    def read(self, stored: dict, i: int) -> Record:
        label, size = stored[self.label_key], self.config.image_size
        if label < 0:  # TFDS marks a split without labels by -1
            split = self.config.split
            raise InputError(f"data.split: {split!r} should have labels, and has {label}")
        image = self.decode(stored, i)
        record = {"image": centre_crop(image, size), "label": np.int32(label)}
        if self.config.mask_classes:
            record["mask"] = self.read_mask(stored)
        return record

    def decode(self, stored: dict, i: int) -> np.ndarray:
        """uint8 `[H, W, C]`, whatever colour space the file is in."""
        mode = "L" if self.config.channels == 1 else "RGB"
        try:
            picture = Image.open(io.BytesIO(stored[self.image_key])).convert(mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = stored.get("file_name", b"").decode() or f"record {i}"
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


def open_images(config: Data) -> Dataset:
    """The images of a TFDS data set: in memory if they fit, otherwise decoded on access."""
    records, class_names = open_tfds(config)
    if len(records) * config.image_size**2 * config.channels > MEMORY_LIMIT:
        return Dataset(records, class_names)
    decoded = []
    for start in range(0, len(records), 1024):
        stop = min(start + 1024, len(records))
        decoded += records.__getitems__(range(start, stop))
    columns = [np.stack([record[name] for record in decoded]) for name in decoded[0]]
    return Dataset(InMemory(*columns), class_names)


def open_tfds(config: Data) -> tuple[Decoded, tuple[str, ...]]:
    """Any TFDS data set of images with one label, and its class names, without TensorFlow."""
    import tensorflow_datasets as tfds

    builder = tfds_builder(config.name)
    features = builder.info.features
    image_key, label_key = record_keys(builder)
    channels, masks = features[image_key].shape[-1], config.mask_classes
    fits = channels in (config.channels, None)
    require(fits, "data.channels", config.channels, f"{channels}, as in {config.name!r}")
    class_names = read_class_names(builder, label_key)
    check_classes(config, class_names)
    has_masks = "segmentation_mask" in features
    expected = f"0: {config.name!r} has no segmentation_mask"
    require(not masks or has_masks, "data.mask_classes", masks, expected)
    decoders = {image_key: tfds.decode.SkipDecoding()}
    source = open_split(builder, config.split, decoders=decoders)
    return Decoded(source, image_key, label_key, config), class_names


def tfds_config(name: str, split: str, image_size: int) -> Data:
    """The config of a whole data set, its channels and classes filled in. Raises InputError."""
    if name == "digits":
        return Data()
    builder = tfds_builder(name)
    image_key, label_key = record_keys(builder)
    features = builder.info.features
    channels = features[image_key].shape[-1] or 3
    classes = features[label_key].num_classes
    return Data(
        name=name, split=split, image_size=image_size, channels=channels, num_classes=classes
    )


def tfds_builder(name: str) -> Any:
    """A prepared TFDS builder. Downloads what is missing; raises InputError if that fails."""
    import tensorflow_datasets as tfds

    # TFDS warns of folders that do not exist, which the InputError below reports
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        builder = tfds.builder(name, file_format="array_record")
    except (ValueError, AssertionError, ImportError) as error:
        if "File format" in str(error):
            raise InputError(
                f"data.name: {name!r} was prepared as TFRecord, which only TensorFlow reads; set "
                "TFDS_DATA_DIR to another folder, and it will be prepared there as ArrayRecord"
            ) from error
        names = ["digits", *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0)[0]
        raise InputError(
            f"data.name: {name!r} should be `digits` or a TFDS data set; the nearest is {near!r}"
        ) from error
    features = dict(builder.info.features)
    kinds = [type(features.get(key)) for key in record_keys(builder)]
    expected = "a TFDS data set of images with one class label"
    is_labelled = kinds == [tfds.features.Image, tfds.features.ClassLabel]
    require(is_labelled, "data.name", name, expected)
    if not builder.is_prepared():
        download(builder)
    return builder


def record_keys(builder: Any) -> tuple[str, str]:
    """The names under which records hold the image and its label."""
    return builder.info.supervised_keys or ("image", "label")


def download(builder: Any) -> None:
    import requests
    import tensorflow_datasets as tfds

    failures = (tfds.download.DownloadError, AssertionError, ImportError, OSError)
    try:
        requests.head("https://storage.googleapis.com", timeout=5)  # TFDS would try for minutes
        builder.download_and_prepare()
    except failures as error:  # those of requests are OSErrors
        is_offline = isinstance(error, requests.exceptions.RequestException)
        reason = "no network" if is_offline else f"{type(error).__name__} {one_line(error)}"
        raise InputError(
            f"data.name: {builder.name!r} is not in {builder.data_dir} and cannot be fetched "
            f"({reason}); set TFDS_DATA_DIR to a folder that has it, or run the same command once "
            "where there is a network"
        ) from error


def open_split(builder: Any, split: str, **options: Any) -> Any:
    try:
        return builder.as_data_source(split, **options)
    except ValueError as error:
        splits = ", ".join(builder.info.splits)
        raise InputError(
            f"data.split: {split!r} should be one of {splits}, or a slice of one that is not empty"
        ) from error


def read_class_names(builder: Any, label_key: str) -> tuple[str, ...]:
    """A name for each label: TFDS's own, but words in place of ImageNet's synsets."""
    names = tuple(builder.info.features[label_key].names)
    is_imagenet = len(names) == 1000 and names[0] == "n01440764"
    return imagenet_names() if is_imagenet else names


def imagenet_names() -> tuple[str, ...]:
    """The 1,000 classes of ILSVRC2012, each with its synonyms, separated by commas."""
    from tensorflow_datasets.datasets.siscore.labels import IMAGENET_LABELS_LIST

    return tuple(IMAGENET_LABELS_LIST)


# Latents


class Latents:
    """A data source that dit.imagenet.latents wrote, as records."""

    def __init__(self, source: Any):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Record:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        return [
            {"latent": stored["latent"], "label": np.int32(stored["label"])}
            for stored in self.source.__getitems__(indices)
        ]


def open_latents(config: Data) -> Dataset:
    """The latents in a folder. Raises InputError if they are of another kind, or not normalised."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(config.latents)
        shape = builder.info.features["latent"].shape
        whole = Latents(builder.as_data_source(next(iter(builder.info.splits))))
        some = whole.__getitems__(np.linspace(0, len(whole) - 1, 64).astype(int).tolist())
    except Exception as error:  # TFDS, ArrayRecord and protobuf raise errors of their own
        raise InputError(
            f"data.latents: {config.latents!r} should be a finished, undamaged folder of python -m "
            f"dit.imagenet.latents ({type(error).__name__}: {one_line(error)[:120]})"
        ) from error
    side = config.image_size // VAE_FACTOR
    expected = f"{shape[1] * VAE_FACTOR}, that of {config.latents!r}"
    fits = shape == (2, side, side, 2 * LATENT_CHANNELS)
    require(fits, "data.image_size", config.image_size, expected)
    class_names = read_class_names(builder, "label")
    check_classes(config, class_names)
    check_scale(config, np.stack([record["latent"] for record in some]))
    return Dataset(Latents(open_split(builder, config.split)), class_names)


def check_scale(config: Data, latents: np.ndarray) -> None:
    """Raises InputError unless scaled samples of latents `[N, 2, h, w, 8]` have a std near 1."""
    mean, std = np.split(latents.astype(np.float64), 2, axis=-1)
    sample_std = np.sqrt(mean.var() + np.square(std).mean())
    scaled = config.latent_scale * sample_std
    if not 0.5 < scaled < 2:
        raise InputError(
            f"data.latent_scale: {config.latent_scale} gives {config.latents!r} a standard "
            f"deviation of {scaled:.3g}, which should be near 1; {1 / sample_std:.3g} would"
        )


# Batches


def batch_shapes(config: Config) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and type of each array of a batch."""
    B, (H, W, C) = config.train.batch_size, config.input_shape
    shapes = {"label": ((B,), np.int32)}
    if config.data.latents:
        shapes["latent"] = ((B, 2, H, W, 2 * C), np.float16)
    else:
        shapes["image"] = ((B, H, W, C), np.uint8)
    if config.data.mask_classes:
        shapes["mask"] = ((B, H, W), np.uint8)
    return shapes


def batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps start, start + 1, ...; each epoch has an order of its own.

    Process p of P gets the rows [p B / P, (p + 1) B / P) of every batch.
    """
    import grain

    order = grain.MapDataset.source(dataset.records).seed(seed).shuffle().repeat()
    shares = order.batch(batch_size // processes)[start * processes + process :: processes]
    threads = 1 if isinstance(dataset.records, InMemory) else 8
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 4))
    return iter(shares.to_iter_dataset(options))


# What the network sees


def augment(
    batch: dict[str, jax.Array], key: jax.Array, config: Data
) -> tuple[jax.Array, Condition]:
    """x, float32 `[B, H, W, C]`, and its condition.

    x is pixels in [-1, 1], or a fresh sample of the VAE's posterior, scaled. With `config.flip`,
    each image is mirrored with probability 1/2, its mask with it.
    """
    condition = {"y": batch["label"]}
    mirrored = jax.random.bernoulli(key, 0.5 * config.flip, (len(batch["label"]), 1, 1, 1))
    if "latent" in batch:
        latent = batch["latent"].astype(jnp.float32)  # [B, 2, h, w, 8]
        latent = jnp.where(mirrored, latent[:, 1], latent[:, 0])
        mean, std = jnp.split(latent, 2, axis=-1)  # [B, h, w, 4] each
        noise = jax.random.normal(jax.random.fold_in(key, 1), mean.shape)
        return config.latent_scale * (mean + std * noise), condition
    x = from_uint8(batch["image"])
    x = jnp.where(mirrored, x[:, :, ::-1], x)
    if "mask" in batch:
        mask = batch["mask"]
        condition["mask"] = jnp.where(mirrored[..., 0], mask[:, :, ::-1], mask)
    return x, condition


def null_condition(condition: Condition, config: Data) -> Condition:
    """The null class and, with masks, the null mask, in the shapes of a condition."""
    null = {"y": config.num_classes, "mask": config.mask_classes}
    return {name: jnp.full_like(value, null[name]) for name, value in condition.items()}


def drop_condition(condition: Condition, key: jax.Array, config: Config) -> Condition:
    """Replaces parts of the condition by null, for guidance, with the config's probabilities.

    A label is dropped only where the mask is, so guidance learns the model without both.
    """
    null = null_condition(condition, config.data)
    probability = {"y": config.objective.label_dropout, "mask": config.objective.mask_dropout}
    chance = jax.random.uniform(key, (len(condition["y"]),))

    def drop(name: str, value: jax.Array) -> jax.Array:
        dropped = (chance < probability[name]).reshape(-1, *[1] * (value.ndim - 1))
        return jnp.where(dropped, null[name], value)

    return {name: drop(name, value) for name, value in condition.items()}
