"""One mechanism for everything a stage leaves on disk: write, commit, open, verify.

An artifact is a directory. It exists when `manifest.json` stands in it, and the manifest is written last:

    data files, each written under a temporary name, flushed to disk, renamed
    _parts/00003.json     one per partition: what it holds, size and sha256 of its files
    manifest.json         what made the artifact, what is in it, sha256 of every file

Two hashes have different jobs. `fingerprint` says what *should* be here: the hash of the stage's
configuration and its inputs. `digest` says what *is* here: the hash of the data files. The next stage's
fingerprint is computed from this stage's digest, so nothing can be read that was made from other inputs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nestdiff_core.errors import IntegrityError, NestdiffError
from nestdiff_core.files import (
    LOCK,
    MANIFEST,
    PARTS,
    TEMPORARY,
    DirectoryLock,
    check_file,
    environment_faults,
    file_record,
    fingerprint,
    fsync_directory,
    fsync_tree,
    is_bulk,
    is_sealed,
    read_json,
    read_sealed_json,
    write_json,
    write_sealed_json,
)
from nestdiff_core.mirror import Mirror

SCHEMA_VERSION = 2
PREVIOUS = f"{TEMPORARY}previous"  # where the artifact that is there waits while it is written anew


@cache
def code_version() -> str:
    """`git describe` of the checkout this code runs from, or the installed version. Recorded, never hashed."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=10
        )
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    from importlib import metadata

    try:
        return metadata.version("nestdiff")
    except metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class Artifact:
    """A sealed artifact: its directory and what its manifest says.

    mirror: where large files are that have not been brought to this machine; None: everything is here.
    """

    path: Path
    manifest: dict[str, Any]
    mirror: Mirror | None = None

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def level(self) -> int | None:
        return self.manifest["level"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def digest(self) -> str:
        return self.manifest["digest"]

    @property
    def info(self) -> dict[str, Any]:
        """Counts and figures that the stage left for readers."""
        return self.manifest["info"]

    def shared(self, *, replace: bool = False) -> Artifact:
        """This artifact, in object storage too; or what another machine had put there first. replace: not even then."""
        if self.mirror is None or self.mirror.publish(self.path, self.manifest, replace=replace):
            return self
        return open_artifact(self.path, stage=self.stage, expected=self.fingerprint, mirror=self.mirror)

    def verify(self) -> int:
        """Compare every file with the manifest: the bytes read, or an IntegrityError at the first difference."""
        total = 0
        for found in self.check():
            if isinstance(found, IntegrityError):
                raise found
            total += found
        return total

    def check(self) -> Iterator[int | IntegrityError]:
        """For every file of the manifest its bytes, or what is wrong with it.

        Of a file that is in object storage only, the size is compared; its content is when it is fetched.
        """
        beside = {name: record for name, record in self.manifest["beside"].items() if record is not None}
        for name, record in (self.manifest["files"] | beside).items():
            try:
                here = not self._elsewhere(name, record)
                yield check_file(self.path / name, record, stage=self.stage, level=self.level) if here else 0
            except IntegrityError as error:
                yield error

    def fetch(self, name: str) -> Path:
        """The file `name` of the manifest on this machine, from object storage where it is not here yet."""
        if self.mirror is None:
            return self.path / name
        return self.mirror.fetch(self.path, name, self.manifest["files"][name])

    def _elsewhere(self, name: str, record: dict[str, Any]) -> bool:
        missing = self.mirror is not None and is_bulk(name) and not (self.path / name).is_file()
        return missing and self.mirror is not None and self.mirror.has(self.path, name, record)


def open_artifact(path: Path, *, stage: str, expected: str | None = None, mirror: Mirror | None = None) -> Artifact:
    """The sealed artifact at `path`, or an IntegrityError; `expected` is the fingerprint that it must have."""
    record = read_json(path / MANIFEST, stage=stage)
    version = record.get("schema_version") if isinstance(record, dict) else None
    if version != SCHEMA_VERSION:  # asked first: another version may vouch for itself in another way
        raise IntegrityError(
            "The artifact was written by another version of nestdiff",
            stage=stage,
            path=path,
            expected=SCHEMA_VERSION,
            found=version,
            fix="Materialise its stage again.",
        )
    manifest = read_sealed_json(path / MANIFEST, stage=stage)
    if expected is not None and manifest["fingerprint"] != expected:
        raise IntegrityError(
            "The artifact was made from something else than its place says",
            stage=stage,
            level=manifest["level"],
            path=path,
            key="fingerprint",
            expected=expected,
            found=manifest["fingerprint"],
            fix=f"Remove {path} and materialise its stage again.",
        )
    return Artifact(path, manifest, mirror)


class ArtifactWriter:
    """Collects an artifact's files and seals it. Use through `writing`."""

    def __init__(
        self, path: Path, header: dict[str, Any], mirror: Mirror | None = None, *, remade: bool | None = None
    ) -> None:
        """remade: whether what object storage holds is to be replaced, as it is not what it was; None: if it is there
        already."""
        self.path, self.header, self.mirror = path, header, mirror
        self._remade = mirror is not None and mirror.published(path) is not None if remade is None else remade
        self._parts: dict[str, dict[str, Any]] = {}  # records of the parts that are whole

    def part(self, name: str) -> dict[str, Any] | None:
        """The committed record of partition `name`, or None; a part whose files changed does not count.

        Its files are read once by a writer; with a mirror, what the mirror says is asked every time.
        """
        if self.mirror is None and name in self._parts:
            return self._parts[name]
        path = self.path / PARTS / f"{name}.json"
        shared = None if self.mirror is None else self.mirror.part(self.path, name)
        if shared is None and not path.is_file():
            return None
        record = read_json(path, stage=self.header["stage"]) if shared is None else shared
        try:
            for file, expected in record["files"].items():
                local = self.path / file
                if shared is None or self.mirror is None or not self.mirror.has(self.path, file, expected):
                    check_file(local, expected, stage=self.header["stage"])
                elif local.is_file() and file_record(local) != expected:
                    local.unlink()
        except IntegrityError:
            path.unlink(missing_ok=True)
            return None
        if self.mirror is not None and record["files"]:
            record = self.mirror.commit_part(self.path, name, record) if shared is None else record
            write_json(path, record)
        self._parts[name] = record
        return record

    def commit_part(self, name: str, files: Iterable[Path], **info: Any) -> dict[str, Any]:
        """Record that partition `name` is whole. Its files must be on disk already; they are flushed here.

        With a mirror the record that is returned may be another machine's, which has committed the partition first.
        """
        records = {}
        for file in files:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            fsync_directory(file.parent)
            records[file.relative_to(self.path).as_posix()] = file_record(file)
        record = {"files": records, **info}
        if self.mirror is not None and records:
            record = self.mirror.commit_part(self.path, name, record)
            self.mirror.make_room(self.path)
        write_json(self.path / PARTS / f"{name}.json", record)
        self._parts[name] = record
        return record

    def fetch(self, name: str) -> Path:
        """The file `name` of a committed part on this machine, from object storage where it is not here."""
        if self.mirror is None:
            return self.path / name
        return self.mirror.fetch(self.path, name, self._part_files()[name])

    def _part_files(self) -> dict[str, dict[str, Any]]:
        return {name: record for part in self._parts.values() for name, record in part["files"].items()}

    def seal(self, *, beside: tuple[str, ...] = (), **info: Any) -> Artifact:
        """Hash what was written and write the manifest: from here on the artifact exists.

        `beside` names what is kept there but is not part of the artifact's identity (a denoiser's checkpoints).
        """
        with environment_faults(self.path):
            self._remove_temporaries(but=PREVIOUS)  # which comes back if what follows fails
            fsync_tree(self.path)
        committed, files = self._part_files(), {}
        names = {path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()}
        for name in sorted(names | set(committed)):
            if name.split("/")[0] not in (PARTS, LOCK, MANIFEST, PREVIOUS, *beside):
                files[name] = committed.get(name) or file_record(self.path / name)
        digest = fingerprint({name: record["sha256"] for name, record in files.items()})
        manifest = {**self.header, "digest": digest, "code_version": code_version(), "files": files, "info": info}
        manifest["beside"] = {
            name: file_record(self.path / name) if (self.path / name).is_file() else None for name in beside
        }
        write_sealed_json(self.path / MANIFEST, manifest)
        if (self.path / PREVIOUS).is_dir():
            os.rename(self.path / PREVIOUS, gone := self.path / f"{TEMPORARY}gone")  # no half of it can come back
            shutil.rmtree(gone, ignore_errors=True)
        return Artifact(self.path, manifest, self.mirror).shared(replace=self._remade)

    def _remove_temporaries(self, but: str = "") -> None:
        for path in list(self.path.rglob(f"{TEMPORARY}*")) + list(self.path.rglob("*.partial")):
            if path.is_dir() and path.name != but:
                shutil.rmtree(path, ignore_errors=True)
            elif not path.is_dir():
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(
    path: Path,
    header: dict[str, Any],
    *,
    keep_parts: bool = False,
    mirror: Mirror | None = None,
    remade: bool | None = None,
    check: Callable[[], object] | None = None,
) -> Iterator[ArtifactWriter]:
    """Write an artifact at `path` under its lock: to be sealed within the block, or what was there before comes back.

    header: stage, level, fingerprint, config, inputs. With `keep_parts` the files of an earlier attempt stay where
    they are, for a stage that continues; what was sealed is unsealed meanwhile. mirror: where it is put as well.
    remade: as of `ArtifactWriter`.
    check: called under the lock before anything is touched; what it raises ends the attempt.
    """
    with (
        _naming(header["stage"], header["level"]),
        DirectoryLock(path, stage=header["stage"], level=header["level"]),
        environment_faults(path),
    ):
        if check is not None:
            check()
        writer = ArtifactWriter(path, {"schema_version": SCHEMA_VERSION, **header}, mirror, remade=remade)
        if keep_parts:
            (path / MANIFEST).unlink(missing_ok=True)
            writer._remove_temporaries()
            yield writer
            return
        previous = path / PREVIOUS
        if is_sealed(path):
            shutil.rmtree(previous, ignore_errors=True)  # of somebody who was killed while it was made or removed
            previous.mkdir()
            _move_children(path, previous)  # sealing removes it
        else:
            _remove_children(path)
        try:
            yield writer
        except BaseException:
            if previous.is_dir():
                _remove_children(path, but=previous)
                _move_children(previous, path)
                previous.rmdir()
            raise


@contextlib.contextmanager
def _naming(stage: str, level: int | None) -> Iterator[None]:
    """Refusals within the block that do not say which stage they befell are those of this one."""
    try:
        yield
    except NestdiffError as error:
        if error.stage is None:
            error.stage, error.level = stage, level if error.level is None else error.level
        raise


def _children(path: Path) -> list[Path]:
    """Everything in a directory but the lock; the manifest first, so that nothing half-moved looks sealed."""
    return sorted((p for p in path.iterdir() if p.name != LOCK), key=lambda p: p.name != MANIFEST)


def _move_children(source: Path, target: Path) -> None:
    children = [p for p in _children(source) if p != target]
    for child in children if target.is_relative_to(source) else reversed(children):
        os.rename(child, target / child.name)


def _remove_children(path: Path, but: Path | None = None) -> None:
    for child in _children(path):
        if child != but:
            shutil.rmtree(child) if child.is_dir() else child.unlink()
