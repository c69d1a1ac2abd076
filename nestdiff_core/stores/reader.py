"""Reading one array of a store by image row.

`read` gathers rows from a memory map of the shard files: what training does, millions of times. `read_shard` goes
through zarr and verifies every chunk's checksum: what the stages do, once. Both give what `zarr.open` gives, less
unused slots.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from nestdiff_core.errors import IntegrityError
from nestdiff_core.stores.schema import REMAKE, open_store

_ABSENT = 2**64 - 1  # zarr's mark for a chunk that is not in the shard
_MAP_FIXED = 0x10  # Linux and macOS; Python's mmap module does not offer it


class StoreReader:
    """Read-only view of array `array` in the store at `path`, indexed by image row over all shards.

    fetch: brings the file of the given name inside the artifact here, where a shard may be in object storage only.

    Opening checks the layout and, without `fetch`, that every shard's file is there in full. Memory maps are made at
    the first read, in the process that reads: a reader may be pickled, or opened before a fork.

    shuffled: set before the first read where rows will be read in no order: the system then reads nothing around them.
    shape: (images, *shape of one row). dtype: as stored. rows_per_shard: images of each shard. attrs: the stage's.

    Raises IntegrityError, naming shard and file, for what is missing, cut, or laid out differently.
    """

    def __init__(self, path: Path, array: str, fetch: Callable[[str], Path] | None = None) -> None:
        store = open_store(path)
        if array not in store.schema.arrays:
            raise IntegrityError(
                f"{path.name} has no array {array}",
                path=path,
                key=array,
                expected=sorted(store.schema.arrays),
                found=array,
                fix=REMAKE,
            )
        self.path, self.array, self.attrs, self._schema = path, array, store.attrs, store.schema
        self.rows_per_shard: tuple[int, ...] = self._schema.rows_per_shard
        self.shape: tuple[int, ...] = (sum(self.rows_per_shard), *self._schema.arrays[array])
        self.dtype: np.dtype[Any] = np.dtype(self._schema.dtype)
        self._slots = self._schema.slots_of_rows()
        self._map: np.ndarray | None = None
        self.shuffled = False
        self._fetch = fetch
        if fetch is None:
            for shard in range(len(self.rows_per_shard)):
                self._check_file(shard)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: np.ndarray, pick: np.ndarray | None = None) -> np.ndarray:
        """A copy of the images `rows`, (len(rows), *row), in that order; repeats and negative rows are as in numpy.

        pick: for each of the rows an index along the first axis of a row, such as which view or which caption; that
        axis is gone from the result, and nothing else is read. Trusts the chunks: their checksums are verified when
        the artifact is, not on every read.
        """
        if self._map is None:
            self._map = self._map_shards()
        source, slots, row = self._map, self._slots[rows], self.shape[1:]
        if pick is not None:
            num_picks, *row = row
            source, slots = source.view(f"V{source.itemsize // num_picks}"), slots * num_picks + pick
        return source[np.unravel_index(slots, source.shape)].view(self.dtype).reshape(-1, *row)

    def read_shard(self, shard: int) -> np.ndarray:
        """All images of one shard, (rows_per_shard[shard], *row), with every checksum verified."""
        file = self._check_file(shard)
        try:
            return np.asarray(zarr.open_array(self.path / self.array, mode="r")[self._schema.slots(shard)])
        except ValueError as error:  # zarr's checksum error
            raise self._damaged(f"Shard {shard} is damaged ({error})", file) from error

    def iterate_shards(self, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """(shard, its images) in order from shard `first`, one shard in memory at a time."""
        for shard in range(first, len(self.rows_per_shard)):
            yield shard, self.read_shard(shard)

    def files(self) -> list[Path]:
        """The files of all shards, which are then on this machine."""
        return [self._check_file(shard) for shard, rows in enumerate(self.rows_per_shard) if rows]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def _damaged(self, what: str, file: Path, **values: Any) -> IntegrityError:
        return IntegrityError(
            what,
            path=file,
            key=self.array,
            fix="Materialise its stage again: only what is missing or damaged is made anew.",
            **values,
        )

    def _check_file(self, shard: int) -> Path:
        """The shard's file, which must have exactly the size that its rows need (an image shard may be empty)."""
        file = self.path / self._schema.shard_name(self.array, shard)
        if self.rows_per_shard[shard] == 0:
            return file
        expected = self._schema.shard_bytes(self.array, shard)
        if self._fetch is not None:
            self._fetch(f"{self.path.name}/{self._schema.shard_name(self.array, shard)}")
        try:
            found = file.stat().st_size
        except FileNotFoundError:
            raise self._damaged(f"Shard {shard} is missing", file) from None
        if found != expected:
            raise self._damaged(f"Shard {shard} has another size", file, expected=expected, found=found)
        return file

    def _map_shards(self) -> np.ndarray:
        """Every row of every shard as one array [shard, chunk, row in chunk] of opaque rows: a gather is one indexing.

        The shards are mapped side by side into one reserved range of addresses. This also keeps no file open,
        where a mapping by Python's mmap would hold a descriptor for each shard. Addresses between the files are
        not readable, so no mistake in here could return zeros.
        """
        schema, array = self._schema, self.array
        room = schema.chunks_per_shard * schema.stored_chunk_bytes(array) + schema.index_bytes()
        room = -(-room // mmap.PAGESIZE) * mmap.PAGESIZE
        region = mmap.mmap(-1, room * len(self.rows_per_shard), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)
        start = np.frombuffer(region, np.uint8).ctypes.data
        for shard, rows in enumerate(self.rows_per_shard):
            if rows:
                file = self._check_file(shard)
                _map_file(file, start + shard * room)
                if self.shuffled:
                    region.madvise(mmap.MADV_RANDOM, shard * room, room)
                index_start = shard * room + schema.shard_bytes(array, shard) - schema.index_bytes()
                index = np.frombuffer(region, "<u8", schema.chunks_per_shard * 2, index_start)
                self._check_index(shard, file, index)
        return np.ndarray(
            (len(self.rows_per_shard), schema.chunks_per_shard, schema.chunk_rows),
            dtype=f"V{schema.row_bytes(array)}",
            buffer=region,
            strides=(room, schema.stored_chunk_bytes(array), schema.row_bytes(array)),
        )

    def _check_index(self, shard: int, file: Path, index: np.ndarray) -> None:
        """The index must say what the map assumes: the shard's chunks one after the other from the start."""
        step, stored = self._schema.stored_chunk_bytes(self.array), self._schema.stored_chunks(shard)
        expected = np.full((self._schema.chunks_per_shard, 2), _ABSENT, np.uint64)
        expected[:stored, 0] = np.arange(stored) * step
        expected[:stored, 1] = step
        if not np.array_equal(index, expected.ravel()):
            raise self._damaged(f"Shard {shard} has another chunk index", file)


def _map_file(file: Path, address: int) -> None:
    """Map `file`, read-only, at `address`, inside a range that is already ours."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    handle = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(handle).st_size
        if libc.mmap(address, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, handle, 0) != address:
            raise OSError(ctypes.get_errno(), f"cannot map {file}")
    finally:
        os.close(handle)
