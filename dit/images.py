"""Images: bytes to [-1, 1] and back (the only place), crops, grids, pictures, .npz files."""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit.config import InputError, one_line, require
from dit.files import whole

BATCH = 64  # images of an .npz that are read at a time
FRAME_MILLISECONDS = 100  # of a GIF
REST_MILLISECONDS = 2000  # of its last frame

# What Pillow raises of a damaged picture
UNDECODABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
Image.MAX_IMAGE_PIXELS = 2**25  # Pillow warns of more, and refuses more than twice as many


def from_uint8(image: jax.Array) -> jax.Array:
    """0 .. 255 to float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def to_uint8(image: jax.Array) -> jax.Array:
    """[-1, 1] to the nearest of 0 .. 255."""
    return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)


# Pictures


def open_picture(option: str, path: str, mode: str, labels: bool = False) -> np.ndarray:
    """uint8 `[H, W, 1]` for the mode "L", `[H, W, 3]` for "RGB". Raises InputError.

    With `labels` the entries of a palette stay the labels that they are.
    """
    try:
        picture = Image.open(path)
        keeps_palette = labels and picture.mode == "P"
        pixels = np.asarray(picture if keeps_palette else picture.convert(mode))
    except UNDECODABLE as error:
        raise InputError(f"{option}: {path!r} should be a picture ({one_line(error)})") from error
    has_8_bits = not picture.mode.startswith(("I", "F"))
    require(has_8_bits, option, path, f"of 8 bits a channel, unlike its {picture.mode!r}")
    return pixels.reshape(*pixels.shape[:2], -1)


def centre_crop(image: np.ndarray, size: int, labels: bool = False) -> np.ndarray:
    """The largest centred square of uint8 `[H, W, C]`, resized to `[size, size, C]`.

    Antialiased as the authors' crop: halved by boxes while it can be, then bicubic. With `labels`,
    as a mask holds them, the same places are cut out but no two values are mixed.
    """
    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    width, height = picture.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        if not labels:
            picture = picture.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    kernel = Image.Resampling.NEAREST if labels else Image.Resampling.BICUBIC
    picture = picture.resize((round(width * scale), round(height * scale)), kernel)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size))).reshape(size, size, -1)


def fitting_font(names: list[str], width: int, largest: int) -> ImageFont.FreeTypeFont:
    """The largest font in which every name is at most `width` pixels wide, down to 8 points."""
    for size in range(largest, 8, -1):
        font = ImageFont.load_default(size=size)
        if max(font.getlength(name) for name in names) <= width:
            return font
    return ImageFont.load_default(size=8)


def draw_grid(
    images: np.ndarray, row_names: list[str], column_names: list[str] | None = None
) -> Image.Image:
    """A picture of uint8 images `[rows * columns, H, W, C]`, each row behind its name.

    Each column name stands over an equal share of the columns. Images of fewer than 64 pixels are
    enlarged.
    """
    N, H, W, C = images.shape
    rows, columns = len(row_names), N // len(row_names)
    zoom, gap = max(1, 64 // H), 2
    height, width = H * zoom, W * zoom
    images = np.broadcast_to(
        images.repeat(zoom, axis=1).repeat(zoom, axis=2), (N, height, width, 3)
    )
    font_size = max(12, min(height // 3, 24))
    font = ImageFont.load_default(size=font_size)
    margin = 12 + max(int(font.getlength(name)) for name in row_names)
    header = 0 if column_names is None else font_size + 8
    size = (margin + columns * (width + gap), header + rows * (height + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    if column_names is not None:
        share = columns // len(column_names) * (width + gap)
        small = fitting_font(column_names, share - gap - 8, font_size)
        for place, name in enumerate(column_names):
            middle = margin + place * share + (share - gap) // 2
            pen.text((middle, header // 2 + 1), name, fill="black", font=small, anchor="mm")
    for row, name in enumerate(row_names):
        top = header + gap + row * (height + gap)
        pen.text((6, top + height // 2), name, fill="black", font=font, anchor="lm")
        for column in range(columns):
            tile = Image.fromarray(np.ascontiguousarray(images[row * columns + column]))
            sheet.paste(tile, (margin + column * (width + gap), top))
    return sheet


def save_grid(
    path: str | Path,
    images: np.ndarray,
    row_names: list[str],
    column_names: list[str] | None = None,
) -> None:
    """Writes the picture of `draw_grid`, as a PNG."""
    with whole(Path(path)) as unfinished:
        draw_grid(images, row_names, column_names).save(unfinished, "PNG")


def save_gif(
    path: str | Path, frames: np.ndarray, row_names: list[str], frame_names: list[str]
) -> None:
    """Writes uint8 frames `[F, rows * columns, H, W, C]` as a GIF of grids, each under its name.

    It runs for ever, and rests at the last frame.
    """
    named = zip(frames, frame_names, strict=True)
    first, *others = [draw_grid(images, row_names, [name]) for images, name in named]
    milliseconds = [FRAME_MILLISECONDS for _ in others] + [REST_MILLISECONDS]
    timing = dict(save_all=True, duration=milliseconds, loop=0)
    with whole(Path(path)) as unfinished:
        first.save(unfinished, "GIF", append_images=others, **timing)


# .npz files too large for memory


def write_part(path: Path, images: np.ndarray) -> None:
    """Writes uint8 images `[n, H, W, C]` as a .npy file, with its checksum behind it."""
    file = io.BytesIO()
    np.save(file, images)
    content = file.getvalue()
    with whole(path) as unfinished:
        unfinished.write_bytes(content + part_checksum(path, content))


def read_part(path: Path) -> np.ndarray | None:
    """The images that `write_part` wrote to this path, None if it holds anything else."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    content, checksum = stored[:-4], stored[-4:]
    is_intact = checksum == part_checksum(path, content)
    return np.load(io.BytesIO(content)) if is_intact else None


def part_checksum(path: Path, content: bytes) -> bytes:
    """The CRC-32 of a part's name and content, so that no part stands for another."""
    return zlib.crc32(content, zlib.crc32(path.name.encode())).to_bytes(4, "big")


def write_npz(path: Path, parts: list[Path], labels: np.ndarray) -> None:
    """Writes the images of parts as `arr_0` of an .npz, and the labels as `arr_1`.

    Raises InputError for a damaged part.
    """
    shape = (len(labels), *np.load(parts[0], mmap_mode="r").shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with whole(path) as unfinished, zipfile.ZipFile(unfinished, "w") as file:
        with file.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for part in parts:
                images = read_part(part)
                expected = "as it was written; the same command draws it again"
                require(images is not None, "--out", str(part), expected)
                array.write(images.tobytes())
        with file.open("arr_1.npy", "w") as array:
            np.lib.format.write_array(array, labels)


def open_npz(path: Path) -> tuple[tuple[int, ...], Iterator[np.ndarray]]:
    """The shape of `arr_0`, uint8 images `[N, H, W, C]`, and batches of them. Raises InputError."""
    try:
        with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as array:
            np.lib.format.read_magic(array)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(array)
            num_bytes = file.getinfo("arr_0.npy").file_size - array.tell()
    except Exception as error:  # NumPy and zipfile raise nearly anything
        raise InputError(
            f"{path}: should be an .npz with `arr_0`, uint8 images [N, H, W, C] ({one_line(error)})"
        ) from error
    are_images = dtype == np.uint8 and len(shape) == 4 and shape[-1] in (1, 3)
    are_whole = not fortran_order and 0 < np.prod(shape) == num_bytes
    found = f"{dtype} {list(shape)}"
    require(are_images and are_whole, f"{path}: arr_0", found, "uint8 images [N, H, W, 1 or 3]")
    return shape, _read_npz(path, shape)


def _read_npz(path: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as array:
        np.lib.format.read_magic(array)
        np.lib.format.read_array_header_1_0(array)
        for first in range(0, shape[0], BATCH):
            rows = min(BATCH, shape[0] - first)
            try:
                pixels = array.read(rows * int(np.prod(shape[1:])))
            except (zipfile.BadZipFile, zlib.error) as error:
                raise InputError(f"{path}: arr_0 is damaged ({one_line(error)})") from error
            yield np.frombuffer(pixels, np.uint8).reshape(rows, *shape[1:])
