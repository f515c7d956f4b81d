"""A folder of pictures: its classes, order, slices and files, from the command line to samples."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, run_sample, run_train
from PIL import Image

import train
from dit import checkpoint, cli, data, intact
from dit.config import Data, InputError
from dit.folder import is_folder, open_folder
from dit.images import centre_crop

ROOT = Path(__file__).resolve().parent.parent
SIZES = [(5, 5), (7, 11), (23, 13)]  # of pictures, width x height


def write_shade(path: Path, shade: int) -> None:
    """A picture all of one shade, of one of several sizes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = SIZES[shade % len(SIZES)]
    Image.fromarray(np.full((height, width), shade, np.uint8)).save(path, lossless=True)


def write_folder(root: Path, **counts: int) -> Path:
    """Pictures of as many shades: write_folder(root, cat=3, dog=2) has 0 to 2 and 100, 101."""
    for k, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_shade(root / name / f"{i}.png", 100 * k + i)
    return root


def config_of(folder: Path, **changed) -> Data:
    return Data(**(dict(name=str(folder), image_size=5, channels=1) | changed))


def shades(config: Data) -> list[int]:
    records, _ = open_folder(config)
    return records.read(range(len(records)))["image"][:, 2, 2, 0].tolist()


# Classes


def test_a_subfolder_is_a_class_and_its_pictures_are_found_whatever_they_are(tmp_path):
    folder, other = tmp_path / "pictures", tmp_path / "other"
    for i, name in enumerate(["a.png", "b.PNG", "c.webp", "deep/er/d.png"]):
        write_shade(folder / "cat" / name, i)
    write_shade(other / "e.png", 104)
    (folder / "Dog").symlink_to(other)
    write_shade(tmp_path / "more/h.png", 4)
    (folder / "cat/more").symlink_to(tmp_path / "more")
    write_shade(folder / "cat/.hidden.png", 50)
    write_shade(folder / "cat/.cache/f.png", 51)
    write_shade(folder / ".git/g.png", 52)
    (folder / "cat/notes.txt").write_text("no picture")
    (folder / "readme.md").write_text("no class")

    dataset = data.open_dataset(config_of(folder))
    assert dataset.class_names == ("Dog", "cat")
    batch = dataset.records.read(range(len(dataset.records)))
    assert sorted(batch["image"][:, 2, 2, 0]) == [0, 1, 2, 3, 4, 104]
    assert batch["image"].shape == (6, 5, 5, 1)
    np.testing.assert_array_equal(batch["label"], batch["image"][:, 2, 2, 0] < 100)
    assert batch["label"].dtype == np.int32


def test_a_set_too_large_for_memory_is_decoded_when_it_is_read(tmp_path, monkeypatch):
    config = config_of(write_folder(tmp_path, cat=7, dog=5))
    whole = data.open_dataset(config).records
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    lazy = data.open_dataset(config).records
    assert (type(whole), type(lazy)) == (data.InMemory, data.Decoded)
    indices = [11, 0, 3]
    for name, rows in lazy.read(indices).items():
        np.testing.assert_array_equal(rows, whole.read(indices)[name])


def test_a_word_is_a_folder_unless_tfds_has_it_and_a_path_with_a_slash_always(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "prepared/1.0.0").mkdir(parents=True)
    (tmp_path / "prepared/1.0.0/dataset_info.json").write_text("{}")
    (tmp_path / "file").write_text("")
    names = ["mine", "cifar10", "prepared", "./cifar10", "cifar10/", "nowhere", "no/where", "file"]
    assert [name for name in names if is_folder(name)] == ["mine", "./cifar10", "cifar10/"]


def test_no_tfds_is_imported(tmp_path):
    folder = write_folder(tmp_path / "pictures", cat=1)
    program = f"""
import sys
from dit import data
print(len(data.open_dataset(data.Data(name={str(folder)!r})).records))
print([name for name in sys.modules if name.startswith("tensorflow")])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n[]\n"


# Order and slices


def test_a_slice_has_its_share_of_every_class_and_the_rest_has_the_others(tmp_path):
    counts = dict(cat=40, dog=13, eel=21)
    folder = write_folder(tmp_path, **counts)
    for percent in (5, 50, 90):
        first = shades(config_of(folder, split=f"train[:{percent}%]"))
        rest = shades(config_of(folder, split=f"train[{percent}%:]"))
        assert first + rest == shades(config_of(folder))
        held = Counter(shade // 100 for shade in first)
        for k, count in enumerate(counts.values()):
            assert abs(held[k] - count * percent / 100) <= 1, "its share, up to one"
    assert len(first) + len(rest) == len(set(first + rest)) == 74


def test_the_order_is_the_same_anywhere_and_that_of_old_pictures_when_one_comes(tmp_path):
    here = shades(config_of(write_folder(tmp_path / "here", cat=17, dog=5)))
    there = write_folder(tmp_path / "there", dog=5, cat=17)
    for i in range(5):
        write_shade(there / f"dog/{i}.png", 100 + i)
    for i in range(17):
        write_shade(there / f"cat/{i}.png", i)
    assert shades(config_of(there)) == here
    cats = [shade for shade in here if shade < 100]
    assert cats != sorted(cats, key=str), "not in the order of names"
    write_shade(there / "cat/new.png", 99)
    assert [shade for shade in shades(config_of(there)) if shade < 99] == cats


def test_a_split_may_be_several_slices_as_tfds_writes_them(tmp_path):
    folder = write_folder(tmp_path / "pictures", cat=17, dog=6)
    whole = shades(config_of(folder))
    assert shades(config_of(folder, split="train[:5%]+train[-3:]")) == [whole[0], *whole[-3:]]


def test_val_beside_train_is_a_split_with_the_labels_of_train(tmp_path):
    write_folder(tmp_path / "train", cat=3, dog=5, eel=2)
    write_folder(tmp_path / "val", dog=2, eel=1)  # no cat
    assert sorted(shades(config_of(tmp_path))) == [0, 1, 2, *range(100, 105), 200, 201]
    records, class_names = open_folder(config_of(tmp_path, split="val"))
    assert class_names == ("cat", "dog", "eel")
    batch = records.read(range(3))
    assert sorted(batch["label"]) == [1, 1, 2]
    assert len(open_folder(config_of(tmp_path, split="val[:67%]"))[0]) == 2
    write_folder(tmp_path / "val", fox=1)
    with pytest.raises(InputError, match="data.split: 'val' should be of the classes in .* fox"):
        open_folder(config_of(tmp_path, split="val"))


# Files


def read_picture(folder: Path, picture: Image.Image, name="0.png", channels=3, **options):
    """A picture as a data set of it alone reads it, at 5x5."""
    path = folder / "class" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return open_folder(config_of(folder, channels=channels))[0][0]["image"]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("name", ["0.png", "0.webp"])
def test_a_picture_is_cropped_and_resized_as_any_and_converted_to_the_models_channels(
    tmp_path, name
):
    colours, grey = noise(13, 31, 3), noise(13, 31)
    found = read_picture(tmp_path / "a", Image.fromarray(colours), name, lossless=True)
    np.testing.assert_array_equal(found, centre_crop(colours, 5))
    found = read_picture(tmp_path / "b", Image.fromarray(colours), name, 1, lossless=True)
    as_grey = np.asarray(Image.fromarray(colours).convert("L"))[..., None]
    np.testing.assert_array_equal(found, centre_crop(as_grey, 5))
    found = read_picture(tmp_path / "c", Image.fromarray(grey), name, lossless=True)
    expected = centre_crop(grey[..., None].repeat(3, axis=-1), 5)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("orientation, turn", [(1, None), (3, 2), (6, -1), (8, 1)])
def test_a_picture_is_turned_as_its_camera_was_held(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(5, 5, 3)
    found = read_picture(tmp_path, Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(found, pixels if turn is None else np.rot90(pixels, turn))


def test_what_is_clear_is_white_and_16_bits_are_8_and_a_palette_is_its_colours(tmp_path):
    pixels, alpha = noise(5, 5, 3), np.full((5, 5, 1), 255, np.uint8)
    alpha[0] = 0
    clear = Image.fromarray(np.concatenate([pixels, alpha], axis=-1))
    on_white = np.where(alpha == 0, np.uint8(255), pixels)
    np.testing.assert_array_equal(read_picture(tmp_path / "a", clear), on_white)

    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 + 7)
    assert deep.mode == "I;16"
    found = read_picture(tmp_path / "b", deep, channels=1)
    np.testing.assert_array_equal(found, pixels[..., :1])

    palette = Image.fromarray(pixels).quantize(11)
    found = read_picture(tmp_path / "c", palette)
    np.testing.assert_array_equal(found, np.asarray(palette.convert("RGB")))


def test_files_that_cannot_be_read_are_named_counted_and_left_out(tmp_path, capsys):
    folder = write_folder(tmp_path / "pictures", cat=4, dog=3)
    before = shades(config_of(folder))
    assert capsys.readouterr().out == ""
    (folder / "cat/a.jpg").write_text("<html>")
    (folder / "cat/b.webp").write_bytes(b"")
    (folder / "dog/c.png").symlink_to(tmp_path / "gone")
    Image.fromarray(noise(5, 5).astype(np.float32)).save(folder / "dog/d.png", "TIFF")
    dataset = data.open_dataset(config_of(folder))
    assert dataset.records.images[:, 2, 2, 0].tolist() == before
    line = capsys.readouterr().out
    start = f"{folder}: left out 4 of 11 files that cannot be read: cat/a.jpg (cannot identify "
    assert line.startswith(start)
    assert line.endswith(" and 1 more\n") and line.count("\n") == 1


def test_a_picture_whose_end_is_missing_is_named_and_the_next_takes_its_place(tmp_path, capsys):
    folder = write_folder(tmp_path / "pictures", cat=3)
    path = folder / "cat/3.png"
    Image.fromarray(noise(23, 23)).save(path)
    path.write_bytes(path.read_bytes()[:200])
    assert set(shades(config_of(folder))) == {0, 1, 2}
    line = capsys.readouterr().err
    assert line.startswith("damaged record 1, the next takes its place: ")
    assert "cat/3.png cannot be decoded" in line


# Refusals


def none(folder: Path) -> None:
    folder.mkdir()


def only_pictures(folder: Path) -> None:
    write_shade(folder / "0.png", 0)


def empty_class(folder: Path) -> None:
    write_folder(folder, cat=2)
    (folder / "dog").mkdir()
    (folder / "dog/a.txt").write_text("")


def same_names(folder: Path) -> None:
    write_folder(folder, cat=1, Cat=1)


def broken_mode(folder: Path) -> None:
    write_folder(folder, cat=2)
    (folder / "dog").mkdir()
    Image.fromarray(noise(5, 5).astype(np.float32)).save(folder / "dog/d.png", "TIFF")


@pytest.mark.parametrize(
    "write, changed, words",
    [
        (none, {}, "should be a folder with a subfolder of pictures for each class, and has none"),
        (
            only_pictures,
            {},
            "should be a folder with a subfolder of pictures for each class, and has",
        ),
        (
            empty_class,
            {},
            "dog' should be a folder of pictures that can be read (.png, .jpg, .jpeg",
        ),
        (same_names, {}, "without 'Cat' and 'cat': classes differ in more than the case"),
        (broken_mode, {}, "; dog/d.png (mode 'F', where pixels should have 8 or 16 bits a channel"),
        (write_folder, dict(num_classes=3), "data.num_classes: 3 should be 2, the classes of"),
        (write_folder, dict(split="val"), "data.split: 'val' should be train: "),
        (write_folder, dict(split="train[:95"), "should be a slice of its 5 pictures that is not"),
        (write_folder, dict(split="train[5:]"), "should be a slice of its 5 pictures that is not"),
        (write_folder, dict(split="train[:1%]"), "should be a slice of its 5 pictures that is not"),
        (write_folder, dict(mask_classes=2), "data.mask_classes: 2 should be 0: a folder of pict"),
    ],
)
def test_folders_and_slices_that_cannot_be_are_refused(tmp_path, write, changed, words):
    folder = tmp_path / "pictures"
    options = dict(cat=3, dog=2) if write is write_folder else {}
    write(folder, **options)
    with pytest.raises(InputError) as refusal:
        data.open_dataset(config_of(folder, **changed))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_path_that_is_not_there_is_refused_without_a_nearest(refused):
    line = refused(run_train, *TINY, "--data.name", "no/where")
    assert line.endswith(
        "should be `digits` or a TFDS data set, or a folder of pictures that exists"
    )


# The number of classes


def test_other_data_leaves_the_presets_number_of_classes_open_unless_one_is_given():
    def number(*flags: str) -> int | None:
        return cli.parse_config(["cifar10", *flags], "train.py", "").data.num_classes

    assert number() == 10
    assert number("--data.flip", "False") == 10
    assert number("--data.name", "x") is None
    assert number("--data.name=x") is None
    assert number("--data.name", "x", "--data.num-classes", "7") == 7


def test_a_model_is_not_made_of_an_open_number_of_classes(refused):
    from dit.identity import run

    def identity(*argv):
        with cli.exit_status("dit.identity"):
            run(cli.parse_config(list(argv), "dit.identity", ""))

    line = refused(identity, *TINY, "--data.name", "pictures")
    assert "data.num_classes: None should be given here, where no data set is opened" in line


# From the command line to samples


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[list, Path]:
    """The command of a run of 2 steps on a folder, and its workdir."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    folder = write_folder(tmp_path_factory.mktemp("data") / "pictures", heron=7, owl=5, wren=3)
    argv = [*TINY, "--data.name", folder, "--train.steps", 2, "--workdir", workdir]
    run_train(*argv)
    return argv, workdir


def test_a_run_takes_names_and_number_of_classes_from_the_folder(trained):
    argv, workdir = trained
    assert json.loads((workdir / "config.json").read_text())["data"]["num_classes"] == 3
    assert intact.stored_config(workdir, 2).data.num_classes == 3
    facts = {"class_names": ["heron", "owl", "wren"], "num_examples": 15}
    assert intact.stored_dataset(workdir, 2) == facts
    model, _ = checkpoint.load(workdir)
    assert model.num_classes == 3


def test_classes_are_sampled_by_the_names_of_their_folders(trained, tmp_path):
    _, workdir = trained
    run_sample(workdir, "--classes", "OWL", 0, "--per-class", 1, "--out", tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["arr_1"].tolist() == [1, 0]


def test_the_same_command_resumes_and_a_picture_more_is_refused(trained):
    argv, workdir = trained
    assert int(run_train(*argv, "--train.steps", 3).step) == 3
    folder = argv[argv.index("--data.name") + 1]
    write_shade(folder / "owl/9.png", 9)
    config = cli.parse_config([str(a) for a in argv], "train.py", "")
    with pytest.raises(InputError, match="data: 16 images, where the run was trained on 15"):
        train.train(config)
    os.remove(folder / "owl/9.png")
