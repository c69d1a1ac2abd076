"""How much of a Frechet distance is the draw of the images: bootstrap errors.

Images are drawn again with replacement, the reference is held. Sets that have one list of images (the rungs of the
ladder) are drawn together, so that what befalls all of them alike cancels in a difference, as it does in the difference
itself. The deviation over the resamples is that over independent draws where the two distributions differ; where they
hardly do, it is too large by up to a factor of sqrt(3), never too small (tests/evaluation/test_bootstrap.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from nestdiff_core.evaluation.gaussian import Gaussian

RESAMPLES = 100  # a deviation of so many is itself uncertain by 7 %

K = TypeVar("K", bound=Hashable)


def frechet_resamples(
    sets: Mapping[K, Float[Tensor, "N _"]], reference: Gaussian, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[K, Float[np.ndarray, " R"]]:
    """The Frechet distance of each set of features to the reference, for `resamples` draws of N rows of N.

    Row i is one image in all sets. Memory and time are those of matrices of min(N, D) a side.
    """
    draws = np.random.default_rng(seed)
    num = len(next(iter(sets.values())))
    counts = [np.bincount(draws.integers(0, num, num), minlength=num) for _ in range(resamples)]
    found = {}
    for name, values in sets.items():
        centred = values.double().numpy() - reference.mean
        projected = centred @ reference.root
        found[name] = np.array([_distance(centred, projected, reference, count) for count in counts])
    return found


def deviation(values: Float[np.ndarray, " R"]) -> float:
    """The bootstrap error: the standard deviation over the resamples."""
    return float(np.std(values, ddof=1))


def _distance(
    centred: Float[np.ndarray, "N D"],
    projected: Float[np.ndarray, "N D"],
    reference: Gaussian,
    count: Int[np.ndarray, " N"],
) -> float:
    """As gaussian.frechet_distance, of the rows x - m (m, S: the reference's) of which row i is there count_i times.

    projected: the same times S^(1/2), of whose centred rows A the trace of the root is the nuclear norm, so that
    nothing of D x D has to be rooted for each resample where there are fewer images than dimensions.
    """
    there, num = count > 0, int(count.sum())
    weight = count[there][:, None].astype(np.float64)
    rows, rooted = centred[there], projected[there]
    shift = (weight * rows).sum(axis=0) / num
    spread = (weight * (rows - shift) ** 2).sum() / (num - 1)
    a = (rooted - (weight * rooted).sum(axis=0) / num) * np.sqrt(weight / (num - 1))
    gram = a @ a.T if len(a) < a.shape[1] else a.T @ a
    shared = np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum()
    return float(shift @ shift + spread + np.trace(reference.covariance) - 2 * shared)
