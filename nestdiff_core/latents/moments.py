"""Count, mean and scatter of feature tokens: all that a basis needs, mergeable, in float64.

Each block of rows is centred on its own mean before its Gram matrix is taken, so nothing cancels however large the
mean is. Blocks and shards are joined by the formula of Chan, Golub & LeVeque (1979). Fixed blocks and a fixed order
of merging give the same bits every time.
"""

from __future__ import annotations

import functools
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from nestdiff_core.errors import IntegrityError, NumericsError
from nestdiff_core.stores.finite import first_non_finite

BLOCK_ROWS = 4096  # float64 block of 768 channels: 25 MB


@dataclass(frozen=True)
class Moments:
    """n, mean and scatter matrix sum_i (x_i - mean)(x_i - mean)^T of n rows with C channels."""

    count: int
    mean: Float[np.ndarray, " C"]
    scatter: Float[np.ndarray, "C C"]

    @classmethod
    def zero(cls, channels: int) -> Moments:
        """Moments of no rows: the neutral element of `merge`."""
        return cls(0, np.zeros(channels), np.zeros((channels, channels)))

    @classmethod
    def of(cls, x: Float[np.ndarray, "n C"]) -> Moments:
        """Moments of the rows of `x` (any float dtype), in one pass and blocks of `BLOCK_ROWS`.

        Raises NumericsError naming row and channel of a value that is not finite.
        """
        blocks = (cls._of_block(x, start) for start in range(0, len(x), BLOCK_ROWS))
        return functools.reduce(merge, blocks, cls.zero(x.shape[1]))

    @classmethod
    def _of_block(cls, x: np.ndarray, start: int) -> Moments:
        block = x[start : start + BLOCK_ROWS].astype(np.float64)
        mean = block.mean(axis=0)
        if not np.isfinite(mean).all() and (bad := first_non_finite(block)) is not None:
            raise NumericsError(
                f"Row {start + bad[0]}, channel {bad[1]} of the features is not finite",
                expected="finite numbers",
                found=str(block[bad]),
                fix="Encode the image's shard again.",
            )
        block -= mean
        return cls(len(block), mean, block.T @ block)

    def save(self, path: Path) -> None:
        with path.open("wb") as file:  # numpy would change the name of a temporary file
            np.savez(file, count=np.int64(self.count), mean=self.mean, scatter=self.scatter)

    @classmethod
    def load(cls, path: Path) -> Moments:
        """What `save` wrote; a damaged file (its entries have checksums) is an IntegrityError."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(int(arrays["count"]), arrays["mean"], arrays["scatter"])
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise IntegrityError(
                f"{path.name} holds no moments ({error})", path=path, fix="Materialise its stage again."
            ) from None


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the rows of `a` and `b` together."""
    count = a.count + b.count
    if count == 0:
        return a
    delta, share = b.mean - a.mean, b.count / count
    between = np.outer(delta, delta) * (a.count * share)
    return Moments(count, a.mean + delta * share, a.scatter + b.scatter + between)
