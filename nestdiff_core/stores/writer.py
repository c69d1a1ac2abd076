"""Writing a store, one whole image shard at a time.

A shard is written in one assignment by one writer and read back through zarr, checksums included; committing it is the
caller's part: `ArtifactWriter.commit_part(name, files, ...)` with the files that `write_shard` returns.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from nestdiff_core.errors import IntegrityError, NumericsError
from nestdiff_core.files import TEMPORARY
from nestdiff_core.stores.finite import first_non_finite
from nestdiff_core.stores.schema import (
    GROUP_FILE,
    REMAKE,
    Store,
    StoreSchema,
    create_array,
    open_store,
    schema_attributes,
)


def create_store(
    path: Path,
    arrays: dict[str, tuple[int, ...]],
    dtype: str,
    counts: Sequence[int],
    chunk_rows: int,
    attrs: dict[str, Any],
) -> Store:
    """The store at `path`: made where none stands, fitted to `counts` where the image shards have changed.

    arrays: shape of one row of each array, e.g. {"map": (1, 768, 14, 14), "vector": (1, 768)}.
    dtype: float16 or float32. counts: rows of each image shard. attrs: plain JSON that the stage wants to say.

    Shards whose count stays are kept. A shard whose count has changed loses its file, so its part no longer counts;
    a store of which no shard stays is made anew.

    Raises IntegrityError, naming the field, when a store of another schema stands there.
    """
    attrs = json.loads(json.dumps(attrs))  # what reading gives back: tuples are lists
    schema = StoreSchema(
        arrays=dict(arrays),
        dtype=dtype,
        chunk_rows=chunk_rows,
        shard_rows=-(-max(counts) // chunk_rows) * chunk_rows,
        rows_per_shard=tuple(counts),
    )
    if (path / GROUP_FILE).exists():
        store = open_store(path, growing=True)
        _require_same(store, schema, attrs)
        if any(old == new for old, new in zip(store.schema.rows_per_shard, counts, strict=False)):
            return _fit(store, dataclasses.replace(schema, shard_rows=store.schema.shard_rows))
    return _create(path, schema, attrs)


def _create(path: Path, schema: StoreSchema, attrs: dict[str, Any]) -> Store:
    temporary = path.parent / f"{TEMPORARY}{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    if path.exists():
        os.rename(path, temporary)
        shutil.rmtree(temporary)
    group = zarr.create_group(temporary, attributes=schema_attributes(schema, attrs))
    for name in schema.arrays:
        create_array(group, name, schema)
    _consolidate(temporary)
    os.rename(temporary, path)
    return Store(path, schema, attrs)


def _consolidate(path: Path) -> None:
    """Repeat the arrays' metadata in the group's: one request, not one per array, opens a store in object storage."""
    with warnings.catch_warnings():  # that not every zarr v3 tool reads it; those that do not lose nothing
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(path, zarr_format=3)


def _require_same(store: Store, schema: StoreSchema, attrs: dict[str, Any]) -> None:
    old = store.schema
    fields = {
        "arrays": (schema.arrays, old.arrays),
        "dtype": (schema.dtype, old.dtype),
        "chunk_rows": (schema.chunk_rows, old.chunk_rows),
        "attrs": (attrs, store.attrs),
    }
    for field, (expected, found) in fields.items():
        if expected != found:
            raise IntegrityError(
                f"{store.path.name} was made with another {field}",
                path=store.path,
                key=field,
                expected=expected,
                found=found,
                fix=REMAKE,
            )


def _fit(store: Store, schema: StoreSchema) -> Store:
    """Change the counts of a store to those of `schema`; the attributes come last, so interrupted work is repeated."""
    old = store.schema
    if max(schema.rows_per_shard) > schema.shard_rows:
        raise IntegrityError(
            f"{store.path.name} has no room for an image shard of this size",
            path=store.path,
            key="shard_rows",
            expected=f"at most {schema.shard_rows} images",
            found=max(schema.rows_per_shard),
            fix="Cut the new images into smaller shards, or remove the store and materialise its stage again.",
        )
    for name, row in schema.arrays.items():
        for shard, (before, now) in enumerate(zip(old.rows_per_shard, schema.rows_per_shard, strict=False)):
            if before != now:
                (store.path / schema.shard_name(name, shard)).unlink(missing_ok=True)
        array = zarr.open_array(store.path / name, mode="r+")
        if array.shape[0] != schema.num_slots:
            array.resize((schema.num_slots, *row))
    if schema != old:
        zarr.open_group(store.path, mode="r+").update_attributes(schema_attributes(schema, store.attrs))
    _consolidate(store.path)
    return Store(store.path, schema, store.attrs)


def write_shard(
    path: Path, shard: int, arrays: dict[str, np.ndarray], *, keys: Sequence[str] | None = None
) -> list[Path]:
    """Write image shard `shard` of the store at `path`, whole, and read it back; returns the files that hold it.

    arrays: for each array of the store, (rows_per_shard[shard], *row) in a float dtype; rounded to the store's.
    keys: names of the rows, for errors.

    Raises IntegrityError for another shape, dtype or set of arrays, or when the disk gives back something else;
    NumericsError, naming array, row and place, for a value that is not finite or overflows the store's dtype.
    """
    store = open_store(path)
    schema = store.schema
    if set(arrays) != set(schema.arrays):
        raise IntegrityError(
            f"A shard of {store.path.name} needs all of its arrays",
            path=store.path,
            expected=sorted(schema.arrays),
            found=sorted(arrays),
            fix="Pass exactly these to write_shard.",
        )
    rounded = {name: _rounded(store, shard, name, values, keys) for name, values in arrays.items()}
    if schema.rows_per_shard[shard] == 0:
        return []
    return [_write_array(store, shard, name, values) for name, values in rounded.items()]


def _rounded(store: Store, shard: int, name: str, values: np.ndarray, keys: Sequence[str] | None) -> np.ndarray:
    """`values` in the store's dtype, after every check."""
    schema = store.schema
    expected = (schema.rows_per_shard[shard], *schema.arrays[name])
    if values.shape != expected or values.dtype.kind != "f":
        raise IntegrityError(
            f"Shard {shard} of array {name} has another shape or type",
            path=store.path,
            key=name,
            expected=(expected, schema.dtype),
            found=(values.shape, str(values.dtype)),
            fix="Pass all rows of the shard as floats.",
        )
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, schema.dtype)
    bad = first_non_finite(stored)
    if bad is None:
        return stored
    where = f"Array {name}, row {bad[0]} of shard {shard}, at {list(bad[1:])},"
    key = keys[bad[0]] if keys is not None else None
    if np.isfinite(values[bad]):
        raise NumericsError(
            f"{where} does not fit into {schema.dtype}",
            path=store.path,
            key=key,
            expected=f"magnitude <= {np.finfo(schema.dtype).max:g}",
            found=float(values[bad]),
            fix="Set features.dtype to float32 in the experiment.",
        )
    raise NumericsError(
        f"{where} is not finite",
        path=store.path,
        key=key,
        expected="finite numbers",
        found=str(values[bad]),
        fix="Check the encoder's weights and this image.",
    )


def _write_array(store: Store, shard: int, name: str, values: np.ndarray) -> Path:
    file = store.path / store.schema.shard_name(name, shard)
    file.unlink(missing_ok=True)  # else zarr would merge into what an uncommitted attempt left
    array = zarr.open_array(store.path / name, mode="r+", config={"write_empty_chunks": True})
    slots = store.schema.slots(shard)
    array[slots] = values
    try:
        found = np.asarray(array[slots])
        same = np.array_equal(found.view(np.uint8), values.view(np.uint8))  # bytes: far faster than float16
    except ValueError:  # zarr's checksum error
        same = False
    if not same or file.stat().st_size != store.schema.shard_bytes(name, shard):
        raise IntegrityError(
            f"{file.name} reads back differently from what was written",
            path=file,
            fix="Check the disk, then run the same command again.",
        )
    return file
