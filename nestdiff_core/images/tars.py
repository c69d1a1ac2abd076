"""WebDataset shards: is the tar whole, and what samples does it hold.

`webdataset` reads them, but a tar that was cut or has one flipped bit in a header often just ends early for it
(and for `tarfile`). So `scan` walks every header first and refuses what is not whole; only then does
`read_samples` hand the file to webdataset, from an open file, so that no name or URL is ever interpreted.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import webdataset.utils
from webdataset import tariterators

from nestdiff_core.errors import InputError

# webdataset: no pipes and no unpickling, whatever the environment says. Its type stub leaves the switch out.
webdataset.utils.enforce_security = True  # pyright: ignore[reportAttributeAccessIssue]

BLOCK = 512
MAX_MEMBER_BYTES = 2**28
MAX_READ_BYTES = 2**20  # of a header and its extensions; the walk reads no contents

_SET_ASIDE = re.compile(r"__[^/]*__($|/)")  # names that webdataset takes for its own


class Skipped(NamedTuple):
    """A member that webdataset passes over without a word."""

    name: str
    reason: str


class Scan(NamedTuple):
    """What a whole tar holds: how many samples webdataset will find, and the members that it will not."""

    num_samples: int
    skipped: list[Skipped]


def scan(path: Path, place: str = "") -> Scan:
    """Walk all headers of the tar (or gzipped tar) at `path`, which errors say is at `place` (default: `path`).

    Raises InputError, naming the offset in the (unpacked) tar, unless it ends with its two zero blocks exactly
    where the last member ends, every header checksum holds, and no member is there twice.
    """
    try:
        with _unpacked(path) as file:
            return _walk(place or str(path), file)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _damaged(place or str(path), f"cannot be read as a tar ({' '.join(str(error).split())})") from error


def read_samples(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a tar that `scan` found whole: `__key__` and the bytes of each member by its suffix."""
    with path.open("rb") as file:
        members = tariterators.tar_file_expander([{"url": str(path), "stream": file}])
        yield from tariterators.group_by_keys(members)


def _walk(place: str, file: _Bounded) -> Scan:
    tar = tarfile.TarFile(fileobj=cast(IO[bytes], file))
    skipped, num_samples, current, suffixes = [], 0, None, set()
    while (member := _next(place, tar)) is not None:
        if member.isdir():
            continue
        if member.issparse() or (member.isreg() and member.size > MAX_MEMBER_BYTES):
            raise _damaged(place, f"has a sparse member, or one above {MAX_MEMBER_BYTES:,} bytes", key=member.name)
        key, suffix = tariterators.base_plus_ext(member.name)
        reason = _passed_over(member)
        if reason or suffix is None:
            skipped.append(Skipped(member.name, reason or "has no key before its first dot, or no suffix behind it"))
            continue
        if key != current:
            num_samples, current, suffixes = num_samples + 1, key, set()
        if suffix.lower() in suffixes:
            raise _damaged(place, f"holds the same member twice, again at offset {member.offset}", key=member.name)
        suffixes.add(suffix.lower())
    _check_end(place, file, tar.offset, num_samples)
    return Scan(num_samples, skipped)


def _passed_over(member: tarfile.TarInfo) -> str | None:
    if not member.isreg():
        return "is not a regular file (a link or a device)"
    return "has a name that webdataset sets aside" if _SET_ASIDE.match(member.name) else None


def _next(place: str, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except tarfile.TarError as error:
        raise _damaged(place, f"is cut off or damaged before offset {tar.offset} ({error})") from error


def _check_end(place: str, file: _Bounded, offset: int, num_samples: int) -> None:
    """tarfile takes any header that it cannot read for the end of the archive; the real end looks like this."""
    file.seek(offset)
    end = file.read(2 * BLOCK)
    if end != bytes(2 * BLOCK):
        reason = "is cut off" if len(end) < 2 * BLOCK else "has a damaged header"
        raise _damaged(
            place,
            f"{reason} at offset {offset}",
            expected="two zero blocks at the end",
            found=f"{num_samples} samples before it",
        )
    while rest := file.read(MAX_READ_BYTES):
        if any(rest):
            raise _damaged(place, f"goes on behind its end at offset {offset}", expected="nothing but zeros there")


class _Bounded:
    """A file that refuses long reads: an extension header may claim any length, and tarfile would read it whole."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        if size > MAX_READ_BYTES:
            raise ValueError(f"an extension header of {size:,} bytes")
        return self._file.read(size)


@contextmanager
def _unpacked(path: Path) -> Iterator[_Bounded]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        yield _Bounded(gzip.GzipFile(fileobj=file) if packed else file)


def _damaged(place: str, reason: str, **where: Any) -> InputError:
    name, fix = place.rpartition("/")[2], "Get this shard again, or remove it."
    return InputError(f"{name} {reason}", stage="images", path=place, fix=fix, **where)
