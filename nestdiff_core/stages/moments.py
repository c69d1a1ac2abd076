"""Moments of every level's tokens: one pass over the features, continued where it was stopped or where images ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nestdiff_core import loading
from nestdiff_core.artifacts import open_artifact
from nestdiff_core.errors import IntegrityError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import MANIFEST, fingerprint, replacing
from nestdiff_core.images.index import ImageIndex
from nestdiff_core.latents.hierarchy import Begun, level_moments
from nestdiff_core.latents.moments import Moments
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stages.common import require_features, reuse
from nestdiff_core.stages.data import open_maps

MOMENTS, RUNNING = "moments.npz", "running-"
SAVE_SECONDS = 10.0  # a pass that is stopped loses no more than this, or one shard


def moments(
    x: Experiment, levels: Sequence[int], *, device: str = "cpu", progress: Progress = silent
) -> dict[int, Moments]:
    """Moments of the training tokens of each level above 1; levels of one store share a pass.

    Where only images were added since an earlier pass, only their shards are read, with the same bits as all of them.
    """
    by_store: dict[Ref, list[int]] = {}
    for level in levels:
        if reuse(x, Ref("moments", level)) is None:
            by_store.setdefault(x.level_features(level), []).append(level)
    for several in by_store.values():
        _pass(x, several, device, progress)
    return {level: Moments.load(x.artifact(Ref("moments", level)).path / MOMENTS) for level in levels}


def _pass(x: Experiment, levels: list[int], device: str, progress: Progress) -> None:
    """One pass over the store of these levels; of several with the same grid (and so the same moments) one does."""
    index, reader = loading.open_index(x), open_maps(x, levels[0], device)
    for level in levels:
        require_features(x.config.level(level), "svd_basis", channels=reader.shape[2], side=reader.shape[3])
    refs = {x.config.level(level).grid: Ref("moments", level) for level in levels}
    shards = {grid: _shard_identities(x, ref, index) for grid, ref in refs.items()}
    with contextlib.ExitStack() as stack:
        writers = {grid: stack.enter_context(x.writing(ref, keep_parts=True)) for grid, ref in refs.items()}
        known = {grid: _begun(x, writer.path, shards[grid]) for grid, writer in writers.items()}
        saved = time.monotonic()

        def keep(totals: dict[int, Begun]) -> None:
            nonlocal saved
            if time.monotonic() - saved >= SAVE_SECONDS:
                for grid, begun in totals.items():
                    _save(writers[grid].path, begun)
                saved = time.monotonic()

        by_grid = level_moments(
            reader,
            sorted(refs),
            index.rows("train"),
            begun={grid: begun for grid, begun in known.items() if begun is not None},
            keep=keep,
            progress=progress,
        )
        for grid, writer in writers.items():
            by_grid[grid].save(writer.path / MOMENTS)
            for file in writer.path.glob(f"{RUNNING}*"):
                file.unlink()
            writer.seal(tokens=by_grid[grid].count, shards=shards[grid])


def _save(path: Path, begun: Begun) -> None:
    """Keep what a pass has so far, in the place of what it had before."""
    before = list(path.glob(f"{RUNNING}*"))
    with replacing(path / f"{RUNNING}{begun.shards}.npz") as temporary:
        begun.moments.save(temporary)
    for file in before:
        if file.name != f"{RUNNING}{begun.shards}.npz":
            file.unlink()


def _begun(x: Experiment, path: Path, shards: list[str]) -> Begun | None:
    """Moments of the longest beginning of these shards that is here: of a pass that was stopped, or of fewer images."""
    found: list[Begun] = []
    for file in path.glob(f"{RUNNING}*.npz"):
        with contextlib.suppress(IntegrityError):  # damaged: as if it were not there
            found.append(Begun(int(file.stem.removeprefix(RUNNING)), Moments.load(file)))
    for manifest in (x.root / "moments").glob(f"*/{MANIFEST}"):
        with contextlib.suppress(IntegrityError):
            artifact = open_artifact(manifest.parent, stage="moments")
            earlier = artifact.info.get("shards")
            if earlier and earlier == shards[: len(earlier)]:
                artifact.verify()
                found.append(Begun(len(earlier), Moments.load(artifact.path / MOMENTS)))
    return max(found, key=lambda begun: begun.shards, default=None)


def _shard_identities(x: Experiment, ref: Ref, index: ImageIndex) -> list[str]:
    """What decides the tokens of each shard: its features (or its images and the encoder) and its training images."""
    source = x.artifact(x.level_features(ref.level or 0) if x.config.features.keep else Ref("encoder"))
    parts, train = source.info.get("parts", {}), index.splits == "train"
    return [
        fingerprint(
            [
                x.stage_config(ref),
                parts[shard.name]["digest"] if parts else [shard.sha256, source.digest],
                np.flatnonzero(train[shard.rows]).tolist(),
            ]
        )
        for shard in index.shards
    ]
