"""Shuffled batches out of a store, against np.memmap, zarr-python, a file a sample, and WebDataset."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset as wds
import zarr
from webdataset.writer import TarWriter

from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.stores.writer import create_store, write_shard
from scripts.bench.measure import compare

SHARD_ROWS, CHUNK_ROWS, BATCH = 1024, 32, 256


def run() -> None:
    rng = np.random.default_rng(0)
    for shape, rows in (((384, 7, 7), 16384), ((32, 8, 8), 65536), ((256, 1, 1), 65536)):
        with tempfile.TemporaryDirectory() as name:
            memmap, reader = _stored(Path(name), shape, rows, rng)

            def batch(rows: int = rows) -> np.ndarray:
                return rng.permutation(rows)[:BATCH]

            compare(
                f"Shuffled batches of {BATCH} rows {shape} float16, of {rows:,}",
                ("np.memmap", lambda memmap=memmap, batch=batch: memmap[batch()]),
                {"StoreReader": lambda reader=reader, batch=batch: reader.read(batch())},
                rounds=200,
            )
    _peers(rng, (384, 7, 7), 4096)


def _peers(rng: np.random.Generator, shape: tuple[int, ...], rows: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        memmap, reader = _stored(folder, shape, rows, rng)
        array = zarr.open_array(folder / "store.zarr" / "z", mode="r")
        (folder / "rows").mkdir()
        shards = [folder / f"{shard:03d}.tar" for shard in range(rows // SHARD_ROWS)]
        for shard, path in enumerate(shards):
            with TarWriter(str(path)) as tar:
                for row in range(shard * SHARD_ROWS, (shard + 1) * SHARD_ROWS):
                    tar.write({"__key__": f"{row:06d}", "npy": memmap[row]})
                    np.save(folder / "rows" / f"{row:06d}.npy", memmap[row])
        stream = _webdataset(shards)

        def batch() -> np.ndarray:
            return rng.permutation(rows)[:BATCH]

        compare(
            f"The same of {rows:,} rows {shape}, with peers",
            ("np.memmap", lambda: memmap[batch()]),
            {
                "StoreReader": lambda: reader.read(batch()),
                "a .npy for each row": lambda: np.stack(
                    [np.load(folder / "rows" / f"{row:06d}.npy") for row in batch()]
                ),
                "WebDataset, shuffle(1000)": lambda: next(stream),
                "zarr-python, row by row": lambda: np.stack([np.asarray(array[row]) for row in batch()]),
            },
            rounds=15,
        )


def _stored(
    folder: Path, shape: tuple[int, ...], rows: int, rng: np.random.Generator
) -> tuple[np.ndarray, StoreReader]:
    """The same random rows in a flat file and in a store, both mapped and touched once."""
    store, flat = folder / "store.zarr", folder / "flat.bin"
    create_store(store, {"z": shape}, "float16", [SHARD_ROWS] * (rows // SHARD_ROWS), CHUNK_ROWS, {})
    with flat.open("wb") as file:
        for shard in range(rows // SHARD_ROWS):
            values = rng.random((SHARD_ROWS, *shape), np.float32).astype(np.float16)
            write_shard(store, shard, {"z": values})
            file.write(values.tobytes())
    memmap, reader = np.memmap(flat, np.float16, "r", shape=(rows, *shape)), StoreReader(store, "z")
    for block in np.arange(rows).reshape(-1, BATCH):
        _ = memmap[block], reader.read(block)
    return memmap, reader


def _webdataset(shards: list[Path]) -> Iterator[np.ndarray]:
    """Batches for ever, as WebDataset shuffles: shards, and samples within a buffer."""
    dataset = wds.WebDataset([str(path) for path in shards], shardshuffle=len(shards)).repeat().shuffle(1000)  # pyright: ignore
    rows: list[np.ndarray] = []
    for (row,) in dataset.decode().to_tuple("npy"):
        rows.append(row)
        if len(rows) == BATCH:
            yield np.stack(rows)
            rows = []
