"""What lies below the artifact root and belongs to nothing: found first, removed only when asked.

Only what is provably ours is ever named: below ROOT/STAGE/FINGERPRINT, with a lock file of ours beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestdiff_core.config_io import to_dict
from nestdiff_core.errors import IntegrityError, LockHeld
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import LOCK, MANIFEST, PARTS, TEMPORARY, DirectoryLock, fingerprint, is_sealed, read_json
from nestdiff_core.lineage import STAGES
from nestdiff_core.search import candidate


@dataclass(frozen=True)
class Litter:
    """A file or directory that can go, the artifact that it is in (or is), and why."""

    path: Path
    artifact: Path
    reason: str

    @property
    def size(self) -> int:
        """Bytes."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def find_litter(root: Path, keep: Iterable[Experiment] | None = None) -> Iterator[Litter]:
    """Temporary files of stopped runs, files that a sealed artifact's manifest does not name, and, with `keep`, whole
    artifacts that none of these experiments uses, or may come to use, as it is configured now.

    Artifacts that are being written are passed over.
    """
    kept = None if keep is None else _Kept.of(keep)
    for folder in _artifacts(root):
        try:
            with DirectoryLock(folder):
                unnamed = list(_unnamed(folder))
        except LockHeld:
            continue
        if kept is None or kept.may_use(folder):
            yield from unnamed
        else:
            yield Litter(folder, folder, "no experiment that is kept uses it")


def remove(litter: Litter) -> None:
    """Remove it, under its artifact's lock; what is written again meanwhile stays."""
    with DirectoryLock(litter.artifact):
        if litter.path == litter.artifact:
            (litter.path / MANIFEST).unlink(missing_ok=True)  # first, so that nothing half-removed looks whole
        if litter.path.is_dir() and not litter.path.is_symlink():
            shutil.rmtree(litter.path)
        else:
            litter.path.unlink(missing_ok=True)


def _artifacts(root: Path) -> Iterator[Path]:
    for stage in STAGES:
        yield from (lock.parent for lock in sorted((root / stage).glob(f"*/{LOCK}")))


@dataclass(frozen=True)
class _Kept:
    """What experiments have or have begun, the candidates of their searches included.

    paths: addresses, and artifacts that a setting names, such as a judge's weights. unknown: of stages whose address
    cannot be told, since an input is not there at the moment: stage, level and hash of their settings.
    """

    paths: frozenset[Path]
    unknown: frozenset[tuple[str, int | None, str]]

    @classmethod
    def of(cls, experiments: Iterable[Experiment]) -> _Kept:
        paths, unknown = set(), set()
        for x in experiments:
            paths |= set(_named(to_dict(x.config), x.root))
            sigmas = x.config.search.sigmas if x.config.search.level else ()
            for y in (x, *(Experiment(candidate(x.config, sigma), x.root) for sigma in sigmas)):
                swept = (Ref("sweep"),) if y.config.sweep.anything else ()
                for ref in (*y.refs(), *swept, Ref("watch")):
                    try:
                        paths.add(y.path(ref))
                    except IntegrityError:
                        unknown.add((ref.stage, ref.level, fingerprint(y.stage_config(ref))))
        return cls(frozenset(paths), frozenset(unknown))

    def may_use(self, folder: Path) -> bool:
        """Also what an input that is being made again, to the same content, will lead to once more."""
        if folder in self.paths:
            return True
        stage = folder.parent.name
        if not is_sealed(folder):
            return any(stage == other for other, *_ in self.unknown)
        manifest = read_json(folder / MANIFEST)
        return (stage, manifest["level"], fingerprint(manifest["config"])) in self.unknown


def _named(value: Any, root: Path) -> Iterator[Path]:
    """Artifacts below the root that some setting is the path of, or of a file in them."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _named(part, root)
    elif isinstance(value, str) and (path := Path(value).expanduser().absolute()).is_relative_to(root):
        yield root.joinpath(*path.relative_to(root).parts[:2])


def _unnamed(folder: Path) -> Iterator[Litter]:
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(TEMPORARY) or path.name.endswith(".partial"):
            yield Litter(path, folder, "left by a stopped run")
    if not is_sealed(folder):
        return  # its parts may be all that a stopped run has to go on from
    manifest = read_json(folder / MANIFEST)
    beside = {LOCK, MANIFEST, PARTS, *manifest.get("beside", ())}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder)
        temporary = any(part.startswith(TEMPORARY) or part.endswith(".partial") for part in relative.parts)
        if relative.parts[0] not in beside and relative.as_posix() not in manifest["files"] and not temporary:
            yield Litter(path, folder, "the manifest does not name it")
