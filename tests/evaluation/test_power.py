"""Variances of samples over those of real images."""

import numpy as np
import pytest

from nestdiff_core.evaluation.power import component_ratios, frequency_power

SIDE = 6


def test_each_pattern_is_at_its_frequency() -> None:
    """Brightness at 0, a chequerboard at the last, each with all of the variance (of SIDE^2 pixels)."""
    levels = np.random.default_rng(0).integers(0, 256, (200, 1, 1, 1))
    flat = np.broadcast_to(levels, (200, SIDE, SIDE, 3)).astype(np.uint8)
    board = np.where(np.indices((SIDE, SIDE)).sum(0)[None, :, :, None] % 2, flat, 255 - flat).astype(np.uint8)
    variance = flat.astype(np.float64).var(0).mean() / 127.5**2
    power = frequency_power(flat)
    assert power[0] == pytest.approx(variance * SIDE**2, rel=1e-5)
    assert np.abs(power[1:]).max() < 1e-6
    assert frequency_power(board)[1:].argmax() + 1 == 2 * (SIDE - 1)


def test_the_power_of_all_frequencies_is_the_variance_of_the_pixels() -> None:
    images = np.random.default_rng(1).integers(0, 256, (500, SIDE, SIDE + 2, 3)).astype(np.uint8)
    power = frequency_power(images)
    sums = np.add.outer(np.arange(SIDE), np.arange(SIDE + 2))
    assert len(power) == 2 * SIDE + 1
    variance = (images / 127.5 - 1.0).var(0).mean()
    assert (power * np.bincount(sums.ravel())).sum() / sums.size == pytest.approx(variance, rel=1e-4)
    assert power == pytest.approx(np.full(len(power), variance), rel=0.2)  # white


def test_components_are_counted_from_the_largest() -> None:
    """Real variances 100, 9, 4, 1 along a turned basis; samples with 1, 1/4, 2 and 9 times these."""
    rng = np.random.default_rng(2)
    turned = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    deviations = np.array([10.0, 3.0, 2.0, 1.0])
    real = rng.normal(size=(100_000, 4)) * deviations @ turned + 7.0
    z = rng.normal(size=(100_000, 4)) * deviations * np.sqrt([1.0, 0.25, 2.0, 9.0]) @ turned
    assert component_ratios(z, real, (0.25, 0.5, 0.75, 1.0)) == pytest.approx([1.0, 0.25, 2.0, 9.0], rel=0.03)
    assert component_ratios(z, real, (0.5, 1.0)) == pytest.approx([0.625, 5.5], rel=0.03)


def test_one_number_is_its_own_component() -> None:
    rng = np.random.default_rng(3)
    real, z = rng.normal(size=(50_000, 1)), 2.0 * rng.normal(size=(50_000, 1))
    assert component_ratios(z, real, (1.0,)) == pytest.approx([4.0], rel=0.05)
