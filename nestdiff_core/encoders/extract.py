"""Features of one shard, as they are stored: same bits whatever comes before, behind or beside an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nestdiff_core.encoders.base import Encoder
from nestdiff_core.errors import NumericsError


def extract_features(
    encoder: Encoder,
    images: UInt8[np.ndarray, "N H W C"],
    batch_size: int,
    dtype: str,
    *,
    first_row: int = 0,
    flip: bool = False,
) -> tuple[Float[np.ndarray, "N views D S S"], Float[np.ndarray, "N views V"]]:
    """Feature maps and vectors of `images` as `dtype` (float16 or float32); with `flip` of their mirror images too.

    Every pass of the network has exactly `batch_size` images, the last one filled up with black ones: matrix
    products of another shape round differently. Raises NumericsError, naming the row (counted from `first_row`)
    and the channel, for a feature that is not finite or does not fit `dtype`.
    """
    count, views = len(images), 1 + flip
    maps = np.empty((count, views, encoder.map_channels, encoder.map_side, encoder.map_side), dtype)
    vectors = np.empty((count, views, encoder.vector_channels), dtype)
    for rows, view, batch in _passes(images, batch_size, flip):
        for store, features in zip((maps, vectors), encoder.encode(batch), strict=True):
            found = features[: rows.stop - rows.start]
            store[rows, view] = stored(found, dtype, first_row + rows.start, "vector" if found.ndim == 2 else "map")
    return maps, vectors


def encode_crops(
    encoder: Encoder, images: UInt8[np.ndarray, "B H W C"], grid: int
) -> Float[Tensor, "B V {grid} {grid}"]:
    """The vector of each of the grid x grid crops of every image, each resized to the encoder's input size.

    Crops do not overlap and cover the image (arXiv 2412.05984, the `patch` source); its side is a multiple of grid.
    """
    batch, height, width, channels = images.shape
    crops = images.reshape(batch, grid, height // grid, grid, width // grid, channels).swapaxes(2, 3)
    _, vectors = encoder.encode(np.ascontiguousarray(crops).reshape(-1, height // grid, width // grid, channels))
    return vectors.unflatten(0, (batch, grid, grid)).permute(0, 3, 1, 2)


def extract_crops(
    encoder: Encoder,
    images: UInt8[np.ndarray, "N H W C"],
    grid: int,
    batch_size: int,
    dtype: str,
    *,
    first_row: int = 0,
    flip: bool = False,
) -> Float[np.ndarray, "N views V {grid} {grid}"]:
    """Vectors of the crops of `images`, as maps; passes of at most `batch_size` crops. Else as `extract_features`."""
    maps = np.empty((len(images), 1 + flip, encoder.vector_channels, grid, grid), dtype)
    for rows, view, batch in _passes(images, max(1, batch_size // grid**2), flip):
        found = encode_crops(encoder, batch, grid)[: rows.stop - rows.start]
        maps[rows, view] = stored(found, dtype, first_row + rows.start, "crop")
    return maps


def encode_captions(
    encode: Callable[[list[str]], Float[Tensor, "B T W"]],
    captions: list[str],
    batch_size: int,
    dtype: str,
    *,
    first_row: int = 0,
) -> Float[np.ndarray, "N T W"]:
    """Tokens of captions, in passes of exactly `batch_size` (the last one filled up with empty ones)."""
    tokens = []
    for start in range(0, len(captions), batch_size):
        batch = captions[start : start + batch_size]
        found = encode(batch + [""] * (batch_size - len(batch)))[: len(batch)]
        tokens.append(stored(found, dtype, first_row + start, "caption"))
    return np.concatenate(tokens)


def _passes(images: np.ndarray, batch_size: int, flip: bool) -> Iterator[tuple[slice, int, np.ndarray]]:
    """(rows, view, exactly `batch_size` images) of one pass of the network after the other."""
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padded = np.concatenate([batch, np.zeros((batch_size - len(batch), *batch.shape[1:]), np.uint8)])
        for view in range(1 + flip):
            yield slice(start, start + len(batch)), view, padded[:, :, ::-1].copy() if view else padded


def stored(features: torch.Tensor, dtype: str, first_row: int, kind: str) -> np.ndarray:
    """`features` as they are stored, or a NumericsError."""
    exact = features.float().cpu().numpy()
    with np.errstate(over="ignore"):
        rounded = exact.astype(dtype)
    bad = ~np.isfinite(rounded)
    if bad.any():
        row, channel, *_ = np.argwhere(bad)[0].tolist()
        raise NumericsError(
            f"A feature ({kind}) is not finite as {dtype}",
            stage="features",
            key=f"row {first_row + row}, channel {channel}",
            expected=f"at most {np.finfo(dtype).max:g}",
            found=float(exact[bad][0]),
            fix="If it is only too large, set features.dtype: float32; else check the encoder's weights.",
        )
    return rounded
