"""Latents on disk: written, resumed, read, trained on and sampled; of real JPEGs if at hand."""

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import run_sample, run_train, write_vae
from PIL import Image
from tensorflow_datasets.core.naming import FilenameInfo

from dit import checkpoint, cli, data, sampling
from dit.config import Data, InputError
from dit.imagenet import latents
from dit.imagenet.vae import load_vae
from dit.images import centre_crop, to_uint8
from dit.state import make_objective
from dit.tfds import Decoded, Undecodable, open_tfds

pytestmark = pytest.mark.slow

TFDS_DATA_DIR = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
HAS_IMAGENET = (TFDS_DATA_DIR / "imagenet2012").is_dir()
needs_imagenet = pytest.mark.skipif(not HAS_IMAGENET, reason="no ImageNet in TFDS_DATA_DIR")


def latents_command(*argv):
    """What `python -m dit.imagenet.latents *argv` does."""
    with cli.exit_status("dit.imagenet.latents"):
        options = cli.parse(latents.MakeLatents, [str(a) for a in argv], "dit.imagenet.latents", "")
        latents.run(options)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


def random_latent(rng: np.random.Generator) -> np.ndarray:
    """A posterior whose samples have a standard deviation of about 1 / 0.2."""
    mean = rng.normal(size=(2, 6, 6, 4)) * 5
    return np.concatenate([mean, np.full_like(mean, 0.1)], axis=-1).astype(np.float16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """37 latents of 48x48 images of 7 classes, in two shards."""
    out, rng = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    features = latents.features_of(48, tuple(f"class {k}" for k in range(7)))
    options = latents.MakeLatents("random", "vae", str(out), size=48, shard_size=20)
    shards = latents.plan_shards(options, 37)
    assert [len(shard.indices) for shard in shards] == [20, 17]
    for shard in shards:
        examples = [{"latent": random_latent(rng), "label": i % 7} for i in shard.indices]
        latents.write_shard(shard.path, features, iter(examples))
    paths = [shard.path for shard in shards]
    assert latents.write_info(out, features, "train", paths) == 37
    return out


def small_latents(folder, **changed) -> Data:
    options = dict(name="imagenet2012", image_size=48, channels=3, num_classes=7)
    return Data(**(options | dict(latents=str(folder)) | changed))


def latent_flags(folder, vae, workdir, **changed) -> list:
    """The command line of a small run on latents; names have _ for - and __ for a dot."""
    flags = dict(
        data__latents=folder,
        data__vae=vae,
        data__image_size=48,
        data__num_classes=7,
        model__hidden_size=20,
        model__depth=2,
        model__num_heads=5,
        train__batch_size=16,
        train__steps=20,
        train__log_every=5,
        train__dtype="float32",
        train__sample_steps=3,
        train__sample_every=20,
        workdir=workdir,
    )
    argv = ["imagenet256_b2"]
    for name, value in (flags | changed).items():
        if value is not None:
            argv += ["--" + name.replace("__", ".").replace("_", "-"), value]
    return argv


# What the network sees


def posteriors() -> tuple[dict, dict]:
    """A batch of random posteriors, and the same without their deviation."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(101, 2, 3, 3, 8)).astype(np.float16)
    label = np.zeros(101, np.int32)
    certain = latent.copy()
    certain[..., 4:] = 0
    return {"latent": latent, "label": label}, {"latent": certain, "label": label}


def seen(batch, key, flip) -> np.ndarray:
    config = Data(latents="x", flip=flip, latent_scale=0.5)
    return np.asarray(data.augment(batch, key, config)[0])


def test_latents_are_scaled_and_half_of_them_mirrored():
    batch, certain = posteriors()
    mean = 0.5 * batch["latent"][..., :4].astype(np.float32)
    key = jax.random.key(0)
    pairs = list(zip(seen(certain, key, flip=True), mean, strict=True))
    straight = np.array([np.allclose(x, sides[0]) for x, sides in pairs])
    mirrored = np.array([np.allclose(x, sides[1]) for x, sides in pairs])
    assert (mirrored ^ straight).all()
    assert 25 < mirrored.sum() < 76
    np.testing.assert_allclose(seen(certain, key, flip=False), mean[:, 0])


def test_a_latent_is_a_fresh_sample_of_its_posterior():
    batch, certain = posteriors()
    std = 0.5 * batch["latent"][:, 0, ..., 4:].astype(np.float32)
    noise = []
    for key in jax.random.split(jax.random.key(0), 2):
        deviation = seen(batch, key, flip=False) - seen(certain, key, flip=False)
        noise.append(deviation / std)
    noise = np.stack(noise)  # standard normal, and another draw for each key
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    assert abs(np.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.05


# Reading


def test_latents_are_records_that_grain_and_tfds_read_at_random(folder):
    dataset = data.open_dataset(small_latents(folder))
    assert len(dataset.records) == 37
    assert dataset.class_names[3] == "class 3"
    paths = sorted(str(path) for path in folder.glob("*array_record*"))
    source = grain.sources.ArrayRecordDataSource(paths)
    features = tfds.builder_from_directory(folder).info.features
    for i in (36, 0, 20):
        latent = features.deserialize_example_np(source[i])["latent"]
        np.testing.assert_array_equal(latent, dataset.records.read([i])["latent"][0])
    batch = next(data.batches(dataset, 8, seed=0))
    assert batch["latent"].shape == (8, 2, 6, 6, 8)
    assert batch["latent"].dtype == np.float16
    assert batch["label"].dtype == np.int32


def test_the_fields_of_a_record_are_in_one_order_whatever_the_process(folder):
    paths = sorted(str(path) for path in folder.glob("*array_record*"))
    source = grain.sources.ArrayRecordDataSource(paths)
    for i in range(37):
        record = bytes(source[i])
        assert record.index(b"label") < record.index(b"latent")


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(latent_scale=0.01), "data.latent_scale: 0.01 gives"),
        (dict(latent_scale=1.0), "which should be near 1; 0.2 would"),
        (dict(image_size=64), "data.image_size: 64 should be 48, that of"),
        (dict(num_classes=10), "data.num_classes: 10 should be 7"),
        (dict(split="test"), "data.split: 'test' should be one of train"),
        (dict(latents="/"), "data.latents: '/' should be a finished, undamaged folder"),
    ],
)
def test_latents_that_are_not_what_the_config_says_are_refused(folder, changed, words):
    with pytest.raises(InputError) as refusal:
        data.open_dataset(small_latents(folder, **changed))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("damage", ["half", "gone", "info"])
def test_folders_that_are_damaged_are_refused(refused, folder, vae, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = sorted(copy.glob("*array_record*"))[1]
    if damage == "half":
        shard.write_bytes(shard.read_bytes()[:70_000])
    elif damage == "gone":
        shard.unlink()
    else:
        (copy / "dataset_info.json").write_text('{"name": ')
    words = "should be a finished, undamaged folder of python -m dit.imagenet.latents"
    assert words in refused(run_train, *latent_flags(copy, vae, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# Training and sampling


@pytest.fixture(scope="module")
def run(folder, vae, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "run"
    run_train(*latent_flags(folder, vae, workdir))
    return workdir


def test_training_on_latents_draws_grids_through_the_vae(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[-1]["step"] == 20
    assert np.isfinite([row["loss"] for row in rows]).all()
    assert rows[0]["mse"] == pytest.approx(1, abs=0.2)
    assert Image.open(run / "samples/0000020.png").height == 7 * (48 + 2) + 2


def test_latents_may_move_between_two_runs(run, folder, vae, tmp_path):
    copied, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(run, copied)
    shutil.copytree(folder, moved)
    state = run_train(*latent_flags(moved, vae, copied, train__steps=21))
    assert int(state.step) == 21


CLASSES = ["--classes", "class 3", 5, "--per-class", 3, "--steps", 3]


def test_samples_are_decoded_latents_in_batches_of_any_size(run, vae, tmp_path):
    run_sample(run, *CLASSES, "--out", tmp_path / "x.npz")
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["arr_0"].shape == (6, 48, 48, 3)
    assert arrays["arr_1"].tolist() == [3, 3, 3, 5, 5, 5]
    assert arrays["arr_0"].std() > 1

    model, config = checkpoint.load(run)
    condition = {"y": jnp.repeat(jnp.array([3, 5]), 3)}
    denoise = sampling.guided(model, condition, condition)
    keys = sampling.sample_keys(0, jnp.arange(6))
    z = sampling.ddim(make_objective(config), denoise, keys, (6, 6, 4), 3)
    assert jnp.abs(z).max() > 1, "clipped as pixels are"
    expected = np.asarray(to_uint8(load_vae(vae).decode(z / 0.18215)), int)
    assert np.abs(expected - arrays["arr_0"]).max() <= 1

    same = write_vae(tmp_path / "same")
    options = ["--batch-size", 2, "--vae", same, "--out", tmp_path / "y.npz"]
    run_sample(run, *CLASSES, *options)
    again = np.load(tmp_path / "y.npz")["arr_0"].astype(int)
    assert np.abs(again - arrays["arr_0"]).max() <= 1


def test_classes_and_vaes_that_there_are_not_are_refused(refused, run, tmp_path):
    out = tmp_path / "z.png"
    line = refused(run_sample, run, "--classes", "class 33", "--out", out)
    words = "should be a number from 0 to 6 or the name of a class; the nearest is 'class 3'"
    assert f"'class 33' {words}" in line
    line = refused(run_sample, run, "--vae", tmp_path / "no", "--out", out)
    assert "should be the config.json of a diffusers AutoencoderKL" in line


def test_latents_without_a_vae_train_but_are_not_drawn(refused, folder, tmp_path, capsys):
    changed = dict(train__steps=2, train__sample_every=1)
    run_train(*latent_flags(folder, None, tmp_path / "run", **changed))
    assert "no sample grids are drawn: --data.vae names no VAE" in capsys.readouterr().out
    assert list((tmp_path / "run/samples").iterdir()) == []
    line = refused(run_sample, tmp_path / "run", "--out", tmp_path / "x.png")
    assert "--vae: None should be the folder of a VAE: the model makes latents" in line


def test_a_run_without_the_vae_it_names_is_refused(refused, folder, tmp_path):
    line = refused(run_train, *latent_flags(folder, tmp_path / "no", tmp_path / "run"))
    assert "config.json: should be the config.json of a diffusers AutoencoderKL" in line
    assert not (tmp_path / "run").exists()


def test_a_vae_of_another_scale_is_refused(refused, folder, run, vae, tmp_path):
    other = shutil.copytree(vae, tmp_path / "vae")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.13025}))
    words = f"data.latent_scale: 0.18215 should be 0.13025, the scaling_factor of {str(other)!r}"
    assert words in refused(run_train, *latent_flags(folder, other, tmp_path / "run"))
    assert words in refused(run_sample, run, "--vae", other, "--out", tmp_path / "x.png")
    load_vae(other, 0.13025)


# Writing: shards


class Killed(BaseException):
    pass


def test_a_shard_that_is_not_finished_does_not_look_like_one(tmp_path):
    options = latents.MakeLatents("cats/v2", "vae", str(tmp_path), size=48, split="test[:9]")
    (shard,) = latents.plan_shards(options, 9)
    assert shard.path.name == "cats_v2_latents-test.array_record-00000-of-00001"
    assert FilenameInfo.is_valid(shard.path.name)
    features = latents.features_of(48, ("a", "b"))

    def examples():
        yield {"latent": random_latent(np.random.default_rng(0)), "label": 0}
        raise Killed

    with pytest.raises(Killed):
        latents.write_shard(shard.path, features, examples())
    names = [path.name for path in tmp_path.iterdir()]
    assert names, "nothing was begun"
    assert not any(FilenameInfo.is_valid(name) for name in names)


def test_a_damaged_image_is_skipped_and_an_unlabelled_one_is_no_damaged_one(capsys):
    class Records:
        def __init__(self, error):
            self.error = error

        def __getitem__(self, i):
            raise self.error

    assert latents.read(Records(Undecodable("x: record 0 cannot be decoded")), 0) is None
    assert capsys.readouterr().err == "skipped: x: record 0 cannot be decoded\n"
    unlabelled = InputError("data.split: 'test' should have labels, and has -1")
    with pytest.raises(InputError, match="should have labels"):
        latents.read(Records(unlabelled), 0)


# Writing: refusals


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--split", "all"], "--split: 'all' should be one split, such as train or validation"),
        (["--size", 100], "--size: 100 should be a multiple of 8"),
        (["--shard-size", 0], "--shard-size: 0 should be more than 0"),
        (["--batch-size", -1], "--batch-size: -1 should be more than 0"),
    ],
)
def test_options_that_cannot_be_are_refused(refused, vae, tmp_path, flags, words):
    out = tmp_path / "out"
    assert words in refused(latents_command, "imagenet2012", "--vae", vae, "--out", out, *flags)
    assert not out.exists()


def test_a_data_set_that_cannot_be_is_refused_by_the_names_of_the_command(refused, vae, tmp_path):
    flags = ["--vae", vae, "--out", tmp_path / "out"]
    assert "DATASET: 'nowhere' should be" in refused(latents_command, "nowhere", *flags)
    (tmp_path / "pictures/cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/cat/0.png")
    line = refused(latents_command, tmp_path / "pictures", *flags, "--split", "val")
    assert "--split: 'val' should be" in line


def test_the_digits_have_no_latents(refused, vae, tmp_path):
    line = refused(latents_command, "digits", "--vae", vae, "--out", tmp_path / "out")
    assert "DATASET: 'digits' should be a TFDS data set of colour images" in line


# Writing: the command


class Photographs:
    """A TFDS source of 64 small JPEGs of many sizes; record `damaged` is cut short."""

    def __init__(self, damaged: int | None):
        self.damaged = damaged

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict:
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize(tuple(rng.integers(33, 80, 2))).save(file, "JPEG")
        image = file.getvalue()
        if i == self.damaged:
            image = image[: len(image) // 2]
        return {"image": image, "label": i % 7, "file_name": f"{i}.jpg".encode()}


def encode_photographs(vae, out, *flags, damaged: int | None = None):
    """What the command does with a TFDS data set of the photographs."""

    def open_decoded(config):
        names = tuple(f"class {k}" for k in range(7))
        return Decoded(Photographs(damaged), "image", "label", config), names

    def tfds_config(name, split, size):
        return Data(name=name, split=split, image_size=size, channels=3, num_classes=7)

    options = ["--size", 32, "--shard-size", 24, "--batch-size", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "open_decoded", open_decoded)
        patch.setattr(latents, "tfds_config", tfds_config)
        latents_command("photographs", "--vae", vae, "--out", out, *options, *flags)


def open_encoded(folder, **changed) -> data.Dataset:
    return data.open_dataset(small_latents(folder, image_size=32, latent_scale=0.8, **changed))


@pytest.fixture(scope="module")
def encoded(vae, tmp_path_factory) -> Path:
    """Latents of the photographs, written in one go."""
    out = tmp_path_factory.mktemp("encoded") / "out"
    encode_photographs(vae, out)
    return out


def assert_posteriors(stored, records, vae):
    """Holds records of latents against those of their images, encoded one by one."""
    network = load_vae(vae)
    found = stored.read(range(64))
    for i in (0, 30, 63):
        image = jnp.asarray(records[i]["image"] / 127.5 - 1, jnp.float32)[None]
        for side, x in enumerate((image, image[:, :, ::-1])):
            mean, log_variance = network.encode(x)
            expected = np.concatenate([mean, np.exp(log_variance / 2)], axis=-1)[0]
            np.testing.assert_allclose(found["latent"][i, side], expected, rtol=2e-3, atol=1e-3)
        assert found["label"][i] == records[i]["label"]


def test_latents_hold_the_posteriors_of_the_image_and_of_its_mirror_image(encoded, vae):
    config = Data(image_size=32, channels=3)
    records = Decoded(Photographs(None), "image", "label", config)
    assert_posteriors(open_encoded(encoded).records, records, vae)


def test_encoding_that_was_killed_goes_on_to_the_same_bytes(encoded, vae, tmp_path, monkeypatch):
    before, out = latents.encode_records, tmp_path / "out"

    def killed_in_the_second_shard(vae, records, indices, *rest):
        for i, example in enumerate(before(vae, records, indices, *rest)):
            if indices.start == 24 and i == 5:
                raise Killed
            yield example

    monkeypatch.setattr(latents, "encode_records", killed_in_the_second_shard)
    with pytest.raises(Killed):
        encode_photographs(vae, out)
    monkeypatch.undo()
    shards = [path for path in out.glob("photographs*") if FilenameInfo.is_valid(path.name)]
    assert [path.name[-14:] for path in shards] == ["00000-of-00003"]
    with pytest.raises(InputError, match="should be a finished, undamaged folder"):
        open_encoded(out)

    written = shards[0].stat().st_mtime_ns
    encode_photographs(vae, out)
    assert shards[0].stat().st_mtime_ns == written, "the finished shard is not made again"
    names = sorted(path.name for path in encoded.iterdir())
    assert names == sorted(path.name for path in out.iterdir())
    assert len(names) == 7
    for name in names:
        assert (encoded / name).read_bytes() == (out / name).read_bytes(), name


def test_a_folder_of_another_vae_or_size_is_not_gone_on_with(refused, encoded, tmp_path):
    names = sorted(path.name for path in encoded.iterdir())
    other = write_vae(tmp_path / "other", seed=1)
    assert "was begun with vae_crc32" in refused(encode_photographs, other, encoded)
    vae = write_vae(tmp_path / "same")
    line = refused(encode_photographs, vae, encoded, "--size", 64)
    words = "was begun with size 32 rather than 64; remove it, or name another folder"
    assert f"--out: {str(encoded)!r} {words}" in line
    assert names == sorted(path.name for path in encoded.iterdir())


def test_an_image_that_cannot_be_decoded_is_named_counted_and_skipped(
    encoded, vae, tmp_path, capsys
):
    encode_photographs(vae, tmp_path / "out", damaged=40)
    output = capsys.readouterr()
    assert "skipped: photographs: 40.jpg cannot be decoded (" in output.err
    assert "latents of 63 images" in output.out
    assert "1 skipped that cannot be decoded" in output.out
    records, whole = open_encoded(tmp_path / "out").records, open_encoded(encoded).records
    assert len(records) == 63
    found, expected = records.read([39, 40, 62]), whole.read([39, 41, 63])
    np.testing.assert_allclose(found["latent"], expected["latent"], rtol=2e-3, atol=1e-3)


def test_a_folder_of_pictures_has_latents_as_a_tfds_data_set_has(vae, tmp_path, capsys):
    folder = tmp_path / "My Pictures"
    for name, size in [("cat/0.jpg", (40, 33)), ("cat/1.png", (32, 32)), ("dog/2.webp", (50, 64))]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(size[0]).integers(0, 256, (*size, 3), np.uint8)).save(
            path, lossless=True
        )
    whole = (folder / "cat/0.jpg").read_bytes()
    (folder / "dog/3.jpg").write_bytes(whole[: len(whole) // 2])
    options = ["--size", 32, "--batch-size", 1, "--vae", vae, "--out", tmp_path / "out"]
    latents_command(folder, *options)
    output = capsys.readouterr()
    assert "latents of 3 images" in output.out
    assert "dog/3.jpg cannot be decoded" in output.err
    config = Data(name=str(folder), latents=str(tmp_path / "out"), image_size=32, channels=3)
    stored = data.open_dataset(dataclasses.replace(config, latent_scale=0.8))
    assert stored.class_names == ("cat", "dog")
    records, _ = data.open_decoded(config)
    expected = [i for i in range(4) if "3.jpg" not in records.source.pictures[i][1]]
    found = stored.records.read(range(3))
    network = load_vae(vae)
    for latent, label, i in zip(found["latent"], found["label"], expected, strict=True):
        assert label == records[i]["label"]
        x = jnp.asarray(records[i]["image"] / 127.5 - 1, jnp.float32)[None]
        mean, _ = network.encode(x)
        np.testing.assert_allclose(latent[0, ..., :4], mean[0], rtol=2e-3, atol=1e-3)


# Writing: real JPEGs


@needs_imagenet
def test_a_vae_that_is_not_there_is_refused(refused, tmp_path):
    out = tmp_path / "out"
    line = refused(latents_command, "imagenet2012", "--vae", "nowhere", "--out", out)
    assert "config.json: should be the config.json of a diffusers AutoencoderKL" in line
    assert not out.exists()


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """The published procedure: halve by boxes, bicubic to the size, cut out the middle."""
    while min(*image.size) >= 2 * size:
        half = tuple(side // 2 for side in image.size)
        image = image.resize(half, resample=Image.BOX)
    scale = size / min(*image.size)
    scaled = tuple(round(side * scale) for side in image.size)
    array = np.array(image.resize(scaled, resample=Image.BICUBIC))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@needs_imagenet
def test_the_crop_of_real_jpegs_equals_the_published_procedure():
    records, _ = open_tfds(data.tfds_config("imagenet2012", "validation", 64))
    sizes = set()
    for i in range(24):
        image = Image.open(io.BytesIO(records.source[i]["image"])).convert("RGB")
        sizes.add(image.size)
        for size in (64, 256):
            cropped = centre_crop(np.asarray(image), size)
            np.testing.assert_array_equal(cropped, adm_crop(image, size))
        np.testing.assert_array_equal(records[i]["image"], adm_crop(image, 64))
    assert len(sizes) > 5


@pytest.fixture(scope="module")
def real(vae, tmp_path_factory) -> Path:
    """Latents of 64 images of ImageNet."""
    out = tmp_path_factory.mktemp("real") / "out"
    options = ["--size", 32, "--split", "train[:64]", "--batch-size", 1]
    latents_command("imagenet2012", "--vae", vae, "--out", out, *options)
    return out


@needs_imagenet
def test_latents_of_real_jpegs_hold_their_posteriors(real, vae):
    records, _ = open_tfds(data.tfds_config("imagenet2012", "train[:64]", 32))
    assert_posteriors(open_encoded(real, num_classes=1000).records, records, vae)


@needs_imagenet
def test_training_twenty_steps_on_latents_of_real_images(real, vae, tmp_path):
    workdir = tmp_path / "run"
    changed = dict(data__image_size=32, data__num_classes=1000, data__latent_scale=0.8)
    run_train(*latent_flags(real, vae, workdir, **changed))
    classes = ["--classes", "golden retriever", 360, "--guidance", 4, "--steps", 3]
    run_sample(workdir, *classes, "--out", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").height == 2 * (64 + 2) + 2
