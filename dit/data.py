"""Data: a random-access source of labelled images or latents, and the batch at any step as a function of (seed, step).

Batches are dicts of NumPy arrays: `image` uint8 `[B, H, W, C]` or `latent` float16 `[B, 2, h, w, 8]` (of the image and of its mirror
image: the posterior's mean and standard deviation), `label` int32 `[B]`, and `mask` uint8 `[B, H, W]` where the model has one. Scaling,
flips and noise run on the device.
"""

import difflib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dit.config import Config, Data, InputError, one_line, require
from dit.images import centre_crop

MEMORY_LIMIT = 4 << 30  # bytes of decoded images that are kept in memory rather than decoded again each epoch


@dataclass(frozen=True)
class Dataset:
    """`records[i]` is {"image": uint8 [H, W, C], "label": int32}, or has a "latent"; `class_names` has a name for each label."""

    records: Sequence[dict[str, np.ndarray]]
    class_names: tuple[str, ...]


class Undecodable(InputError):
    """A record whose image is damaged."""


class InMemory:
    """Decoded images uint8 `[N, H, W, C]`, labels int32 `[N]` and, where there are any, masks uint8 `[N, H, W]` as records."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, masks: np.ndarray | None = None):
        self.images, self.labels, self.masks = images, labels, masks

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {"image": self.images[i], "label": self.labels[i]} | ({} if self.masks is None else {"mask": self.masks[i]})


class Decoded:
    """A TFDS data source of encoded images as records: decoded, cropped and resized on access, in any thread."""

    def __init__(self, source, image_key: str, label_key: str, config: Data):
        self.source, self.image_key, self.label_key, self.config = source, image_key, label_key, config

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return [self.read(record, i) for record, i in zip(self.source.__getitems__(indices), indices)]

    def read(self, record, i: int) -> dict[str, np.ndarray]:
        label = record[self.label_key]
        if label < 0:  # TFDS marks a split without labels by -1
            raise InputError(f"data.split: {self.config.split!r} should have labels, and has {label}")
        try:  # with one decoder and one colour space, whatever the file is in
            image = Image.open(io.BytesIO(record[self.image_key])).convert("L" if self.config.channels == 1 else "RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            name = record.get("file_name", b"").decode() or f"record {i}"
            raise Undecodable(f"{self.config.name}: {name} cannot be decoded ({one_line(error)})") from error
        image = np.asarray(image).reshape(image.height, image.width, self.config.channels)
        found = {"image": centre_crop(image, self.config.image_size), "label": np.int32(label)}
        if self.config.mask_classes:
            mask, K = record["segmentation_mask"], self.config.mask_classes  # oxford_iiit_pet counts them from 1
            require(0 < mask.min() and mask.max() <= K, "data.mask_classes", K, f"that of masks which hold {mask.min()} to {mask.max()}")
            found["mask"] = centre_crop(mask - 1, self.config.image_size, labels=True)[..., 0]
        return found


class Latents:
    """A data source that dit.latents wrote, as records."""

    def __init__(self, source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return [{"latent": record["latent"], "label": np.int32(record["label"])} for record in self.source.__getitems__(indices)]


def batch_shapes(config: Config) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape and type of each array of a batch."""
    B, (H, W, C) = config.train.batch_size, config.input_shape
    data = {"latent": ((B, 2, H, W, 2 * C), np.float16)} if config.data.latents else {"image": ((B, H, W, C), np.uint8)}
    return data | {"label": ((B,), np.int32)} | ({"mask": ((B, H, W), np.uint8)} if config.data.mask_classes else {})


def open_dataset(config: Data) -> Dataset:
    """The data set a config names. Raises InputError where it is not to be had or is not what the config says."""
    if config.latents:
        return latents(config)
    return digits(config) if config.name == "digits" else tfds_images(config)


def check_classes(config: Data, names: tuple[str, ...]) -> None:
    require(config.num_classes == len(names), "data.num_classes", config.num_classes, f"{len(names)}, the classes of {config.name!r}")


def digits(config: Data) -> Dataset:
    """The 1,797 real 8x8 digits, 17 levels of grey, that scikit-learn carries (UCI, Alpaydin & Kaynak 1998)."""
    from sklearn.datasets import load_digits

    names = tuple("0123456789")
    check_classes(config, names)
    require((config.image_size, config.channels) == (8, 1), "data.image_size and data.channels", (config.image_size, config.channels),
            "(8, 1), those of 'digits'")
    images, labels = load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    require(config.mask_classes in (0, 2), "data.mask_classes", config.mask_classes, "2 for 'digits': paper and ink")
    return Dataset(InMemory(images, labels.astype(np.int32), ink(images) if config.mask_classes else None), names)


def ink(images: np.ndarray) -> np.ndarray:
    """Which parts of images uint8 `[N, H, W, 1]` carry ink: 1 where a cell of 2 x 2 pixels is a third full, else 0, `[N, H, W]`."""
    N, H, W, _ = images.shape
    cells = images.reshape(N, H // 2, 2, W // 2, 2).mean(axis=(2, 4)) >= 85
    return cells.repeat(2, axis=1).repeat(2, axis=2).astype(np.uint8)


def decoded(config: Data) -> tuple[Decoded, tuple[str, ...]]:
    """Any TFDS data set of images with one label, read through `tfds.data_source` without TensorFlow, and its class names."""
    import tensorflow_datasets as tfds

    builder = tfds_builder(config.name)
    image_key, label_key = builder.info.supervised_keys or ("image", "label")
    channels, names = builder.info.features[image_key].shape[-1], class_names(builder, label_key)
    require(channels in (config.channels, None), "data.channels", config.channels, f"{channels}, as in {config.name!r}")
    check_classes(config, names)
    require(not config.mask_classes or "segmentation_mask" in builder.info.features, "data.mask_classes", config.mask_classes,
            f"0: {config.name!r} has no segmentation_mask")
    source = open_split(builder, config.split, decoders={image_key: tfds.decode.SkipDecoding()})
    return Decoded(source, image_key, label_key, config), names


def tfds_images(config: Data) -> Dataset:
    """The images of a TFDS data set: in memory where they fit, decoded on access where not."""
    records, names = decoded(config)
    if len(records) * config.image_size**2 * config.channels <= MEMORY_LIMIT:
        N = len(records)
        read = [r for start in range(0, N, 1024) for r in records.__getitems__(range(start, min(start + 1024, N)))]
        records = InMemory(*(np.stack([record[name] for record in read]) for name in read[0]))
    return Dataset(records, names)


def tfds_data(name: str, split: str, image_size: int) -> Data:
    """The config of a whole TFDS data set, its channels and classes filled in. Raises InputError."""
    if name == "digits":
        return Data()
    builder = tfds_builder(name)
    image_key, label_key = builder.info.supervised_keys or ("image", "label")
    return Data(name=name, split=split, image_size=image_size, channels=builder.info.features[image_key].shape[-1] or 3,
                num_classes=builder.info.features[label_key].num_classes)


def latents(config: Data) -> Dataset:
    """What dit.latents wrote to the folder `config.latents`. Raises InputError where it is of another kind, or not about N(0, 1)."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(config.latents)
        shape = builder.info.features["latent"].shape
        whole = Latents(builder.as_data_source(next(iter(builder.info.splits))))
        shown = whole.__getitems__(np.linspace(0, len(whole) - 1, 64).astype(int).tolist())
    except Exception as error:  # TFDS, ArrayRecord and protobuf each have errors of their own for what is missing or damaged
        raise InputError(f"data.latents: {config.latents!r} should be a finished folder of python -m dit.latents, undamaged "
                         f"({type(error).__name__}: {one_line(error)[:120]})") from error
    side = config.image_size // 8
    require(shape == (2, side, side, 8), "data.image_size", config.image_size, f"{shape[1] * 8}, that of {config.latents!r}")
    names = class_names(builder, "label")
    check_classes(config, names)
    records = Latents(open_split(builder, config.split))
    moments = np.stack([record["latent"] for record in shown]).astype(np.float64)
    mean, std = np.split(moments, 2, axis=-1)
    spread = np.sqrt(mean.var() + np.square(std).mean())  # of a sample of the posterior
    if not 0.5 < config.latent_scale * spread < 2:
        raise InputError(f"data.latent_scale: {config.latent_scale} gives {config.latents!r} a standard deviation of "
                         f"{config.latent_scale * spread:.3g}, which should be near 1; {1 / spread:.3g} would")
    return Dataset(records, names)


def open_split(builder, split: str, **options):
    try:
        return builder.as_data_source(split, **options)
    except ValueError as error:
        raise InputError(f"data.split: {split!r} should be one of {', '.join(builder.info.splits)}, or a slice of one that is not "
                         "empty") from error


def class_names(builder, label_key: str) -> tuple[str, ...]:
    """A name for each label: TFDS's own, but words for the synsets of ImageNet."""
    names = tuple(builder.info.features[label_key].names)
    return imagenet_names() if len(names) == 1000 and names[0] == "n01440764" else names


def imagenet_names() -> tuple[str, ...]:
    """The 1,000 classes of ILSVRC2012, each with its synonyms, separated by commas."""
    from tensorflow_datasets.datasets.siscore.labels import IMAGENET_LABELS_LIST  # where TFDS keeps them

    return tuple(IMAGENET_LABELS_LIST)


def tfds_builder(name: str):
    """A prepared TFDS builder; downloads what is missing, or raises InputError at once where there is no network."""
    import requests
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS warns of folders that are not there, which is told below
    try:
        builder = tfds.builder(name, file_format="array_record")
    except (ValueError, AssertionError, ImportError) as error:
        if "File format" in str(error):
            raise InputError(f"data.name: {name!r} was prepared as TFRecord, which only TensorFlow reads; set TFDS_DATA_DIR to another "
                             "folder, and it will be prepared there as ArrayRecord") from error
        known = ["digits", *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0)[0]
        raise InputError(f"data.name: {name!r} should be `digits` or a TFDS data set; the nearest is {near!r}") from error
    features = dict(builder.info.features)
    kinds = [type(features.get(key)) for key in builder.info.supervised_keys or ("image", "label")]
    if kinds != [tfds.features.Image, tfds.features.ClassLabel]:
        raise InputError(f"data.name: {name!r} should be a TFDS data set of images with one class label")
    if not builder.is_prepared():
        try:  # TFDS itself tries for minutes before it gives up
            requests.head("https://storage.googleapis.com", timeout=5)
            builder.download_and_prepare()
        except (requests.exceptions.RequestException, tfds.download.DownloadError, AssertionError, ImportError, OSError) as error:
            offline = isinstance(error, requests.exceptions.RequestException)
            reason = "no network" if offline else f"{type(error).__name__} {one_line(error)}"
            raise InputError(f"data.name: {name!r} is not in {builder.data_dir} and cannot be fetched ({reason}); set TFDS_DATA_DIR to "
                             "a folder that has it, or run the same command once where there is a network") from error
    return builder


def batches(dataset: Dataset, batch_size: int, seed: int, start: int = 0, process: int = 0, processes: int = 1
            ) -> Iterator[dict[str, np.ndarray]]:
    """The batches of steps start, start + 1, ...: each epoch in an order of its own, all a function of (seed, step).

    Process p of P gets rows [p B / P, (p + 1) B / P) of every batch.
    """
    import grain

    order = grain.MapDataset.source(dataset.records).seed(seed).shuffle().repeat()
    parts = order.batch(batch_size // processes)[start * processes + process::processes]
    threads = 1 if isinstance(dataset.records, InMemory) else 8
    return iter(parts.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 4))))
