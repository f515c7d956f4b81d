"""FID and its kin on a network of random weights: the command, references, and the evaluation."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import TINY, awaken, run_train, tiny_config
from flax import nnx
from safetensors.numpy import save_file

from dit import cli, generation
from dit.config import Data, InputError, Stopped
from dit.data import InMemory
from dit.imagenet import fid
from dit.imagenet.inception import Features, Inception, load_inception, published_shapes
from dit.metrics import gaussian_of
from dit.sharding import make_mesh
from dit.state import make_model

DIGITS = 7  # of the reference data set, cut short


def fid_command(*argv):
    """What `python -m dit.imagenet.fid *argv` does."""
    with cli.exit_status("dit.imagenet.fid"):
        return fid.run(cli.parse(fid.Fid, [str(a) for a in argv], "dit.imagenet.fid", ""))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file named as pytorch-fid's: random convolutions, and batch norms that do nothing."""
    rng = np.random.default_rng(0)
    identity = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}
    tensors = {}
    model = jax.eval_shape(lambda: Inception(rngs=nnx.Rngs(0)))
    for name, tensor in published_shapes(model).items():
        module, part = name.rsplit(".", 1)
        if module.endswith(".bn"):
            tensors[name] = np.full(tensor.shape, identity[part], np.float32)
        else:
            fan = np.prod(tensor.shape[1:])
            tensors[name] = rng.normal(size=tensor.shape).astype(np.float32) * (2 / fan) ** 0.5
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def cheap(monkeypatch):
    """A few random products of the pixels in place of the network's features.

    The network takes seconds an image, and the distance of its 2048 features as long.
    """
    sizes = {"pool": 13, "spatial": 11, "logits": 7}

    def extract(images, rows):
        x = images.reshape(len(images), -1) / 127.5 - 1
        rng = np.random.default_rng(0)
        products = [x @ rng.normal(size=(x.shape[1], size)) for size in sizes.values()]
        return Features(*(product.astype(np.float32) for product in products))

    monkeypatch.setattr(fid, "make_extract", lambda file, mesh: extract)
    monkeypatch.setattr(fid, "POOL_FEATURES", sizes["pool"])
    monkeypatch.setattr(fid, "SPATIAL_FEATURES", sizes["spatial"])
    return extract


@pytest.fixture
def few_digits(monkeypatch):
    """Makes a data set of its first images alone, and returns those of the digits."""
    before = fid.open_dataset

    def open_some(config):
        dataset = before(config)
        records = dataset.records
        few = InMemory(records.images[:DIGITS], records.labels[:DIGITS])
        return dataclasses.replace(dataset, records=few)

    monkeypatch.setattr(fid, "open_dataset", open_some)
    return open_some(Data()).records.images


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def write_statistics(path, size=2048, **arrays):
    """The statistics of a standard normal distribution, as pytorch-fid writes them."""
    return write(path, mu=np.zeros(size), sigma=np.eye(size), **arrays)


# Images to statistics


@pytest.mark.slow
def test_features_are_the_networks_and_a_smaller_batch_takes_no_second_compilation(
    weights, monkeypatch
):
    network = load_inception(weights)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    expected = jax.jit(lambda network, images: network(images))(network, images)
    shapes = []
    before = Inception.__call__

    def traced(self, images):
        shapes.append(images.shape)
        return before(self, images)

    monkeypatch.setattr(Inception, "__call__", traced)
    mesh = make_mesh(tiny_config(train=dict(batch_size=2)), jax.devices()[:2])
    extract = fid.make_extract(str(weights), mesh)
    batches = [extract(images[:2], 2), extract(images[2:], 2)]
    assert shapes == [(2, 8, 8, 1)]
    for name in ("pool", "spatial", "logits"):
        found = np.concatenate([getattr(batch, name) for batch in batches])
        np.testing.assert_allclose(found, getattr(expected, name), rtol=1e-3, atol=1e-4)


def test_each_batch_is_padded_to_the_largest(cheap):
    rows = []

    def extract(images, padded):
        rows.append(padded)
        return cheap(images, padded)

    images = np.zeros((11, 8, 8, 1), np.uint8)
    fid.measure([images[:4], images[4:8], images[8:]], extract)
    assert rows == [4, 4, 4]


def test_statistics_do_not_depend_on_the_batches(cheap):
    images = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
    features = cheap(images, 11)
    whole = fid.measure([images], cheap)
    parts = fid.measure([images[:4], images[4:8], images[8:]], cheap, keep=6)
    for statistics in (whole, parts):
        pairs = [(statistics.pool, features.pool), (statistics.spatial, features.spatial)]
        for found, rows in pairs:
            expected = gaussian_of(rows)
            np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found.covariance, expected.covariance, atol=1e-3)
    np.testing.assert_allclose(whole.logit_rows, features.logits)
    np.testing.assert_allclose(parts.pool_rows, features.pool[:6], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(parts.logit_rows, features.logits[:6], rtol=1e-4, atol=1e-4)


# The command


@pytest.mark.slow
def test_samples_equal_themselves(weights, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    path = write(tmp_path / "x.npz", arr_0=images)
    scores = fid_command(path, "--inception", weights, "--reference", path)
    out = capsys.readouterr().out
    assert "warning: 5 samples are fewer than the 2048 features" in out
    assert list(scores) == ["fid", "sfid", "inception_score", "precision", "recall"]
    printed = dict(line.split() for line in out.splitlines() if not line.startswith("warning"))
    assert printed == {name: f"{value:.4f}" for name, value in scores.items()}
    assert abs(scores["fid"]) < 1e-2
    assert abs(scores["sfid"]) < 1e-2
    assert scores["inception_score"] >= 1
    assert scores["precision"] == scores["recall"] == 1


def test_what_the_reference_does_not_allow_is_said(cheap, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    path = write(tmp_path / "x.npz", arr_0=images)
    reference = write_statistics(tmp_path / "reference.npz", 13)
    scores = fid_command(path, "--inception", "x.pth", "--reference", reference)
    assert list(scores) == ["fid", "inception_score"]
    out = capsys.readouterr().out
    assert "-  the reference has no mu_s and sigma_s" in out
    assert out.count("-  the reference has no images in arr_0") == 2


# References


def test_a_data_sets_statistics_are_those_of_its_images(cheap, few_digits):
    reference = fid.open_reference("--reference", "digits", "train", 8, cheap)
    features = cheap(few_digits, DIGITS)
    np.testing.assert_array_equal(reference.pool.mean, gaussian_of(features.pool).mean)
    np.testing.assert_array_equal(reference.spatial.mean, gaussian_of(features.spatial).mean)
    np.testing.assert_array_equal(reference.pool_rows, features.pool)


def test_a_data_sets_statistics_are_saved_and_read(cheap, few_digits, tmp_path):
    path = tmp_path / "digits.npz"
    reference = fid.open_reference("--reference", "digits", "train", 8, cheap, str(path))
    saved = fid.read_reference("--reference", path, cheap)
    np.testing.assert_array_equal(saved.pool.covariance, reference.pool.covariance)
    np.testing.assert_array_equal(saved.spatial.covariance, reference.spatial.covariance)
    np.testing.assert_array_equal(saved.pool_rows, reference.pool_rows)
    assert saved.spatial.mean.shape == (11,)
    assert list(tmp_path.iterdir()) == [path]


def test_pytorch_fids_statistics_serve_for_fid(cheap, tmp_path):
    path = write_statistics(tmp_path / "x.npz", 13)
    reference = fid.read_reference("--reference", path, cheap)
    assert reference.spatial is None
    np.testing.assert_array_equal(reference.pool.covariance, np.eye(13))


def test_images_serve_as_a_reference(cheap, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    path = write(tmp_path / "x.npz", arr_0=images)
    reference = fid.read_reference("--reference", path, cheap)
    features = cheap(images, 5)
    np.testing.assert_array_equal(reference.pool.mean, gaussian_of(features.pool).mean)
    np.testing.assert_array_equal(reference.spatial.mean, gaussian_of(features.spatial).mean)
    np.testing.assert_array_equal(reference.pool_rows, features.pool)


def test_statistics_go_before_those_of_the_images_beside_them(cheap, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    path = write_statistics(tmp_path / "x.npz", 13, arr_0=images)
    reference = fid.read_reference("--reference", path, cheap)
    np.testing.assert_array_equal(reference.pool.mean, np.zeros(13))
    assert reference.spatial is None
    np.testing.assert_array_equal(reference.pool_rows, cheap(images, 5).pool)


# In training


def test_training_reports_the_scores_of_the_average(cheap, tmp_path):
    reference = write_statistics(tmp_path / "reference.npz", 13)
    flags = {
        "--workdir": tmp_path / "run",
        "--train.steps": 2,
        "--eval.every": 2,
        "--eval.inception": "x.pth",
        "--eval.num-samples": 19,
        "--eval.batch-size": 8,
        "--eval.reference": reference,
    }
    run_train(*TINY, *(word for flag in flags.items() for word in flag))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["step"], "fid" in row) for row in rows] == [(1, False), (2, False), (2, True)]
    assert np.isfinite(rows[2]["fid"])


@pytest.mark.parametrize("mask_classes", [0, 2])
def test_the_evaluation_scores_what_the_command_scores(cheap, tmp_path, mask_classes):
    reference = write_statistics(tmp_path / "reference.npz", 13)
    evaluation = dict(inception="x.pth", reference=str(reference), num_samples=19, batch_size=8)
    evaluation |= dict(guidance=3.0, steps=3, labels="balanced")
    config = tiny_config(eval=evaluation, data=dict(mask_classes=mask_classes))
    mesh = make_mesh(config)
    model = awaken(make_model(config, jax.random.key(0)))
    scores = fid.make_evaluation(config, None, mesh)(model)

    labels = np.arange(19) % 10
    condition = generation.make_condition(labels, config)
    options = dict(sampler="ddpm", steps=3, guidance=3.0, seed=config.train.seed)
    draw = generation.make_draw(config, mesh, condition, 19, **options)
    samples = write(tmp_path / "x.npz", arr_0=draw(model, None, 0))
    again = fid_command(samples, "--inception", "x.pth", "--reference", reference)
    assert scores == pytest.approx(again, rel=1e-3)


def test_the_evaluation_is_held_against_the_data_trained_on_unless_told(cheap, few_digits):
    config = tiny_config(eval=dict(inception="x.pth", num_samples=19, batch_size=8))
    model = make_model(config, jax.random.key(0))
    scores = fid.make_evaluation(config, None, make_mesh(config))(model)
    assert list(scores) == ["fid", "sfid", "inception_score", "precision", "recall"]


def test_the_evaluation_is_broken_off_between_two_batches(cheap, tmp_path):
    reference = str(write_statistics(tmp_path / "reference.npz", 13))
    evaluation = dict(inception="x.pth", reference=reference, num_samples=19, batch_size=8, steps=3)
    config = tiny_config(eval=evaluation)
    checks = iter([None, Stopped("now")])

    def check_stop():
        if stopped := next(checks):
            raise stopped

    evaluate = fid.make_evaluation(config, None, make_mesh(config), check_stop)
    with pytest.raises(Stopped, match="now"):
        evaluate(make_model(config, jax.random.key(0)))


# Refusals


@pytest.mark.parametrize(
    "arrays, words",
    [
        (
            dict(images=np.zeros((3, 4, 4, 3), np.uint8)),
            "should be an .npz with `arr_0`",
        ),
        (
            dict(arr_0=np.zeros((3, 4, 4, 3))),
            "arr_0: 'float64 [3, 4, 4, 3]' should be uint8 images [N, H, W, 1 or 3]",
        ),
        (
            dict(arr_0=np.zeros((3, 4, 4, 4), np.uint8)),
            "arr_0: 'uint8 [3, 4, 4, 4]' should be uint8 images",
        ),
        (
            dict(arr_0=np.zeros((1, 4, 4, 3), np.uint8)),
            "arr_0: [1, 4, 4, 3] should be more than one image",
        ),
        (
            dict(arr_0=np.zeros((3, 0, 0, 3), np.uint8)),
            "arr_0: 'uint8 [3, 0, 0, 3]' should be uint8 images",
        ),
    ],
)
def test_samples_that_cannot_be_are_refused(refused, tmp_path, arrays, words):
    path = write(tmp_path / "x.npz", **arrays)
    assert words in refused(fid_command, path, "--reference", "digits", "--inception", "x.pth")


def test_files_that_are_none_are_refused(refused, tmp_path):
    flags = ["--reference", "digits", "--inception", "x.pth"]
    (tmp_path / "x.npz").write_bytes(b"PK")
    assert "should be an .npz with `arr_0`" in refused(fid_command, tmp_path / "x.npz", *flags)
    samples = write(tmp_path / "y.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    assert "x.pth: should be a file of weights" in refused(fid_command, samples, *flags)


def test_a_reference_that_cannot_be_is_refused_by_the_names_of_the_command(
    refused, cheap, tmp_path
):
    samples = write(tmp_path / "x.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8))
    flags = [samples, "--inception", "x.pth", "--reference"]
    assert "--reference: 'nowhere' should be" in refused(fid_command, *flags, "nowhere")
    line = refused(fid_command, *flags, "digits", "--split", "train[:1]")
    assert "--split: 'train[:1]' should be one of more than one image" in line
    asked = dict(every=1, inception="x.pth", reference="nowhere")
    with pytest.raises(InputError, match="eval.reference: 'nowhere' should be"):
        fid.make_evaluation(tiny_config(eval=asked), None, make_mesh(tiny_config()))


@pytest.mark.parametrize(
    "reference, save, words",
    [
        ("x.npz", "s.npz", "'s.npz' should be given with a data set as --reference"),
        ("digits", "s.txt", "'s.txt' should be an .npz file in a folder to write to"),
        ("digits", "no/s.npz", "'no/s.npz' should be an .npz file in a folder to write to"),
    ],
)
def test_statistics_that_cannot_be_saved_are_refused(refused, tmp_path, reference, save, words):
    samples = write(tmp_path / "y.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    flags = ["--inception", "x.pth", "--reference", reference, "--save-reference", save]
    assert f"--save-reference: {words}" in refused(fid_command, samples, *flags)


@pytest.mark.parametrize(
    "arrays, words",
    [
        (
            dict(mu=np.zeros(64), sigma=np.eye(64)),
            "mu and its covariance: ((64,), (64, 64)) should be of 2048 features",
        ),
        (
            dict(mu=np.full(2048, np.nan), sigma=np.eye(2048)),
            "mu and its covariance: 'nan or infinity' should be finite",
        ),
        (
            dict(arr_0=np.zeros((1, 4, 4, 3), np.uint8)),
            "arr_0: [1, 4, 4, 3] should be more than one image",
        ),
        (
            dict(mu=np.zeros(2048)),
            "['mu'] should be mu and sigma, or images in arr_0",
        ),
        (
            dict(mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(7), sigma_s=np.eye(7)),
            "mu_s and its covariance: ((7,), (7, 7)) should be",
        ),
    ],
)
def test_reference_statistics_of_another_kind_are_refused(tmp_path, arrays, words):
    path = write(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError) as refusal:
        fid.read_reference("eval.reference", path, None)
    assert str(refusal.value).startswith(f"eval.reference: {path}")
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_reference_files_that_are_missing_or_damaged_are_refused(tmp_path):
    whole = write_statistics(tmp_path / "x.npz").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + b"?" + whole[middle + 1 :]
    path = tmp_path / "y.npz"
    for damaged in (None, b"", whole[:middle], flipped):
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(InputError, match="should be an .npz of statistics or images"):
            fid.read_reference("--reference", path, None)


def test_an_array_that_is_no_npz_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(InputError, match="should be an .npz of statistics or images"):
        fid.read_reference("--reference", tmp_path / "x.npz", None)
