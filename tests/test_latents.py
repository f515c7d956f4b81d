"""Latents on disk: written, resumed, read, trained on and sampled; on real JPEGs where ImageNet is at hand."""

import io
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_vae
from PIL import Image

import sample
import train
from dit import checkpoint, data, latents, sampling
from dit.config import Data, InputError
from dit.images import centre_crop, prepare, to_uint8
from dit.state import make_objective
from dit.weights import load_vae

TFDS_DATA_DIR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
needs_imagenet = pytest.mark.skipif(not (TFDS_DATA_DIR / "imagenet2012").is_dir(), reason="no ImageNet in TFDS_DATA_DIR")


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """37 latents of 48x48 images of 7 classes, of standard deviation about 1 / 0.18215, in two shards."""
    import tensorflow_datasets as tfds

    out, rng = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    features = tfds.features.FeaturesDict({
        "latent": tfds.features.Tensor(shape=(2, 6, 6, 8), dtype=np.float16, encoding="bytes"),
        "label": tfds.features.ClassLabel(names=[f"class {k}" for k in range(7)])})
    shards = [out / f"random_latents-train.array_record-{i:05d}-of-00002" for i in range(2)]
    for shard, count in zip(shards, (20, 17)):
        moments = [np.concatenate([rng.normal(size=(2, 6, 6, 4)) * 5, np.full((2, 6, 6, 4), 0.1)], axis=-1) for _ in range(count)]
        latents.write_shard(shard, features, ({"latent": m.astype(np.float16), "label": i % 7} for i, m in enumerate(moments)))
    assert latents.write_info(out, features, "train", shards) == 37
    return out


def latent_flags(folder, vae, workdir, **changed):
    flags = {"data.latents": folder, "data.vae": vae, "data.image-size": 48, "data.num-classes": 7, "model.hidden-size": 20,
             "model.depth": 2, "model.num-heads": 5, "train.batch-size": 16, "train.steps": 20, "train.log-every": 5, "workdir": workdir,
             "train.dtype": "float32", "train.sample-steps": 3, "train.sample-every": 20} | changed
    return ["imagenet256_b2", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]


def test_a_batch_becomes_a_fresh_sample_of_the_posterior_scaled_and_mirrored_half_of_the_time():
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(101, 2, 3, 3, 8)).astype(np.float16)
    batch = {"latent": latent, "label": np.zeros(101, np.int32)}
    certain = {**batch, "latent": np.concatenate([latent[..., :4], np.zeros_like(latent[..., 4:])], axis=-1)}
    key = jax.random.key(0)
    x = np.asarray(prepare(certain, key, True, 0.5)[0])
    mirrored = np.array([np.allclose(a, 0.5 * b[1, ..., :4]) for a, b in zip(x, latent)])
    straight = np.array([np.allclose(a, 0.5 * b[0, ..., :4]) for a, b in zip(x, latent)])
    assert (mirrored ^ straight).all() and 25 < mirrored.sum() < 76
    np.testing.assert_allclose(prepare(certain, key, False, 0.5)[0], 0.5 * latent[:, 0, ..., :4].astype(np.float32))

    noise = np.stack([prepare(batch, k, False, 0.5)[0] - prepare(certain, k, False, 0.5)[0] for k in jax.random.split(key, 2)])
    noise /= 0.5 * latent[:, 0, ..., 4:].astype(np.float32)  # what is left is standard normal, and another draw for each key
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05 and abs(np.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.05


def test_latents_are_records_that_grain_and_tfds_read_at_random(folder):
    import grain
    import tensorflow_datasets as tfds

    dataset = data.open_dataset(Data(name="imagenet2012", image_size=48, channels=3, num_classes=7, latents=str(folder)))
    assert len(dataset.records) == 37 and dataset.class_names[3] == "class 3"
    source = grain.sources.ArrayRecordDataSource(sorted(str(path) for path in folder.glob("*array_record*")))
    features = tfds.builder_from_directory(folder).info.features
    for i in (36, 0, 20):
        np.testing.assert_array_equal(features.deserialize_example_np(source[i])["latent"], dataset.records[i]["latent"])
    stored = [bytes(source[i]) for i in range(37)]  # in one order of the fields, whatever the process that wrote them
    assert all(record.index(b"label") < record.index(b"latent") for record in stored)
    batch = next(data.batches(dataset, 8, seed=0))
    assert batch["latent"].shape == (8, 2, 6, 6, 8) and batch["latent"].dtype == np.float16 and batch["label"].dtype == np.int32


@pytest.mark.parametrize("changed, words", [
    (dict(latent_scale=0.01), "data.latent_scale: 0.01 gives"), (dict(latent_scale=1.0), "which should be near 1; 0.2 would"),
    (dict(image_size=64), "data.image_size: 64 should be 48, that of"), (dict(num_classes=10), "data.num_classes: 10 should be 7"),
    (dict(split="test"), "data.split: 'test' should be one of train"), (dict(latents="/"), "data.latents: '/' should be a finished folder"),
])
def test_latents_that_are_not_what_the_config_says_are_refused(folder, changed, words):
    with pytest.raises(InputError) as refusal:
        data.open_dataset(Data(**(dict(name="x", image_size=48, channels=3, num_classes=7, latents=str(folder)) | changed)))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_training_on_latents_and_sampling_through_the_vae(refused, folder, vae, tmp_path):
    run = tmp_path / "run"
    train.main(latent_flags(folder, vae, run))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20 and np.isfinite([row["loss"] for row in rows]).all() and rows[0]["mse"] == pytest.approx(1, abs=0.2)
    assert Image.open(run / "samples/0000020.png").height == 7 * (48 + 2) + 2
    moved = tmp_path / "moved"
    folder.rename(moved)  # where the latents lie may change
    try:
        train.main(latent_flags(moved, vae, run, **{"train.steps": 21}))
    finally:
        moved.rename(folder)

    sample.main([str(run), "--classes", "class 3", "5", "--per-class", "3", "--steps", "3", "--out", str(tmp_path / "x.npz")])
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["arr_0"].shape == (6, 48, 48, 3) and arrays["arr_1"].tolist() == [3, 3, 3, 5, 5, 5] and arrays["arr_0"].std() > 1
    model, config = checkpoint.load(run)
    y, keys = jnp.repeat(jnp.array([3, 5]), 3), sampling.sample_keys(0, jnp.arange(6))
    z = sampling.ddim(make_objective(config), sampling.guided(model, y, 7), keys, (6, 6, 4), 3)
    by_hand = to_uint8(load_vae(vae).decode(z / 0.18215))
    assert np.abs(np.asarray(by_hand, int) - arrays["arr_0"]).max() <= 1 and jnp.abs(z).max() > 1
    sample.main([str(run), "--classes", "class 3", "5", "--per-class", "3", "--steps", "3", "--batch-size", "2", "--vae",
                 str(write_vae(tmp_path / "same")), "--out", str(tmp_path / "y.npz")])
    assert np.abs(np.load(tmp_path / "y.npz")["arr_0"].astype(int) - arrays["arr_0"]).max() <= 1, "decoded in other batches"
    assert "'class 33' should be a number from 0 to 6 or the name of a class; the nearest is 'class 3'" in refused(
        sample.main, run, "--classes", "class 33", "--out", tmp_path / "z.png")
    assert "should be the config.json of a diffusers AutoencoderKL" in refused(
        sample.main, run, "--vae", tmp_path / "no", "--out", tmp_path / "z.png")


def test_latents_without_a_vae_train_but_are_not_drawn(refused, folder, vae, tmp_path, capsys):
    flags = latent_flags(folder, vae, tmp_path / "run", **{"train.steps": 2, "train.sample-every": 1})
    del flags[flags.index("--data.vae"):flags.index("--data.vae") + 2]
    train.main(flags)
    assert "no sample grids are drawn: --data.vae names no VAE" in capsys.readouterr().out
    assert list((tmp_path / "run/samples").iterdir()) == []
    assert "--vae: None should be the folder of a VAE: the model makes latents, not pixels" in refused(
        sample.main, tmp_path / "run", "--out", tmp_path / "x.png")
    assert "config.json: should be the config.json of a diffusers AutoencoderKL" in refused(
        train.main, *latent_flags(folder, tmp_path / "no", tmp_path / "other"))
    assert not (tmp_path / "other").exists()


# Real JPEGs


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """The published procedure: halve by boxes while both sides allow, bicubic to the size, cut out the middle of the array."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    array = np.array(image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top:top + size, left:left + size]


@needs_imagenet
def test_the_crop_of_real_jpegs_equals_the_published_procedure():
    records, _ = data.decoded(Data(name="imagenet2012", split="validation", image_size=64, channels=3, num_classes=1000))
    sizes = set()
    for i in range(24):
        image = Image.open(io.BytesIO(records.source[i]["image"])).convert("RGB")
        sizes.add(image.size)
        for size in (64, 256):
            np.testing.assert_array_equal(centre_crop(np.asarray(image), size), adm_crop(image, size))
        np.testing.assert_array_equal(records[i]["image"], adm_crop(image, 64))
    assert len(sizes) > 5


def encode_64(vae, out, *flags):
    latents.main(["imagenet2012", "--vae", str(vae), "--size", "32", "--split", "train[:64]", "--shard-size", "24", "--batch-size", "1",
                  "--out", str(out), *flags])


@pytest.fixture(scope="module")
def real(vae, tmp_path_factory) -> Path:
    """Latents of 64 real images, written in one go."""
    out = tmp_path_factory.mktemp("real") / "out"
    encode_64(vae, out)
    return out


@needs_imagenet
def test_latents_hold_the_posteriors_of_the_image_and_of_its_mirror_image(real, vae):
    records, _ = data.decoded(Data(name="imagenet2012", split="train[:64]", image_size=32, channels=3, num_classes=1000))
    stored = data.open_dataset(Data(name="imagenet2012", image_size=32, channels=3, num_classes=1000, latents=str(real), latent_scale=0.8))
    network = load_vae(vae)
    for i in (0, 30, 63):
        image = jnp.asarray(records[i]["image"] / 127.5 - 1, jnp.float32)[None]
        for flip, x in enumerate((image, image[:, :, ::-1])):
            mean, log_variance = network.encode(x)
            expected = np.concatenate([mean, np.exp(log_variance / 2)], axis=-1)[0]
            np.testing.assert_allclose(stored.records[i]["latent"][flip], expected, rtol=2e-3, atol=1e-3)
        assert stored.records[i]["label"] == records[i]["label"]


@needs_imagenet
def test_encoding_that_was_killed_goes_on_to_the_same_bytes(refused, real, vae, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def until_the_second_shard(vae, records, indices, *rest):
        for i, example in enumerate(before(vae, records, indices, *rest)):
            if indices.start == 24 and i == 5:
                raise Killed
            yield example

    before = latents.encoded
    monkeypatch.setattr(latents, "encoded", until_the_second_shard)
    with pytest.raises(Killed):
        encode_64(vae, tmp_path / "out")
    monkeypatch.setattr(latents, "encoded", before)
    assert [path.name[-14:] for path in (tmp_path / "out").glob("imagenet*")] == ["00000-of-00003"]
    assert "should be a finished folder" in refused(train.main, *latent_flags(tmp_path / "out", vae, tmp_path / "run"))
    (first,) = (tmp_path / "out").glob("imagenet*")
    written = first.stat().st_mtime_ns
    encode_64(vae, tmp_path / "out")
    assert first.stat().st_mtime_ns == written, "the finished shard is not made again"
    names = sorted(path.name for path in real.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir()) and len(names) == 7
    for name in names:
        assert (real / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    other = write_vae(tmp_path / "other", seed=1)
    assert "was begun with vae_crc32" in refused(lambda argv: encode_64(*argv), other, tmp_path / "out")
    assert "was begun with size: 32 should be 64, or --out another folder" in refused(
        lambda argv: encode_64(*argv), vae, tmp_path / "out", "--size", "64")


@needs_imagenet
def test_a_jpeg_that_cannot_be_decoded_is_named_counted_and_skipped(vae, tmp_path, monkeypatch, capsys):
    class Damaged:
        def __init__(self, source):
            self.source = source

        def __len__(self):
            return len(self.source)

        def __getitems__(self, indices):
            found = self.source.__getitems__(indices)
            return [{**r, "image": r["image"][:len(r["image"]) // 2]} if i == 40 else r for i, r in zip(indices, found)]

    before = data.open_split
    monkeypatch.setattr(data, "open_split", lambda *args, **options: Damaged(before(*args, **options)))
    encode_64(vae, tmp_path / "out")
    told = capsys.readouterr()
    assert "skipped: imagenet2012: n0" in told.err and "cannot be decoded (image file is truncated" in told.err
    assert "latents of 63 images" in told.out and "1 skipped that cannot be decoded" in told.out
    monkeypatch.undo()
    stored = data.open_dataset(Data(name="imagenet2012", image_size=32, channels=3, num_classes=1000, latents=str(tmp_path / "out"),
                                    latent_scale=0.8))
    assert len(stored.records) == 63


@needs_imagenet
def test_training_twenty_steps_on_latents_of_real_images(real, vae, tmp_path):
    changed = {"data.image-size": 32, "data.num-classes": 1000, "data.latent-scale": 0.8}
    train.main(latent_flags(real, vae, tmp_path / "run", **changed))
    sample.main([str(tmp_path / "run"), "--classes", "golden retriever", "360", "--guidance", "4", "--steps", "3", "--out",
                 str(tmp_path / "x.png")])
    assert Image.open(tmp_path / "x.png").height == 2 * (64 + 2) + 2


def test_folders_that_are_damaged_are_refused(refused, folder, vae, tmp_path):
    for name, damage in {"half": lambda path: path.write_bytes(path.read_bytes()[:70_000]), "gone": Path.unlink}.items():
        shutil.copytree(folder, tmp_path / name)
        damage(sorted((tmp_path / name).glob("*array_record*"))[1])
        told = refused(train.main, *latent_flags(tmp_path / name, vae, tmp_path / "run"))
        assert "should be a finished folder of python -m dit.latents, undamaged" in told
    shutil.copytree(folder, tmp_path / "info")
    (tmp_path / "info/dataset_info.json").write_text('{"name": ')
    assert "undamaged" in refused(train.main, *latent_flags(tmp_path / "info", vae, tmp_path / "run"))
    (tmp_path / "latents.json").touch()
    with pytest.raises(InputError, match="should hold the settings that the folder was begun with, and is damaged"):
        latents.check_settings(tmp_path, {"size": 32})


def test_an_unlabelled_record_is_no_damaged_one():
    class Records:
        def __getitem__(self, i):
            raise InputError("data.split: 'test' should have labels, and has -1")

    with pytest.raises(InputError):
        latents.read(Records(), 0)


@pytest.mark.parametrize("flags, words", [
    (["--split", "all"], "--split: 'all' should be one split, such as train or validation"),
    (["--size", "100"], "--size: 100 should be a multiple of 8"), (["--shard-size", "0"], "--batch-size and --shard-size"),
    (["--vae", "nowhere"], "config.json: should be the config.json of a diffusers AutoencoderKL"),
])
def test_latents_that_cannot_be_made_are_refused(refused, vae, tmp_path, flags, words):
    name = "imagenet2012" if "--vae" not in flags or (TFDS_DATA_DIR / "imagenet2012").is_dir() else pytest.skip("no ImageNet")
    assert words in refused(latents.main, name, "--vae", vae, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
    told = refused(latents.main, "digits", "--vae", vae, "--out", tmp_path)
    assert "DATASET: 'digits' should be a TFDS data set of colour images" in told
