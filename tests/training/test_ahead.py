"""Batches and pages that are there before they are needed."""

import ctypes
import mmap
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nestdiff_core.training import ahead
from nestdiff_core.training.ahead import DEPTH, Ahead, available_memory, read_into_memory


def test_every_batch_comes_once_and_in_order() -> None:
    before = threading.active_count()
    with Ahead(lambda step: step * step, 3, 10) as batches:
        assert [batches.next() for _ in range(7)] == [step * step for step in range(3, 10)]
        with pytest.raises(IndexError):
            batches.next()
    assert threading.active_count() == before


def test_no_more_are_made_than_are_needed_soon() -> None:
    """While one is used at most DEPTH others are held, so memory stays bounded."""
    made: list[int] = []
    with Ahead(lambda step: made.append(step) or step, 0, 100) as batches:
        for step in range(5):
            assert batches.next() == step
            time.sleep(0.02)
            assert max(made) <= step + DEPTH
    assert max(made) <= 4 + DEPTH


def test_an_error_comes_with_its_batch() -> None:
    """As itself, after the batches before it, and the thread ends."""

    def make(step: int) -> int:
        if step == 2:
            raise ZeroDivisionError("batch 2")
        return step

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="batch 2"), Ahead(make, 0, 10) as batches:
        assert [batches.next(), batches.next()] == [0, 1]
        batches.next()
    assert threading.active_count() == before


def test_waiting_is_counted() -> None:
    """A slow maker is waited for; one that keeps up is not."""
    with Ahead(lambda step: time.sleep(0.05), 0, 4) as batches:
        for _ in range(4):
            batches.next()
        assert batches.waited > 0.15
    with Ahead(lambda step: time.sleep(0.01), 0, 6) as batches:
        batches.next()
        first = batches.waited
        for _ in range(5):
            time.sleep(0.05)
            batches.next()
        assert batches.waited - first < 0.01


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


def forget(file: Path) -> None:
    """Drop a file from the page cache."""
    handle = os.open(file, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def test_files_that_fit_are_read_into_memory(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(os.urandom(2**23))
        forget(file)
    if max(map(resident, files)) > 0.5:
        pytest.skip("this file system does not drop pages when asked")
    assert not read_into_memory(files, 2**24 - 1)
    assert max(map(resident, files)) < 0.5
    assert read_into_memory(files, 2**24)
    deadline = time.monotonic() + 30
    while min(map(resident, files)) < 0.99 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert min(map(resident, files)) >= 0.99


def test_available_memory_heeds_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "CGROUP_LIMITS", ())
    machine = available_memory()
    assert 2**20 < machine < 2**50
    (tmp_path / "limit").write_text("5000000\n")
    (tmp_path / "used").write_text("2000000\n")
    monkeypatch.setattr(ahead, "CGROUP_LIMITS", ((tmp_path / "limit", tmp_path / "used"),))
    assert available_memory() == 3_000_000
    (tmp_path / "limit").write_text("max\n")
    assert available_memory() > 3_000_000
