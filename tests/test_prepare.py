"""TFDS's own builders fetch, unpack and write their data without TensorFlow."""

import io
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from conftest import TINY, run_train
from PIL import Image
from scipy.io import savemat
from tensorflow_datasets.core import constants
from tensorflow_datasets.datasets.oxford_flowers102 import (
    oxford_flowers102_dataset_builder as flowers,
)
from tensorflow_datasets.datasets.oxford_iiit_pet import oxford_iiit_pet_dataset_builder as pets
from tensorflow_datasets.image_classification import cifar

from dit.config import Data
from dit.data import open_dataset

rng = np.random.default_rng(0)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder whose files a server on this machine hands out, and its address."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *words: None})
    server = ThreadingTCPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(requests, "head", lambda *args, **options: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path / "tfds"))
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def pack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def picture(*shape: int, form: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(file, form)
    return file.getvalue()


def test_cifar10(site, monkeypatch):
    folder, address = site
    info = cifar.Cifar10._cifar_info.fget(SimpleNamespace(name="cifar10"))
    local = info._replace(url=f"{address}/cifar-10-binary.tar.gz")
    monkeypatch.setattr(cifar.Cifar10, "_cifar_info", local)
    images = rng.integers(0, 256, (6, 3, 3, 32, 32), np.uint8)  # three of each file
    labels = rng.integers(0, 10, (6, 3, 1), np.uint8)
    rows = np.concatenate([labels, images.reshape(6, 3, -1)], axis=2)
    names = [*info.train_files, *info.test_files]
    files = {info.prefix + name: part.tobytes() for name, part in zip(names, rows, strict=True)}
    files[info.prefix + info.label_files[0]] = b"\n".join(b"class%d" % k for k in range(10))
    pack(folder / "cifar-10-binary.tar.gz", files)

    test = Data(name="cifar10", split="test", image_size=32, channels=3)
    batch = open_dataset(test).records.read(np.arange(3))
    pixels = images[-1].transpose(0, 2, 3, 1)
    order = [np.flatnonzero((pixels == image).all((1, 2, 3)))[0] for image in batch["image"]]
    assert sorted(order) == [0, 1, 2]
    assert batch["label"].tolist() == labels[-1, order, 0].tolist()
    assert len(open_dataset(replace(test, split="train")).records) == 15


def test_flowers(site, monkeypatch):
    folder, address = site
    monkeypatch.setattr(flowers, "_BASE_URL", address)
    pack(
        folder / "102flowers.tgz",
        {f"jpg/image_0000{i}.jpg": picture(9, 7, 3) for i in (1, 2, 3, 4)},
    )
    savemat(folder / "imagelabels.mat", {"labels": [[5, 6, 7, 8]]})
    savemat(folder / "setid.mat", {"trnid": [[2, 4]], "tstid": [[1]], "valid": [[3]]})
    records = open_dataset(Data(name="oxford_flowers102", image_size=8, channels=3)).records
    batch = records.read(np.arange(2))
    assert sorted(batch["label"]) == [5, 7]
    assert batch["image"].std() > 10


def test_pets_of_which_some_are_no_jpegs(site, monkeypatch):
    folder, address = site
    monkeypatch.setattr(pets, "_BASE_URL", address)
    pictures = {"Abyssinian_1": picture(9, 7, 3), "beagle_116": picture(9, 7, 4, form="PNG")}
    lines = b"Abyssinian_1 1 1 1\nbeagle_116 5 2 1\n"
    pack(folder / "images.tar.gz", {f"images/{n}.jpg": stored for n, stored in pictures.items()})
    trimap = io.BytesIO()
    Image.fromarray(rng.integers(1, 4, (9, 7), np.uint8)).save(trimap, "PNG")
    trimaps = {f"annotations/trimaps/{name}.png": trimap.getvalue() for name in pictures}
    lists = {"annotations/trainval.txt": lines, "annotations/test.txt": lines}
    pack(folder / "annotations.tar.gz", trimaps | lists)
    options = dict(image_size=8, channels=3, mask_classes=3)
    batch = open_dataset(Data(name="oxford_iiit_pet", **options)).records.read(np.arange(2))
    assert sorted(batch["label"]) == [0, 4]
    assert set(batch["mask"].ravel()) == {0, 1, 2}
    assert batch["image"].std((1, 2, 3)).min() > 10


def test_a_builder_that_calls_for_more_of_tensorflow_is_refused(site, monkeypatch, refused):
    monkeypatch.setattr(
        cifar.Cifar10, "_split_generators", lambda *args: cifar.tf.io.parse_single_example
    )
    line = refused(
        run_train,
        *TINY,
        "--data.name",
        "cifar10",
        "--data.image-size",
        "32",
        "--data.channels",
        "3",
    )
    assert "cannot be prepared here (TensorFlow's parse_single_example is called); set" in line
    assert "by `tfds build cifar10 --file_format=array_record` where TensorFlow is" in line
