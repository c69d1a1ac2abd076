"""Where samples vary too little or too much: their variance over that of real ones, by spatial frequency and by
principal component.

A distance says how far, these say in what. A model may be right in all of it and still draw nothing that is an object:
they are second moments only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8


def frequency_power(images: UInt8[np.ndarray, "N H W C"]) -> Float[np.ndarray, " K"]:
    """Mean square of the coefficients of the images less their mean, in the orthonormal cosine transform, by the sum
    of both frequencies 0, 1, ..., H + W - 2: 0 is brightness, the last one a chequerboard. Pixels in [-1, 1]."""
    from scipy.fft import dctn  # takes half a second to import

    x = images.astype(np.float32) / 127.5 - 1.0
    coefficients = np.asarray(dctn(x - x.mean(0), axes=(1, 2), norm="ortho"))
    power = (coefficients**2).mean((0, 3), dtype=np.float64)
    sums = np.add.outer(*map(np.arange, power.shape))
    return np.bincount(sums.ravel(), power.ravel()) / np.bincount(sums.ravel())


def component_ratios(
    z: Float[np.ndarray, "N D"], real: Float[np.ndarray, "M D"], shares: Sequence[float]
) -> Float[np.ndarray, " K"]:
    """Mean of the ratios of z's variance to the real one along the real latents' principal components: the ratio of
    each group of components, from the largest to the smallest, which end at these shares of their number (0 to 1).

    M should be many times D: along the smallest components of few latents any others vary more.
    """
    variances, vectors = np.linalg.eigh(np.cov(real, rowvar=False).reshape(real.shape[1], -1))
    ratios = ((z - z.mean(0)) @ vectors).var(0)[::-1] / variances[::-1]
    ends = np.round(np.asarray(shares) * len(ratios)).astype(int)
    return np.array([part.mean() for part in np.split(ratios, ends)[: len(ends)]])
