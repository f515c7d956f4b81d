"""Images: bytes to [-1, 1] and back (the only place), the centre crop, and labelled grids."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont


def from_uint8(image: jax.Array) -> jax.Array:
    """0 .. 255 to float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def to_uint8(image: jax.Array) -> jax.Array:
    """[-1, 1] to the nearest of 0 .. 255."""
    return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The largest centred square of uint8 `[H, W, C]`, antialiased to `[size, size, C]`: halved by boxes, then bicubic."""
    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
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
