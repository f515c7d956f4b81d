"""What judges samples: judge.py, digits.py, classifier.py and cifar10.py of benchmarks/."""

import dataclasses
import sys
from functools import cache, partial
from pathlib import Path

import cifar10
import classifier
import digits
import jax
import jax.numpy as jnp
import judge
import numpy as np
import optax
import pytest
from conftest import awaken, tiny_config
from flax import nnx

from dit import checkpoint, cli, data
from dit.metrics import frechet_distance, gaussian_of
from dit.state import make_model

pytestmark = pytest.mark.slow

HALF = "train[:50%]"
WIDTHS = (7, 11, 13)
STEPS = 80
SHADES = 5 + 25 * np.arange(10)  # of a colour that tells the class


def run(module, prog: str, *argv: str) -> None:
    """What `python benchmarks/X.py *argv` does, in this process."""
    sys.argv = [prog, *[str(a) for a in argv]]
    with cli.exit_status(prog):
        module.main()


@pytest.fixture(autouse=True)
def restore_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def write_weights(folder, **sections):
    """A folder of weights, random ones, that sample.py and the benchmarks take as a run."""
    config = tiny_config(**sections)
    model = awaken(make_model(config, jax.random.key(0)))
    names = tuple(f"class {k}" for k in range(10))
    checkpoint.save_weights(folder, model, config, names)
    return folder


def table_of(printed: str) -> dict[str, list[str]]:
    """The figures of a printed table, by the first word of their row."""
    rows = [line.split() for line in printed.splitlines() if "%" in line]
    return {row[0]: row[-4:] for row in rows}


# judge.py


def test_the_nearest_equal_brute_force():
    rng = np.random.default_rng(0)
    queries, features = rng.normal(size=(23, 5)), rng.normal(size=(29, 5))
    distances, indices = judge.nearest(queries, features, 3)
    pairs = np.linalg.norm(queries[:, None] - features[None], axis=-1)
    order = np.argsort(pairs, axis=1)[:, :3]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(distances, np.take_along_axis(pairs, order, 1), rtol=1e-4)


# digits.py


@pytest.fixture(scope="module")
def halves():
    """Images and labels of the digits that a run on a half has seen, and of the others."""
    seen = data.split_rows(HALF, 1797)
    unseen = np.setdiff1d(np.arange(1797), seen)
    records = data.open_dataset(data.Data()).records
    return [(records.images[rows], records.labels[rows]) for rows in (seen, unseen)]


def test_digits_that_were_not_seen_pass_and_copies_do_not(halves):
    (seen, seen_labels), (unseen, labels) = halves
    passing = digits.judge(unseen, labels, HALF)
    assert passing["neighbour_ratio"] == pytest.approx(1, abs=0.05)
    assert passing["near_copies"] == pytest.approx(judge.NEAR, abs=0.025)
    copies = digits.judge(seen, seen_labels, HALF)
    assert copies["neighbour_ratio"] < 0.05 and copies["near_copies"] == 1
    noise = np.random.default_rng(0).integers(0, 17, seen.shape, np.uint8)
    noisy = digits.judge(np.minimum(seen, 239) + noise, seen_labels, HALF)
    assert noisy["neighbour_ratio"] < 0.5 and noisy["near_copies"] > 0.9
    assert noisy["accuracy"] > 0.95, "which shows nothing of it"


def test_a_run_on_half_the_digits_is_judged_by_the_others(halves):
    (seen, labels), (unseen, _) = halves
    scores = digits.judge(seen, labels, HALF)
    assert 0.96 < scores["accuracy"] < 1, "of an SVC that was not fitted on them"
    assert digits.judge(seen, (labels + 1) % 10, HALF)["accuracy"] < 0.02
    a, b = (gaussian_of(digits.pixel_rows(images)) for images in (seen, unseen))
    assert scores["frechet_distance"] == pytest.approx(frechet_distance(a, b), rel=0.02)
    real = digits.figures_of_real_digits(1000, HALF)
    assert real["frechet_distance"] == pytest.approx(scores["frechet_distance"], rel=0.02)


def test_the_frechet_distance_of_real_digits_falls_with_their_number():
    few, many = (digits.figures_of_real_digits(n, "train")["frechet_distance"] for n in (500, 2000))
    assert few / many == pytest.approx(4, rel=0.15)
    whole, half = (digits.figures_of_real_digits(1000, split) for split in ("train", HALF))
    assert whole["frechet_distance"] < 0.7 * half["frechet_distance"]
    assert 0.96 < half["accuracy"] < whole["accuracy"] < 1


def test_digits_prints_the_figures_of_what_sample_draws(tmp_path, capsys):
    folder = write_weights(tmp_path / "half", data=dict(split=HALF))
    run(digits, "digits.py", folder, "--steps", "2", "--seed", "3")
    printed = capsys.readouterr().out
    assert "judged by 899 real digits" in printed
    images, labels = judge.draw(digits.sample.Sample(str(folder), per_class=100, steps=2, seed=3))
    assert len(images) == 1000
    scores = digits.judge(images, labels, HALF)
    real = digits.figures_of_real_digits(1000, HALF)
    for row, expected in [("1,000", scores), ("real", real)]:
        shares = [f"{expected[name]:.1%}" for name in ("accuracy", "near_copies")]
        assert [table_of(printed)[row][i] for i in (0, 3)] == shares
        assert table_of(printed)[row][1] == f"{expected['frechet_distance']:.3f}"


def test_what_is_no_run_on_digits_or_leaves_none_to_judge_is_refused(tmp_path, refused):
    folder = write_weights(tmp_path / "most", data=dict(split="train[:90%]"))
    words = "data.split: 'train[:90%]' should be train, or leave 300 digits to judge by"
    assert words in refused(partial(run, digits), "digits.py", folder)
    other = write_weights(tmp_path / "other", data=dict(name="mnist"))
    assert "should be a run on the digits" in refused(partial(run, digits), "digits.py", other)


# classifier.py


def coloured(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy uint8 images `[N, 8, 8, 3]`, whose colour tells their labels."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 10).astype(np.int32)
    colours = np.stack([SHADES[labels], 255 - SHADES[labels], SHADES[labels * 3 % 10]], axis=-1)
    noise = rng.integers(-9, 10, (count, 8, 8, 3))
    return (colours[:, None, None] + noise).clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def trained() -> classifier.Classifier:
    return classifier.train(*coloured(1000), steps=STEPS, widths=WIDTHS)


def test_squares_hold_each_pixel_once_and_pool_as_flax_does():
    x = jax.random.normal(jax.random.key(0), (2, 6, 10, 3))
    pooled = classifier.halve(x)
    np.testing.assert_array_equal(pooled, nnx.max_pool(x, (2, 2), strides=(2, 2)))
    np.testing.assert_array_equal(np.sort(classifier.squares(x).ravel()), np.sort(x.ravel()))


def test_training_images_are_windows_of_themselves():
    ramp = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1) + np.zeros((31, 1, 1, 3), np.uint8)
    seen = np.asarray(classifier.augment(jnp.asarray(ramp), jax.random.key(0)))
    value = np.round((seen[..., 0] + 1) * 127.5).astype(int)  # 128 is the grey outside
    centre = value[:, 4, 4]
    slopes = value[:, 4, 4] - value[:, 4, 3]
    assert set(slopes) == {1, -1}, "some mirrored and some not"
    rows, columns = centre // 8, centre % 8
    assert set(rows) == set(range(1, 8)), "moved by up to three rows each way"
    assert len(set(columns)) > 4
    inside = value != 128
    assert (inside.sum(axis=(1, 2)) >= 25).all() and not inside.all()


def test_the_same_images_give_the_same_classifier(trained):
    again = classifier.train(*coloured(1000), steps=STEPS, widths=WIDTHS)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, trained, again)) == 0
    images, labels = coloured(503, seed=1)
    _, predicted = classifier.classify(trained, images)
    assert (predicted == labels).mean() > 0.9


def test_an_image_is_classified_the_same_whatever_stands_beside_it(trained):
    images, _ = coloured(503, seed=1)
    features, predicted = classifier.classify(trained, images)
    assert features.shape == (503, WIDTHS[-1]) and predicted.shape == (503,)
    few, _ = classifier.classify(trained, images[[7, 501]])
    np.testing.assert_allclose(few, features[[7, 501]], rtol=1e-4, atol=1e-5)
    logits = trained.linear(features)
    np.testing.assert_array_equal(np.argmax(logits, axis=1), predicted)


def test_a_classifier_is_trained_once_for_the_same_images(tmp_path, monkeypatch, trained):
    calls = []

    def train(images, labels):
        calls.append(len(images))
        return trained

    monkeypatch.setattr(cli, "CACHE", tmp_path)
    monkeypatch.setattr(classifier, "WIDTHS", WIDTHS)
    monkeypatch.setattr(classifier, "train", train)
    images, labels = coloured(20)
    first, second = (classifier.load_or_train(images, labels) for _ in range(2))
    assert calls == [20]
    for other in (first, second):
        assert optax.tree.norm(jax.tree.map(jnp.subtract, trained, other)) == 0
    classifier.load_or_train(images[:19], labels[:19])
    classifier.load_or_train(images, labels[::-1].copy())
    assert calls == [20, 19, 20]


# cifar10.py


@pytest.fixture
def cifar(monkeypatch, trained):
    """Coloured squares in place of CIFAR-10: 500 to train on, 300 to test with."""
    monkeypatch.setattr(cifar10, "load_or_train", lambda images, labels: trained)
    images, labels = coloured(500)
    seen = {"train": images, HALF: images[:250]}
    made = cache(
        lambda split: cifar10.make_judge(images, labels, *coloured(300, seed=1), seen[split])
    )
    monkeypatch.setattr(cifar10, "real_images", made)
    return made("train")


def test_test_images_have_the_figures_that_stand_beside_the_samples(cifar):
    images, labels = coloured(300, seed=1)
    scores = cifar10.judge(images, labels, "train")
    expected = cifar10.figures_of_test_images(300, "train")
    assert scores["accuracy"] == expected["accuracy"] == cifar.accuracy > 0.9
    for name in ("frechet_distance", "neighbour_ratio"):
        assert scores[name] == pytest.approx(expected[name], rel=1e-3)
    assert scores["near_copies"] == pytest.approx(judge.NEAR, abs=0.005)
    assert (
        cifar10.figures_of_test_images(30, "train")["frechet_distance"] > scores["frechet_distance"]
    )


def test_training_images_are_copies_and_noise_is_far(cifar):
    images, labels = coloured(500)
    copies = cifar10.judge(images, labels, "train")
    assert copies["neighbour_ratio"] < 0.05 and copies["near_copies"] > 0.95
    assert copies["frechet_distance"] == pytest.approx(0, abs=1e-3)
    half = cifar10.judge(images, labels, HALF)  # of a model that has seen half of them
    assert 0.4 < half["near_copies"] < 0.6
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    far = cifar10.judge(noise, labels, "train")
    assert far["neighbour_ratio"] > 2 and far["near_copies"] < 0.05
    assert far["frechet_distance"] > 1 and far["accuracy"] < 0.3


def test_cifar10_prints_figures_and_draws_neighbours(tmp_path, capsys, cifar, monkeypatch):
    seen = {}
    monkeypatch.setattr(cifar10, "save_grid", lambda path, images, names: seen.update(vars()))
    monkeypatch.setattr(cifar10, "check", lambda options, config: None)
    folder = write_weights(tmp_path / "run", data=dict(name="cifar10", channels=3))
    run(cifar10, "cifar10.py", folder, "--steps", "2", "--per-class", "3", "--out", "x.png")
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"accuracy of the classifier on real test images: {cifar.accuracy:.1%}"
    )
    images, labels = judge.draw(cifar10.sample.Sample(str(folder), per_class=3, steps=2))
    assert len(images) == 30
    expected = cifar10.judge(images, labels, "train")
    assert table_of(printed)["30"][1] == f"{expected['frechet_distance']:.3f}"
    assert table_of(printed)["real"][0] == f"{cifar.accuracy:.1%}"

    rows = seen["images"].reshape(cifar10.SHOWN, 1 + cifar10.NEIGHBOURS, 8, 8, 3)
    assert {row[0].tobytes() for row in rows} <= {image.tobytes() for image in images}
    training = {image.tobytes() for image in cifar.images}
    assert {image.tobytes() for row in rows for image in row[1:]} <= training
    ratios = [float(name) for name in seen["names"]]
    assert ratios == sorted(ratios) and seen["path"] == str(folder / "x.png")


def test_fid_is_of_50000_samples_by_the_protocol_with_three_seeds(capsys, monkeypatch):
    drawn, scored = [], []

    def run_fid(request):
        scored.append(request)
        if request.save_reference:
            Path(request.save_reference).touch()
        return {"fid": float(len(scored))}

    monkeypatch.setattr(cifar10.sample, "run", drawn.append)
    monkeypatch.setattr(cifar10, "run_fid", run_fid)
    options = cifar10.Options("run", seed=5, guidance=1.5, inception="weights")
    config = tiny_config(objective=dict(num_steps=1000), optim=dict(ema_decay=(0.99, 0.9)))
    cifar10.score_by_protocol(options, config)
    assert [(request.ema_decay, request.seed) for request in drawn] == [
        (decay, seed) for decay in (0.99, 0.9) for seed in (5, 6, 7)
    ]
    for request in drawn:
        assert (request.num_samples, request.guidance) == (50_000, 1.5)
        assert (request.sampler, request.steps) == ("ddpm", 250)
    assert [request.reference for request in scored[1:]] == [scored[0].save_reference] * 5
    assert scored[0].reference == "cifar10" and scored[0].split == "train"
    printed = capsys.readouterr().out
    assert "50,000 samples by ddpm in 250 steps, guidance 1.5, random labels" in printed
    assert "average of decay 0.99, 3 seeds: FID 2.00, from 1.00 to 3.00" in printed
    assert "average of decay 0.9, 3 seeds: FID 5.00, from 4.00 to 6.00" in printed

    for weights, words in [(dict(ema_decay=0.9), "decay 0.9,"), (dict(ema=False), "last weights,")]:
        drawn.clear()
        asked = dict(sampler="ddim", steps=7, labels="balanced") | weights
        cifar10.score_by_protocol(dataclasses.replace(options, **asked), config)
        assert [(request.sampler, request.steps) for request in drawn] == [("ddim", 7)] * 3
        printed = capsys.readouterr().out
        assert "ddim in 7 steps, guidance 1.5, balanced labels" in printed
        assert words in printed and printed.count("3 seeds") == 1


@pytest.mark.parametrize(
    "sections, argv, words",
    [
        (dict(name="digits"), [], "should be a run on cifar10 at data.image_size 32"),
        (dict(name="cifar10"), [], "should be a run on cifar10 at data.image_size 32"),
        (
            dict(name="cifar10", image_size=32),
            ["--out", "x.npz"],
            "x.npz' should be a .png file",
        ),
        (
            dict(name="cifar10", image_size=32),
            ["--inception", "nowhere.pth"],
            "nowhere.pth",
        ),
    ],
)
def test_what_cifar10_cannot_judge_is_refused_first(
    tmp_path, refused, monkeypatch, sections, argv, words
):
    monkeypatch.setattr(cifar10, "real_images", lambda: pytest.fail("trains before it refuses"))
    folder = write_weights(tmp_path / "run", data=sections)
    assert words in refused(partial(run, cifar10), "cifar10.py", folder, *argv)
