"""Features of one shard, as they are stored: same bits whatever comes before, behind or beside an image.

Every pass of a network has exactly `batch_size` rows, the last one filled up with black images or empty captions:
matrix products of another shape round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from nestdiff_core.encoders.base import Encoder
from nestdiff_core.errors import ConfigError, NumericsError


def extract_features(
    encoder: Encoder,
    images: UInt8[np.ndarray, "N H W C"],
    batch_size: int,
    dtype: str,
    *,
    name: Callable[[int], str] = "row {}".format,
    flip: bool = False,
) -> tuple[Float[np.ndarray, "N views D S S"], Float[np.ndarray, "N views V"]]:
    """Feature maps and vectors of `images` as `dtype` (float16 or float32).

    View 0 is the image; with `flip` view 1 is its mirror image. Raises NumericsError, naming the image (`name` of its
    number) and the channel, for a feature that is not finite or does not fit `dtype`.
    """
    maps = np.empty((len(images), 1 + flip, encoder.map_channels, encoder.map_side, encoder.map_side), dtype)
    vectors = np.empty((len(images), 1 + flip, encoder.vector_channels), dtype)
    for view, pictures in enumerate(_views(images, flip)):
        for rows, features in _passes(encoder, pictures, batch_size):
            for kind, store, found in zip(("map", "vector"), (maps, vectors), features, strict=True):
                store[rows, view] = _stored(found, dtype, kind, lambda i, rows=rows: name(rows.start + i))
    return maps, vectors


def encode_crops(
    encoder: Encoder, images: UInt8[np.ndarray, "B R R C"], grid: int
) -> Float[Tensor, "B V {grid} {grid}"]:
    """The vector of each of an image's grid x grid crops, at the crop's place.

    Crops do not overlap, have side R / grid, and are resized to the encoder's input size like any image.
    """
    vectors = encoder.encode(_crops(images, grid))[1]
    return vectors.unflatten(0, (len(images), grid, grid)).permute(0, 3, 1, 2)


def extract_crops(
    encoder: Encoder,
    images: UInt8[np.ndarray, "N R R C"],
    grid: int,
    batch_size: int,
    dtype: str,
    *,
    name: Callable[[int], str] = "row {}".format,
    flip: bool = False,
) -> Float[np.ndarray, "N views V {grid} {grid}"]:
    """`encode_crops` of `images` as `dtype`, `batch_size` crops a pass; views and errors as in `extract_features`.

    View 1 holds the crops of the mirror image: its left column shows the image's right one.
    """
    maps = np.empty((len(images), 1 + flip, encoder.vector_channels, grid, grid), dtype)
    for view, pictures in enumerate(_views(images, flip)):
        vectors = np.empty((len(images) * grid**2, encoder.vector_channels), dtype)
        for rows, (_, found) in _passes(encoder, _crops(pictures, grid), batch_size):
            vectors[rows] = _stored(
                found, dtype, "vector of a crop", lambda i, rows=rows: name((rows.start + i) // grid**2)
            )
        maps[:, view] = vectors.reshape(len(images), grid, grid, -1).transpose(0, 3, 1, 2)
    return maps


def encode_captions(
    encode: Callable[[Sequence[str]], Float[Tensor, "B T W"]],
    captions: Sequence[str],
    batch_size: int,
    dtype: str,
    *,
    name: Callable[[int], str] = "row {}".format,
) -> Float[np.ndarray, "N T W"]:
    """Tokens of `captions` as `dtype`. encode: a text tower's."""
    tokens = []
    for start in range(0, len(captions), batch_size):
        batch = list(captions[start : start + batch_size])
        found = encode(batch + [""] * (batch_size - len(batch)))[: len(batch)]
        tokens.append(
            _stored(found.transpose(1, 2), dtype, "caption", lambda i, start=start: name(start + i)).swapaxes(1, 2)
        )
    return np.concatenate(tokens)


def _views(images: np.ndarray, flip: bool) -> list[np.ndarray]:
    return [images, images[:, :, ::-1]] if flip else [images]


def _passes(encoder: Encoder, images: np.ndarray, batch_size: int) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """Rows, and the map and vector of the images in them."""
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padded = np.concatenate([batch, np.zeros((batch_size - len(batch), *batch.shape[1:]), np.uint8)])
        feature_map, vector = encoder.encode(padded)
        yield slice(start, start + len(batch)), (feature_map[: len(batch)], vector[: len(batch)])


def _crops(images: np.ndarray, grid: int) -> UInt8[np.ndarray, "crops s s C"]:
    """(N, R, R, C) as (N grid grid, R / grid, R / grid, C): the crops of one image after the other, row by row."""
    n, side, _, channels = images.shape
    if side % grid:
        raise ConfigError(
            "Images cannot be cut into such crops",
            stage="crops",
            key="levels.grid",
            expected=f"a divisor of the images' side {side}",
            found=grid,
            fix="Change levels.grid or images.resolution.",
        )
    cut = images.reshape(n, grid, side // grid, grid, side // grid, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(-1, side // grid, side // grid, channels)


def _stored(
    features: Float[Tensor, "B C *_"], dtype: str, kind: str, name: Callable[[int], str]
) -> Float[np.ndarray, "B C *_"]:
    """`features` as they are stored. name: what an error calls the i-th of them."""
    exact = features.float().cpu().numpy()
    with np.errstate(over="ignore"):
        stored = exact.astype(dtype)
    bad = ~np.isfinite(stored)
    if bad.any():
        item, channel, *_ = np.argwhere(bad)[0].tolist()
        raise NumericsError(
            f"A feature ({kind}) is not finite as {dtype}",
            stage="features",
            key=f"{name(item)}, channel {channel}",
            expected=f"at most {np.finfo(dtype).max:g}",
            found=float(exact[bad][0]),
            fix="If it is only too large, set features.dtype: float32; else check the encoder's weights.",
        )
    return stored
