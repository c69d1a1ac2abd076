"""Artifacts in object storage, shared by every machine that names the same URL (NESTDIFF_REMOTE).

    URL/features/FINGERPRINT/store.zarr/...      as on disk: a zarr v3 store that any tool opens
    URL/features/FINGERPRINT/_parts/00003.json   a shard is committed when its record stands here
    URL/features/FINGERPRINT/artifact.tar        manifest and all small files; written last: now the artifact exists

What is large (shards of stores, shards of images) lies there file by file and comes to this machine when it is read;
everything else is one object, so that of two machines that make the same artifact one wins whole. An artifact is
addressed by what made it and never changes under a reader, so the local copy is a cache that needs no questions.

Writers on several machines need no lock: a shard's record is created only where there is none, and who comes second
takes what is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nestdiff_core.errors import IntegrityError, LockHeld
from nestdiff_core.files import (
    MANIFEST,
    PARTS,
    DirectoryLock,
    check_file,
    file_record,
    is_bulk,
    is_sealed,
    read_sealed_json,
    write_bytes,
)
from nestdiff_core.remote import Remote, cache_bytes, make_room

logger = logging.getLogger("nestdiff")

URL_VARIABLE = "NESTDIFF_REMOTE"
SEALED = "artifact.tar"
FETCHING = ".fetching.lock"
STORE_METADATA = "store.zarr/"
UNFINISHED: dict[str, Any] = {"source": "unfinished", "files": {}}
LARGE = 64 * 2**20  # bytes: what is larger is not packed, as it would have to fit into memory
TAKE_OVER_SECONDS = 60.0  # between the first file of a part and its record lies only the upload of the others


class Mirror:
    """Everything below the artifact root `root`, as it stands below `url`.

    cache_bytes: how much of a store's shards stays on this machine once they are in object storage; None: all.
    """

    def __init__(self, url: str, root: Path, cache_bytes: int | None = None) -> None:
        self.remote, self.root, self.cache_bytes = Remote(url), root, cache_bytes

    @classmethod
    def from_environment(cls, root: Path) -> Mirror | None:
        """That of NESTDIFF_REMOTE and NESTDIFF_CACHE_GIB, or None."""
        url = os.environ.get(URL_VARIABLE)
        return cls(url, root, cache_bytes()) if url else None

    def _key(self, path: Path, name: str) -> str:
        return f"{path.relative_to(self.root).as_posix()}/{name}"

    # --- sealed artifacts -----------------------------------------------------------------------------------------

    def pull(self, path: Path) -> bool:
        """Bring the artifact of `path` here, its large files apart.

        False where object storage has none, or while a process of this machine is making it.
        """
        with self._fetching():
            if is_sealed(path):
                return True
            if (sealed := self.remote.read(self._key(path, SEALED))) is None:
                return False
            try:
                with DirectoryLock(path):
                    self._unpack(path, sealed)
            except LockHeld:
                return False
        return True

    def _unpack(self, path: Path, sealed: bytes) -> None:
        """Write the members of an artifact.tar, the manifest last, as it was packed."""
        manifest, files = self._members(path, sealed)
        large = {name: record for name, record in _small_files(manifest).items() if name not in files}
        for name in (*large, *(n for n in manifest["files"] | manifest["beside"] if n in files), MANIFEST):
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise IntegrityError(
                    f"{SEALED} names a file outside of the artifact",
                    path=path,
                    key=name,
                    fix="Do not use this storage.",
                )
            if name in large:
                self.remote.fetch(self._large(path, large[name]), path / name)
                check_file(path / name, large[name])
            else:
                write_bytes(path / name, files[name])

    def _members(self, path: Path, sealed: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
        """The manifest of an artifact.tar, and its files by name."""
        try:
            with tarfile.open(fileobj=io.BytesIO(sealed)) as tar:
                members = {m.name: tar.extractfile(m) for m in tar.getmembers() if m.isreg()}
                files = {name: file.read() for name, file in members.items() if file is not None}
            return json.loads(files[MANIFEST]), files
        except (tarfile.TarError, KeyError, ValueError) as error:
            raise IntegrityError(
                f"{SEALED} cannot be read ({error})",
                path=f"{self.remote.url}/{self._key(path, SEALED)}",
                fix="Remove it from object storage, and materialise its stage again.",
            ) from error

    def _large(self, path: Path, record: dict[str, Any]) -> str:
        """Key of a large file: by what it holds, so that machines that make the same artifact at once do not overwrite
        each other's."""
        return self._key(path, f"large/{record['sha256']}")

    def publish(self, path: Path, manifest: dict[str, Any], *, replace: bool = False) -> bool:
        """Put the sealed artifact of `path` into object storage; where another machine's stands already, take that one.

        replace: put this one in the place of one that differs. Returns whether it is still this machine's.
        """
        theirs = self.published(path)
        if theirs is not None and theirs["digest"] == manifest["digest"]:
            return True
        if theirs is not None and not replace:
            return self._adopt(path)
        there = self.remote.sizes(self._key(path, "").rstrip("/"))
        known = _committed(path) | (theirs["files"] if theirs is not None else {})
        for name, record in manifest["files"].items():
            local = path / name
            if is_bulk(name):
                if local.is_file() and (there.get(name) != record["size"] or known.get(name) != record):
                    self.remote.replace(self._key(path, name), local)
            elif name.startswith(STORE_METADATA):  # so that other tools can open the store
                self.remote.replace(self._key(path, name), local)
        for name, record in _small_files(manifest).items():
            if record["size"] > LARGE and self.remote.size(self._large(path, record)) != record["size"]:
                self.remote.replace(self._large(path, record), path / name)
        packed = _pack(path, manifest)
        if replace:
            self.remote.replace(self._key(path, SEALED), packed)
        elif not self.remote.create(self._key(path, SEALED), packed):
            return self._adopt(path)
        return True

    def published(self, path: Path) -> dict[str, Any] | None:
        """The manifest in object storage: the first member of the artifact's tar."""
        key = self._key(path, SEALED)
        if (header := self.remote.read(key, 0, tarfile.BLOCKSIZE)) is None:
            return None
        size = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "strict").size
        manifest = self.remote.read(key, tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + size)
        return None if manifest is None else json.loads(manifest)

    def read(self, path: Path, name: str) -> bytes | None:
        """A small file of the artifact of `path` as it is in object storage now, whatever is here; None without one."""
        if (sealed := self.remote.read(self._key(path, SEALED))) is None:
            return None
        manifest, files = self._members(path, sealed)
        if (data := files.get(name)) is None or name not in manifest["files"]:
            return None
        if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
            raise IntegrityError(
                f"A file within {SEALED} has changed since it was written",
                path=f"{self.remote.url}/{self._key(path, SEALED)}",
                key=name,
                fix="Remove it from object storage, and materialise its stage again.",
            )
        return data

    def _adopt(self, path: Path) -> bool:
        logger.warning("Another machine has made %s first; its result is taken.", path.relative_to(self.root))
        sealed = self.remote.read(self._key(path, SEALED))
        assert sealed is not None
        self._unpack(path, sealed)
        _remove_differing(path, read_sealed_json(path / MANIFEST)["files"])
        return False

    # --- large files ----------------------------------------------------------------------------------------------

    def has(self, path: Path, name: str, record: dict[str, Any]) -> bool:
        """Whether file `name` of the artifact of `path` is in object storage in its full size."""
        return self.remote.size(self._key(path, name)) == record["size"]

    def fetch(self, path: Path, name: str, record: dict[str, Any]) -> Path:
        """The local file `name` of the artifact of `path`, brought here and compared with its record if need be."""
        local = path / name
        if local.is_file():
            return local
        with self._fetching():  # processes of one machine would all bring the same file
            if not local.is_file():
                self.make_room(path, record["size"])
                self.remote.fetch(self._key(path, name), local)
                try:
                    check_file(local, record)
                except IntegrityError:
                    local.unlink()
                    raise
        return local

    def make_room(self, path: Path, size: int = 0) -> None:
        """Remove shards that were read longest ago from this machine, until `size` more bytes are within the limit."""
        files = (f for f in path.rglob("*") if f.is_file() and is_bulk(f.relative_to(path).as_posix()))
        make_room(files, self.cache_bytes, size)

    # --- parts of an artifact that several machines write -----------------------------------------------------------

    def part(self, path: Path, name: str) -> dict[str, Any] | None:
        """The record of a part that some machine has committed; a damaged one does not count."""
        data = self.remote.read(self._key(path, f"{PARTS}/{name}.json"))
        with contextlib.suppress(ValueError):
            return None if data is None else json.loads(data)
        return None

    def commit_part(self, path: Path, name: str, record: dict[str, Any]) -> dict[str, Any]:
        """Put the files of a part, then its record, into object storage; returns the record that holds.

        Of several machines the one that creates the first file writes the part, and the others take its result, unless
        it has not finished after TAKE_OVER_SECONDS. Their own files, where they differ, are then gone from here.
        """
        key, (first, *others) = self._key(path, f"{PARTS}/{name}.json"), record["files"]
        data = json.dumps(record, sort_keys=True).encode()
        theirs = self.part(path, name)
        if theirs is not None and not all(self.has(path, *file) for file in theirs["files"].items()):
            theirs = UNFINISHED  # object storage has lost something
        if theirs is None and not self.remote.create(self._key(path, first), path / first):
            theirs = self._wait_for_part(path, name)
            if theirs is None:
                logger.warning("Another machine began shard %s of %s and has stopped. It is written again.", name, path)
                theirs = UNFINISHED
        if theirs is None:
            mine = all(self.remote.create(self._key(path, file), path / file) for file in others)
            if mine and self.remote.create(key, data):
                return record
            theirs = self._wait_for_part(path, name) or UNFINISHED  # so slow that another took over
        if theirs["source"] != record["source"]:  # stopped half-way, or made from an image shard that has changed
            for file in record["files"]:
                self.remote.replace(self._key(path, file), path / file)
            self.remote.replace(key, data)
            return record
        _remove_differing(path, theirs["files"])
        return theirs

    def _wait_for_part(self, path: Path, name: str) -> dict[str, Any] | None:
        deadline = time.monotonic() + TAKE_OVER_SECONDS
        while (theirs := self.part(path, name)) is None and time.monotonic() < deadline:
            time.sleep(1)
        return theirs

    @contextlib.contextmanager
    def _fetching(self) -> Iterator[None]:
        """One process of this machine at a time."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / FETCHING).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _small_files(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Records of all files of an artifact that are not shards, those beside it included."""
    beside = {name: record for name, record in manifest["beside"].items() if record is not None}
    return {name: record for name, record in (manifest["files"] | beside).items() if not is_bulk(name)}


def _pack(path: Path, manifest: dict[str, Any]) -> bytes:
    """The manifest, first, and all files of an artifact that are neither shards nor large, as a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        small = [name for name, record in _small_files(manifest).items() if record["size"] <= LARGE]
        for name in (MANIFEST, *small):
            data = (path / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _remove_differing(path: Path, files: dict[str, Any]) -> None:
    """Local shards that are not those of the records go; what is read will be fetched."""
    for name, record in files.items():
        if is_bulk(name) and (path / name).is_file() and file_record(path / name) != record:
            (path / name).unlink()


def _committed(path: Path) -> dict[str, Any]:
    """Records of the files of all parts that are known here, by name."""
    records = [json.loads(part.read_text())["files"] for part in sorted((path / PARTS).glob("*.json"))]
    return {name: record for files in records for name, record in files.items()}
