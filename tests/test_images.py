"""Bytes and floats, crops, grids, and .npz files."""

import io
import zipfile
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFont

from dit.config import InputError
from dit.images import (
    centre_crop,
    draw_grid,
    fitting_font,
    from_uint8,
    open_npz,
    open_picture,
    read_part,
    save_gif,
    save_grid,
    to_uint8,
    write_npz,
    write_part,
)


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# Bytes


def test_every_byte_survives_the_round_trip():
    levels = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(to_uint8(from_uint8(levels)), levels)


def test_the_ends_are_minus_one_and_one_and_what_lies_beyond_is_clipped():
    np.testing.assert_array_equal(from_uint8(jnp.array([0, 255], jnp.uint8)), [-1, 1])
    np.testing.assert_array_equal(to_uint8(jnp.array([-3.0, 3.0])), [0, 255])


# Crops


def wide_image() -> tuple[np.ndarray, np.ndarray]:
    """uint8 `[40, 88, 3]`, black but for its middle, and the middle `[40, 40, 3]`."""
    image, middle = np.zeros((40, 88, 3), np.uint8), random_images(40, 40, 3)
    image[:, 24:64] = middle
    return image, middle


def test_centre_crop_keeps_the_middle():
    image, middle = wide_image()
    np.testing.assert_array_equal(centre_crop(image, 40), middle)


def test_centre_crop_halves_by_boxes():
    image, middle = wide_image()
    boxes = middle.reshape(10, 4, 10, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(centre_crop(image, 10), boxes, atol=2)  # two halvings, rounded twice


@pytest.mark.parametrize("size, channels", [(13, 3), (53, 1)])
def test_centre_crop_resizes_up_and_down(size, channels):
    image, _ = wide_image()
    assert centre_crop(image[..., :channels], size).shape == (size, size, channels)


def test_centre_crop_returns_an_image_of_the_right_size_as_it_is():
    image = random_images(10, 10, 3)
    assert centre_crop(image, 10) is image


# Grids


def test_a_grid_shows_each_image_in_its_place_behind_its_rows_name(tmp_path):
    levels = np.arange(6, dtype=np.uint8) * 40
    images = np.broadcast_to(levels.reshape(6, 1, 1, 1), (6, 8, 8, 1))
    save_grid(tmp_path / "grid.png", images, ["zero", "one"])
    sheet = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    width = 3 * 66  # tiles of 64 pixels and a gap of 2
    margin, tiles = sheet[:, :-width], sheet[2:, -width:].reshape(2, 66, 3, 66)
    inside = tiles[:, :64, :, :64]
    np.testing.assert_array_equal(inside.max(axis=(1, 3)), levels.reshape(2, 3))
    np.testing.assert_array_equal(inside.min(axis=(1, 3)), levels.reshape(2, 3))
    first_row, second_row = margin[2:68], margin[68:134]
    assert first_row.min() < 100
    assert second_row.min() < 100


def test_a_grid_that_cannot_be_written_leaves_the_old_one_as_it_was(tmp_path, monkeypatch):
    def save(picture, path, *args):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "grid.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space"):
        save_grid(path, np.zeros((1, 8, 8, 1), np.uint8), ["zero"])
    assert path.read_bytes() == b"old"


def test_the_columns_names_stand_above_the_same_grid_and_fit_their_columns():
    images = random_images(4, 8, 8, 1)
    plain = np.asarray(draw_grid(images, ["a", "b"]))
    named = np.asarray(draw_grid(images, ["a", "b"], ["one", "a name of 17 char"]))
    header = len(named) - len(plain)
    np.testing.assert_array_equal(named[header:], plain)
    over_first = named[:header, -2 * 66 : -66]
    assert over_first.min() < 100
    assert (over_first[:, -2:] == 255).all()
    assert fitting_font(["noise 0.98"], 64, 21).getlength("noise 0.98") <= 64


def test_a_lone_name_stands_over_the_middle_of_all_columns_in_the_rows_font():
    header = np.asarray(draw_grid(random_images(4, 8, 8, 1), ["a"], ["a name of 17 char"]))[:28]
    inked = np.flatnonzero(header.min(axis=(0, 2)) < 128)
    assert (inked[0] + inked[-1]) / 2 == pytest.approx(header.shape[1] - 2 * 66, abs=3)
    assert inked[-1] - inked[0] == pytest.approx(
        ImageFont.load_default(size=21).getlength("a name of 17 char"), abs=6
    )


def test_a_gif_shows_every_frame_under_its_name_and_rests_at_the_last(tmp_path):
    levels = np.arange(5, dtype=np.uint8) * 60
    frames = np.broadcast_to(levels.reshape(5, 1, 1, 1, 1), (5, 2, 8, 8, 3))
    save_gif(tmp_path / "x.gif", frames, ["a"], [f"noise {k}" for k in range(5)])
    with Image.open(tmp_path / "x.gif") as movie:
        assert (movie.n_frames, movie.info["loop"]) == (5, 0)
        for k, level in enumerate(levels):
            movie.seek(k)
            sheet = np.asarray(movie.convert("L"), int)
            assert movie.info["duration"] == (2000 if k == 4 else 100)
            np.testing.assert_allclose(sheet[-60:-6, -60:-6], level, atol=2)
            expected = draw_grid(frames[k], ["a"], [f"noise {k}"]).convert("L")
            np.testing.assert_allclose(sheet[:30], np.asarray(expected, int)[:30], atol=40)


# Pictures


def test_a_palettes_entries_are_labels_and_other_pictures_are_converted(tmp_path):
    labels = random_images(3, 5) % 7
    picture = Image.fromarray(labels, "P")
    picture.putpalette([255 - i // 3 for i in range(3 * 256)])
    picture.save(tmp_path / "labels.png")
    opened = open_picture("--mask", str(tmp_path / "labels.png"), "L", labels=True)
    np.testing.assert_array_equal(opened, labels[..., None])
    opened = open_picture("--style", str(tmp_path / "labels.png"), "L")
    np.testing.assert_array_equal(opened, 255 - labels[..., None])
    grey = random_images(3, 5)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    opened = open_picture("--style", str(tmp_path / "grey.png"), "RGB")
    np.testing.assert_array_equal(opened, grey[..., None].repeat(3, axis=-1))


def test_what_is_no_picture_of_8_bits_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="--mask: .*text.png' should be a picture"):
        open_picture("--mask", str(tmp_path / "text.png"), "L")
    Image.fromarray(np.zeros((3, 5), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="should be of 8 bits a channel, unlike its 'I;16'"):
        open_picture("--mask", str(tmp_path / "deep.png"), "L")


def test_a_picture_of_too_many_pixels_is_refused_with_the_bound_before_it_is_decoded(tmp_path):
    file = io.BytesIO()
    Image.fromarray(random_images(3, 5)).save(file, "PNG")
    content = bytearray(file.getvalue())
    for width, words in [(4096, "image file is truncated"), (8193, "limit of 67108864 pixels")]:
        content[16:20] = width.to_bytes(4, "big")
        content[20:24] = (8192).to_bytes(4, "big")
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
        (tmp_path / "large.png").write_bytes(content)
        with pytest.raises(InputError, match=f"--mask: .*large.png' should be a picture .*{words}"):
            open_picture("--mask", str(tmp_path / "large.png"), "L")


# .npz files


def test_a_part_is_what_was_written_under_its_name_or_nothing(tmp_path):
    path = tmp_path / "8.npy"
    assert read_part(path) is None
    images = random_images(2, 3, 5, 1)
    write_part(path, images)
    np.testing.assert_array_equal(read_part(path), images)
    whole = path.read_bytes()
    path.rename(tmp_path / "16.npy")
    assert read_part(tmp_path / "16.npy") is None
    for content in (b"", bytes(4), bytes(len(whole)), whole[:-1], whole + b"\0"):
        path.write_bytes(content)
        assert read_part(path) is None
    for i in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[i // 8] ^= 1 << i % 8
        path.write_bytes(flipped)
        assert read_part(path) is None
    for other in (random_images(2, 3, 4, 1), np.zeros((2, 3, 5, 1))):
        np.save(path, other)
        assert read_part(path) is None


def written_npz(folder: Path, images: np.ndarray) -> Path:
    """An .npz that write_npz made of two parts of the images, labelled from 0."""
    parts = [folder / "0.npy", folder / "1.npy"]
    write_part(parts[0], images[:40])
    write_part(parts[1], images[40:])
    write_npz(folder / "images.npz", parts, np.arange(len(images)))
    return folder / "images.npz"


def test_an_npz_holds_its_parts_and_labels_and_is_read_in_batches(tmp_path):
    images = random_images(100, 3, 5, 1)
    path = written_npz(tmp_path, images)
    whole = np.load(path)
    np.testing.assert_array_equal(whole["arr_0"], images)
    np.testing.assert_array_equal(whole["arr_1"], np.arange(100))
    shape, batches = open_npz(path)
    batches = list(batches)
    assert shape == images.shape
    assert [len(batch) for batch in batches] == [64, 36]
    np.testing.assert_array_equal(np.concatenate(batches), images)


def test_no_npz_is_written_of_a_part_that_was_damaged_meanwhile(tmp_path):
    path = written_npz(tmp_path, random_images(100, 3, 5, 1))
    before = path.read_bytes()
    (tmp_path / "1.npy").write_bytes((tmp_path / "1.npy").read_bytes()[:-9])
    with pytest.raises(InputError, match="--out: .*1.npy' should be as it was written; the same"):
        write_npz(path, [tmp_path / "0.npy", tmp_path / "1.npy"], np.arange(100))
    assert path.read_bytes() == before


@pytest.mark.parametrize("array", [np.zeros((2, 3, 3, 3)), np.zeros((2, 3, 3), np.uint8)])
def test_an_npz_of_anything_but_uint8_images_is_refused(array, tmp_path):
    np.savez(tmp_path / "other.npz", array)
    with pytest.raises(InputError, match=r"arr_0: .* should be uint8 images \[N, H, W, 1 or 3\]"):
        open_npz(tmp_path / "other.npz")


def test_an_npz_of_fewer_pixels_than_its_shape_is_refused(tmp_path):
    path = written_npz(tmp_path, random_images(100, 3, 5, 1))
    with zipfile.ZipFile(path) as file:
        array = file.read("arr_0.npy")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("arr_0.npy", array[:-1])
    with pytest.raises(InputError, match=r"arr_0: .* should be uint8 images"):
        open_npz(path)


def test_a_damaged_npz_is_refused(tmp_path):
    path = written_npz(tmp_path, random_images(100, 13, 11, 1))
    content = bytearray(path.read_bytes())
    content[500] ^= 1  # a pixel; only at the end does the checksum show it
    path.write_bytes(content)
    _, batches = open_npz(path)
    with pytest.raises(InputError, match="images.npz: arr_0 is damaged"):
        list(batches)
    encrypted = bytearray(content)
    encrypted[encrypted.index(b"PK\1\2") + 8] ^= 1  # a flag of its first file
    for damaged in (content[:1000], encrypted):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="images.npz: should be an .npz with `arr_0`"):
            open_npz(path)
