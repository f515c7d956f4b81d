"""A folder of pictures as a data set, without TFDS: a subfolder for each class, named after it.

Pictures are PNG, JPEG or WebP, of any size, anywhere below their class's folder. Labels are in the
order of the classes' names. Where classes lie in `train/` and perhaps `val/`, these are the splits;
otherwise all pictures are the split `train`. A slice such as `train[:95%]` is written as in TFDS.
"""

import os
import re
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from dit.config import Data, one_line, require
from dit.images import UNDECODABLE
from dit.progress import say
from dit.tfds import Decoded, class_words, rows_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # in any case; other files are ignored
MAX_DAMAGED = 0.5  # of the pictures whose first bytes are right
NAMED = 3  # files that a message names
THREADS = 16  # that look at files, most of the time waiting for the disk

Labelled = tuple[int, str]  # the label of a picture, and its path below the folder of its split


@dataclass(frozen=True)
class Files:
    """Pictures as a TFDS data source has them, but for the image, which is the file's path."""

    folder: Path
    pictures: list[Labelled]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict:
        label, path = self.pictures[i]
        return {"image": self.folder / path, "label": label, "file_name": os.fsencode(path)}

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        return [self[i] for i in indices]


def is_folder(name: str) -> bool:
    """Whether a data set's name is that of a folder of pictures.

    A path with a slash is, if it exists. A word is too, unless TFDS has a data set of that name.
    """
    folder = Path(name)
    if "/" in name or not folder.is_dir():
        return folder.is_dir()
    import tensorflow_datasets as tfds  # takes a second

    is_prepared = any(folder.glob("*/dataset_info.json"))
    return not is_prepared and name not in tfds.list_builders(with_community_datasets=False)


def open_folder(config: Data) -> tuple[Decoded, tuple[str, ...]]:
    """The pictures of a folder, decoded when they are read, and the names of their classes.

    Those that cannot be read are left out, and said. Raises InputError.
    """
    masks, name = config.mask_classes, config.name
    require(masks == 0, "data.mask_classes", masks, "0: a folder of pictures has no masks")
    folder, class_names = open_split(config)
    classes, unreadable = [], []
    for class_name in tqdm(class_names, unit=" class", delay=3, leave=False, disable=None):
        readable, others = find_pictures(folder, class_name)
        reasons = f"; {others[0]}" if others else ""
        expected = f"a folder of pictures that can be read ({', '.join(SUFFIXES)}{reasons})"
        class_folder = folder / class_name
        is_missing = not class_folder.exists()  # as it may be beside train/
        require(readable or is_missing, "data.name", str(class_folder), expected)
        classes.append(readable)
        unreadable += others
    pictures = spread(classes)
    rows = rows_of(config.split, split_name(config.split), len(pictures))
    expected = f"a slice of its {len(pictures)} pictures that is not empty"
    require(len(rows), "data.split", config.split, expected)
    if unreadable:
        count, total = len(unreadable), len(unreadable) + len(pictures)
        say(f"{name}: left out {count} of {total:,} files that cannot be read: {some(unreadable)}")
    source = Files(folder, [pictures[i] for i in rows])
    records = Decoded(source, "image", "label", config, open_upright, MAX_DAMAGED)
    return records, class_words(class_names)


# Classes and splits


def split_name(split: str) -> str:
    """`train`, for `train[:90%]`."""
    return re.match(r"\w*", split).group()


def open_split(config: Data) -> tuple[Path, tuple[str, ...]]:
    """The folder of a split, and the classes of `train`. Raises InputError."""
    root, split = Path(config.name), config.split
    name = split_name(split)
    has_splits = bool(subfolders(root / "train"))
    expected = f"train: {config.name!r} has no train/ and val/ that hold the classes"
    require(has_splits or name == "train", "data.split", split, expected)
    train, folder = (root / "train", root / name) if has_splits else (root, root)
    require(folder.is_dir(), "data.split", split, f"a folder in {config.name!r}, as train is")
    class_names = subfolders(train)
    check_names(config, class_names)
    unknown = [name for name in subfolders(folder) if name not in class_names]
    expected = f"of the classes in {str(train)!r}, without {', '.join(unknown[:NAMED])}"
    require(not unknown, "data.split", split, expected)
    return folder, tuple(class_names)


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, and of links to folders, sorted; not hidden ones."""
    if not folder.is_dir():
        return []
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return sorted(name for name in names if not name.startswith("."))


def check_names(config: Data, class_names: list[str]) -> None:
    """Raises InputError unless there are classes that differ in more than the case."""
    expected = "a folder with a subfolder of pictures for each class, and has none"
    require(class_names, "data.name", config.name, expected)
    seen: dict[str, str] = {}
    for name in class_names:
        other = seen.setdefault(name.casefold(), name)
        expected = f"without {other!r} and {name!r}: classes differ in more than the case"
        require(other == name, "data.name", config.name, expected)


def spread(classes: list[list[str]]) -> list[Labelled]:
    """The pictures of all classes in a fixed order, of which every slice has its share of each.

    A class's own are in the order of their paths' checksums: not in that of names, which may tell
    when a picture was made, and which a new picture leaves as it is.
    """
    places = []
    for label, paths in enumerate(classes):
        paths = sorted(paths, key=lambda path: (zlib.crc32(os.fsencode(path)), path))
        places += [((i + 0.5) / len(paths), label, path) for i, path in enumerate(paths)]
    return [(label, path) for _, label, path in sorted(places)]


# Files


def find_pictures(folder: Path, class_name: str) -> tuple[list[str], list[str]]:
    """The paths of a class's pictures below the folder, and a reason for each that cannot be read.

    A file's first bytes decide: they hold its format, size and mode.
    """
    paths = []
    for parent, folders, names in os.walk(folder / class_name, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                paths.append(os.path.relpath(os.path.join(parent, name), folder))
    paths.sort()
    with ThreadPoolExecutor(THREADS) as pool:
        reasons = list(pool.map(lambda path: problem(folder / path), paths))
    pairs = list(zip(paths, reasons, strict=True))
    readable = [path for path, reason in pairs if reason is None]
    return readable, [f"{path} ({reason})" for path, reason in pairs if reason is not None]


def problem(path: Path) -> str | None:
    """Why a file is no picture that can be read, None where its first bytes are right."""
    try:
        with Image.open(path) as picture:
            check_mode(picture)
    except UNDECODABLE as error:
        return one_line(error).removesuffix(f"{str(path)!r}").strip()
    return None


def check_mode(picture: Image.Image) -> None:
    """Raises ValueError for pixels that are neither of 8 bits a channel nor of 16."""
    mode = picture.mode
    if mode.startswith(("I", "F")) and not mode.startswith("I;16"):
        raise ValueError(f"mode {mode!r}, where pixels should have 8 or 16 bits a channel")


def open_upright(path: Path) -> Image.Image:
    """A picture of 8 bits a channel, turned as its camera was held, on white where it is clear."""
    picture = Image.open(path)
    check_mode(picture)
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I;16"):  # which Pillow would clip at 255
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA"))
    return picture


def some(lines: list[str]) -> str:
    """A few of some lines, and how many more there are."""
    more = len(lines) - NAMED
    return ", ".join(lines[:NAMED]) + (f" and {more} more" if more > 0 else "")
