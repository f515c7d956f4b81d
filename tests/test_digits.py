import numpy as np
import pytest
from digits import frechet_distance


def test_frechet_distance_has_its_closed_form():
    """|shift|^2 + sum of (sigma_a - sigma_b)^2 where the covariances commute; zero on equal sets, symmetric, and singular ones serve."""
    x = np.random.default_rng(0).normal(size=(500, 7)) * [0, 1, 2, 3, 4, 5, 6]  # the first, like a corner pixel, never varies
    shift, scale = np.arange(7.0), np.array([1, 2, 1, 1, 0.5, 1, 1])
    whitened = np.linalg.eigh(np.cov(x, rowvar=False))[1]
    rotated = (x - x.mean(0)) @ whitened
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(x, x + shift) == pytest.approx(np.square(shift).sum())
    deviation = rotated.std(axis=0, ddof=1)
    assert frechet_distance(rotated, rotated * scale) == pytest.approx(np.square(deviation * (scale - 1)).sum())
    assert frechet_distance(x, x * scale + shift) == pytest.approx(frechet_distance(x * scale + shift, x))
