"""The Frechet distance of two Gaussians and its limit, against closed forms, scipy and torch-fidelity."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from torch_fidelity.metric_fid import fid_statistics_to_metric

from nestdiff_core.errors import NumericsError
from nestdiff_core.evaluation.gaussian import PARTS, Gaussian, Limit, frechet_distance, limit, random_parts
from nestdiff_core.latents.moments import Moments


def random_gaussian(dimension: int, seed: int, rank: int | None = None) -> Gaussian:
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(dimension, rank or dimension)) / np.sqrt(dimension)
    return Gaussian(rng.normal(size=dimension), factor @ factor.T, 1000)


@pytest.mark.parametrize(("dimension", "rank"), [(1, None), (8, None), (64, None), (64, 20)])
def test_it_is_what_scipy_and_torch_fidelity_say(dimension: int, rank: int | None) -> None:
    """Of stored moments, singular ones too: both agree within 1e-5 of the traces."""
    a, b = random_gaussian(dimension, 0, rank), random_gaussian(dimension, 1, rank)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    offset = a.mean - b.mean
    exact = float(offset @ offset + np.trace(a.covariance + b.covariance - 2 * np.real(root)))
    stored = [{"mu": g.mean, "sigma": g.covariance} for g in (a, b)]
    theirs = fid_statistics_to_metric(*stored, verbose=False)["frechet_inception_distance"]
    scale = 1e-5 * float(np.trace(a.covariance + b.covariance))
    assert frechet_distance(a, b) == pytest.approx(exact, abs=scale)
    assert frechet_distance(a, b) == pytest.approx(theirs, abs=scale)
    assert frechet_distance(b, a) == pytest.approx(exact, abs=scale)


def test_commuting_covariances_have_a_closed_form() -> None:
    """Rotated alike, the distance is |offset|^2 + sum (sqrt(v) - sqrt(w))^2, zeros among the variances included."""
    rotation = scipy.stats.ortho_group.rvs(6, random_state=0)
    v, w = np.array([4.0, 1, 9, 0, 0, 2]), np.array([1.0, 1, 4, 0, 1, 2])
    a = Gaussian(np.zeros(6), rotation @ np.diag(v) @ rotation.T)
    b = Gaussian(np.full(6, 0.5), rotation @ np.diag(w) @ rotation.T)
    assert frechet_distance(a, b) == pytest.approx(6 * 0.25 + np.sum((np.sqrt(v) - np.sqrt(w)) ** 2), abs=1e-6)


@pytest.mark.parametrize(
    ("covariance", "words"),
    [
        (np.array([[1.0, 0.0], [0.5, 1.0]]), "symmetric"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "eigenvalue of -1"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "not finite"),
    ],
    ids=["not symmetric", "indefinite", "not finite"],
)
def test_what_is_no_covariance_is_refused(covariance: np.ndarray, words: str) -> None:
    """A reference is refused with what is wrong: never a number from the real part of a complex root."""
    with pytest.raises(NumericsError, match=words):
        frechet_distance(Gaussian(np.zeros(2), np.eye(2)), Gaussian(np.zeros(2), covariance))


def test_an_indefinite_sample_covariance_is_refused_too() -> None:
    """The matrix between the roots then has a negative eigenvalue, or none that is a number."""
    good = Gaussian(np.zeros(2), np.eye(2))
    for covariance in (np.array([[1.0, 2.0], [2.0, 1.0]]), np.full((2, 2), np.nan)):
        with pytest.raises(NumericsError, match="cannot be compared"):
            frechet_distance(Gaussian(np.zeros(2), covariance), good)


# --- the limit ----------------------------------------------------------------------------------------------------


def drawn(num: int, dimension: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> list[Moments]:
    values = np.random.default_rng(seed).normal(size=(num, dimension)) * scale + shift
    part = random_parts(num, seed)
    return [Moments.of(values[part == k]) for k in range(PARTS)]


@pytest.mark.parametrize(("num", "shift", "scale"), [(200, 0.1, 1.5), (500, 0.1, 1.5), (500, 0.0, 1.0)])
def test_the_limit_is_nearer_to_the_truth_than_the_number(num: int, shift: float, scale: float) -> None:
    """Draws of N(shift, scale^2 I) in 50 dimensions, at a known distance from N(0, I), none in the last case: over 20
    repetitions the limit's mean error is below a sixth of the plain number's, and it scatters about as it says."""
    dimension = 50
    reference, truth = Gaussian(np.zeros(dimension), np.eye(dimension)), dimension * (shift**2 + (scale - 1) ** 2)
    found = [limit(drawn(num, dimension, seed, shift=shift, scale=scale), reference) for seed in range(20)]
    limits = np.array([f.value for f in found if f is not None])
    bias = np.mean([f.distances[-1] for f in found if f is not None]) - truth
    assert len(limits) == 20 and bias > 0
    assert abs(limits.mean() - truth) < bias / 6
    said = np.mean([f.standard_error for f in found if f is not None])
    assert 0.4 < limits.std() / said < 2.5


def test_a_parabola_is_met_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances of 3 + 100 / n + 50 / n^2 at every size have the limit 3 and no error."""
    monkeypatch.setattr(
        "nestdiff_core.evaluation.gaussian.frechet_distance",
        lambda a, _: 3.0 + 100.0 / (a.count or 0) + 50.0 / (a.count or 0) ** 2,
    )
    parts = [Moments(10, np.zeros(4), np.eye(4)) for _ in range(PARTS)]
    found = limit(parts, Gaussian(np.zeros(4), np.eye(4)))
    assert found is not None
    assert found.value == pytest.approx(3.0) and found.standard_error == pytest.approx(0.0)
    assert found.sizes == (10, 20, 30, 40, 60, 120)


def test_sizes_below_the_dimension_are_not_fitted() -> None:
    """With 7 images a dimension the sizes begin at the dimension; with 3 there is no limit at all."""
    reference = Gaussian(np.zeros(30), np.eye(30))
    found = limit(drawn(200, 30, 0), reference)
    assert isinstance(found, Limit) and min(found.sizes) >= 30
    assert limit(drawn(90, 30, 0), reference) is None
