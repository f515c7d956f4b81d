"""Data: source -> batch -> what the network sees. A batch is a function of (seed, step).

Batches are dicts of NumPy arrays: `image` uint8 `[B, H, W, C]`, or `latent` float16
`[B, 2, h, w, 8]` (mean and standard deviation of the posterior, of the image and of its mirror
image); `label` int32 `[B]`; and `mask` uint8 `[B, H, W]` where the model has one. Scaling, flips
and noise run on the device, in `augment`.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dit.config import (
    LATENT_CHANNELS,
    VAE_FACTOR,
    Config,
    Data,
    InputError,
    one_line,
    replace,
    require,
)
from dit.folder import is_folder, open_folder
from dit.images import from_uint8
from dit.progress import Progress, say
from dit.tfds import (
    Batch,
    Decoded,
    open_split,
    open_tfds,
    read_class_names,
    record_keys,
    rows_of,
    tfds_builder,
)

if TYPE_CHECKING:
    from grain import DatasetIterator  # takes a second to import

MEMORY_LIMIT = 4 << 30  # bytes of decoded images to keep in memory; more are decoded each epoch
DECODE_LIMIT = 300  # seconds at the start to decode them in; else they are decoded each epoch
DECODED_AT_ONCE = 1024  # images

# What the model is told beside x and t: "y", "mask" if any and, in training alone, "augment" if any
Condition = dict[str, jax.Array]


class Records(Protocol):
    """What batches are read from, in any thread."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Batch: ...


@dataclass(frozen=True)
class Dataset:
    records: Records
    class_names: tuple[str, ...]  # one a label


def open_dataset(config: Data) -> Dataset:
    """The data set of a config. Raises InputError if it is missing or not what the config says."""
    if config.latents:
        return open_latents(config)
    if config.name == "digits":
        return open_digits(config)
    return open_images(config)


def with_num_classes(config: Config, dataset: Dataset) -> Config:
    """The config with its data set's number of classes, where it leaves it open."""
    return replace(config, data=dict(num_classes=len(dataset.class_names)))


def check_classes(config: Data, class_names: tuple[str, ...]) -> None:
    count = len(class_names)
    expected = f"{count}, the classes of {config.name!r}"
    require(config.num_classes in (None, count), "data.num_classes", config.num_classes, expected)


# Images in memory


@dataclass(frozen=True)
class InMemory:
    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N]
    masks: np.ndarray | None = None  # uint8 [N, H, W]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> Batch:
        batch = {"image": self.images[indices], "label": self.labels[indices]}
        if self.masks is not None:
            batch["mask"] = self.masks[indices]
        return batch


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
    rows = split_rows(config.split, len(labels))
    images, labels = images[rows], labels[rows]
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    ink = ink_masks(images) if masks else None
    return Dataset(InMemory(images, labels.astype(np.int32), ink), class_names)


def split_rows(split: str, count: int) -> np.ndarray:
    """The rows of `train`, in their order, or of slices of it as TFDS writes them: `train[:50%]`.

    Slices are of one fixed shuffled order of the `count` rows. Raises InputError.
    """
    if split == "train":
        return np.arange(count)
    order = np.random.RandomState(0).permutation(count)  # whose numbers are the same in any NumPy
    rows = order[rows_of(split, "train", count)]
    expected = "train, or a slice of it that is not empty, such as train[:50%]"
    require(len(rows), "data.split", split, expected)
    return rows


def ink_masks(images: np.ndarray) -> np.ndarray:
    """Where images uint8 `[N, H, W, 1]` have ink, `[N, H, W]`.

    1 in the cells of 2 x 2 pixels that are a third full or fuller, else 0.
    """
    N, H, W, _ = images.shape
    cells = images.reshape(N, H // 2, 2, W // 2, 2).mean(axis=(2, 4)) >= 85
    return cells.repeat(2, axis=1).repeat(2, axis=2).astype(np.uint8)


def open_decoded(config: Data) -> tuple[Decoded, tuple[str, ...]]:
    """The images of a folder or of a TFDS data set, decoded when they are read, and class names."""
    return open_folder(config) if is_folder(config.name) else open_tfds(config)


def open_images(config: Data) -> Dataset:
    """Images in memory if they are few, otherwise decoded when they are read."""
    records, class_names = open_decoded(config)
    check_classes(config, class_names)
    is_small = len(records) * config.image_size**2 * config.channels <= MEMORY_LIMIT
    return Dataset(decode_all(records) if is_small else records, class_names)


def decode_all(records: Decoded) -> InMemory | Decoded:
    """The records in memory, or as they are if decoding them takes longer than DECODE_LIMIT."""
    count = len(records)
    arrays: Batch = {}
    with closing(Progress(count, "image")) as progress:
        for start in range(0, count, DECODED_AT_ONCE):
            stop = min(start + DECODED_AT_ONCE, count)
            for name, rows in records.read(range(start, stop)).items():
                if name not in arrays:
                    arrays[name] = np.empty((count, *rows.shape[1:]), rows.dtype)
                arrays[name][start:stop] = rows
            progress.advance(stop - start)
            seconds = count / progress.rate
            if seconds > DECODE_LIMIT:
                say(
                    f"images are decoded when they are read: to decode all {count:,} would take "
                    f"{seconds:,.0f} s at the start, more than {DECODE_LIMIT}"
                )
                return records
    return InMemory(arrays["image"], arrays["label"], arrays.get("mask"))


def tfds_config(name: str, split: str, image_size: int, channels: int = 3) -> Data:
    """The config of a whole data set, its channels and classes filled in. Raises InputError.

    `channels` is for a folder, whose pictures are taken in either.
    """
    if name == "digits":
        return Data(split=split)
    if is_folder(name):
        return Data(name=name, split=split, image_size=image_size, channels=channels)
    builder = tfds_builder(name)
    image_key, label_key = record_keys(builder)
    features = builder.info.features
    channels = features[image_key].shape[-1] or 3
    classes = features[label_key].num_classes
    return Data(
        name=name, split=split, image_size=image_size, channels=channels, num_classes=classes
    )


# Latents


class Latents:
    """A folder of dit.imagenet.latents as records.

    One by one, as TFDS reads batches in new threads each time, and without its own decoding, which
    takes three times as long.
    """

    def __init__(self, builder: Any, split: str):
        import tensorflow_datasets as tfds

        as_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
        self.source = open_split(builder, split, deserialize_method=as_bytes)
        self.shape = builder.info.features["latent"].shape

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int]) -> Batch:
        from tensorflow_datasets.proto import tf_example_pb2

        parse = tf_example_pb2.Example.FromString
        examples = [parse(self.source[i]).features.feature for i in indices]
        latents = b"".join([example["latent"].bytes_list.value[0] for example in examples])
        labels = [example["label"].int64_list.value[0] for example in examples]
        return {
            "latent": np.frombuffer(latents, np.float16).reshape(-1, *self.shape),
            "label": np.array(labels, np.int32),
        }


def open_latents(config: Data) -> Dataset:
    """The latents in a folder. Raises InputError if they are of another kind, or not normalised."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(config.latents)
        whole = Latents(builder, next(iter(builder.info.splits)))
        some = whole.read(np.linspace(0, len(whole) - 1, 64).astype(int))
    except Exception as error:  # TFDS, ArrayRecord and protobuf raise errors of their own
        raise InputError(
            f"data.latents: {config.latents!r} should be a finished, undamaged folder of python -m "
            f"dit.imagenet.latents ({type(error).__name__}: {one_line(error)[:120]})"
        ) from error
    side = config.image_size // VAE_FACTOR
    expected = f"{whole.shape[1] * VAE_FACTOR}, that of {config.latents!r}"
    fits = whole.shape == (2, side, side, 2 * LATENT_CHANNELS)
    require(fits, "data.image_size", config.image_size, expected)
    class_names = read_class_names(builder, "label")
    check_classes(config, class_names)
    check_scale(config, some["latent"])
    return Dataset(Latents(builder, config.split), class_names)


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
) -> "DatasetIterator[Batch]":
    """The batches of steps start, start + 1, ..., the first of which are read from now on.

    Each epoch has an order of its own. Process p of P gets the rows [p B / P, (p + 1) B / P) of
    every batch.
    """
    import grain

    records = dataset.records
    order = grain.MapDataset.range(len(records)).seed(seed).shuffle().repeat()
    # without drop_remainder grain's count of an endless order's batches overflows for shares of 1
    shares = order.batch(batch_size // processes, drop_remainder=True)
    shares = shares[start * processes + process :: processes]
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    stream = iter(shares.map(records.read).to_iter_dataset(options))
    stream.start_prefetch()
    return stream


# What the network sees


def augment(
    batch: dict[str, jax.Array], key: jax.Array, config: Data
) -> tuple[jax.Array, Condition]:
    """x, float32 `[B, H, W, C]`, and its condition.

    x is pixels in [-1, 1], or a fresh sample of the VAE's posterior, scaled. With `config.flip`,
    each image is mirrored with probability 1/2, its mask with it, and with `config.augment` they
    are moved.
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
    if config.augment:
        motion = draw_motion(jax.random.fold_in(key, 1), *x.shape[:2], config.augment)
        x = jax.vmap(move)(x, motion)
        if "mask" in batch:
            condition["mask"] = jax.vmap(move)(condition["mask"], motion)
        condition["augment"] = motion_label(motion, x.shape[1])
    return x, condition


class Motion(NamedTuple):
    """How each image of a batch is moved, in this order; int32 `[B]` each."""

    mirrored: jax.Array  # 0 or 1
    turns: jax.Array  # by 90 degrees, 0 to 3
    down: jax.Array  # pixels
    right: jax.Array


def largest_shift(side: int) -> int:
    return max(side // 8, 1)


def draw_motion(key: jax.Array, count: int, side: int, probability: float) -> Motion:
    """Non-leaking augmentation (Karras et al., 2206.00364, appendix F.2) by motions alone.

    A mirror, a turn and a shift of up to an eighth of the side, each with a probability.
    """
    which_key, turn_key, shift_key = jax.random.split(key, 3)
    mirrored, turned, shifted = jax.random.bernoulli(which_key, probability, (3, count)).astype(int)
    turns = turned * jax.random.randint(turn_key, (count,), 1, 4)
    most = largest_shift(side)
    down, right = shifted[None] * jax.random.randint(shift_key, (2, count), -most, most + 1)
    return Motion(mirrored, turns, down, right)


def move(image: jax.Array, motion: Motion) -> jax.Array:
    """An image `[H, H, C]`, or a mask `[H, H]`, moved; what is shifted in is its reflection."""
    image = jnp.where(motion.mirrored, image[:, ::-1], image)
    image = jnp.stack([jnp.rot90(image, turns) for turns in range(4)])[motion.turns]
    most = largest_shift(len(image))
    borders = [(most, most)] * 2 + [(0, 0)] * (image.ndim - 2)
    corner = [most - motion.down, most - motion.right] + [0] * (image.ndim - 2)
    return jax.lax.dynamic_slice(jnp.pad(image, borders, mode="reflect"), corner, image.shape)


def motion_label(motion: Motion, side: int) -> jax.Array:
    """What the network is told of it, `[B, AUGMENT_SIZE]`: zeros of an image that was not moved."""
    cosine, sine = jnp.array([1, 0, -1, 0])[motion.turns], jnp.array([0, 1, 0, -1])[motion.turns]
    shifts = motion.down / largest_shift(side), motion.right / largest_shift(side)
    return jnp.stack([motion.mirrored, cosine - 1, sine, *shifts], axis=1).astype(jnp.float32)


def null_condition(condition: Condition, config: Data) -> Condition:
    """The null class and, with masks, the null mask, in the shapes of a condition."""
    null = {"y": config.num_classes, "mask": config.mask_classes, "augment": 0}
    nulls = {name: jnp.full_like(value, null[name]) for name, value in condition.items()}
    if condition["y"].ndim == 2:  # weights of the classes, the last of them null
        nulls["y"] = jnp.zeros_like(condition["y"]).at[:, -1].set(1)
    return nulls


def drop_condition(condition: Condition, key: jax.Array, config: Config) -> Condition:
    """Replaces parts of the condition by null, for guidance, with the config's probabilities.

    A label is dropped only where the mask is, so guidance learns the model without both. How an
    image was augmented is always told.
    """
    null = null_condition(condition, config.data)
    objective = config.objective
    probability = {"y": objective.label_dropout, "mask": objective.mask_dropout, "augment": 0.0}
    chance = jax.random.uniform(key, (len(condition["y"]),))

    def drop(name: str, value: jax.Array) -> jax.Array:
        dropped = (chance < probability[name]).reshape(-1, *[1] * (value.ndim - 1))
        return jnp.where(dropped, null[name], value)

    return {name: drop(name, value) for name, value in condition.items()}
