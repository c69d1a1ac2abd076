"""Values made in a thread before they are asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """`make`, a function of 0, 1, 2, ..., whose next `depth` values are made in a thread while one is used.

    Values may be asked for in any order; i, then i + 1, is the one that is fast. What `make` raises is raised by the
    call that asks for that value. `end`: from here on nothing is made ahead.

    Use as a context, or `close` it: the thread has then ended. waited: seconds that callers have waited in all.
    """

    def __init__(self, make: Callable[[int], T], *, end: int | None = None, depth: int = 2) -> None:
        self._make, self._end, self._depth = make, end, depth
        self._pool, self._made = self._new_pool(), dict[int, Future[T]]()
        self.waited = 0.0

    def __call__(self, i: int) -> T:
        start = time.monotonic()
        end = i + 1 + self._depth if self._end is None else max(i + 1, min(i + 1 + self._depth, self._end))
        for j in self._made.keys() - set(range(i, end)):
            self._made.pop(j).cancel()  # let go before another is made
        for j in range(i, end):
            if j not in self._made:
                self._made[j] = self._pool.submit(self._make, j)
        value = self._made[i].result()
        self.waited += time.monotonic() - start
        return value

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="ahead")  # starts its thread with the first value

    def close(self) -> None:
        """Wait for what is being made, forget the rest, end the thread; a later call starts anew."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._made = self._new_pool(), {}

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
