"""How many nats a noisy latent can tell: what sigma_l, the condition noise, does to z_l.

Two measures. The paper reports KL(N(z_l, sigma_l^2 I) || N(0, I)): least at sigma = 1 and infinite without noise, but
blind to the spectrum. Channel capacity, 1/2 log(1 + S / sigma^2) for a channel of variance S, falls with sigma and is
the one to design with. Both are in nats; divide by log 2 for bits.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float


def kl_nats(z: Float[np.ndarray, "N ..."], sigma: float) -> float:
    """Mean over the N latents of KL(N(z, sigma^2 I) || N(0, I)), in nats per latent.

        1/2 sum_d (z_d^2 + sigma^2 - 1 - log sigma^2)

    On standardised channels that is 0.5 a dimension at sigma = 1. Infinite at sigma = 0.
    """
    if sigma == 0:
        return math.inf
    num_dims = z[0].size
    power = float(np.square(z, dtype=np.float64).sum()) / len(z)
    return 0.5 * (power + num_dims * (sigma**2 - 1 - math.log(sigma**2)))


def capacity_nats(sigma: float, num_dims: int) -> float:
    """num_dims/2 log(1 + 1/sigma^2): capacity of that many standardised dimensions behind noise sigma; inf at 0."""
    return num_dims * spectrum_nats(np.ones(1), sigma)


def spectrum_nats(eigenvalues: Float[np.ndarray, " k"], sigma: float) -> float:
    """1/2 sum_i log(1 + lambda_i/sigma^2): capacity of channels with these variances behind noise sigma.

    Infinite at sigma = 0, unless no channel varies.
    """
    signal = np.asarray(eigenvalues, np.float64)
    if sigma == 0:
        return math.inf if signal.any() else 0.0
    return 0.5 * float(np.log1p(signal / sigma**2).sum())
