"""The metrics against closed forms and brute force, and the command on a network of random weights."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import TINY
from flax import nnx
from safetensors.numpy import save_file

import train

from dit import fid
from dit.config import Data, InputError
from dit.fid import Gaussian, Moments, frechet_distance, inception_score, precision_recall
from dit.images import open_npz, write_npz
from dit.inception import Inception
from dit.weights import load_inception, torch_layout


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file under the names of pytorch-fid's, with random convolutions and batch norms that do nothing."""
    path, rng = tmp_path_factory.mktemp("inception") / "inception.safetensors", np.random.default_rng(0)
    tensors = {}
    for name, tensor in jax.eval_shape(lambda: torch_layout(Inception(rngs=nnx.Rngs(0)))).items():
        if name.endswith(".conv.bias"):
            tensors |= {name.replace("conv.bias", f"bn.{part}"): np.full(tensor.shape, value, np.float32)
                        for part, value in dict(weight=1, bias=0, running_mean=0, running_var=1).items()}
        else:
            tensors[name] = rng.normal(size=tensor.shape).astype(np.float32) * (2 / np.prod(tensor.shape[1:])) ** 0.5
    save_file(tensors, path)
    return path


def moments(x: np.ndarray) -> Gaussian:
    found = Moments()
    for part in np.array_split(x, 3):
        found.add(part)
    return found.gaussian()


def test_streamed_moments_equal_numpys():
    x = 100 + np.random.default_rng(0).normal(size=(101, 7)).astype(np.float32)
    found = moments(x)
    np.testing.assert_allclose(found.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.astype(np.float64), rowvar=False), atol=1e-9)


def test_frechet_distance_equals_its_closed_form_is_symmetric_and_zero_on_equals():
    rng = np.random.default_rng(0)
    m1, m2, s1, s2 = rng.normal(size=5), rng.normal(size=5), rng.uniform(0.1, 2, 5), rng.uniform(0.1, 2, 5)
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]  # covariances that commute: sum (m1 - m2)^2 + (sqrt s1 - sqrt s2)^2
    a, b = (Gaussian(m, rotation * s @ rotation.T) for m, s in ((m1, s1), (m2, s2)))
    assert frechet_distance(a, b) == pytest.approx(np.square(m1 - m2).sum() + np.square(np.sqrt(s1) - np.sqrt(s2)).sum(), rel=1e-10)
    c, d = moments(rng.normal(size=(11, 5))), moments(rng.normal(size=(3, 5)))  # that do not, one of them singular
    assert frechet_distance(c, d) == pytest.approx(frechet_distance(d, c), rel=1e-8) and frechet_distance(c, d) > 0.1
    assert abs(frechet_distance(c, c)) < 1e-10 and abs(frechet_distance(d, d)) < 1e-7


def test_inception_score_is_1_for_one_answer_and_k_for_k_sure_ones():
    assert inception_score(np.random.default_rng(0).normal(size=(1, 13)).repeat(11, axis=0)) == pytest.approx(1)
    assert inception_score(50 * np.eye(13)[np.arange(28) % 7]) == pytest.approx(7, rel=1e-6)
    two = np.concatenate([50 * np.eye(13)[np.arange(6) % 3], 50 * np.eye(13)[np.arange(6) % 2]])
    assert inception_score(two, split=6) == pytest.approx(2.5, rel=1e-6)


def test_precision_and_recall_equal_brute_force():
    rng = np.random.default_rng(0)
    real, samples = rng.normal(size=(47, 5)).astype(np.float32), (1 + 0.9 * rng.normal(size=(43, 5))).astype(np.float32)

    def inside(queries, centres, neighbours):
        radius = [sorted(np.linalg.norm(c - other) for other in centres)[neighbours] for c in centres]  # [0] is itself
        return np.mean([any(np.linalg.norm(q - c) <= r for c, r in zip(centres, radius)) for q in queries])

    precision, recall = precision_recall(samples, real)
    assert precision == pytest.approx(inside(samples, real, 3)) and recall == pytest.approx(inside(real, samples, 3))
    assert precision != recall and {0, 1}.isdisjoint((precision, recall))
    for other in (2, 4):  # the number of neighbours matters here
        assert (precision, recall) != (inside(samples, real, other), inside(real, samples, other))
    assert precision_recall(real, real) == (1, 1) and precision_recall(real + 100, real) == (0, 0)


def test_npz_files_are_streamed_part_by_part(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (101, 5, 5, 3), np.uint8)
    parts = [tmp_path / f"{i}.npy" for i in range(2)]
    for part, rows in zip(parts, (images[:64], images[64:])):
        np.save(part, rows)
    write_npz(tmp_path / "x.npz", parts, np.arange(101))
    arrays = np.load(tmp_path / "x.npz")
    np.testing.assert_array_equal(arrays["arr_0"], images)
    np.testing.assert_array_equal(arrays["arr_1"], np.arange(101))
    shape, batches = open_npz(tmp_path / "x.npz")
    assert shape == images.shape
    np.testing.assert_array_equal(np.concatenate(list(batches)), images)


def test_the_command_measures_samples_against_files_and_data_sets(weights, tmp_path, capsys, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images)
    flags = [str(tmp_path / "x.npz"), "--inception", str(weights)]
    fid.main([*flags, "--reference", str(tmp_path / "x.npz")])
    out = capsys.readouterr().out
    found = dict(line.split() for line in out.splitlines() if not line.startswith("warning"))
    assert "warning: 5 samples are fewer than the 2048 features" in out and found.keys() == {
        "fid", "sfid", "inception_score", "precision", "recall"}
    assert abs(float(found["fid"])) < 1e-2 and abs(float(found["sfid"])) < 1e-2 and float(found["inception_score"]) >= 1
    assert float(found["precision"]) == float(found["recall"]) == 1

    before = fid.open_dataset
    some = lambda config: dataclasses.replace(before(config), records=[before(config).records[i] for i in range(7)])  # noqa: E731
    monkeypatch.setattr(fid, "open_dataset", some)
    network = load_inception(weights)
    reference = fid.open_reference("digits", "train", 8, network, str(tmp_path / "digits.npz"))
    expected = fid.Activations()
    expected.add(jax.jit(lambda m, x: m(x))(network, np.stack([record["image"] for record in some(Data()).records])))
    np.testing.assert_allclose(reference.pool.mean, expected.pool.gaussian().mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reference.features, expected.kept[0], rtol=1e-3, atol=1e-4)
    saved = fid.read_reference(tmp_path / "digits.npz", None)
    np.testing.assert_array_equal(saved.pool.covariance, reference.pool.covariance)
    np.testing.assert_array_equal(saved.spatial.covariance, reference.spatial.covariance)
    assert saved.features is None and saved.spatial.mean.shape == (2023,)
    statistics = np.load(tmp_path / "digits.npz")
    np.savez(tmp_path / "pytorch_fid.npz", mu=statistics["mu"], sigma=statistics["sigma"])
    assert fid.read_reference(tmp_path / "pytorch_fid.npz", None).spatial is None


def test_training_reports_the_scores_of_the_average(weights, tmp_path):
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    train.main([*TINY, "--workdir", str(tmp_path / "run"), "--train.steps", "2", "--eval.every", "2", "--eval.inception", str(weights),
                "--eval.num-samples", "19", "--eval.batch-size", "8", "--eval.reference", str(tmp_path / "reference.npz")])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert ["fid" in row for row in rows] == [False, True] and np.isfinite(rows[1]["fid"])


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("arrays, words", [
    (dict(images=np.zeros((3, 4, 4, 3), np.uint8)), "should be an .npz with `arr_0`"),
    (dict(arr_0=np.zeros((3, 4, 4, 3))), "arr_0: 'float64 [3, 4, 4, 3]' should be uint8 images [N, H, W, 1 or 3]"),
    (dict(arr_0=np.zeros((3, 4, 4, 4), np.uint8)), "arr_0: 'uint8 [3, 4, 4, 4]' should be uint8 images"),
    (dict(arr_0=np.zeros((1, 4, 4, 3), np.uint8)), "arr_0: [1, 4, 4, 3] should be more than one image"),
    (dict(arr_0=np.zeros((3, 0, 0, 3), np.uint8)), "arr_0: 'uint8 [3, 0, 0, 3]' should be uint8 images"),
])
def test_samples_that_cannot_be_are_refused(refused, tmp_path, arrays, words):
    flags = ["--reference", "digits", "--inception", "x.pth"]
    assert words in refused(fid.main, write(tmp_path / "x.npz", **arrays), *flags)
    (tmp_path / "y.npz").write_bytes(b"PK")
    assert "should be an .npz with `arr_0`" in refused(fid.main, tmp_path / "y.npz", *flags)
    given = ["--inception", "x.pth", "--save-reference", tmp_path / "s.npz"]
    assert "--save-reference: " in refused(fid.main, write(tmp_path / "v.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8)), "--reference",
                                           "x.npz", *given)
    right = write(tmp_path / "z.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    assert "x.pth: should be a file of weights" in refused(fid.main, right, *flags)


@pytest.mark.parametrize("arrays, words", [
    (dict(mu=np.zeros(64), sigma=np.eye(64)), "mu and its covariance: ((64,), (64, 64)) should be of 2048 features"),
    (dict(mu=np.full(2048, np.nan), sigma=np.eye(2048)), "should be finite"),
    (dict(arr_0=np.zeros((1, 4, 4, 3), np.uint8)), "arr_0: [1, 4, 4, 3] should be more than one image"),
    (dict(mu=np.zeros(2048)), "['mu'] should be mu and sigma, or images in arr_0"),
    (dict(mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(7), sigma_s=np.eye(7)), "mu_s and its covariance: ((7,), (7, 7)) should be"),
])
def test_reference_statistics_of_another_kind_are_refused(tmp_path, arrays, words):
    with pytest.raises(InputError) as refusal:
        fid.read_reference(write(tmp_path / "x.npz", **arrays), None)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    whole = (tmp_path / "x.npz").read_bytes()
    for damaged in (None, whole[:len(whole) // 2], whole[:len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1:]):
        (tmp_path / "y.npz").unlink(missing_ok=True)
        if damaged:
            (tmp_path / "y.npz").write_bytes(damaged)
        with pytest.raises(InputError, match="should be"):
            fid.read_reference(tmp_path / "y.npz", None)
