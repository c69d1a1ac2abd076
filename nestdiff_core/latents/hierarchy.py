"""From one feature map to the latents of every level: pool to the level's grid, project on its basis.

Every level pools the full map; a 4x4 grid pooled from 8x8 is another one than 4x4 pooled from 14x14. One read of the
features serves all levels. Level 1, the image, is the autoencoder's (autoencoders/).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nestdiff_core.errors import NumericsError
from nestdiff_core.latents.basis import Basis
from nestdiff_core.latents.moments import Moments, merge
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stores.finite import first_non_finite

BLOCK_IMAGES = 128  # images whose pooled tokens are multiplied together
CACHED_BYTES = 2**21  # of a float32 map that is pooled for every level before the next images are converted


def pool(feature_map: Float[Tensor, "B C S S"], grid: int) -> Float[Tensor, "B C {grid} {grid}"]:
    """Adaptive average pooling: cell i of a side covers rows floor(i S / grid) up to ceil((i + 1) S / grid)."""
    return F.adaptive_avg_pool2d(feature_map, grid)


def tokens_of(z: Float[Tensor, "B C H W"]) -> Float[Tensor, "B*H*W C"]:
    """One row per position, images first, then rows, then columns."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)


def _pooled(
    feature_map: Float[np.ndarray, "N C S S"], grids: Collection[int]
) -> Iterator[dict[int, Float[Tensor, "B C _ _"]]]:
    """The maps pooled to each grid, in float32 and blocks of `BLOCK_IMAGES` images.

    Channels last: both pooling and projection run over whole tokens. Converting costs more than pooling, and half as
    much where the few images that are converted at a time stay in the cache until every grid has them.
    """
    few = max(1, CACHED_BYTES // (4 * math.prod(feature_map.shape[1:])))
    for start in range(0, len(feature_map), BLOCK_IMAGES):
        block = torch.from_numpy(feature_map[start : start + BLOCK_IMAGES])
        converted = (part.to(torch.float32, memory_format=torch.channels_last) for part in block.split(few))
        parts = [{grid: pool(part, grid) for grid in grids} for part in converted]
        yield {grid: torch.cat([pooled[grid] for pooled in parts]) for grid in grids}


@runtime_checkable
class FeatureMaps(Protocol):
    """What a pass over feature maps (N, views, C, S, S) needs: a StoreReader, or what reads like one."""

    path: Path
    shape: tuple[int, ...]
    rows_per_shard: tuple[int, ...]

    def read_shard(self, shard: int) -> np.ndarray: ...

    def iterate_shards(self, first: int = 0) -> Iterator[tuple[int, np.ndarray]]: ...


# --- moments ------------------------------------------------------------------------------------------------------


def shard_moments(feature_map: Float[np.ndarray, "N C S S"], grids: Sequence[int]) -> dict[int, Moments]:
    """Moments of the pooled tokens of feature maps, for each grid."""
    totals = {grid: Moments.zero(feature_map.shape[1]) for grid in grids}
    for pooled in _pooled(feature_map, grids):
        totals = {grid: merge(totals[grid], Moments.of(tokens_of(pooled[grid]).numpy())) for grid in totals}
    return totals


class Begun(NamedTuple):
    """Moments of the first `shards` shards."""

    shards: int
    moments: Moments


def level_moments(
    features: FeatureMaps,
    grids: Sequence[int],
    rows: Int[np.ndarray, " n"],
    *,
    begun: dict[int, Begun] | None = None,
    keep: Callable[[dict[int, Begun]], None] | None = None,
    progress: Progress = silent,
) -> dict[int, Moments]:
    """Moments, for each grid, of the pooled tokens of the images `rows` (a split, ascending): one pass over the store.

    features: rows (views, C, S, S); every view counts. Shards are merged in their order, so the result has the same
    bits every time, also where the first ones are known already (`begun`, by grid). keep: called after every shard.
    Raises NumericsError naming shard, row in the shard and channel of a value that is not finite.
    """
    totals = {grid: Begun(0, Moments.zero(features.shape[2])) for grid in grids} | (begun or {})
    first_shard = min(known.shards for known in totals.values())
    first = sum(features.rows_per_shard[:first_shard])
    for shard, feature_map in features.iterate_shards(first_shard):
        last = first + len(feature_map)
        chosen = rows[np.searchsorted(rows, first) : np.searchsorted(rows, last)] - first
        if (bad := first_non_finite(feature_map)) is not None:
            raise NumericsError(
                f"Row {bad[0]} of shard {shard}, channel {bad[2]} of the features is not finite",
                stage="moments",
                path=features.path,
                fix="Remove that shard's file and materialise the features again.",
            )
        missing = [grid for grid in grids if totals[grid].shards == shard]
        moments = shard_moments(feature_map[chosen].reshape(-1, *features.shape[2:]), missing)
        totals |= {grid: Begun(shard + 1, merge(totals[grid].moments, moments[grid])) for grid in missing}
        first = last
        if keep is not None:
            keep(totals)
        progress(shard + 1, len(features.rows_per_shard), "moments")
    return {grid: total.moments for grid, total in totals.items()}


# --- latents ------------------------------------------------------------------------------------------------------


def encode_levels(
    feature_map: Float[np.ndarray, "N C S S"], levels: dict[int, tuple[int, Basis]]
) -> dict[int, Float[np.ndarray, "N _ _ _"]]:
    """z_l in float32 for each level of {l: (grid, basis)}, standardised and clean, from one pass over the maps."""
    z = {
        level: np.empty((len(feature_map), basis.channels, grid, grid), np.float32)
        for level, (grid, basis) in levels.items()
    }
    starts = range(0, len(feature_map), BLOCK_IMAGES)
    for start, pooled in zip(starts, _pooled(feature_map, {grid for grid, _ in levels.values()}), strict=True):
        for level, (grid, basis) in levels.items():
            tokens = pooled[grid].permute(0, 2, 3, 1)
            z[level][start : start + BLOCK_IMAGES] = basis.project(tokens).permute(0, 3, 1, 2).numpy()
    return z


def encode_level(
    feature_map: Float[np.ndarray, "N C S S"], grid: int, basis: Basis
) -> Float[np.ndarray, "N k {grid} {grid}"]:
    """z_l of one level; see `encode_levels`."""
    return encode_levels(feature_map, {0: (grid, basis)})[0]
