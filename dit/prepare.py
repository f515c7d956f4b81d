"""TFDS builders write their records, without TensorFlow.

TFDS needs it no more to read, but to unpack what it downloads, and many of its builders to open
files. Here Python's own functions and Pillow do both.
"""

import contextlib
import glob
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from dit.config import InputError, one_line


class Part(SimpleNamespace):
    """What stands in for a part of TensorFlow."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(f"TensorFlow's {name} is called")


class Encoded(bytes):
    def numpy(self) -> bytes:
        return self


def decode(stored: bytes) -> np.ndarray:
    """The pixels of a picture, uint8 `[H, W, 3]`."""
    return np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))


def encode(image: np.ndarray, form: str = "JPEG") -> Encoded:
    """A picture of pixels, uint8 `[H, W, 1 or 3]`."""
    file = io.BytesIO()
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    picture.save(file, form, quality=95)  # as TensorFlow's JPEG
    return Encoded(file.getvalue())


GFILE = Part(
    GFile=open,
    copy=shutil.copy,
    exists=os.path.exists,
    glob=glob.glob,
    isdir=os.path.isdir,
    listdir=os.listdir,
    makedirs=partial(os.makedirs, exist_ok=True),
    remove=os.remove,
    walk=os.walk,
)
TENSORFLOW = dict(
    compat=Part(as_text=os.fsdecode, as_bytes=os.fsencode),
    errors=Part(ResourceExhaustedError=OSError, UnimplementedError=NotImplementedError),
    image=Part(decode_image=decode),
    io=Part(gfile=GFILE, encode_jpeg=encode),
    shape=np.shape,
)


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """In which builders call what is above: for arrays always, else where TensorFlow is missing."""
    from tensorflow_datasets.core.features import image_feature
    from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow

    def encode_image(encoder: Any, image: np.ndarray) -> bytes:
        image_feature._validate_np_array(image, shape=encoder.shape, dtype=encoder.np_dtype)
        return bytes(encode(image, encoder.encoding_format))

    parts = {} if importlib.util.find_spec("tensorflow") else TENSORFLOW
    with (
        mock.patch.object(image_feature._ImageEncoder, "_encode_image", encode_image),
        mock.patch.dict(tensorflow._submodules, parts),  # looked up before any import of it
    ):
        yield


def write_records(builder: Any) -> None:
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    with without_tensorflow():
        builder.download_and_prepare()


def prepare(builder: Any) -> None:
    """Has a builder that is not TFDS's own write its records. Raises InputError."""
    try:
        write_records(builder)
    except Exception as error:  # whatever the code of a builder does
        raise faulty_builder(builder.name, error) from error


def faulty_builder(name: str, error: Exception) -> InputError:
    """The refusal of a builder whose code raises an error, with what lies at its root."""
    while error.__cause__ is not None:  # TFDS puts its own on top
        error = error.__cause__
    reason = f"{type(error).__name__}: {one_line(error)[:300]}"
    return InputError(f"data.name: {name!r} should have a builder that works ({reason})")


def download(builder: Any) -> None:
    """Has one of TFDS's builders fetch its data and write its records. Raises InputError."""
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.extractor import ExtractError

    name, folder = builder.name, builder.data_dir
    missing = f"data.name: {name!r} is not in {folder} and cannot be"
    try:
        requests.head("https://storage.googleapis.com", timeout=5)  # TFDS would try for minutes
        write_records(builder)
    except ImportError as error:
        raise InputError(
            f"{missing} prepared here ({one_line(error)}); set TFDS_DATA_DIR to a folder that has "
            f"it, by `tfds build {name} --file_format=array_record` where TensorFlow is installed"
        ) from error
    except (tfds.download.DownloadError, ExtractError, AssertionError, OSError) as error:
        is_offline = isinstance(error, requests.exceptions.RequestException)
        reason = "no network" if is_offline else f"{type(error).__name__} {one_line(error)}"
        raise InputError(
            f"{missing} fetched ({reason}); set TFDS_DATA_DIR to a folder that has it, or run the "
            "same command once where there is a network"
        ) from error
