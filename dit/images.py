"""Images: bytes to [-1, 1] and back (the only place), the centre crop, labelled grids, and .npz files too large for memory."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit.config import InputError, one_line, require


def from_uint8(image: jax.Array) -> jax.Array:
    """0 .. 255 to float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def to_uint8(image: jax.Array) -> jax.Array:
    """[-1, 1] to the nearest of 0 .. 255."""
    return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def prepare(batch: dict[str, jax.Array], key: jax.Array, flip: bool, latent_scale: float) -> tuple[jax.Array, jax.Array | None]:
    """What the network is trained on, float32 `[B, H, W, C]`: pixels in [-1, 1], or a fresh sample of the VAE's posterior, scaled.

    And its mask `[B, H, W]`, where there is one. With `flip`, each is mirrored with probability 1/2. `batch` is as in `dit.data`.
    """
    mirrored = jax.random.bernoulli(key, 0.5 * flip, (len(batch["label"]), 1, 1, 1))
    if "image" in batch:
        x, mask = from_uint8(batch["image"]), batch.get("mask")
        return jnp.where(mirrored, x[:, :, ::-1], x), mask if mask is None else jnp.where(mirrored[..., 0], mask[:, :, ::-1], mask)
    latent = batch["latent"].astype(jnp.float32)  # [B, 2, h, w, 8]
    mean, std = jnp.split(jnp.where(mirrored, latent[:, 1], latent[:, 0]), 2, axis=-1)  # [B, h, w, 4] each
    return latent_scale * (mean + std * jax.random.normal(jax.random.fold_in(key, 1), mean.shape)), None


def centre_crop(image: np.ndarray, size: int, labels: bool = False) -> np.ndarray:
    """The largest centred square of uint8 `[H, W, C]`, antialiased to `[size, size, C]`: halved by boxes, then bicubic.

    With `labels`, as a mask holds them, the same places are cut out but no two values are mixed.
    """
    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    width, height = picture.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        picture = picture if labels else picture.resize((width, height), Image.Resampling.BOX)
    scale, kernel = size / min(width, height), Image.Resampling.NEAREST if labels else Image.Resampling.BICUBIC
    picture = picture.resize((round(width * scale), round(height * scale)), kernel)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size))).reshape(size, size, -1)


def save_grid(path: str | Path, images: np.ndarray, row_names: list[str]) -> None:
    """Writes uint8 images `[rows * columns, H, W, C]` as a PNG, one row a name; small images are enlarged to be seen."""
    N, H, W, C = images.shape
    rows, columns = len(row_names), N // len(row_names)
    zoom = max(1, 64 // H)
    gap = 2
    tiles = images.reshape(rows, columns, H, W, C).repeat(zoom, axis=2).repeat(zoom, axis=3)
    font = ImageFont.load_default(size=max(12, min(H * zoom // 3, 24)))
    margin = 12 + max(int(font.getlength(name)) for name in row_names)
    sheet = Image.new("RGB", (margin + columns * (W * zoom + gap), rows * (H * zoom + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for r, name in enumerate(row_names):
        top = gap + r * (H * zoom + gap)
        pen.text((6, top + H * zoom // 2), name, fill="black", font=font, anchor="lm")
        for c in range(columns):
            tile = np.broadcast_to(tiles[r, c], (H * zoom, W * zoom, 3))
            sheet.paste(Image.fromarray(np.ascontiguousarray(tile)), (margin + c * (W * zoom + gap), top))
    sheet.save(path)


def write_npz(path: Path, parts: list[Path], labels: np.ndarray) -> None:
    """Writes .npy files of uint8 images, one after the other, as `arr_0` of an .npz, and the labels as `arr_1`; whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    first = np.load(parts[0], mmap_mode="r")
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *first.shape[1:])}
    with zipfile.ZipFile(unfinished, "w") as file:
        with file.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for part in parts:
                array.write(np.load(part).tobytes())
        with file.open("arr_1.npy", "w") as array:
            np.lib.format.write_array(array, labels)
    unfinished.rename(path)


def open_npz(path: Path) -> tuple[tuple[int, ...], Iterator[np.ndarray]]:
    """The shape of `arr_0`, uint8 images `[N, H, W, C]`, and an iterator over it by the 64 images. Raises InputError."""
    try:
        with zipfile.ZipFile(path).open("arr_0.npy") as array:
            np.lib.format.read_magic(array)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(array)
            header = array.tell()
        stored = zipfile.ZipFile(path).getinfo("arr_0.npy").file_size - header
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: should be an .npz with `arr_0`, uint8 images [N, H, W, C] ({one_line(error)})") from error
    right = dtype == np.uint8 and not fortran and len(shape) == 4 and shape[-1] in (1, 3) and 0 < np.prod(shape) == stored
    require(right, f"{path}: arr_0", f"{dtype} {list(shape)}", "uint8 images [N, H, W, 1 or 3]")

    def batches() -> Iterator[np.ndarray]:
        size = int(np.prod(shape[1:]))
        with zipfile.ZipFile(path).open("arr_0.npy") as array:
            np.lib.format.read_magic(array)
            np.lib.format.read_array_header_1_0(array)
            for first in range(0, shape[0], 64):
                rows = min(64, shape[0] - first)
                try:
                    images = array.read(rows * size)
                except (zipfile.BadZipFile, zlib.error) as error:
                    raise InputError(f"{path}: arr_0 is damaged ({one_line(error)}); it should be written again") from error
                yield np.frombuffer(images, np.uint8).reshape(rows, *shape[1:])

    return shape, batches()
