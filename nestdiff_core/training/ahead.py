"""Batches made before they are needed, and pages read before they are needed."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

DEPTH = 2
CGROUP_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


class Ahead(Generic[T]):
    """make(first), make(first + 1), ..., make(end - 1), in a thread that is up to DEPTH of them ahead.

    Use as a context. What `make` raises is raised by the `next` that would have returned it.
    """

    def __init__(self, make: Callable[[int], T], first: int, end: int) -> None:
        self._make, self._following, self._end = make, first, end
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: deque[Future[T]] = deque()
        self.waited = 0.0  # seconds that `next` has waited in all

    def next(self) -> T:
        """The next one, waited for if need be; IndexError behind the last."""
        while len(self._coming) < DEPTH and self._following < self._end:
            self._submit()
        start = time.monotonic()
        made = self._coming.popleft().result()
        self.waited += time.monotonic() - start
        if self._following < self._end:
            self._submit()  # while what was made is used
        return made

    def _submit(self) -> None:
        self._coming.append(self._pool.submit(self._make, self._following))
        self._following += 1

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def available_memory() -> int:
    """Bytes that this process may still use without swapping: what the machine has, or the container allows."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    fields = dict(line.split(":", 1) for line in lines)
    found = [int(fields["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in fields else []
    for limit, used in CGROUP_LIMITS:
        if limit.is_file() and (allowed := limit.read_text().strip()).isdigit():
            found.append(int(allowed) - int(used.read_text()))
    return max(0, min(found, default=0))


def read_into_memory(files: Iterable[Path], limit: int) -> bool:
    """Have the system read files into its page cache in the background, if together they fit into `limit` bytes.

    All processes of a machine share that cache. Returns whether they fit.
    """
    files = list(files)
    if sum(file.stat().st_size for file in files) > limit:
        return False
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)
    return True
