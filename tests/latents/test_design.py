"""Levels proposed from spectra: budgets are met, channels are as few as may be."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nestdiff_core.latents.capacity import capacity_nats
from nestdiff_core.latents.design import LEAST_SIGMA, noise_for, propose


@pytest.mark.parametrize(("nats", "num_dims"), [(200.0, 256), (1.0, 1000), (5000.0, 2048)])
def test_noise_is_the_inverse_of_capacity(nats: float, num_dims: int) -> None:
    """Behind the noise found for a budget, the channel tells that budget."""
    assert capacity_nats(noise_for(nats, num_dims), num_dims) == pytest.approx(nats)


def test_the_papers_top_level_is_proposed_for_its_own_budget() -> None:
    """1 x 256 numbers behind sigma .5 tell 206 nats: asked for those, with a spectrum that needs 256 channels, the
    proposal is the paper's."""
    spectrum = np.r_[np.ones(256), np.full(512, 1e-9)]
    budget = 256 / 2 * math.log(1 + 1 / 0.25)
    (top,) = propose({1: spectrum}, nats=budget, growth=2.0, variance=0.9999)
    assert (top.grid, top.channels) == (1, 256) and top.sigma == pytest.approx(0.5, rel=1e-3)


def test_channels_are_the_fewest_that_keep_the_share_and_budgets_grow() -> None:
    """Each level has its budget, from the smallest grid on; one channel fewer would keep too little."""
    rng = np.random.default_rng(0)
    spectra = {grid: np.sort(rng.gamma(0.3, size=64))[::-1] for grid in (4, 1, 2)}
    proposals = propose(spectra, nats=6.0, growth=3.0, variance=0.8)
    assert [p.grid for p in proposals] == [1, 2, 4]
    for p, budget in zip(proposals, (6.0, 18.0, 54.0), strict=True):
        shares = spectra[p.grid].cumsum() / spectra[p.grid].sum()
        assert shares[p.channels - 1] == pytest.approx(p.variance_share) and p.variance_share >= 0.8
        assert shares[p.channels - 2] < 0.8
        assert p.nats == pytest.approx(budget) and p.nats == pytest.approx(
            capacity_nats(p.sigma, p.grid**2 * p.channels)
        )


def test_a_budget_that_channels_cannot_tell_gets_more_of_them() -> None:
    """Never less noise than the least; where the spectrum ends, the level tells less than was asked."""
    steep = np.r_[1.0, np.full(63, 1e-6)]
    (wide,) = propose({1: steep}, nats=100.0, growth=1.0, variance=0.5)
    assert wide.channels == math.ceil(100 / capacity_nats(LEAST_SIGMA, 1)) and wide.nats == pytest.approx(100)
    (short,) = propose({1: np.r_[1.0, 1.0, np.zeros(9)]}, nats=100.0, growth=1.0, variance=0.5)
    assert (short.channels, short.sigma) == (2, LEAST_SIGMA) and short.nats < 100
    (rounded,) = propose({1: np.r_[1.0, 1.0, np.full(9, 1e-9)]}, nats=100.0, growth=1.0, variance=0.5)
    assert rounded.channels == 2  # no more than a basis will have
