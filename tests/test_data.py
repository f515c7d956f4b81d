import io
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, tiny_config
from PIL import Image

import train
from dit import config, data
from dit.config import Data, InputError
from dit.images import prepare, to_uint8

CIFAR10 = Data(name="cifar10", image_size=32, channels=3)
TFDS_DATA_DIR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
needs_cifar10 = pytest.mark.skipif(not (TFDS_DATA_DIR / "cifar10").is_dir(), reason="no CIFAR-10 in TFDS_DATA_DIR")


def take(dataset, count, **options):
    stream = data.batches(dataset, **options)
    return [next(stream) for _ in range(count)]


def test_digits_are_the_1797_real_ones():
    digits = data.open_dataset(Data())
    images, labels = digits.records.images, digits.records.labels
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8 and labels.dtype == np.int32
    assert images.min() == 0 and images.max() == 255 and len(np.unique(images)) == 17
    assert digits.class_names == tuple("0123456789") and np.bincount(labels).min() > 170


def test_a_batch_is_a_function_of_seed_and_step():
    digits = data.open_dataset(Data())
    first, resumed = take(digits, 9, batch_size=7, seed=3), take(digits, 4, batch_size=7, seed=3, start=5)
    for a, b in zip(first[5:], resumed, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])
    other = take(digits, 1, batch_size=7, seed=4)[0]
    assert (first[0]["image"] != other["image"]).any() and (first[0]["image"] != first[1]["image"]).any()


def test_each_epoch_shows_every_record_once_in_an_order_of_its_own():
    small = data.Dataset(data.InMemory(np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1), np.zeros(12, np.int32)), ())
    epochs = [np.concatenate([b["image"].ravel() for b in take(small, 4, batch_size=3, seed=0, start=4 * e)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any() and (epochs[0] != np.arange(12)).any()


def test_masks_say_where_the_ink_is_and_are_mirrored_with_the_image():
    digits = data.open_dataset(Data(mask_classes=2))
    cells = digits.records.masks.reshape(-1, 4, 2, 4, 2)
    ink = digits.records.images[..., 0].reshape(-1, 4, 2, 4, 2)
    assert (cells.max(axis=(2, 4)) == cells.min(axis=(2, 4))).all() and 0.3 < cells.mean() < 0.7
    full, empty = ink[:, :, 0, :, 0][cells[:, :, 0, :, 0] == 1], ink.max(axis=(2, 4))[cells[:, :, 0, :, 0] == 0]
    assert full.mean() > 100 and empty.mean() < 60
    batch = take(digits, 1, batch_size=16, seed=0)[0]
    assert batch["mask"].shape == (16, 8, 8) and batch["mask"].dtype == np.uint8
    batch["mask"] = batch["image"][..., 0]  # a mask that says which way round its image is
    x, mask = prepare(batch, jax.random.key(0), True, 1.0)
    np.testing.assert_array_equal(to_uint8(x)[..., 0], mask)
    assert (np.asarray(mask) != batch["image"][..., 0]).any() and data.batch_shapes(tiny_config(data=dict(mask_classes=2)))["mask"] == (
        (16, 8, 8), np.uint8)
    with pytest.raises(InputError, match="data.mask_classes: 3 should be 2 for 'digits'"):
        data.open_dataset(Data(mask_classes=3))


def test_masks_of_tfds_are_cropped_like_their_images_without_mixing_labels():
    mask = np.zeros((20, 31, 1), np.uint8) + 1
    mask[:, 20:] = 3
    file = io.BytesIO()
    Image.fromarray(mask[..., 0] * 80).save(file, "PNG")  # the picture shows the mask
    source = [{"image": file.getvalue(), "label": 5, "segmentation_mask": mask}]
    config = Data(name="pets", image_size=10, channels=1, mask_classes=3)
    record = data.Decoded(source, "image", "label", config).read(source[0], 0)
    assert set(np.unique(record["mask"])) == {0, 2} and record["mask"].shape == (10, 10)
    np.testing.assert_array_equal(record["image"][..., 0] > 160, record["mask"] == 2)
    with pytest.raises(InputError, match="data.mask_classes: 3 should be that of masks which hold 0 to 2"):
        data.Decoded(source, "image", "label", config).read(source[0] | {"segmentation_mask": mask - 1}, 0)
    with pytest.raises(InputError, match="data.mask_classes: 2 should be that of masks which hold 1 to 3"):
        data.Decoded(source, "image", "label", Data(name="pets", image_size=10, channels=1, mask_classes=2)).read(source[0], 0)


def test_the_processes_parts_make_up_the_batch():
    digits = data.open_dataset(Data())
    whole = take(digits, 3, batch_size=6, seed=1, start=2)
    parts = [take(digits, 3, batch_size=6, seed=1, start=2, process=p, processes=3) for p in range(3)]
    for step in range(3):
        np.testing.assert_array_equal(np.concatenate([parts[p][step]["image"] for p in range(3)]), whole[step]["image"])


@pytest.mark.parametrize("changed, words", [
    (dict(num_classes=9), "data.num_classes: 9 should be 10, the classes of 'digits'"),
    (dict(num_classes=20), "data.num_classes: 20 should be 10, the classes of 'digits'"),
    (dict(image_size=16), "data.image_size and data.channels: (16, 1) should be (8, 1), those of 'digits'"),
    (dict(name="CIFAR10"), "the nearest is 'cifar10'"),
    (dict(name="../x"), "data.name: '../x' should be `digits` or a TFDS data set"),
    (dict(name="cifar10:1.0.0"), "data.name: 'cifar10:1.0.0' should be `digits` or a TFDS data set"),
    (dict(name="cifar10/plain"), "data.name: 'cifar10/plain' should be `digits` or a TFDS data set"),
    (dict(name="cifar_10"), "data.name: 'cifar_10' should be `digits` or a TFDS data set; the nearest is 'cifar10'"),
    (dict(name="ag_news_subset"), "should be a TFDS data set of images with one class label"),
    (dict(latents="nowhere", name="imagenet2012", image_size=256), "data.latents: 'nowhere' should be a finished folder"),
])
def test_data_that_is_not_what_the_config_says_is_refused(changed, words):
    with pytest.raises(InputError) as refusal:
        data.open_dataset(Data(**changed))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_without_data_and_network_the_refusal_says_how_to_get_it(refused, monkeypatch, tmp_path):
    import requests

    def no_network(*args, **options):
        raise requests.exceptions.ConnectionError("no route")

    monkeypatch.setattr(requests, "head", no_network)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    line = refused(train.main, *TINY, "--data.name", "mnist", "--data.image-size", "28")
    assert "data.name: 'mnist' is not in" in line and "no network" in line and "set TFDS_DATA_DIR to a folder that has it" in line
    assert list(tmp_path.iterdir()) == []


def test_the_imagenet_presets_are_refused_before_anything_is_written(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "data.latents" in refused(train.main, "imagenet256_b2")
    assert list(tmp_path.iterdir()) == []


@needs_cifar10
def test_cifar10_through_tfds():
    cifar10 = data.open_dataset(CIFAR10)
    images, labels = cifar10.records.images, cifar10.records.labels
    assert images.shape == (50_000, 32, 32, 3) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [5000] * 10
    assert cifar10.class_names == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    np.testing.assert_allclose(images.mean(axis=(0, 1, 2)) / 255, [0.491, 0.482, 0.447], atol=0.005)  # the published means
    tenth = data.open_dataset(Data(name="cifar10", split="train[:10%]", image_size=13, channels=3))
    assert tenth.records.images.shape == (5000, 13, 13, 3)


@needs_cifar10
@pytest.mark.parametrize("changed, words", [
    (dict(num_classes=7), "data.num_classes: 7 should be 10, the classes of 'cifar10'"),
    (dict(channels=1), "data.channels: 1 should be 3, as in 'cifar10'"),
    (dict(split="trian"), "data.split: 'trian' should be one of"),
    (dict(split="train[50000:]"), "data.split: 'train[50000:]' should be one of"),
])
@pytest.mark.parametrize("limit", [0, data.MEMORY_LIMIT])
def test_cifar10_that_is_not_what_the_config_says_is_refused(monkeypatch, changed, words, limit):
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
    with pytest.raises(InputError) as refusal:
        data.open_dataset(Data(**(dict(name="cifar10", image_size=32, channels=3) | changed)))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.skipif(not (TFDS_DATA_DIR / "imagenet2012").is_dir(), reason="no ImageNet in TFDS_DATA_DIR")
def test_images_of_many_sizes_are_cropped_to_one():
    imagenet = data.open_dataset(Data(name="imagenet2012", split="validation", image_size=23, channels=3, num_classes=1000))
    assert imagenet.records.images.shape[1:] == (23, 23, 3) and len(imagenet.class_names) == 1000
    assert imagenet.records.images.std() > 30 and len(imagenet.records) == len(imagenet.records.labels)


@needs_cifar10
def test_a_set_too_large_for_memory_is_decoded_on_access_with_the_same_batches(monkeypatch):
    whole = data.open_dataset(CIFAR10)
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    lazy = data.open_dataset(CIFAR10)
    assert isinstance(lazy.records, data.Decoded)
    a, b = (take(d, 1, batch_size=5, seed=0, start=11)[0] for d in (whole, lazy))
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["label"], b["label"])


@needs_cifar10
def test_300_steps_of_cifar10_tiny_lower_the_loss(optimised, tmp_path):
    import json

    train.main(["cifar10_tiny", "--workdir", str(tmp_path / "run"), "--train.steps", "300", "--train.sample-every", "0",
                "--train.batch-size", "16"])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 300 and np.isfinite([row["loss"] for row in rows]).all()
    assert np.mean([row["mse"] for row in rows[-3:]]) < 0.5 * rows[0]["mse"]
    assert config.from_json((tmp_path / "run/config.json").read_text()).data.class_names[3] == "cat"
