"""Stores that fit into memory are read from memory: pages are brought in before shuffled reads ask for them.

Pages stay the operating system's. All processes of a machine share them, and where memory gets short they are
dropped, not swapped.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nestdiff_core.stores.reader import StoreReader

MEMORY_SHARE = 0.5  # of what is available: the rest is left to networks, batches and neighbours
BLOCK_BYTES = 2**22

logger = logging.getLogger("nestdiff")


@contextlib.contextmanager
def shuffled_reads(readers: Sequence[StoreReader], *, bring_in: bool = True) -> Iterator[bool]:
    """Within the block `readers` are read in no order; yields whether what they read fits into memory.

    If it does, a thread reads every file through once; else rows are read from the disk one by one, and the log says
    so. bring_in: False in all but one of a machine's processes.

    Neither changes a bit of what is read.
    """
    files = [file for reader in readers for file in reader.files()]
    size, room = sum(file.stat().st_size for file in files), int(MEMORY_SHARE * available_memory())
    for reader in readers:
        reader.shuffled = True
    with contextlib.ExitStack() as stack:
        if size <= room:
            if bring_in:
                logger.info("%.1f GiB of stores are brought into memory.", size / 2**30)
                stack.enter_context(_bringing_in(files))
        elif bring_in:
            logger.warning(
                "Batches are read from the disk: %.1f GiB of stores, and room for %.1f GiB, %.0f %% of the memory "
                "available.",
                size / 2**30,
                room / 2**30,
                100 * MEMORY_SHARE,
            )
        yield size <= room


@contextlib.contextmanager
def _bringing_in(files: Iterable[Path]) -> Iterator[None]:
    """A thread that reads files from beginning to end, and that ends with the block.

    Linux answers POSIX_FADV_WILLNEED with no more than one readahead window of each file.
    """
    over = threading.Event()

    def read() -> None:
        block = bytearray(BLOCK_BYTES)
        with contextlib.suppress(OSError):  # who needs a file that cannot be read will say so
            for file in files:
                with file.open("rb", buffering=0) as handle:
                    while not over.is_set() and handle.readinto(block):
                        pass

    thread = threading.Thread(target=read, name="bringing in", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may come to use without swapping: of the machine, and of every cgroup that it is in.

    Files in the page cache count as available: they make room. 0 where the system does not say. root: of /proc, /sys.
    """
    try:
        machine = _numbers(root / "proc/meminfo")["MemAvailable:"] * 1024
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, KeyError):
        return 0
    room = [machine]
    for line in groups:  # "0::/path" in version 2, "4:memory:/path" in version 1
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, used, prefix = "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            mount, limit, used, prefix = (
                "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_",
            )
        else:
            continue
        group = root / mount / path.lstrip("/")
        for folder in (group, *group.parents):  # a container may see its own group as the mount
            with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
                allowed, now = (int((folder / name).read_text()) for name in (limit, used))
                pages = _numbers(folder / "memory.stat")
                files = sum(pages.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
                room.append(allowed - now + files)
            if folder == root / mount:
                break
    return max(0, min(room))


def _numbers(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    return {name: int(number) for name, number, *_ in map(str.split, file.read_text().splitlines())}
