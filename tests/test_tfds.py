"""Images of TFDS: decoded, cropped, and replaced where they are damaged."""

import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Pictures, run_train
from PIL import Image

from dit import cli
from dit.config import Data, InputError
from dit.data import open_dataset
from dit.tfds import Decoded, Undecodable

PICTURES = Data(name="pictures", image_size=5, channels=1, num_classes=3)


def shades(records: Decoded, indices) -> list[int]:
    """The one colour of each picture, which is its index in the set."""
    return records.read(indices)["image"][:, 2, 2, 0].tolist()


def open_pictures(count: int, damaged=()) -> Decoded:
    return Decoded(Pictures(count, damaged), "image", "label", PICTURES)


# Reading


def test_records_are_read_in_the_order_of_their_indices():
    records = open_pictures(13)
    indices = np.array([11, 3, 3, 0, 12])
    batch = records.read(indices)
    assert batch["image"].shape == (5, 5, 5, 1)
    assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
    assert shades(records, indices) == indices.tolist()
    assert batch["label"].tolist() == (indices % 3).tolist()


def test_records_are_decoded_in_threads(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    both = threading.Barrier(2)

    class Meeting(Decoded):
        def decode(self, i, stored):
            both.wait(timeout=10)  # until another thread decodes as well
            return super().decode(i, stored)

    records = Meeting(Pictures(7), "image", "label", PICTURES)
    assert shades(records, [5, 2, 1, 6]) == [5, 2, 1, 6]


# Damaged records: at most one in a hundred


def test_a_damaged_record_is_named_once_counted_and_replaced_by_the_next(capsys):
    records = open_pictures(211, damaged={7, 210})
    assert shades(records, [6, 7, 8]) == [6, 8, 8]
    assert shades(records, [210, 7]) == [0, 8], "the first comes after the last"
    first, second = capsys.readouterr().err.splitlines()
    start = "damaged record {}, the next takes its place: pictures: {}.png cannot be decoded ("
    assert first.startswith(start.format(1, 7))
    assert second.startswith(start.format(2, 210))


def test_what_takes_a_records_place_does_not_depend_on_what_was_read_before():
    indices = np.arange(211)
    damaged = {5, 6}
    expected = shades(open_pictures(211, damaged=damaged), indices)
    assert expected == [*range(5), 7, 7, *range(7, 211)]
    backwards = open_pictures(211, damaged=damaged)
    assert shades(backwards, indices[::-1]) == expected[::-1]
    assert shades(backwards, indices) == expected


def test_a_set_with_more_damaged_records_is_refused():
    records = open_pictures(211, damaged={7, 20, 101})
    records.read([20, 101, 20])
    with pytest.raises(InputError) as refusal:
        records.read([6, 7])
    line = str(refusal.value)
    words = "data.name: 'pictures' should have at most 1% damaged records, and has 3 or more of 211"
    assert line.startswith(words)
    assert "one is pictures: 7.png cannot be decoded (" in line
    assert "\n" not in line


def test_a_set_that_is_damaged_throughout_is_refused():
    with pytest.raises(InputError, match="at most 1% damaged records, and has 1 or more of 5"):
        open_pictures(5, damaged=range(5)).read([3])


def test_one_record_is_not_replaced():
    with pytest.raises(Undecodable, match="pictures: 7.png cannot be decoded"):
        open_pictures(211, damaged={7})[7]


def test_a_record_without_a_label_is_no_damaged_one():
    class Unlabelled(Pictures):
        def __getitem__(self, i):
            return super().__getitem__(i) | {"label": -1}

    records = Decoded(Unlabelled(5), "image", "label", PICTURES)
    with pytest.raises(InputError, match="data.split: 'train' should have labels, and has -1"):
        records.read([0])
    assert not records.damaged


# Masks


def tfds_record() -> dict:
    """A picture of 20 x 31 that shows its own mask of labels 1 and 3."""
    mask = np.ones((20, 31, 1), np.uint8)
    mask[:, 20:] = 3
    file = io.BytesIO()
    Image.fromarray(mask[..., 0] * 80).save(file, "PNG")
    return {"image": file.getvalue(), "label": 5, "segmentation_mask": mask}


def read(record: dict, mask_classes: int) -> dict:
    config = Data(name="pets", image_size=10, channels=1, mask_classes=mask_classes)
    return Decoded([record], "image", "label", config)[0]


def test_masks_of_tfds_are_cropped_like_their_images_without_mixing_labels():
    record = read(tfds_record(), 3)
    assert record["mask"].shape == (10, 10)
    assert set(np.unique(record["mask"])) == {0, 2}
    np.testing.assert_array_equal(record["image"][..., 0] > 160, record["mask"] == 2)


def test_masks_that_are_not_what_the_config_says_are_refused():
    record = tfds_record()
    from_zero = record | {"segmentation_mask": record["segmentation_mask"] - 1}
    with pytest.raises(InputError, match="3 should be that of masks which hold 0 to 2"):
        read(from_zero, 3)
    with pytest.raises(InputError, match="2 should be that of masks which hold 1 to 3"):
        read(record, 2)


# Builders of one's own

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds


class NAME(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(8, 8, 1))
        label = tfds.features.ClassLabel(names=["dark", "light", "white"])
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(7):
            yield i, {"image": np.full((8, 8, 1), 30 * i, np.uint8), "label": i // 3}
"""
CONFIG = """
from dit.config import Config, Data

config = Config(name="mine", data=Data(name="SET", image_size=8, channels=1))
"""


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """A folder for config files, beside that of TFDS, where asking the network is an error."""
    import requests

    def no_network(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(requests.Session, "request", no_network)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    folder = tmp_path / "configs"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("place", ["defined in", "beside"])
def test_a_builder_of_ones_own_is_prepared_and_read_without_a_network(offline, place):
    if place == "beside":
        (offline / "own_shapes.py").write_text(BUILDER.replace("NAME", "BesideShapes"))
        text, name = "import own_shapes\n" + CONFIG, "beside_shapes"
    else:
        text, name = BUILDER.replace("NAME", "DefinedShapes") + CONFIG, "defined_shapes"
    (offline / "own_config.py").write_text(text.replace("SET", name))
    argv = [str(offline / "own_config.py")]
    assert not cli.joins_hosts(argv), "which runs the file too"
    config = cli.parse_config(argv, "train.py", "")
    dataset = open_dataset(config.data)
    assert dataset.class_names == ("dark", "light", "white")
    order = np.argsort(dataset.records.images[:, 0, 0, 0])
    assert dataset.records.images[order, 3, 5, 0].tolist() == [0, 30, 60, 90, 120, 150, 180]
    assert dataset.records.labels[order].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert open_dataset(config.data).class_names == dataset.class_names, "from what is prepared"


@pytest.mark.parametrize(
    "name, set_name, sound, broken, words",
    [
        ("BadInfo", "bad_info", "tfds.features.Image", "np.Imag", "works (AttributeError: module "),
        ("BadItems", "bad_items", "30 * i", "30 // 0", "works (ZeroDivisionError: "),
        ("BadShape", "bad_shape", "np.full((8, 8, 1)", "np.full((8, 7, 1)", "works (ValueError: "),
        (
            "BadLabel",
            "bad_label",
            '"label": label',
            '"other": label',
            "images with one class label",
        ),
    ],
)
def test_what_goes_wrong_in_a_builder_is_named(
    refused, offline, name, set_name, sound, broken, words
):
    builder = BUILDER.replace("NAME", name).replace(sound, broken)
    (offline / "own_config.py").write_text(builder + CONFIG.replace("SET", set_name))
    line = refused(run_train, offline / "own_config.py", *TINY[1:])
    assert f"data.name: {set_name!r} should " in line
    assert words in line
