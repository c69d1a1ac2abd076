"""Stores: what is written is read back to the bit, by zarr and by the memory map; what is not there is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from nestdiff_core.errors import IntegrityError, NumericsError
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.stores.schema import open_store
from nestdiff_core.stores.writer import create_store, write_shard

ARRAYS = {"map": (3, 2, 2), "vector": (5,)}
CHUNK = 4
ATTRS = {"fingerprint": "abc", "config": {"shape": [1, 2]}}


def make(path: Path, counts: list[int], dtype: str = "float16", seed: int = 0) -> dict[str, np.ndarray]:
    """A full store at `path`, and its rows."""
    create_store(path, ARRAYS, dtype, counts, CHUNK, ATTRS)
    rng = np.random.default_rng(seed)
    rows = {name: rng.standard_normal((sum(counts), *row)).astype(dtype) for name, row in ARRAYS.items()}
    start = 0
    for shard, count in enumerate(counts):
        write_shard(path, shard, {name: values[start : start + count] for name, values in rows.items()})
        start += count
    return rows


def shard_file(path: Path, shard: int, array: str = "map") -> Path:
    return path / open_store(path).schema.shard_name(array, shard)


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# --- reading what was written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("counts", [[8, 8, 8], [8, 8, 3], [8, 5, 0, 8, 1], [3], [1, 1]])
def test_reader_gives_what_was_written(tmp_path: Path, counts: list[int], dtype: str) -> None:
    """Gather, shards and shape agree with the rows, also where image shards are ragged or empty."""
    path = tmp_path / "store.zarr"
    rows = make(path, counts, dtype)
    order = np.random.default_rng(1).integers(0, sum(counts), 50)
    for name, values in rows.items():
        reader = StoreReader(path, name)
        assert reader.shape == values.shape and reader.dtype == values.dtype and len(reader) == len(values)
        assert reader.rows_per_shard == tuple(counts) and reader.attrs == ATTRS
        np.testing.assert_array_equal(reader.read(order), values[order])
        np.testing.assert_array_equal(np.concatenate([shard for _, shard in reader.iterate_shards()]), values)


@pytest.mark.parametrize("counts", [[8, 8, 8], [8, 5, 0, 8, 1]])
def test_one_of_each_row_is_picked(tmp_path: Path, counts: list[int]) -> None:
    """`pick` reads, for each row, one entry along the row's first axis."""
    path = tmp_path / "store.zarr"
    rows, rng = make(path, counts), np.random.default_rng(1)
    order = rng.integers(0, sum(counts), 50)
    for name, values in rows.items():
        pick = rng.integers(0, values.shape[1], 50)
        np.testing.assert_array_equal(StoreReader(path, name).read(order, pick), values[order, pick])


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), seed=st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_reader_equals_plain_zarr(tmp_path_factory: pytest.TempPathFactory, counts: list[int], seed: int) -> None:
    """A plain `zarr.open` sees the same rows in their slots, and NaN in unused slots."""
    path = tmp_path_factory.mktemp("store") / "s.zarr"
    make(path, counts, seed=seed)
    reader, schema = StoreReader(path, "map"), open_store(path).schema
    plain = zarr.open_group(path, mode="r")["map"][:]
    slots = schema.slots_of_rows()
    np.testing.assert_array_equal(plain[slots], reader.read(np.arange(len(reader))))
    assert np.isnan(np.delete(plain, slots, axis=0)).all()


def test_even_shards_are_plain_rows(tmp_path: Path) -> None:
    """Where every shard but the last is full, the zarr array has exactly the images, in order."""
    path = tmp_path / "store.zarr"
    rows = make(path, [8, 8, 3])
    np.testing.assert_array_equal(zarr.open_group(path, mode="r")["vector"][:], rows["vector"])


def test_layout_on_disk(tmp_path: Path) -> None:
    """One file a shard: raw little-endian rows, crc32c behind each chunk, no compression, NaN as fill value."""
    path = tmp_path / "store.zarr"
    rows = make(path, [8, 3])
    metadata = json.loads((path / "map" / "zarr.json").read_text())
    sharding = metadata["codecs"][0]
    assert sharding["name"] == "sharding_indexed" and metadata["fill_value"] == "NaN"
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "crc32c"]
    assert sharding["configuration"]["chunk_shape"] == [CHUNK, 3, 2, 2]
    data = shard_file(path, 0).read_bytes()
    assert data[: CHUNK * 24] == rows["map"][:CHUNK].tobytes()
    assert sorted(p.name for p in (path / "map").iterdir()) == ["c.0.0.0.0", "c.1.0.0.0", "zarr.json"]


def test_rows_out_of_range_are_refused(tmp_path: Path) -> None:
    """No row behind the last image can be read, though the ragged store has slots there."""
    path = tmp_path / "store.zarr"
    make(path, [8, 3])
    with pytest.raises(IndexError):
        StoreReader(path, "map").read(np.array([11]))


def test_no_rows(tmp_path: Path) -> None:
    """An empty gather has the shape of no rows."""
    path = tmp_path / "store.zarr"
    make(path, [4])
    assert StoreReader(path, "map").read(np.arange(0)).shape == (0, 3, 2, 2)


def test_read_is_a_copy(tmp_path: Path) -> None:
    """Changing a batch changes neither the file nor the next batch."""
    path = tmp_path / "store.zarr"
    rows, reader = make(path, [4]), StoreReader(path, "map")
    reader.read(np.arange(4))[:] = 7
    np.testing.assert_array_equal(reader.read(np.arange(4)), rows["map"])
    np.testing.assert_array_equal(StoreReader(path, "map").read_shard(0), rows["map"])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reader_crosses_processes(tmp_path: Path, method: str) -> None:
    """A reader that has already read works in forked and in spawned workers."""
    path = tmp_path / "store.zarr"
    rows, reader = make(path, [8, 5]), StoreReader(path, "map")
    reader.read(np.arange(3))
    with multiprocessing.get_context(method).Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(StoreReader.read, (reader, np.arange(13))), rows["map"])
        pool.close()
        pool.join()


def test_pickle_is_small(tmp_path: Path) -> None:
    """A pickled reader carries the schema, not the data."""
    path = tmp_path / "store.zarr"
    make(path, [8] * 20)
    reader = StoreReader(path, "map")
    reader.read(np.arange(160))
    assert len(pickle.dumps(reader)) < 4000


def test_many_shards_need_few_file_descriptors(tmp_path: Path) -> None:
    """Memory maps keep no file open: 80 shards are read under a limit of 64 descriptors."""
    path = tmp_path / "store.zarr"
    rows = make(path, [1] * 80)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(64, before + 16), limits[1]))
    try:
        np.testing.assert_array_equal(StoreReader(path, "map").read(np.arange(80)), rows["map"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


# --- writing: refusals, repeats, growth ---------------------------------------------------------------------------


def test_write_returns_its_files(tmp_path: Path) -> None:
    """The files that hold a shard are named, so that a part can be committed; an empty shard has none."""
    path = tmp_path / "store.zarr"
    create_store(path, ARRAYS, "float16", [2, 0], CHUNK, {})
    values = {"map": np.ones((2, 3, 2, 2)), "vector": np.ones((2, 5))}
    assert write_shard(path, 0, values) == [path / "map/c.0.0.0.0", path / "vector/c.0.0"]
    assert write_shard(path, 1, {name: v[:0] for name, v in values.items()}) == []


def test_same_bytes_whatever_came_before(tmp_path: Path) -> None:
    """Rewriting a shard, or writing shards in another order, leaves byte-identical files: nothing is merged."""
    rows = make(tmp_path / "a.zarr", [8, 5])
    path = tmp_path / "b.zarr"
    create_store(path, ARRAYS, "float16", [8, 5], CHUNK, ATTRS)
    for shard, part in ((1, slice(8, 13)), (0, slice(0, 8))):
        write_shard(path, shard, {name: np.full_like(values[part], 9) for name, values in rows.items()})
        write_shard(path, shard, {name: values[part] for name, values in rows.items()})
    assert files(path) == files(tmp_path / "a.zarr")


def test_torn_shard_is_overwritten(tmp_path: Path) -> None:
    """A shard file that a fault left damaged does not stop its rewrite."""
    path = tmp_path / "store.zarr"
    rows = make(path, [8])
    shard_file(path, 0).write_bytes(b"torn")
    write_shard(path, 0, rows)
    np.testing.assert_array_equal(StoreReader(path, "map").read_shard(0), rows["map"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"map": np.ones((7, 3, 2, 2))}, (8, 3, 2, 2)),
        ({"map": np.ones((8, 3, 4))}, (8, 3, 2, 2)),
        ({"map": np.ones((8, 3, 2, 2), np.int32)}, (8, 3, 2, 2)),
    ],
)
def test_wrong_shape_or_type_is_refused(
    tmp_path: Path, change: dict[str, np.ndarray], expected: tuple[int, ...]
) -> None:
    """Another row count, row shape or an integer dtype is refused before anything is written."""
    path = tmp_path / "store.zarr"
    create_store(path, ARRAYS, "float16", [8], CHUNK, {})
    with pytest.raises(IntegrityError) as error:
        write_shard(path, 0, {"map": np.ones((8, 3, 2, 2)), "vector": np.ones((8, 5)), **change})
    assert error.value.expected[0] == expected and not shard_file(path, 0).exists()


def test_missing_array_is_refused(tmp_path: Path) -> None:
    """A shard is written with all of its arrays or not at all."""
    path = tmp_path / "store.zarr"
    create_store(path, ARRAYS, "float16", [8], CHUNK, {})
    with pytest.raises(IntegrityError, match="all of its arrays"):
        write_shard(path, 0, {"map": np.ones((8, 3, 2, 2))})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    """A NaN or infinity names array, row, shard, place and the image's key; nothing of the shard is written."""
    path = tmp_path / "store.zarr"
    create_store(path, ARRAYS, "float16", [8, 8], CHUNK, {})
    values = {"map": np.ones((8, 3, 2, 2), np.float16), "vector": np.ones((8, 5), np.float16)}
    values["map"][5, 2, 1, 0] = value
    with pytest.raises(NumericsError, match=r"Array map, row 5 of shard 1, at \[2, \d, \d\], is not finite") as error:
        write_shard(path, 1, values, keys=[f"image{i}" for i in range(8)])
    assert error.value.key == "image5"
    assert not shard_file(path, 1).exists() and not shard_file(path, 1, "vector").exists()


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    """A finite value beyond float16 is refused as that, with the value; a float32 store takes it."""
    values = {"map": np.ones((4, 3, 2, 2), np.float32), "vector": np.ones((4, 5), np.float32)}
    values["vector"][2, 4] = -70000.0
    create_store(tmp_path / "half.zarr", ARRAYS, "float16", [4], CHUNK, {})
    with pytest.raises(
        NumericsError, match=r"Array vector, row 2 of shard 0, at \[4\], does not fit into float16"
    ) as error:
        write_shard(tmp_path / "half.zarr", 0, values)
    assert error.value.found == -70000.0
    create_store(tmp_path / "single.zarr", ARRAYS, "float32", [4], CHUNK, {})
    write_shard(tmp_path / "single.zarr", 0, values)


def test_create_is_idempotent(tmp_path: Path) -> None:
    """Creating a store that stands with the same schema changes no byte."""
    path = tmp_path / "store.zarr"
    make(path, [8, 5])
    before = files(path)
    create_store(path, ARRAYS, "float16", [8, 5], CHUNK, {"fingerprint": "abc", "config": {"shape": (1, 2)}})
    assert files(path) == before


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("arrays", {"arrays": {"map": (3, 2, 2)}}),
        ("arrays", {"arrays": {"map": (3, 2, 2), "vector": (6,)}}),
        ("dtype", {"dtype": "float32"}),
        ("chunk_rows", {"chunk_rows": 2}),
        ("attrs", {"attrs": {"fingerprint": "other"}}),
        ("shard_rows", {"counts": [8, 9]}),
    ],
)
def test_another_schema_is_refused_by_field(tmp_path: Path, field: str, change: dict[str, Any]) -> None:
    """A store of another schema stays as it is, and the error names the field that differs."""
    path = tmp_path / "store.zarr"
    make(path, [8])
    before = files(path)
    arguments = {"arrays": ARRAYS, "dtype": "float16", "counts": [8], "chunk_rows": CHUNK, "attrs": ATTRS, **change}
    with pytest.raises(IntegrityError) as error:
        create_store(path, **arguments)
    assert error.value.key == field and files(path) == before


def test_growth_keeps_what_is_there(tmp_path: Path) -> None:
    """With more shards, committed shards keep their bytes and the whole equals a store made at once."""
    whole = make(tmp_path / "whole.zarr", [8, 8, 8, 2])
    path = tmp_path / "grown.zarr"
    create_store(path, ARRAYS, "float16", [8, 8], CHUNK, ATTRS)
    for shard in (0, 1):
        write_shard(path, shard, {name: values[shard * 8 : shard * 8 + 8] for name, values in whole.items()})
    create_store(path, ARRAYS, "float16", [8, 8, 8, 2], CHUNK, ATTRS)
    for shard, part in ((2, slice(16, 24)), (3, slice(24, 26))):
        write_shard(path, shard, {name: values[part] for name, values in whole.items()})
    assert files(path) == files(tmp_path / "whole.zarr")


def test_growth_drops_only_the_shard_that_changed(tmp_path: Path) -> None:
    """When the last image shard has filled up, its file goes and the others stay."""
    path = tmp_path / "store.zarr"
    make(path, [8, 3])
    create_store(path, ARRAYS, "float16", [8, 8, 1], CHUNK, ATTRS)
    assert shard_file(path, 0).exists() and not shard_file(path, 1).exists()
    group = zarr.open_group(path, mode="r")  # its consolidated metadata has grown too
    assert group.metadata.consolidated_metadata is not None
    assert {name: array.shape[0] for name, array in group.arrays()} == dict.fromkeys(ARRAYS, 17)


def test_store_is_remade_when_no_shard_stays(tmp_path: Path) -> None:
    """A single small shard that grew beyond its room makes a new store, as nothing of the old one holds."""
    path = tmp_path / "store.zarr"
    make(path, [3])
    create_store(path, ARRAYS, "float16", [30, 5], CHUNK, ATTRS)
    assert open_store(path).schema.shard_rows == 32 and not shard_file(path, 0).exists()


def test_interrupted_growth_is_repeated(tmp_path: Path) -> None:
    """Killed after an array was lengthened but before the attributes: readers refuse, creating again finishes."""
    path = tmp_path / "store.zarr"
    rows = make(path, [8])
    zarr.open_array(path / "map", mode="r+").resize((16, 3, 2, 2))
    with pytest.raises(IntegrityError, match="another shape"):
        StoreReader(path, "map")
    create_store(path, ARRAYS, "float16", [8, 8], CHUNK, ATTRS)
    assert not shard_file(path, 1).exists()
    write_shard(path, 1, rows)
    np.testing.assert_array_equal(StoreReader(path, "map").read(np.arange(16)), np.concatenate([rows["map"]] * 2))


def test_interrupted_growth_is_undone(tmp_path: Path) -> None:
    """The same, but the images went back to what they were: the store is as before."""
    path = tmp_path / "store.zarr"
    make(path, [8])
    before = files(path)
    zarr.open_array(path / "map", mode="r+").resize((16, 3, 2, 2))
    create_store(path, ARRAYS, "float16", [8], CHUNK, ATTRS)
    assert files(path) == before


# --- damage -------------------------------------------------------------------------------------------------------

CUTS = {
    "deleted": lambda data: None,
    "empty": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
}


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("moment", ["before opening", "after opening"])
def test_missing_or_cut_shard_is_named(tmp_path: Path, kind: str, moment: str) -> None:
    """A shard file of another size is refused by shard and file, at opening and at reading; never zeros."""
    path = tmp_path / "store.zarr"
    make(path, [8, 8, 3])
    file = shard_file(path, 1)
    reader = StoreReader(path, "map") if moment == "after opening" else None
    data = CUTS[kind](file.read_bytes())
    file.unlink() if data is None else file.write_bytes(data)
    reads = (
        [lambda: StoreReader(path, "map")]
        if reader is None
        else [lambda: reader.read(np.arange(3)), lambda: reader.read_shard(1)]
    )
    for read in reads:
        with pytest.raises(IntegrityError, match=r"Shard 1 .*c\.1\.0\.0\.0") as error:
            read()
        assert error.value.path == str(file)


def test_flipped_bit_is_found(tmp_path: Path) -> None:
    """Any single flipped bit of a shard file, in data, checksums or index, is refused by `read_shard`."""
    path = tmp_path / "store.zarr"
    make(path, [8])
    reader, file = StoreReader(path, "map"), shard_file(path, 0)
    whole = file.read_bytes()
    for bit in range(0, 8 * len(whole), 29):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises(IntegrityError, match=r"Shard 0 is damaged .*c\.0\.0\.0\.0"):
            reader.read_shard(0)


def test_gather_refuses_another_index(tmp_path: Path) -> None:
    """The memory map is used only where the shard's index says what it assumes."""
    path = tmp_path / "store.zarr"
    make(path, [8])
    file = shard_file(path, 0)
    data = bytearray(file.read_bytes())
    data[-36:-20], data[-20:-4] = data[-20:-4], data[-36:-20]  # the two chunks exchanged
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="another chunk index"):
        StoreReader(path, "map").read(np.arange(8))


METADATA = {
    "deleted": lambda m: None,
    "not JSON": lambda m: "{",
    "no shards": lambda m: {**m, "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]},
    "unknown codec": lambda m: {**m, "codecs": [{"name": "rot13"}]},
    "dtype": lambda m: {**m, "data_type": "int16"},
    "shape": lambda m: {**m, "shape": [16, 3, 2, 2]},
    "row shape": lambda m: {**m, "shape": [8, 3, 2, 3]},
    "fill value": lambda m: {**m, "fill_value": 0},
    "format": lambda m: {**m, "zarr_format": 2},
    "a list": lambda m: [m],
}


@pytest.mark.parametrize("kind", METADATA)
def test_edited_array_metadata_is_refused(tmp_path: Path, kind: str) -> None:
    """zarr.json of an array that was deleted, broken or edited is an IntegrityError that names the store."""
    path = tmp_path / "store.zarr"
    make(path, [8])
    file = path / "map" / "zarr.json"
    edited = METADATA[kind](json.loads(file.read_text()))
    file.unlink() if edited is None else file.write_text(edited if isinstance(edited, str) else json.dumps(edited))
    with pytest.raises(IntegrityError, match=r"store\.zarr"):
        StoreReader(path, "map")


@pytest.mark.parametrize(
    "change",
    [{}, {"dtype": "float12"}, {"chunk_rows": 0}, {"rows_per_shard": None}, {"arrays": {}}, {"shard_rows": 12}],
)
def test_edited_schema_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A schema attribute that is missing, nonsense, or at odds with the arrays is an IntegrityError."""
    path = tmp_path / "store.zarr"
    make(path, [8])
    file = path / "zarr.json"
    metadata = json.loads(file.read_text())
    schema = metadata["attributes"].pop("nestdiff_store")
    if change:
        metadata["attributes"]["nestdiff_store"] = {**schema, **change}
    file.write_text(json.dumps(metadata))
    with pytest.raises(IntegrityError):
        StoreReader(path, "map")


def test_unknown_array_and_missing_store(tmp_path: Path) -> None:
    """An array that the store does not have is named with those it has; so is a store that is not there."""
    path = tmp_path / "store.zarr"
    make(path, [8])
    with pytest.raises(IntegrityError, match="z_2") as error:
        StoreReader(path, "z_2")
    assert error.value.expected == ["map", "vector"]
    shutil.rmtree(path)
    with pytest.raises(IntegrityError, match=r"store\.zarr"):
        StoreReader(path, "map")
