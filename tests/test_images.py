import jax.numpy as jnp
import numpy as np
from PIL import Image

from dit.images import centre_crop, from_uint8, save_grid, to_uint8


def test_every_byte_survives_the_round_trip_and_the_ends_are_minus_one_and_one():
    levels = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(to_uint8(from_uint8(levels)), levels)
    assert from_uint8(levels)[0] == -1 and from_uint8(levels)[-1] == 1
    np.testing.assert_array_equal(to_uint8(jnp.array([-3.0, 3.0])), [0, 255])


def test_centre_crop_keeps_the_middle_and_the_mean():
    image = np.zeros((40, 88, 3), np.uint8)
    image[:, 24:64] = np.random.default_rng(0).integers(0, 256, (40, 40, 3))
    np.testing.assert_array_equal(centre_crop(image, 40), image[:, 24:64])
    small = centre_crop(image, 10)  # two halvings by boxes, rounded twice
    np.testing.assert_allclose(small, image[:, 24:64].reshape(10, 4, 10, 4, 3).mean(axis=(1, 3)), atol=2)
    assert centre_crop(image, 13).shape == (13, 13, 3) and centre_crop(image[..., :1], 53).shape == (53, 53, 1)
    assert centre_crop(small, 10) is small


def test_grid_shows_each_image_in_its_place(tmp_path):
    images = (np.arange(6, dtype=np.uint8) * 40).reshape(6, 1, 1, 1).repeat(8, axis=1).repeat(8, axis=2)
    save_grid(tmp_path / "grid.png", images, ["zero", "one"])
    sheet = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    tiles = sheet[:, -(3 * 66):].reshape(-1, 3, 66)[2:].reshape(2, 66, 3, 66)[:, :64, :, :64]
    np.testing.assert_array_equal(tiles.max(axis=(1, 3)), images[:, 0, 0, 0].reshape(2, 3))
    np.testing.assert_array_equal(tiles.min(axis=(1, 3)), images[:, 0, 0, 0].reshape(2, 3))
    assert sheet[:, : -(3 * 66)].min() < 100, "no names"
