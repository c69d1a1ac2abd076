"""Features of one shard, as they are stored: same bits whatever comes before, behind or beside an image."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8

from nestdiff_core.encoders.base import Encoder
from nestdiff_core.errors import NumericsError


def extract_features(
    encoder: Encoder, images: UInt8[np.ndarray, "N H W C"], batch_size: int, dtype: str, *, first_row: int = 0
) -> tuple[Float[np.ndarray, "N D S S"], Float[np.ndarray, "N V"]]:
    """Feature maps and vectors of `images` as `dtype` (float16 or float32).

    Every pass of the network has exactly `batch_size` images, the last one filled up with black ones: matrix
    products of another shape round differently. Raises NumericsError, naming the row (counted from `first_row`)
    and the channel, for a feature that is not finite or does not fit `dtype`.
    """
    maps = np.empty((len(images), encoder.map_channels, encoder.map_side, encoder.map_side), dtype)
    vectors = np.empty((len(images), encoder.vector_channels), dtype)
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padded = np.concatenate([batch, np.zeros((batch_size - len(batch), *batch.shape[1:]), np.uint8)])
        for store, features in zip((maps, vectors), encoder.encode(padded), strict=True):
            store[start : start + len(batch)] = _stored(features[: len(batch)], dtype, first_row + start)
    return maps, vectors


def _stored(features: torch.Tensor, dtype: str, first_row: int) -> np.ndarray:
    exact = features.float().cpu().numpy()
    with np.errstate(over="ignore"):
        stored = exact.astype(dtype)
    bad = ~np.isfinite(stored)
    if bad.any():
        row, channel, *_ = np.argwhere(bad)[0].tolist()
        kind = "vector" if exact.ndim == 2 else "map"
        raise NumericsError(
            f"A feature ({kind}) is not finite as {dtype}",
            stage="features",
            key=f"row {first_row + row}, channel {channel}",
            expected=f"at most {np.finfo(dtype).max:g}",
            found=float(exact[bad][0]),
            fix="If it is only too large, set features.dtype: float32; else check the encoder's weights.",
        )
    return stored
