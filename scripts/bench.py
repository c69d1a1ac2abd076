"""Ratios against peers, both measured in this run, interleaved, with a null control (the peer against itself).

    python scripts/bench.py            # all
    python scripts/bench.py reads      # shuffled batches out of a store, against np.memmap
    python scripts/bench.py bases      # moments and basis, against scikit-learn's IncrementalPCA

CPU time of one process; a ratio above 1 means faster than the peer. The control says how far a ratio can be trusted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.decomposition import IncrementalPCA

from nestdiff_core.latents.basis import fit_basis
from nestdiff_core.latents.moments import Moments
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.stores.writer import create_store, write_shard

SHARD_ROWS, CHUNK_ROWS, BATCH = 1024, 32, 256


def compare(
    title: str, peer: tuple[str, Callable[[], object]], ours: tuple[str, Callable[[], object]], rounds: int
) -> None:
    """Time peer, peer again and ours in turn, `rounds` times after a warm-up; print medians and ratios."""
    entries = [peer, (f"{peer[0]}, again", peer[1]), ours]
    seconds: list[list[float]] = [[] for _ in entries]
    for counted in range(-1, rounds):
        for times, (_, call) in zip(seconds, entries, strict=True):
            start = time.process_time()
            call()
            if counted >= 0:
                times.append(time.process_time() - start)
    print(f"\n{title}")
    for (name, _), times in zip(entries, seconds, strict=True):
        print(f"  {name:34} {np.median(times) * 1e3:9.3f} ms   ratio {np.median(seconds[0]) / np.median(times):5.2f}")


def reads() -> None:
    rng = np.random.default_rng(0)
    for shape, rows in (((384, 7, 7), 16384), ((32, 8, 8), 65536), ((256, 1, 1), 65536)):
        with tempfile.TemporaryDirectory() as folder:
            store, flat = Path(folder) / "store.zarr", Path(folder) / "flat.bin"
            create_store(store, {"z": shape}, "float16", [SHARD_ROWS] * (rows // SHARD_ROWS), CHUNK_ROWS, {})
            with flat.open("wb") as file:
                for shard in range(rows // SHARD_ROWS):
                    values = rng.random((SHARD_ROWS, *shape), np.float32).astype(np.float16)
                    write_shard(store, shard, {"z": values})
                    file.write(values.tobytes())
            memmap, reader = np.memmap(flat, np.float16, "r", shape=(rows, *shape)), StoreReader(store, "z")
            every = np.arange(rows)
            for start in range(0, rows, BATCH):  # map every page once
                _ = memmap[every[start : start + BATCH]], reader.read(every[start : start + BATCH])

            def batch(rows: int = rows) -> np.ndarray:
                return rng.permutation(rows)[:BATCH]

            compare(
                f"shuffled batches of {BATCH} rows {shape} float16",
                ("np.memmap", lambda memmap=memmap, batch=batch: memmap[batch()]),
                ("StoreReader", lambda reader=reader, batch=batch: reader.read(batch())),
                rounds=200,
            )


def bases() -> None:
    tokens, channels, kept = 50_000, 768, 128
    rng = np.random.default_rng(0)
    spectrum = np.linspace(1, 0.05, channels, dtype=np.float32)
    x = rng.standard_normal((tokens, channels), np.float32) * spectrum + rng.standard_normal(channels, np.float32)

    def incremental() -> None:
        pca = IncrementalPCA(kept, batch_size=4096)
        for start in range(0, tokens, 4096):
            pca.partial_fit(x[start : start + 4096])

    compare(
        f"{kept} components of {tokens:,} tokens with {channels} channels",
        ("IncrementalPCA", incremental),
        ("Moments.of + fit_basis", lambda: fit_basis(Moments.of(x), kept, 2)),
        rounds=3,
    )


BENCHES = {"reads": reads, "bases": bases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", nargs="?", choices=BENCHES, help="default: all")
    chosen = parser.parse_args().bench
    for name in [chosen] if chosen else BENCHES:
        BENCHES[name]()


if __name__ == "__main__":
    main()
