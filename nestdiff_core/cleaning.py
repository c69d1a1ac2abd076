"""What lies below the artifact root and belongs to nothing: found first, removed only when asked.

Only what is provably ours is ever named: below ROOT/STAGE/FINGERPRINT, with a lock file of ours beside it.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nestdiff_core.errors import IntegrityError, LockHeld
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import LOCK, MANIFEST, PARTS, TEMPORARY, DirectoryLock, is_sealed, read_json
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
    artifacts that none of these experiments uses as it is configured now.

    Artifacts that are being written are passed over.
    """
    used = None if keep is None else {path for x in keep for path in _used(x)}
    for folder in _artifacts(root):
        try:
            with DirectoryLock(folder):
                unnamed = list(_unnamed(folder))
        except LockHeld:
            continue
        if used is None or folder in used:
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


def _used(x: Experiment) -> Iterator[Path]:
    """Addresses of everything that the experiment has or has begun, its search's candidates included."""
    sigmas = x.config.search.sigmas if x.config.search.level else ()
    for y in (x, *(Experiment(candidate(x.config, sigma), x.root) for sigma in sigmas)):
        swept = (Ref("sweep"),) if y.config.sweep.anything else ()
        for ref in (*y.refs(), *swept, Ref("watch")):
            with contextlib.suppress(IntegrityError):  # its inputs have not been made
                yield y.path(ref)


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
