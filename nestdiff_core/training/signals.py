"""Being asked to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nestdiff_core.errors import Interrupted

SAME_REQUEST_SECONDS = 3.0


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and SIGINT set a flag, which the yielded function reads; a second one ends at once.

    What comes within SAME_REQUEST_SECONDS is the first one still: Slurm tells every process of a job, and so do
    torchrun and its parent.
    """
    asked: list[float] = []

    def ask(number: int, frame: object) -> None:
        now = time.monotonic()
        if asked and now - asked[0] > SAME_REQUEST_SECONDS:
            os._exit(Interrupted.code)
        asked.append(now)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
