"""How a store lies on disk: one zarr v3 group, one zarr shard per image shard.

    features.zarr/zarr.json             group: attributes of the stage, and the schema below
    features.zarr/map/zarr.json         array (slots, C, H, W)
    features.zarr/map/c.3.0.0.0         image shard 3: every value of its rows, and nothing else

Image shard k owns the slots [k S, k S + n_k), where S = `shard_rows` is the largest image shard rounded up to whole
chunks. When every image shard but the last holds S rows, slots are image rows; behind a shorter one, slots stay
unused and read as NaN. `rows_per_shard` (the n_k) says which.

Chunks are `chunk_rows` rows, uncompressed, each followed by its crc32c. Compression would save 7-8 % of latents, which
are read at every training step, for two to three times the cost of a shard (`make bench ARGS=codecs`; a map behind a
ReLU would shrink to a fifth); and plain chunks can be gathered from a memory map.

This module leaves writing to writer.py and reading to reader.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from nestdiff_core.errors import IntegrityError

SCHEMA_ATTRIBUTE = "nestdiff_store"
GROUP_FILE = "zarr.json"
CHECKSUM_BYTES = 4
REMAKE = "Remove the store and materialise its stage again."


@dataclass(frozen=True, kw_only=True)
class StoreSchema:
    """Shape and layout of a store. `arrays` gives the shape of one row of each array."""

    arrays: dict[str, tuple[int, ...]]
    dtype: str
    chunk_rows: int
    shard_rows: int
    rows_per_shard: tuple[int, ...]

    @property
    def num_slots(self) -> int:
        """Length of the zarr arrays: the images, plus what shorter shards leave unused between them."""
        return max((k * self.shard_rows + n for k, n in enumerate(self.rows_per_shard) if n), default=0)

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    def slots(self, shard: int) -> slice:
        start = shard * self.shard_rows
        return slice(start, start + self.rows_per_shard[shard])

    def slots_of_rows(self) -> np.ndarray:
        """Slot of every image row over all shards, in order."""
        return np.concatenate(
            [np.arange(slots.start, slots.stop) for slots in map(self.slots, range(len(self.rows_per_shard)))]
        )

    def row_bytes(self, array: str) -> int:
        return int(np.prod(self.arrays[array])) * np.dtype(self.dtype).itemsize

    def stored_chunk_bytes(self, array: str) -> int:
        """Bytes from the start of one chunk to the start of the next."""
        return self.chunk_rows * self.row_bytes(array) + CHECKSUM_BYTES

    def stored_chunks(self, shard: int) -> int:
        """Chunks that stand in the shard's file; the others of the shard are marked absent in its index."""
        return -(-self.rows_per_shard[shard] // self.chunk_rows)

    def index_bytes(self) -> int:
        """Size of the index at a shard file's end: offset and length of each chunk, and a checksum."""
        return self.chunks_per_shard * 16 + CHECKSUM_BYTES

    def shard_bytes(self, array: str, shard: int) -> int:
        return self.stored_chunks(shard) * self.stored_chunk_bytes(array) + self.index_bytes()

    def shard_name(self, array: str, shard: int) -> str:
        """Path of the shard's file inside the store."""
        return f"{array}/c.{shard}" + ".0" * len(self.arrays[array])


def create_array(group: zarr.Group, name: str, schema: StoreSchema) -> zarr.Array:
    """The one place that says which codecs a store has."""
    row = schema.arrays[name]
    return group.create_array(
        name,
        shape=(schema.num_slots, *row),
        shards=(schema.shard_rows, *row),
        chunks=(schema.chunk_rows, *row),
        dtype=schema.dtype,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=float("nan"),  # so that what is missing shows
        chunk_key_encoding={"name": "default", "separator": "."},
    )


def layout(array: zarr.Array) -> dict[str, Any]:
    """Metadata of an array that decides where its values lie."""
    metadata = array.metadata.to_dict()
    return {key: metadata[key] for key in ("data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs")}


@dataclass(frozen=True)
class Store:
    """A store that exists: its directory, schema, and the attributes that its stage gave it."""

    path: Path
    schema: StoreSchema
    attrs: dict[str, Any]


def open_store(path: Path, *, growing: bool = False) -> Store:
    """The store at `path`; an IntegrityError when its metadata is missing, damaged, or of another layout.

    `growing` tolerates arrays that are longer than the schema says: growth that was interrupted.
    """
    try:
        group = zarr.open_group(path, mode="r", zarr_format=3)
        attrs = dict(group.attrs.asdict())
        plain: Any = attrs.pop(SCHEMA_ATTRIBUTE)
        schema = StoreSchema(
            arrays={name: tuple(row) for name, row in plain["arrays"].items()},
            dtype=plain["dtype"],
            chunk_rows=plain["chunk_rows"],
            shard_rows=plain["shard_rows"],
            rows_per_shard=tuple(plain["rows_per_shard"]),
        )
        twin = zarr.create_group(MemoryStore())
        pairs = {
            name: (create_array(twin, name, schema), zarr.open_array(path / name, mode="r")) for name in schema.arrays
        }
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise IntegrityError(
            f"The metadata of {path.name} cannot be read ({' '.join(str(error).split())})", path=path, fix=REMAKE
        ) from error
    for name, (expected, found) in pairs.items():
        if layout(found) != layout(expected):
            raise IntegrityError(
                f"Array {name} of {path.name} has another layout",
                path=path / name,
                key=name,
                expected=layout(expected),
                found=layout(found),
                fix=REMAKE,
            )
        if found.shape != expected.shape and not (growing and found.shape[1:] == expected.shape[1:]):
            raise IntegrityError(
                f"Array {name} of {path.name} has another shape",
                path=path / name,
                key=name,
                expected=expected.shape,
                found=found.shape,
                fix=REMAKE,
            )
    return Store(path, schema, attrs)


def schema_attributes(schema: StoreSchema, attrs: dict[str, Any]) -> dict[str, Any]:
    """Attributes of the zarr group."""
    return {**attrs, SCHEMA_ATTRIBUTE: dataclasses.asdict(schema)}
