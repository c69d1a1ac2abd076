"""The project's errors and exit codes: one class per exit code, each saying what to do.

Every refusal ends a command with the class's `code` and exactly one JSON line on stderr (`to_json`),
so that scripts and schedulers can act on it without reading prose. Each class also derives from
the builtin its meaning is closest to, so `except ValueError` in a notebook still works.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

EXIT_CODES = {
    0: "done",
    1: "a bug in nestdiff",
    2: "usage or configuration",
    3: "bad input beyond the budget",
    4: "integrity: an artifact is missing, damaged or was made by something else",
    5: "environment: disk, memory, permission, or a lock that is held",
    6: "numerics: a value that is not finite or cannot be used",
    75: "interrupted, run the same command again to resume",
}


class NestdiffError(Exception):
    """Base of all refusals. `what` is one sentence; the rest finish it for people and for scripts.

    stage, level, path, key: where it happened. expected, found: the two values that disagree.
    fix: the sentence that says what to do.
    """

    code: ClassVar[int] = 1
    shared = False  # whether every process of a group raises it

    def __init__(
        self,
        what: str,
        *,
        fix: str,
        stage: str | None = None,
        level: int | None = None,
        path: object | None = None,
        key: str | None = None,
        expected: Any = None,
        found: Any = None,
    ) -> None:
        self.what, self.fix = what, fix
        self.stage, self.level, self.key = stage, level, key
        self.path = None if path is None else str(path)
        self.expected, self.found = expected, found
        super().__init__(what)

    def __str__(self) -> str:
        level = None if self.level is None else f"level {self.level}"
        where = ", ".join(text for text in (level, self.key, self.path) if text and text not in self.what)
        values = [
            f"{name} {value!r}"
            for name, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        sentence = self.what.rstrip(".") + (f" ({where})" if where else "")
        return f"{': '.join([sentence, *([', '.join(values)] if values else [])])}. {self.fix}"

    def to_json(self) -> str:
        """The one line that a refusing command leaves on stderr."""
        record = {
            "code": self.code,
            "error": self.what,
            "stage": self.stage,
            "level": self.level,
            "path": self.path,
            "key": self.key,
            "expected": self.expected,
            "found": self.found,
            "fix": self.fix,
        }
        return json.dumps(record, default=str, ensure_ascii=True)


class ConfigError(NestdiffError, ValueError):
    """The experiment cannot work as written; nothing was started."""

    code = 2


class InputError(NestdiffError, ValueError):
    """Images or labels that cannot be used, beyond `max_bad_samples`."""

    code = 3


class IntegrityError(NestdiffError, RuntimeError):
    """An artifact is missing, damaged, incomplete, or belongs to another configuration."""

    code = 4


class EnvironmentFault(NestdiffError, OSError):
    """The machine says no: disk full, permission, memory, or a lock held by a living process."""

    code = 5

    def __str__(self) -> str:  # OSError would print its args tuple
        return NestdiffError.__str__(self)


class LockHeld(EnvironmentFault):
    """Another process of this machine is writing there."""


class NumericsError(NestdiffError, ArithmeticError):
    """A non-finite or unusable number, named by step, key or channel."""

    code = 6


class Interrupted(NestdiffError):
    """Stopped by a signal after saving; the same command resumes."""

    code = 75


def out_of_memory(error: BaseException) -> bool:
    """Whether a machine or a GPU has no memory left: Python's and pyarrow's MemoryError; torch and threads say it with
    a RuntimeError."""
    words = ("can't allocate memory", "can't start new thread", "out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in words)
    )


@contextmanager
def memory_faults(*, fix: str, **where: Any) -> Iterator[None]:
    """Turn a lack of memory within the block into an EnvironmentFault; fix, where: its arguments."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, NestdiffError) or not out_of_memory(error):
            raise
        said = str(error).split("\n", 1)[0]
        raise EnvironmentFault(
            f"There is not enough memory ({said or type(error).__name__})", fix=fix, **where
        ) from error


def from_record(record: dict[str, Any]) -> NestdiffError:
    """The error that `to_json` wrote."""
    kinds = {kind.code: kind for kind in (ConfigError, InputError, IntegrityError, EnvironmentFault, NumericsError)}
    said = {key: record[key] for key in ("fix", "stage", "level", "path", "key", "expected", "found")}
    return {**kinds, Interrupted.code: Interrupted}.get(record["code"], NestdiffError)(record["error"], **said)
