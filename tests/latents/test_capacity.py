"""Capacity: the closed forms, and what Monte Carlo says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from nestdiff_core.latents.capacity import capacity_nats, kl_nats, spectrum_nats


def standardised(n: int = 4000, shape: tuple[int, ...] = (3, 2, 2)) -> np.ndarray:
    z = np.random.default_rng(0).standard_normal((n, *shape))
    return (z - z.mean(axis=0)) / z.std(axis=0)


@pytest.mark.parametrize(("sigma", "nats"), [(1.0, 0.50), (1.5, 0.72), (0.5, 0.82)])
def test_kl_on_standardised_channels(sigma: float, nats: float) -> None:
    """0.50 nats a dimension at sigma 1, 0.72 at 1.5, 0.82 at 0.5, whatever the number of dimensions."""
    assert kl_nats(standardised(), sigma) / 12 == pytest.approx(nats, abs=0.005)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_kl_is_the_integral(sigma: float) -> None:
    """The closed form is the integral of p log p/q for single numbers."""
    z = np.array([[0.7], [-1.9]])

    def divergence(mean: float) -> float:
        p, q = stats.norm(mean, sigma), stats.norm(0, 1)
        return integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), mean - 12 * sigma, mean + 12 * sigma)[0]

    assert kl_nats(z, sigma) == pytest.approx((divergence(0.7) + divergence(-1.9)) / 2, rel=1e-6)


def test_kl_is_least_at_one() -> None:
    """On standardised channels sigma = 1 gives the least KL."""
    z = standardised()
    sigmas = np.linspace(0.5, 1.5, 101)
    assert sigmas[np.argmin([kl_nats(z, s) for s in sigmas])] == pytest.approx(1.0)


def test_no_noise_is_infinite() -> None:
    """Without noise both measures are infinite; channels without variance have no capacity at all."""
    assert kl_nats(standardised(), 0.0) == math.inf
    assert capacity_nats(0.0, 10) == math.inf
    assert spectrum_nats(np.zeros(3), 0.0) == 0.0


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0, 3.0])
def test_capacity_is_mutual_information(sigma: float) -> None:
    """For Gaussian z it is h(z + sigma eta) - h(sigma eta), per dimension."""
    expected = stats.norm(0, math.hypot(1, sigma)).entropy() - stats.norm(0, sigma).entropy()
    assert capacity_nats(sigma, 7) == pytest.approx(7 * expected)


def test_capacity_falls_with_noise_and_adds_over_dimensions() -> None:
    """More noise, less capacity; dimensions add."""
    values = [capacity_nats(s, 4) for s in (0.1, 0.5, 1.0, 2.0)]
    assert values == sorted(values, reverse=True)
    assert capacity_nats(0.5, 12) == pytest.approx(3 * capacity_nats(0.5, 4))


def test_spectrum() -> None:
    """Unit variances give `capacity_nats`; scaling signal and noise together changes nothing."""
    spectrum = np.array([4.0, 1.0, 0.01])
    assert spectrum_nats(np.ones(5), 0.7) == pytest.approx(capacity_nats(0.7, 5))
    assert spectrum_nats(spectrum, 0.5) == pytest.approx(spectrum_nats(9 * spectrum, 1.5))
    assert spectrum_nats(spectrum, 0.5) == pytest.approx(0.5 * sum(math.log(1 + v / 0.25) for v in spectrum))
