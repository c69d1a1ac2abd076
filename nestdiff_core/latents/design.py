"""Levels proposed from measured spectra: how many channels each grid is worth, and the noise that fits a budget.

A level's condition should tell a stated number of nats. Channels are the leading components that carry a stated share
of the pooled tokens' variance; the noise then follows from the channel capacity of standardised dimensions,

    grid^2 channels / 2 log(1 + 1/sigma^2) = nats.

Budgets grow from the top level down, as the paper's sizes do (256, 512, 1024, 2048 numbers: a factor of 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from nestdiff_core.latents.basis import EIGENVALUE_FLOOR
from nestdiff_core.latents.capacity import capacity_nats

LEAST_SIGMA = 0.1  # below it a dimension tells 2.3 nats or more: more channels are the better way to tell as much


@dataclass(frozen=True)
class Proposal:
    """One level. variance_share: of the pooled tokens, in [0, 1]. nats: what z_l tells behind sigma."""

    grid: int
    channels: int
    variance_share: float
    sigma: float
    nats: float


def propose(
    eigenvalues: dict[int, Float[np.ndarray, " C"]], *, nats: float, growth: float, variance: float
) -> list[Proposal]:
    """A level for each grid, from the smallest (the top) on.

    eigenvalues: falling spectrum of the pooled tokens by grid. nats: budget of the top level; each level below has
    `growth` times as much. variance: share that the channels carry at least. A budget that these channels could not
    tell at sigma = 0.1 gets more of them, as far as the spectrum goes.
    """
    proposals, budget = [], nats
    for grid in sorted(eigenvalues):
        spectrum = np.maximum(eigenvalues[grid], 0.0)
        shares = spectrum.cumsum() / spectrum.sum()
        rank = int((spectrum > EIGENVALUE_FLOOR * spectrum[0]).sum())  # as the basis will have it
        enough = int(np.searchsorted(shares, variance)) + 1
        needed = math.ceil(budget / capacity_nats(LEAST_SIGMA, grid**2))
        channels = min(rank, max(enough, needed))
        sigma = max(noise_for(budget, grid**2 * channels), LEAST_SIGMA)
        told = capacity_nats(sigma, grid**2 * channels)
        proposals.append(Proposal(grid, channels, float(shares[channels - 1]), sigma, told))
        budget *= growth
    return proposals


def noise_for(nats: float, num_dims: int) -> float:
    """The sigma behind which `num_dims` standardised dimensions tell `nats`; the inverse of `capacity_nats`."""
    return 1.0 / math.sqrt(math.expm1(2.0 * nats / num_dims))
