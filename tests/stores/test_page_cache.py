"""Stores that fit into memory are read into the page cache; those that do not are left on the disk, and it is said."""

import ctypes
import logging
import mmap
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from processes import wait_for

from nestdiff_core.stores import page_cache
from nestdiff_core.stores.page_cache import available_memory, shuffled_reads
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.stores.writer import create_store, write_shard

ROWS, ROW = 2048, (2, 4, 32, 32)  # 32 MiB a shard, four times the largest readahead window seen


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "store.zarr"
    create_store(path, {"z": ROW}, "float16", [ROWS, ROWS], 64, {})
    for shard in range(2):
        rows = np.random.default_rng(shard).standard_normal((ROWS, *ROW), np.float32)
        write_shard(path, shard, {"z": rows.astype(np.float16)})
    return path


def resident(file: Path) -> float:
    """Share of a file's pages that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED) as pages:
        vector = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        view = np.frombuffer(pages, np.uint8)
        address = ctypes.c_void_p(view.ctypes.data)
        assert libc.mincore(address, ctypes.c_size_t(len(pages)), vector) == 0
        del view
        return float((np.frombuffer(vector, np.uint8) & 1).mean())


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    if max(map(resident, files)) > 0.1:
        pytest.skip("this file system does not drop pages when asked")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "bringing in"]


def with_memory(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(page_cache, "available_memory", lambda: count)


def test_a_store_that_fits_comes_into_memory(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the memory is enough: every page of every shard comes in without a read; one process does it."""
    reader = StoreReader(store, "z")
    files, size = reader.files(), sum(file.stat().st_size for file in reader.files())
    forget(files)
    with_memory(monkeypatch, 2 * size)
    with shuffled_reads([reader], bring_in=False) as fits:
        assert fits and not threads()
        time.sleep(0.2)
        assert max(map(resident, files)) < 0.1
    with shuffled_reads([reader]):
        wait_for(lambda: min(map(resident, files)) == 1.0)


def test_a_store_that_does_not_fit_stays_on_the_disk(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One byte too many: it is said, no thread starts, and rows are read without what lies around them."""
    reader = StoreReader(store, "z")
    files, size = reader.files(), sum(file.stat().st_size for file in reader.files())
    forget(files)
    with_memory(monkeypatch, 2 * size - 2)
    with caplog.at_level(logging.WARNING), shuffled_reads([reader]) as fits:
        assert not fits and not threads()
        reader.read(np.arange(0, 2 * ROWS, ROWS // 8), np.zeros(16, int))
    assert "read from the disk" in caplog.text
    assert max(map(resident, files)) < 0.1


@pytest.mark.parametrize("memory", [0, 2**50])
def test_reads_are_the_same(store: Path, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    """Wherever it is read from, a store has the same bits."""
    rows = np.random.default_rng(0).permutation(2 * ROWS)
    expected = StoreReader(store, "z").read(rows)
    with_memory(monkeypatch, memory)
    reader = StoreReader(store, "z")
    with shuffled_reads([reader]):
        np.testing.assert_array_equal(reader.read(rows), expected)


def test_the_thread_ends_with_the_block(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of a file, and by an error."""
    with_memory(monkeypatch, 2**50)
    monkeypatch.setattr(page_cache, "BLOCK_BYTES", 1)  # hours
    with pytest.raises(KeyboardInterrupt), shuffled_reads([StoreReader(store, "z")]):
        assert len(threads()) == 1
        raise KeyboardInterrupt
    assert not threads()


# --- memory that may be used --------------------------------------------------------------------------------------


def machine(root: Path, **files: str) -> Path:
    """A root with 8 kB available and other `files`, whose names have __ for /."""
    for name, text in {
        "proc__meminfo": "MemTotal:  99 kB\nMemAvailable:  8 kB\nHugePages_Total:  0\n",
        **files,
    }.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


V1, V2 = "sys__fs__cgroup__memory__", "sys__fs__cgroup__"
STAT = "anon 1\nactive_file 100\ninactive_file 200\ntotal_active_file 300\ntotal_inactive_file 400\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({"proc__self__cgroup": "0::/\n"}, 8192, id="no limit"),
        pytest.param(
            {
                "proc__self__cgroup": "0::/a/b\n",
                f"{V2}a__memory.max": "5000\n",
                f"{V2}a__memory.current": "3000\n",
                f"{V2}a__memory.stat": STAT,
                f"{V2}a__b__memory.max": "max\n",
                f"{V2}a__b__memory.current": "1000\n",
                f"{V2}a__b__memory.stat": STAT,
            },
            2300,
            id="version 2, the parent's limit, less what is used, but for pages of files",
        ),
        pytest.param(
            {
                "proc__self__cgroup": "0::/not/seen/here\n",
                f"{V2}memory.max": "5000\n",
                f"{V2}memory.current": "2000\n",
                f"{V2}memory.stat": "anon 1\n",
            },
            3000,
            id="a container whose mount is its own group",
        ),
        pytest.param(
            {
                "proc__self__cgroup": "9:name=systemd:/\n4:cpu,memory:/a\n0::/\n",
                f"{V1}a__memory.limit_in_bytes": "6000\n",
                f"{V1}a__memory.usage_in_bytes": "4000\n",
                f"{V1}a__memory.stat": STAT,
                f"{V1}memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}memory.usage_in_bytes": "4000\n",
                f"{V1}memory.stat": STAT,
            },
            2700,
            id="version 1",
        ),
    ],
)
def test_memory_of_machine_and_groups(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    """The least of what the machine and each group around the process leave."""
    assert available_memory(machine(tmp_path, **files)) == expected


def test_memory_of_this_machine(tmp_path: Path) -> None:
    """A number that can be; none where the system does not say."""
    assert 2**20 < available_memory() < 2**50
    assert available_memory(tmp_path) == 0
