"""Finding the value that is not a number, so that an error can name its row and channel."""

from __future__ import annotations

import numpy as np


def first_non_finite(values: np.ndarray) -> tuple[int, ...] | None:
    """Index of the first NaN or infinity in `values` (rows, channels, ...), or None when all are finite."""
    bad = ~np.isfinite(values)
    if not bad.any():
        return None
    return tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
