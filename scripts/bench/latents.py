"""Latents of all levels from one read of a store, against a pass of its own for each level."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import zarr

from nestdiff_core.latents.basis import Basis, fit_basis
from nestdiff_core.latents.hierarchy import encode_levels, level_moments
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.stores.writer import create_store, write_shard
from scripts.bench.measure import compare

CHANNELS, SIDE, SHARDS, SHARD_ROWS = 768, 14, 2, 256
GRIDS = (8, 4, 2, 1)
KEPT = ((8, 32, 128, 256), (64, 64, 64, 64))

Levels = dict[int, tuple[int, Basis]]


def run() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.zarr"
        create_store(path, {"map": (1, CHANNELS, SIDE, SIDE)}, "float16", [SHARD_ROWS] * SHARDS, 32, {})
        for shard in range(SHARDS):
            values = rng.standard_normal((SHARD_ROWS, 1, CHANNELS, SIDE, SIDE), np.float32)
            write_shard(path, shard, {"map": values})
        reader = StoreReader(path, "map")
        moments = level_moments(reader, GRIDS, np.arange(len(reader)))
        for kept in KEPT:
            pairs = enumerate(zip(GRIDS, kept, strict=True), 2)
            levels: Levels = {level: (grid, fit_basis(moments[grid], k, level)) for level, (grid, k) in pairs}
            compare(
                f"Latents of {len(reader)} maps ({CHANNELS}, {SIDE}, {SIDE}) float16: grids {GRIDS}, channels {kept}",
                ("a pass for each level", lambda levels=levels: naive(path, levels)),
                {
                    "one pass, projected before pooling": lambda levels=levels: project_first(reader, levels),
                    "encode_levels": lambda levels=levels: [
                        encode_levels(maps[:, 0], levels) for _, maps in reader.iterate_shards()
                    ],
                },
            )


def naive(path: Path, levels: Levels) -> None:
    """Each level reads the store again, pools it and projects."""
    array = zarr.open_array(path / "map", mode="r")
    for grid, basis in levels.values():
        whitened = basis.components / basis.std[:, None]
        for start in range(0, SHARD_ROWS * SHARDS, SHARD_ROWS):
            maps = torch.from_numpy(np.asarray(array[start : start + SHARD_ROWS])[:, 0]).float()
            pooled = F.adaptive_avg_pool2d(maps, grid) - basis.mean[:, None, None]
            torch.einsum("nchw,kc->nkhw", pooled, whitened)


def project_first(reader: StoreReader, levels: Levels, images: int = 4) -> None:
    """C channels become k before they are pooled, which is linear too; few images at a time, as encode_levels does."""
    for _, maps in reader.iterate_shards():
        for part in torch.from_numpy(maps[:, 0]).split(images):
            tokens = part.float().flatten(2)
            for grid, basis in levels.values():
                scores = (basis.components / basis.std[:, None]) @ (tokens - basis.mean[:, None])
                F.adaptive_avg_pool2d(scores.unflatten(2, (SIDE, SIDE)), grid)
