"""The metrics against closed forms and brute force."""

import numpy as np
import pytest

from dit.metrics import (
    Gaussian,
    Moments,
    frechet_distance,
    gaussian_of,
    inception_score,
    precision_recall,
)


def streamed(x: np.ndarray) -> Gaussian:
    """The Gaussian of rows that come in three batches."""
    moments = Moments()
    for batch in np.array_split(x, 3):
        moments.add(batch)
    return moments.gaussian()


def test_streamed_moments_equal_numpys():
    x = 100 + np.random.default_rng(0).normal(size=(101, 7)).astype(np.float32)
    for gaussian in (streamed(x), gaussian_of(x)):
        np.testing.assert_allclose(gaussian.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-12)
        covariance = np.cov(x.astype(np.float64), rowvar=False)
        np.testing.assert_allclose(gaussian.covariance, covariance, atol=1e-9)


def test_frechet_distance_equals_its_closed_form_where_covariances_commute():
    """sum (m1 - m2)^2 + (sqrt s1 - sqrt s2)^2"""
    rng = np.random.default_rng(0)
    m1, m2 = rng.normal(size=(2, 5))
    s1, s2 = rng.uniform(0.1, 2, (2, 5))
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    a = Gaussian(m1, rotation * s1 @ rotation.T)
    b = Gaussian(m2, rotation * s2 @ rotation.T)
    expected = np.square(m1 - m2).sum() + np.square(np.sqrt(s1) - np.sqrt(s2)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_moved_and_of_stretched_rows():
    """|shift|^2, and sum (sigma_a - sigma_b)^2, with a column that never varies, like a corner."""
    x = np.random.default_rng(0).normal(size=(500, 7)) * np.arange(7)
    shift = np.arange(7.0)
    moved = frechet_distance(gaussian_of(x), gaussian_of(x + shift))
    assert moved == pytest.approx(np.square(shift).sum())

    scale = np.array([1, 2, 1, 1, 0.5, 1, 1])
    rotated = (x - x.mean(axis=0)) @ np.linalg.eigh(np.cov(x, rowvar=False))[1]  # uncorrelated
    stretched = frechet_distance(gaussian_of(rotated), gaussian_of(rotated * scale))
    deviation = rotated.std(axis=0, ddof=1)
    assert stretched == pytest.approx(np.square(deviation * (scale - 1)).sum())


def test_frechet_distance_is_symmetric_and_zero_on_equals():
    rng = np.random.default_rng(0)
    a = streamed(rng.normal(size=(11, 5)))
    b = streamed(rng.normal(size=(3, 5)))  # singular
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-8)
    assert frechet_distance(a, b) > 0.1
    assert abs(frechet_distance(a, a)) < 1e-10
    assert abs(frechet_distance(b, b)) < 1e-7


def test_inception_score_is_1_for_one_answer_and_k_for_k_sure_ones():
    one = np.random.default_rng(0).normal(size=(1, 13)).repeat(11, axis=0)
    assert inception_score(one) == pytest.approx(1)
    sure = 50 * np.eye(13)
    assert inception_score(sure[np.arange(28) % 7]) == pytest.approx(7, rel=1e-6)
    splits = np.concatenate([sure[np.arange(6) % 3], sure[np.arange(6) % 2]])
    assert inception_score(splits, split=6) == pytest.approx((3 + 2) / 2, rel=1e-6)


def share_inside(queries: np.ndarray, centres: np.ndarray, neighbours: int) -> float:
    """The share of queries within the radius of any centre, one pair at a time."""
    radii = []
    for centre in centres:
        distances = sorted(np.linalg.norm(centre - other) for other in centres)
        radii.append(distances[neighbours])  # [0] is itself
    pairs = list(zip(centres, radii, strict=True))
    return np.mean([any(np.linalg.norm(q - c) <= r for c, r in pairs) for q in queries])


def test_precision_and_recall_equal_brute_force():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(47, 5)).astype(np.float32)
    samples = (1 + 0.9 * rng.normal(size=(43, 5))).astype(np.float32)
    precision, recall = precision_recall(samples, real)
    assert precision == pytest.approx(share_inside(samples, real, 3))
    assert recall == pytest.approx(share_inside(real, samples, 3))
    assert precision != recall
    assert {0, 1}.isdisjoint((precision, recall))
    for other in (2, 4):  # the number of neighbours matters here
        of_others = share_inside(samples, real, other), share_inside(real, samples, other)
        assert (precision, recall) != of_others


def test_precision_and_recall_are_1_on_equals_and_0_far_apart():
    real = np.random.default_rng(0).normal(size=(47, 5)).astype(np.float32)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 100, real) == (0, 0)
