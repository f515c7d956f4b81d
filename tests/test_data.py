import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPTIMISED, TINY, Pictures, run_train, tiny_config
from processes import ROOT

from dit import data, intact, progress
from dit.config import AUGMENT_SIZE, Data, InputError
from dit.images import to_uint8
from dit.tfds import Decoded

GOLDEN = [12, 9, 10, 8, 1, 0, 6, 5, 7, 11, 4, 2, 3, 7, 6]  # the first rows of 13 records, seed 5
PICTURES = Data(name="pictures", image_size=5, channels=1, num_classes=3)
CIFAR10 = Data(name="cifar10", image_size=32, channels=3)
TFDS_DATA_DIR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
needs_cifar10 = pytest.mark.skipif(
    not (TFDS_DATA_DIR / "cifar10").is_dir(), reason="no CIFAR-10 in TFDS_DATA_DIR"
)
needs_imagenet = pytest.mark.skipif(
    not (TFDS_DATA_DIR / "imagenet2012").is_dir(), reason="no ImageNet in TFDS_DATA_DIR"
)


def take(dataset, count, **options):
    stream = data.batches(dataset, **options)
    return [next(stream) for _ in range(count)]


# Digits and batches


def test_digits_are_the_1797_real_ones():
    digits = data.open_dataset(Data())
    images, labels = digits.records.images, digits.records.labels
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    assert images.min() == 0 and images.max() == 255
    assert len(np.unique(images)) == 17
    assert labels.dtype == np.int32
    assert np.bincount(labels).min() > 170
    assert digits.class_names == tuple("0123456789")


def test_slices_of_digits_are_shuffled_and_add_up_to_all_of_them():
    whole = data.open_dataset(Data(mask_classes=2)).records
    parts = [
        data.open_dataset(Data(split=split, mask_classes=2)).records
        for split in ("train[:50%]", "train[898:1700]", "train[1700:]")
    ]
    assert [len(part) for part in parts] == [898, 802, 97]
    rows = np.concatenate([data.split_rows(s, 1797) for s in ("train[:31%]", "train[31%:]")])
    assert sorted(rows) == list(range(1797))
    for name in ("images", "labels", "masks"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(whole, name)[rows])
    assert np.bincount(parts[2].labels).min() > 0, "all classes"
    assert 700 < np.median(rows[:898]) < 1100, "from all over the whole"
    joined = data.open_dataset(Data(split="train[:50%]+train[1700:]")).records
    np.testing.assert_array_equal(joined.labels, np.concatenate([parts[0].labels, parts[2].labels]))


@pytest.mark.parametrize(
    "split", ["test", "trian[:50%]", "train[50%", "train[1797:]", "train[:0%]"]
)
def test_what_is_no_slice_of_digits_is_refused(split):
    words = "should be train, or a slice of it that is not empty"
    with pytest.raises(InputError, match=re.escape(f"data.split: {split!r} {words}")):
        data.open_dataset(Data(split=split))


def test_a_batch_is_a_function_of_seed_and_step():
    digits = data.open_dataset(Data())
    first = take(digits, 9, batch_size=7, seed=3)
    resumed = take(digits, 4, batch_size=7, seed=3, start=5)
    for a, b in zip(first[5:], resumed, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])
    other = take(digits, 1, batch_size=7, seed=4)[0]
    assert (first[0]["image"] != other["image"]).any()
    assert (first[0]["image"] != first[1]["image"]).any()


def test_each_epoch_shows_every_record_once_in_an_order_of_its_own():
    images = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1)
    small = data.Dataset(data.InMemory(images, np.zeros(12, np.int32)), ())
    epochs = []
    for epoch in range(3):
        steps = take(small, 4, batch_size=3, seed=0, start=4 * epoch)
        epochs.append(np.concatenate([batch["image"].ravel() for batch in steps]))
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()
    assert (epochs[0] != np.arange(12)).any()


def test_the_order_is_that_of_the_records_shuffled_one_by_one():
    """A run that goes on under a newer version sees the batches that it would have seen."""
    order = grain.MapDataset.source(np.arange(13)).seed(5).shuffle().repeat()
    expected = [int(order[i]) for i in range(3 * 13)]
    assert expected[:15] == GOLDEN
    images = np.arange(13, dtype=np.uint8).reshape(13, 1, 1, 1)
    records = data.InMemory(images, np.arange(13, dtype=np.int32))
    for start, process, processes in [(0, 0, 1), (2, 0, 1), (1, 1, 3)]:
        options = dict(batch_size=6, seed=5, start=start, process=process, processes=processes)
        share = 6 // processes
        for step, batch in enumerate(take(data.Dataset(records, ()), 3, **options), start):
            first = 6 * step + share * process
            assert batch["label"].tolist() == expected[first : first + share]
            assert batch["image"].ravel().tolist() == expected[first : first + share]


class Counted:
    """Records that note the indices of every call."""

    def __init__(self):
        self.calls = []
        self.called = threading.Event()

    def __len__(self) -> int:
        return 13

    def read(self, indices):
        self.calls.append(len(indices))
        self.called.set()
        return {"label": np.asarray(indices)}


def test_a_batch_is_read_in_one_call():
    records = Counted()
    take(data.Dataset(records, ()), 3, batch_size=10, seed=0, process=1, processes=2)
    assert set(records.calls) == {5}


def test_batches_are_read_before_they_are_asked_for():
    records = Counted()
    stream = data.batches(data.Dataset(records, ()), 5, seed=0)
    assert records.called.wait(timeout=10)
    stream.close()


@pytest.mark.parametrize("processes", [3, 6])  # of two images each, and of one
def test_the_processes_parts_make_up_the_batch(processes):
    digits = data.open_dataset(Data())
    options = dict(batch_size=6, seed=1, start=2)
    whole = take(digits, 3, **options)
    shares = [dict(process=p, processes=processes) for p in range(processes)]
    parts = [take(digits, 3, **options, **share) for share in shares]
    for step in range(3):
        joined = np.concatenate([part[step]["image"] for part in parts])
        np.testing.assert_array_equal(joined, whole[step]["image"])


def test_batch_shapes_are_those_of_the_batches():
    config = tiny_config(data=dict(mask_classes=2))
    batch = take(data.open_dataset(config.data), 1, batch_size=16, seed=0)[0]
    found = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert found == data.batch_shapes(config)


# Masks


def test_masks_say_where_the_ink_is():
    digits = data.open_dataset(Data(mask_classes=2))
    masks = digits.records.masks.reshape(-1, 4, 2, 4, 2)
    ink = digits.records.images.reshape(-1, 4, 2, 4, 2)
    assert (masks.max(axis=(2, 4)) == masks.min(axis=(2, 4))).all(), "a cell has one label"
    cells = masks[:, :, 0, :, 0]
    assert 0.3 < cells.mean() < 0.7
    assert ink[:, :, 0, :, 0][cells == 1].mean() > 100
    assert ink.max(axis=(2, 4))[cells == 0].mean() < 60


def test_masks_are_mirrored_with_their_images():
    digits = data.open_dataset(Data(mask_classes=2))
    batch = take(digits, 1, batch_size=16, seed=0)[0]
    assert batch["mask"].shape == (16, 8, 8)
    assert batch["mask"].dtype == np.uint8
    batch["mask"] = batch["image"][..., 0]  # a mask that says which way round its image is
    x, condition = data.augment(batch, jax.random.key(0), Data(mask_classes=2, flip=True))
    mask = np.asarray(condition["mask"])
    np.testing.assert_array_equal(to_uint8(x)[..., 0], mask)
    mirrored = (mask != batch["mask"]).any(axis=(1, 2))
    assert 0 < mirrored.sum() < 16
    np.testing.assert_array_equal(mask[mirrored], batch["mask"][mirrored][..., ::-1])


# Augmentation


SIDE = 8  # whose largest shift is 1
MOTIONS = [
    (mirrored, turns, down, right)
    for mirrored in (0, 1)
    for turns in range(4)
    for down in (-1, 0, 1)
    for right in (-1, 0, 1)
]


def as_motion(rows) -> data.Motion:
    return data.Motion(*jnp.array(rows).T)


def test_images_are_mirrored_turned_and_shifted():
    image = np.random.default_rng(0).normal(size=(SIDE, SIDE, 3)).astype(np.float32)
    moved = jax.vmap(data.move, (None, 0))(image, as_motion(MOTIONS))
    for (mirrored, turns, down, right), found in zip(MOTIONS, moved, strict=True):
        expected = np.rot90(image[:, ::-1] if mirrored else image, turns)
        padded = np.pad(expected, [(1, 1), (1, 1), (0, 0)], mode="reflect")
        expected = padded[1 - down : 1 - down + SIDE, 1 - right : 1 - right + SIDE]
        np.testing.assert_array_equal(found, expected)


def test_a_label_tells_every_motion_from_every_other_and_is_zero_of_none():
    labels = np.asarray(data.motion_label(as_motion(MOTIONS), SIDE))
    assert labels.shape == (len(MOTIONS), AUGMENT_SIZE)
    assert len(np.unique(labels, axis=0)) == len(MOTIONS)
    assert not labels[MOTIONS.index((0, 0, 0, 0))].any()
    wide = data.motion_label(as_motion([(1, 2, 4, -4)]), 32)
    np.testing.assert_array_equal(wide, [[1, -2, 0, 1, -1]])


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_each_kind_of_motion_comes_with_its_probability(probability):
    mirrored, turns, down, right = data.draw_motion(jax.random.key(0), 3000, 32, probability)
    shares = [(mirrored == 1).mean(), (turns > 0).mean(), ((down != 0) | (right != 0)).mean()]
    assert shares == pytest.approx([probability] * 3, abs=0.04)
    both = (mirrored == 1) & (turns > 0)
    assert both.mean() == pytest.approx(probability**2, abs=0.04)
    assert {int(n) for n in turns} <= {0, 1, 2, 3}
    if probability == 1:
        assert len(np.unique(turns)) == 3
        assert (int(down.min()), int(down.max())) == (-4, 4)
        assert (int(right.min()), int(right.max())) == (-4, 4)


def test_masks_are_moved_with_their_images_and_the_network_is_told():
    digits = data.open_dataset(Data(mask_classes=2))
    batch = take(digits, 1, batch_size=16, seed=0)[0]
    batch["mask"] = batch["image"][..., 0]  # a mask that says how its image lies
    for augment in (0.0, 0.5):
        config = Data(num_classes=10, mask_classes=2, augment=augment)
        x, condition = data.augment(batch, jax.random.key(0), config)
        np.testing.assert_array_equal(to_uint8(x)[..., 0], condition["mask"])
        moved = (condition["mask"] != batch["mask"]).any(axis=(1, 2))
        assert ("augment" in condition) == (augment > 0)
    assert 0 < moved.sum() < 16
    np.testing.assert_array_equal(moved, condition["augment"].any(axis=1))
    null = data.null_condition(condition, config)
    assert not null["augment"].any()
    dropping = tiny_config(data=dict(mask_classes=2), objective=dict(label_dropout=1.0))
    dropped = data.drop_condition(condition, jax.random.key(0), dropping)
    np.testing.assert_array_equal(dropped["augment"], condition["augment"])


def test_masks_of_digits_that_are_not_what_the_config_says_are_refused():
    with pytest.raises(InputError, match="data.mask_classes: 3 should be 2 for 'digits'"):
        data.open_dataset(Data(mask_classes=3))


# The condition and its null


@pytest.mark.parametrize("num_classes", [7, 1000])
def test_the_null_condition_is_the_class_and_the_mask_behind_the_last(num_classes):
    config = Data(num_classes=num_classes, mask_classes=3)
    condition = {"y": jnp.arange(5), "mask": jnp.zeros((5, 4, 4), jnp.uint8)}
    null = data.null_condition(condition, config)
    np.testing.assert_array_equal(null["y"], np.full(5, num_classes))
    np.testing.assert_array_equal(null["mask"], np.full((5, 4, 4), 3))
    assert null["mask"].dtype == jnp.uint8
    assert data.null_condition({"y": jnp.arange(5)}, config).keys() == {"y"}


def test_labels_and_masks_are_dropped_as_often_as_asked_and_no_label_without_its_mask():
    config = tiny_config(
        data=dict(mask_classes=2), objective=dict(label_dropout=0.2, mask_dropout=0.5)
    )
    condition = {"y": jnp.full(4000, 4), "mask": jnp.ones((4000, 2, 2), jnp.uint8)}
    dropped = data.drop_condition(condition, jax.random.key(0), config)
    y, mask = np.asarray(dropped["y"]), np.asarray(dropped["mask"])
    assert set(np.unique(y)) == {4, 10}
    assert set(np.unique(mask)) == {1, 2}
    no_label = y == 10
    no_mask = (mask == 2).all(axis=(1, 2))
    np.testing.assert_array_equal(no_mask, (mask == 2).any(axis=(1, 2)))
    assert no_label.mean() == pytest.approx(0.2, abs=0.03)
    assert no_mask.mean() == pytest.approx(0.5, abs=0.03)
    assert no_mask[no_label].all()


# Refusals


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(num_classes=9), "data.num_classes: 9 should be 10, the classes of 'digits'"),
        (dict(num_classes=20), "data.num_classes: 20 should be 10, the classes of 'digits'"),
        (
            dict(image_size=16),
            "data.image_size and data.channels: (16, 1) should be (8, 1), those of 'digits'",
        ),
        (dict(name="CIFAR10"), "the nearest is 'cifar10'"),
        (dict(name="../x"), "data.name: '../x' should be `digits` or a TFDS data set"),
        (dict(name="cifar10:1.0.0"), "'cifar10:1.0.0' should be `digits` or a TFDS data set"),
        (dict(name="cifar10/plain"), "'cifar10/plain' should be `digits` or a TFDS data set"),
        (
            dict(name="cifar_10"),
            "or a TFDS data set, or a folder of pictures that exists; the nearest is 'cifar10'",
        ),
        (
            dict(name="ag_news_subset"),
            "should be a TFDS data set of images with one class label",
        ),
        (
            dict(latents="nowhere", name="imagenet2012", image_size=256),
            "data.latents: 'nowhere' should be a finished, undamaged folder",
        ),
    ],
)
def test_data_that_is_not_what_the_config_says_is_refused(changed, words):
    with pytest.raises(InputError) as refusal:
        data.open_dataset(Data(**changed))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_without_data_and_network_the_refusal_says_how_to_get_it(refused, monkeypatch, tmp_path):
    import requests

    def no_network(*args, **options):
        raise requests.exceptions.ConnectionError("no route")

    monkeypatch.setattr(requests, "head", no_network)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    line = refused(run_train, *TINY, "--data.name", "mnist", "--data.image-size", "28")
    assert "data.name: 'mnist' is not in" in line
    assert "no network" in line
    assert "set TFDS_DATA_DIR to a folder that has it" in line
    assert list(tmp_path.iterdir()) == []


def test_the_imagenet_presets_are_refused_before_anything_is_written(
    refused, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert "data.latents" in refused(run_train, "imagenet256_b2")
    assert list(tmp_path.iterdir()) == []


# Images of TFDS: decoded at the start, or when they are read


def open_pictures(monkeypatch, source, config=PICTURES) -> data.Dataset:
    """The data set that a config opens if TFDS finds this source."""
    records = Decoded(source, "image", "label", config)
    monkeypatch.setattr(data, "open_tfds", lambda config: (records, ("a", "b", "c")))
    monkeypatch.setattr(data, "DECODED_AT_ONCE", 5)
    return data.open_dataset(config)


@pytest.mark.parametrize("count", [4, 5, 211])
def test_images_are_decoded_into_memory_with_a_progress_bar(monkeypatch, capsys, count):
    source = Pictures(count, damaged={7, 210})
    records = open_pictures(monkeypatch, source).records
    assert isinstance(records, data.InMemory)
    assert f"image {count}/{count}  " in capsys.readouterr().err
    every = np.arange(count)
    expected = Decoded(source, "image", "label", PICTURES).read(every)
    assert records.images.shape == (count, 5, 5, 1)
    for name, rows in records.read(every).items():
        assert rows.dtype == expected[name].dtype
        np.testing.assert_array_equal(rows, expected[name])


@pytest.mark.parametrize("limit, is_slow", [(12, True), (14, False)])
def test_images_that_take_too_long_are_decoded_when_they_are_read(
    monkeypatch, capsys, limit, is_slow
):
    clock = Clock(monkeypatch)
    source = Slow(13, clock)  # 13 seconds for all
    monkeypatch.setattr(data, "DECODE_LIMIT", limit)
    records = open_pictures(monkeypatch, source).records
    assert isinstance(records, Decoded if is_slow else data.InMemory)
    assert clock.now == (5 if is_slow else 13), "the first records tell"
    line = "images are decoded when they are read: to decode all 13 would take 13 s at the start, "
    assert capsys.readouterr().out == (line + "more than 12\n" if is_slow else "")


class Clock:
    """Seconds that tests set."""

    def __init__(self, monkeypatch):
        self.now = 0
        self.lock = threading.Lock()
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


class Slow(Pictures):
    """A second a picture, however many threads there are."""

    def __init__(self, count: int, clock: Clock):
        super().__init__(count)
        self.clock = clock

    def __getitem__(self, i: int) -> dict:
        with self.clock.lock:
            self.clock.now += 1
        return super().__getitem__(i)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 1000])
@pytest.mark.parametrize("damaged", [{7, 210}, {7, 8, 210}])
def test_a_run_goes_on_past_damaged_records_unless_they_are_many(
    monkeypatch, capsys, tmp_path, limit, damaged
):
    monkeypatch.setattr(data, "DECODE_LIMIT", limit)
    records = Decoded(Pictures(211, damaged), "image", "label", PICTURES)
    monkeypatch.setattr(data, "open_tfds", lambda config: (records, ("a", "b", "c")))
    options = "--data.name pictures --data.image-size 5 --data.num-classes 3 --model.patch-size 5"
    argv = [*TINY, *options.split(), "--train.steps", "15", "--workdir", tmp_path]
    if len(damaged) == 2:
        assert int(run_train(*argv).step) == 15  # 240 images, so each of the 211
        assert capsys.readouterr().err.count("damaged record ") == 2
    else:
        with pytest.raises(SystemExit) as stop:
            run_train(*argv)
        assert stop.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert "data.name: 'pictures' should have at most 1% damaged records" in last


@pytest.fixture(scope="module")
def cifar10() -> data.Dataset:
    return data.open_dataset(CIFAR10)


@pytest.mark.slow
@needs_cifar10
def test_cifar10_through_tfds(cifar10):
    images, labels = cifar10.records.images, cifar10.records.labels
    assert images.shape == (50_000, 32, 32, 3)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [5000] * 10
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    assert cifar10.class_names == tuple(names.split())
    published_means = [0.491, 0.482, 0.447]
    np.testing.assert_allclose(images.mean(axis=(0, 1, 2)) / 255, published_means, atol=0.005)
    tenth = data.open_dataset(Data(name="cifar10", split="train[:10%]", image_size=13, channels=3))
    assert tenth.records.images.shape == (5000, 13, 13, 3)


@needs_cifar10
def test_the_config_of_a_tfds_data_set_is_filled_in_from_its_own_facts():
    config = data.tfds_config("cifar10", "test", 32)
    assert config == Data(name="cifar10", split="test", image_size=32, channels=3, num_classes=10)
    assert data.tfds_config("digits", "train", 8) == Data()


@needs_cifar10
@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(num_classes=7), "data.num_classes: 7 should be 10, the classes of 'cifar10'"),
        (dict(channels=1), "data.channels: 1 should be 3, as in 'cifar10'"),
        (dict(mask_classes=2), "data.mask_classes: 2 should be 0: 'cifar10' has no segmentation"),
        (dict(split="trian"), "data.split: 'trian' should be one of"),
        (dict(split="train[50000:]"), "data.split: 'train[50000:]' should be one of"),
    ],
)
@pytest.mark.parametrize("limit", [0, data.MEMORY_LIMIT])
def test_cifar10_that_is_not_what_the_config_says_is_refused(monkeypatch, changed, words, limit):
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
    options = dict(name="cifar10", image_size=32, channels=3) | changed
    with pytest.raises(InputError) as refusal:
        data.open_dataset(Data(**options))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@needs_imagenet
def test_images_of_many_sizes_are_cropped_to_one():
    config = Data(
        name="imagenet2012", split="validation", image_size=23, channels=3, num_classes=1000
    )
    imagenet = data.open_dataset(config)
    assert imagenet.records.images.shape[1:] == (23, 23, 3)
    assert imagenet.records.images.std() > 30
    assert len(imagenet.records) == len(imagenet.records.labels)
    assert len(imagenet.class_names) == 1000


@pytest.mark.slow
@needs_cifar10
def test_a_set_too_large_for_memory_is_decoded_on_access_with_the_same_batches(
    cifar10, monkeypatch
):
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    lazy = data.open_dataset(CIFAR10)
    assert isinstance(lazy.records, Decoded)
    a = take(cifar10, 1, batch_size=5, seed=0, start=11)[0]
    b = take(lazy, 1, batch_size=5, seed=0, start=11)[0]
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["label"], b["label"])


@pytest.mark.slow
@needs_cifar10
def test_100_steps_of_cifar10_tiny_lower_the_loss(tmp_path):
    command = [sys.executable, ROOT / "train.py", "cifar10_tiny", "--workdir", tmp_path]
    options = "--data.split train[:10%] --train.steps 100 --train.batch-size 16".split()
    options += "--train.sample-every 0".split()
    subprocess.run([*command, *options], env=os.environ | OPTIMISED, check=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[-1]["step"] == 100
    assert np.isfinite([row["loss"] for row in rows]).all()
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]  # means of 50 steps each
    assert intact.stored_dataset(tmp_path, 100)["class_names"][3] == "cat"
