"""How long work tells that it is moving: one callable, whoever listens.

    progress(done, total, what, **numbers)        # progress(300, 1500, "level 2", loss=0.41)

Core functions take `progress: Progress | None = None` and call it as often as they like; a listener decides
how often to show it. A terminal gets a tqdm bar, a Dagster run a line in its log and a point of its plots now and then.
Numbers that are parts of another (`loss_t0.25` of `loss`, see `part_of`) go to the plots only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from tqdm import tqdm


@runtime_checkable
class Progress(Protocol):
    def __call__(self, done: int, total: int, what: str, **numbers: float) -> None: ...


def part_of(name: str) -> str:
    """The number that one by this name is a part of: of `loss_t0.25`, `loss`; else itself."""
    return name.partition("_t0.")[0]


def _in_a_line(numbers: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if part_of(name) == name}


def silent(done: int, total: int, what: str, **numbers: float) -> None:
    """The listener that shows nothing."""


def duration(seconds: float) -> str:
    """An estimate in words: `about 20 s`, `about 3 min`, `about 5 h`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {max(1, round(seconds))} s"


class TerminalProgress:
    """A tqdm bar on stderr, a new one whenever `what` changes.

    As a context manager it closes the last one, so that a refusal is said behind it.
    """

    def __init__(self) -> None:
        self._what, self._bar = "", None

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, done: int, total: int, what: str, **numbers: float) -> None:
        if self._bar is None or what != self._what:
            self.close()
            # what was there before is none of this run's rate, from which the time that is left follows
            bar = tqdm(total=total, initial=done, desc=what, file=sys.stderr, dynamic_ncols=True)
            self._what, self._bar = what, bar
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if numbers := _in_a_line(numbers):
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in numbers.items()}, refresh=False)
        if done >= total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class LogProgress:
    """A line through `log` at most every `interval_seconds`, and at the end of each piece of work."""

    def __init__(self, log: Callable[[str], object], interval_seconds: float = 10.0) -> None:
        self.log, self.interval_seconds = log, interval_seconds
        self._shown, self._what = time.monotonic(), ""
        self._numbers: dict[str, float] = {}

    def __call__(self, done: int, total: int, what: str, **numbers: float) -> None:
        now = time.monotonic()
        if what != self._what:  # a new piece of work starts quietly
            self._what, self._numbers, self._shown = what, {}, now
        self._numbers = _in_a_line(numbers) or self._numbers  # what was last measured is shown until something newer is
        if done < total and now - self._shown < self.interval_seconds:
            return
        self._shown = now
        figures = "".join(f", {name} {value:.4g}" for name, value in self._numbers.items())
        self.log(f"{what}: {done:,} of {total:,}{figures}")


class NumbersProgress:
    """The step and what was measured to `tell`: first, last, and at most every `interval_seconds` between; later in a
    long work less often, every `share` of its time, so that a week gives some hundred points more than an hour.

    What is measured rarely is told again with each point until it is measured anew, so that its line has no gaps.
    """

    def __init__(
        self, tell: Callable[[dict[str, float]], object], interval_seconds: float = 10.0, share: float = 0.01
    ) -> None:
        self.tell, self.interval_seconds, self.share = tell, interval_seconds, share
        self._began, self._next = time.monotonic(), 0.0
        self._numbers: dict[str, float] = {}

    def __call__(self, done: int, total: int, what: str, **numbers: float) -> None:
        seconds = time.monotonic() - self._began
        self._numbers |= numbers
        if numbers and (done >= total or seconds >= self._next):
            self._next = seconds + max(self.interval_seconds, self.share * seconds)
            self.tell({"step": done, **self._numbers})


def all_of(*listeners: Progress) -> Progress:
    """A listener that tells each of these."""

    def progress(done: int, total: int, what: str, **numbers: float) -> None:
        for listener in listeners:
            listener(done, total, what, **numbers)

    return progress
