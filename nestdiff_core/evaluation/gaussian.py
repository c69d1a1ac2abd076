"""Gaussians fitted to features, the Frechet distance of two, and what it tends to with ever more images.

    d^2 = |mean_a - mean_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))                          (arXiv 1706.08500)

The last trace is the sum of the roots of the eigenvalues of R S_a R, R being the symmetric root of S_b: a symmetric
matrix, so that nothing complex appears however singular the covariances are.

The distance of n images is larger than that of the distributions, by a / n + b / n^2 + ...; fitted over parts of a set
against 1 / n, the value at 0 is the distance of ever more images (arXiv 1911.07023, with a line over larger numbers of
images a dimension; with fewer, the line bends, and misses by a tenth to two thirds of what it corrects).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from nestdiff_core.errors import NumericsError
from nestdiff_core.latents.moments import Moments, merge

PARTS = 12  # random parts that a set is divided into: divisible by most small numbers
LEAST_SIZES = 4  # points of the fit of a parabola
_ROUNDING = 1e-6  # of the largest eigenvalue: below it, a negative one is rounding


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance (with 1 / (count - 1)) of `count` images' features; None: of an unknown number."""

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]
    count: int | None = None

    @classmethod
    def of(cls, moments: Moments) -> Gaussian:
        """The Gaussian of two images or more."""
        return cls(moments.mean, moments.scatter / (moments.count - 1), moments.count)

    @property
    def dimension(self) -> int:
        return len(self.mean)

    @cached_property
    def root(self) -> Float[np.ndarray, "D D"]:
        """The symmetric root of the covariance. Raises NumericsError where the matrix is none."""
        if not (np.isfinite(self.covariance).all() and np.isfinite(self.mean).all()):
            raise _no_covariance("numbers that are not finite")
        if not np.allclose(
            self.covariance, self.covariance.T, rtol=1e-5, atol=1e-8 * float(np.abs(self.covariance).max())
        ):
            raise _no_covariance("a matrix that is not symmetric")
        values, vectors = np.linalg.eigh(self.covariance)
        if values[0] < -_ROUNDING * max(values[-1], 0.0):
            raise _no_covariance(f"an eigenvalue of {values[0]:g}")
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared, as everyone reports it; symmetric. The root of `b` is computed once, so let it be the reference.

    Raises NumericsError for what is no covariance: of `b` at once, of `a` where the distance shows it.
    """
    if a.dimension != b.dimension:
        raise ValueError(f"Gaussians in {a.dimension} and {b.dimension} dimensions")
    inner = b.root @ a.covariance @ b.root
    offset = a.mean - b.mean
    if not (np.isfinite(inner).all() and np.isfinite(offset).all()):  # eigenvalues of what is not would be numbers
        raise _no_covariance("numbers that are not finite")
    values = np.linalg.eigvalsh((inner + inner.T) / 2)
    if values[0] < -_ROUNDING * max(values[-1], 0.0):
        raise _no_covariance(f"an eigenvalue of {values[0]:g}")
    shared = np.sqrt(values.clip(0)).sum()
    return float(offset @ offset + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared)


@dataclass(frozen=True)
class Limit:
    """The distance of ever more images: the fit's value at 1 / n = 0, its standard error, and what was fitted.

    sizes: images in a part; distances: the mean over all parts of that size.
    """

    value: float
    standard_error: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def limit(parts: Sequence[Moments], reference: Gaussian) -> Limit | None:
    """Fit the distance to `reference` against 1 / n, over `PARTS` random parts of a set and what they add up to.

    Only sizes of at least as many images as there are dimensions count. None where fewer than `LEAST_SIZES` of them
    are left, that is with fewer than four images a dimension. The reference's own number of images stays what it
    is. The standard error is that of the mean over the smallest parts; what the fit leaves out it does not contain.
    """
    mean = sum(part.count for part in parts) / len(parts)
    joined = [m for m in range(1, len(parts) + 1) if len(parts) % m == 0 and m * mean >= reference.dimension]
    if len(joined) < LEAST_SIZES:
        return None
    sizes, means, error = [], [], 0.0
    for m in joined:
        groups = [functools.reduce(merge, parts[i : i + m]) for i in range(0, len(parts), m)]
        distances = [frechet_distance(Gaussian.of(group), reference) for group in groups]
        if not sizes:
            error = float(np.std(distances, ddof=1) / np.sqrt(len(distances)))
        sizes.append(sum(group.count for group in groups) / len(groups))
        means.append(float(np.mean(distances)))
    value = float(np.polyfit(sizes[-1] / np.array(sizes), means, 2)[-1])
    return Limit(value, error, tuple(round(size) for size in sizes), tuple(means))


def random_parts(num: int, seed: int) -> np.ndarray:
    """Which of `PARTS` equally large parts (to one) each of `num` images belongs to, int (num,)."""
    return np.random.default_rng(seed).permutation(num) % PARTS


def _no_covariance(found: str) -> NumericsError:
    return NumericsError(
        "The moments of a set of images cannot be compared",
        stage="evaluation",
        key="covariance",
        expected="a symmetric matrix without negative eigenvalues",
        found=found,
        fix="Look at the features, or at the file that the moments came from.",
    )
