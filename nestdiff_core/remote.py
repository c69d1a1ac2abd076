"""Object storage: whole objects below one URL, through obstore.

obstore rather than fsspec: create-if-absent, bounded retries and parallel ranges are part of it, it is one wheel
without dependencies, and zarr reads through it too. Credentials and endpoints come from the environment
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, ...) and are never part of an experiment.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from nestdiff_core.errors import ConfigError, EnvironmentFault, IntegrityError
from nestdiff_core.files import replacing

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss", "http", "https", "file")
RANGE_BYTES = 2**24
CONNECTIONS = 8  # ranges of one object that are fetched side by side
REQUEST_TIMEOUT = timedelta(minutes=30)  # of one object, body included
RETRIES: Any = {"max_retries": 6, "retry_timeout": timedelta(minutes=5)}
CACHE_VARIABLE = "NESTDIFF_CACHE_GIB"


def cache_bytes() -> int | None:
    """How much of what is in object storage stays on this machine, from NESTDIFF_CACHE_GIB; None: all of it."""
    cache = os.environ.get(CACHE_VARIABLE)
    try:
        return int(float(cache) * 2**30) if cache else None
    except ValueError:
        raise ConfigError(
            f"{CACHE_VARIABLE} is not a number", key=CACHE_VARIABLE, expected="GiB", found=cache, fix="Correct it."
        ) from None


def is_url(place: str) -> bool:
    """Whether a place is a URL rather than a path on this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", place) is not None


class Remote:
    """The objects below `url`: s3://bucket/prefix, gs://, az://, file:///folder, or (to read from) https://.

    Keys are relative, with slashes. What the service refuses is an EnvironmentFault that names the object.
    """

    def __init__(self, url: str) -> None:
        scheme = url.split(":", 1)[0]
        if scheme not in SCHEMES or "://" not in url:
            raise ConfigError(
                "This is not a URL of object storage or the web",
                key="url",
                expected=f"one of {', '.join(f'{s}://' for s in SCHEMES)}",
                found=url,
                fix="Correct the URL; pipes and commands are never run.",
            )
        if "@" in url.split("://", 1)[1].split("/", 1)[0]:
            raise ConfigError(
                "A URL holds credentials",
                key="url",
                expected="credentials in the environment, such as AWS_ACCESS_KEY_ID",
                fix="Take them out of the URL, and change them: it may have been logged.",
            )
        self.url = url.rstrip("/")

    @cached_property
    def _store(self) -> Any:
        from obstore.store import from_url

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        plain = self.url.startswith("http:") or (self.url.startswith("s3") and endpoint.startswith("http:"))
        local: Any = {"mkdir": True} if self.url.startswith("file:") else {}
        network: Any = {"client_options": {"allow_http": plain, "timeout": REQUEST_TIMEOUT}, "retry_config": RETRIES}
        with _faults(self.url):
            return from_url(self.url, **(local if local else network))

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}  # connections stay in their process

    def size(self, key: str) -> int | None:
        """Bytes of an object, None where there is none."""
        meta = self._head(key)
        return None if meta is None else meta["size"]

    def _head(self, key: str) -> Any:
        import obstore

        with _faults(f"{self.url}/{key}"):
            try:
                return obstore.head(self._store, key)
            except FileNotFoundError:
                return None

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of every object below `prefix/`, by key relative to it."""
        return {key: meta["size"] for key, meta in self._list(prefix)}

    def state(self, key: str) -> str | None:
        """What tells that an object has changed: its size and entity tag; None where there is none."""
        meta = self._head(key)
        return None if meta is None else _state(meta)

    def states(self) -> dict[str, str]:
        """`state` of every object, by key, with one request for a thousand of them. Web servers cannot be asked."""
        return {key: _state(meta) for key, meta in self._list("")}

    def _list(self, prefix: str) -> Iterator[tuple[str, Any]]:
        import obstore

        with _faults(f"{self.url}/{prefix}"):
            for several in obstore.list(self._store, prefix or None):
                for meta in several:
                    yield meta["path"].removeprefix(prefix).lstrip("/"), meta

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """All of an object, or the bytes [start, stop) of it; None where there is none. For small ones."""
        import obstore

        with _faults(f"{self.url}/{key}"):
            try:
                if stop is not None:
                    return bytes(obstore.get_range(self._store, key, start=start, end=stop))
                return bytes(obstore.get(self._store, key).bytes())
            except FileNotFoundError:
                return None

    def fetch(self, key: str, path: Path) -> None:
        """Copy an object to `path`, which then is there whole or not at all; IntegrityError where there is none."""
        import obstore

        size = self.size(key)
        if size is None:
            raise IntegrityError(
                f"{key} is not in object storage",
                path=f"{self.url}/{key}",
                fix="Materialise its stage again.",
            )
        with replacing(path) as temporary, temporary.open("wb") as file, _faults(f"{self.url}/{key}"):
            if self.url.startswith("http"):  # a web server need not know ranges
                for part in obstore.get(self._store, key).stream():
                    file.write(part)
                return
            file.truncate(size)

            def copy(start: int) -> None:
                part = obstore.get_range(self._store, key, start=start, length=min(RANGE_BYTES, size - start))
                os.pwrite(file.fileno(), part, start)

            with ThreadPoolExecutor(CONNECTIONS) as pool:
                for _ in pool.map(copy, range(0, size, RANGE_BYTES)):
                    pass

    def create(self, key: str, data: bytes | Path) -> bool:
        """Write an object where there is none; False where there is one. Of many at once exactly one succeeds."""
        import obstore

        with _faults(f"{self.url}/{key}"):
            try:
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
                return True
            except obstore.exceptions.AlreadyExistsError:
                return False

    def remove(self, key: str) -> None:
        """Delete an object."""
        import obstore

        with _faults(f"{self.url}/{key}"):
            obstore.delete(self._store, key)

    def replace(self, key: str, data: bytes | Path) -> None:
        """Write an object, over what was there."""
        import obstore

        with _faults(f"{self.url}/{key}"):
            obstore.put(self._store, key, data)


def _state(meta: Any) -> str:
    return f"{meta['size']} {meta['e_tag']}"


@contextlib.contextmanager
def _faults(where: str) -> Iterator[None]:
    """What object storage refuses, as an error that says what to do."""
    from obstore.exceptions import BaseError

    try:
        yield
    except BaseError as error:
        first = str(error).strip().splitlines()[0]
        raise EnvironmentFault(
            f"Object storage failed ({type(error).__name__}: {first[:300]})",
            path=where,
            fix="Check the URL, the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...) and the "
            "network, then run the same command again; committed work is kept.",
        ) from error


def make_room(files: Iterable[Path], limit: int | None, size: int = 0) -> None:
    """Remove those of `files` that came first, until `size` more bytes are within `limit`; None: no limit."""
    if limit is None:
        return
    there = {file: file.stat() for file in files}
    total = size + sum(status.st_size for status in there.values())
    for file in sorted(there, key=lambda f: there[f].st_mtime_ns):
        if total > limit:
            file.unlink(missing_ok=True)
            total -= there[file].st_size
