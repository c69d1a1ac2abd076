"""Files that survive: hashes, durable writes, sealed JSON, one writer at a time, and the names within an artifact.

What an artifact is and how it comes to be, artifacts.py says.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nestdiff_core.errors import EnvironmentFault, IntegrityError, LockHeld, NestdiffError

MANIFEST = "manifest.json"
PARTS = "_parts"
TEMPORARY = ".tmp-"
LOCK = ".lock"
SELF = "sha256_of_this"


# --- hashes -------------------------------------------------------------------------------------------------------


def fingerprint(record: Any) -> str:
    """16 hex digits that name plain JSON data: the start of the sha256 of its sorted, compact form."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- durable writes -----------------------------------------------------------------------------------------------


def fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(path: Path) -> None:
    """Flush every file and directory below `path` (and `path`) to the disk."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(folder))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file name beside `path`; when the block ends well it is flushed and renamed to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}"
    try:
        with environment_faults(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, record: Any) -> None:
    write_bytes(path, (json.dumps(record, indent=1, sort_keys=True, allow_nan=True) + "\n").encode())


def read_json(path: Path, *, stage: str | None = None) -> Any:
    """Parsed JSON of `path`; a damaged file is an IntegrityError that names it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise IntegrityError(
            f"{path.name} is missing", stage=stage, path=path, fix="Materialise its stage again."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IntegrityError(
            f"{path.name} is damaged ({error})",
            stage=stage,
            path=path,
            fix=f"Remove {path.parent} and materialise its stage again.",
        ) from None


def write_sealed_json(path: Path, record: dict[str, Any]) -> None:
    """JSON that carries the hash of itself, for what no manifest can vouch for."""
    write_json(path, {**record, SELF: fingerprint(json.loads(json.dumps(record, allow_nan=True)))})


def read_sealed_json(path: Path, *, stage: str | None = None) -> dict[str, Any]:
    """What `write_sealed_json` wrote; an edited one is an IntegrityError."""
    record = read_json(path, stage=stage)
    found = record.pop(SELF, None) if isinstance(record, dict) else None
    if found is None or found != fingerprint(record):
        raise IntegrityError(
            f"{path.name} is not what was written",
            stage=stage,
            path=path,
            expected=found,
            found=fingerprint(record),
            fix=f"Remove {path.parent} and materialise its stage again.",
        )
    return record


@contextlib.contextmanager
def environment_faults(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into an EnvironmentFault that says what to do."""
    cures = {
        errno.ENOSPC: "Free some disk space and run the same command again; committed work is kept.",
        errno.EDQUOT: "Raise the quota or free some space and run the same command again; committed work is kept.",
        errno.EFBIG: "Raise the file size limit (ulimit -f) and run the same command again; committed work is kept.",
        errno.EROFS: "Choose a writable NESTDIFF_HOME.",
        errno.EACCES: "Give this user write permission there, or choose another NESTDIFF_HOME.",
        errno.EPERM: "Give this user write permission there, or choose another NESTDIFF_HOME.",
        errno.EIO: "Check the disk, then run the same command again.",
    }
    try:
        yield
    except NestdiffError:
        raise
    except Exception as error:
        number = _system_error(error)
        if number not in cures:
            raise
        free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
        raise EnvironmentFault(
            f"Writing {path.name} failed ({os.strerror(number)})",
            path=path,
            found=f"{free / 2**20:.0f} MiB free",
            fix=cures[number],
        ) from error


def _system_error(error: Exception) -> int:
    """The operating system's number of an error, which libraries in Rust (safetensors) only write out; 0: none."""
    if isinstance(error, OSError):
        return error.errno or 0
    written = re.search(r"\(os error (\d+)\)", str(error))
    return int(written[1]) if written else 0


# --- one writer at a time -----------------------------------------------------------------------------------------


class DirectoryLock:
    """Exclusive right to write below a directory, held while the process lives (flock on `.lock`).

    A second writer is refused at once with the holder's name; a killed holder frees it by dying.
    Works on a local file system; network file systems need one that supports flock.
    """

    def __init__(self, directory: Path, *, stage: str | None = None, level: int | None = None) -> None:
        self.path, self.stage, self.level = directory / LOCK, stage, level
        self._handle: int | None = None

    def __enter__(self) -> DirectoryLock:
        with environment_faults(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            os.close(handle)
            raise LockHeld(
                "Another process is writing here",
                stage=self.stage,
                level=self.level,
                path=self.path.parent,
                found=f"locked by {holder}",
                fix="Wait for it to end, or stop it.",
            ) from None
        with contextlib.suppress(OSError):  # the name is a courtesy: `gc` must be able to make room on a full disk
            os.ftruncate(handle, 0)
            os.write(handle, f"pid {os.getpid()} on {socket.gethostname()}".encode())
        self._handle = handle
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)  # closing frees the lock
            self._handle = None


# --- files of an artifact -----------------------------------------------------------------------------------------


def file_record(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def check_file(path: Path, record: dict[str, Any], *, stage: str | None = None, level: int | None = None) -> int:
    """Raise IntegrityError unless `path` has the size and sha256 of `record`; returns the size."""
    fix = f"Remove {path} and materialise the stage again: only what is missing is made anew."
    if not path.is_file():
        raise IntegrityError(f"{path.name} is missing", stage=stage, level=level, path=path, fix=fix)
    for what, field, measure in (
        ("size", "size", lambda: path.stat().st_size),
        ("content", "sha256", lambda: sha256_file(path)),
    ):
        if (found := measure()) != record[field]:
            raise IntegrityError(
                f"{path.name} has another {what}",
                stage=stage,
                level=level,
                path=path,
                expected=record[field],
                found=found,
                fix=fix,
            )
    return record["size"]


def is_bulk(name: str) -> bool:
    """Whether a file of an artifact is a shard: of a zarr store, or of images. All others are small."""
    folder, _, rest = name.partition("/")
    return folder == "shards" or (folder == "store.zarr" and rest.rpartition("/")[2].startswith("c."))


def is_sealed(path: Path) -> bool:
    return (path / MANIFEST).is_file()
