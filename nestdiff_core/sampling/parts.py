"""Images in parts: who makes which, what is there already, and how far all processes are together.

A part is a run of whole micro-batches and is made by one process: an image is decided by seed and index, and computed
in the same batch whoever computes it, so parts have the same bytes from any number of processes. Each is committed by
itself (artifacts.py). Part k goes to process k mod their number whatever is there already, so processes need not agree
on what is missing; they meet only at the beginning and the end.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from nestdiff_core.artifacts import ArtifactWriter
from nestdiff_core.errors import IntegrityError
from nestdiff_core.files import PARTS
from nestdiff_core.loading import Cascade
from nestdiff_core.progress import Progress, duration, silent

logger = logging.getLogger("nestdiff")

LEAST_PART = 50  # images
SHARDS = "shards"  # folder of the parts of an artifact that is not whole yet
WHOLE = "whole"  # the part that its finished files are


class Part(NamedTuple):
    """Images `first` to `first + num_images`, of which `size` would be a full part; of the set `of`, where one artifact
    has several."""

    number: int
    num_images: int
    size: int
    of: str = ""

    @property
    def name(self) -> str:
        return f"{self.of}{self.number:05d}"

    @property
    def first(self) -> int:
        return self.number * self.size

    @property
    def indices(self) -> range:
        return range(self.first, self.first + self.num_images)


def in_parts(num_images: int, size: int, *, first: int = 0, of: str = "") -> list[Part]:
    """The parts that hold images `first` to `first + num_images`; first is a multiple of `size`."""
    numbers = range(first // size, -(-(first + num_images) // size))
    return [Part(k, min(size, first + num_images - k * size), size, of) for k in numbers]


def part_size(batch_size: int) -> int:
    """Images of a usual part: whole micro-batches, the fewest that are worth a commit."""
    return batch_size * -(-LEAST_PART // batch_size)


def rank() -> int:
    """Of this process in its torchrun group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def together() -> None:
    """Wait until every process of the group is here."""
    if dist.is_initialized():
        dist.barrier()


def make_parts(
    writer: ArtifactWriter,
    parts: Sequence[Part],
    open_cascade: Callable[[], Cascade],
    make: Callable[[Cascade, Part, Callable[[int], None]], list[Path]],
    *,
    what: str = "samples",
    estimate: Callable[[Cascade, Sequence[Part]], float] | None = None,
    progress: Progress = silent,
) -> None:
    """Make and commit those of `parts` that are not there or not whole; runs in each process of a group, and returns
    when all parts of all processes are there. How long it will take is logged before it begins.

    open_cascade: asked only where there is something to make. make: writes the files of a part and returns them; it may
    say meanwhile how many images of it are done. what: they are parts of. estimate: the seconds that parts will take,
    where not every level is generated. progress: of all processes together, in images, with the rate since this call.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    tally = _Tally(writer, parts, progress)
    todo = [part for part in parts[rank() :: world_size] if not holds(writer, part)]
    if todo:
        cascade, images = open_cascade(), sum(part.num_images for part in todo)
        if rank() == 0:
            share = "" if world_size == 1 else f" in each of {world_size} processes"
            seconds = cascade.estimate_seconds(images) if estimate is None else estimate(cascade, todo)
            logger.info("%s: %s images%s, %s", what, f"{images:,}", share, duration(seconds))
        for part in todo:
            files = make(cascade, part, tally)
            writer.commit_part(part.name, files, first=part.first, images=part.num_images)
            tally(0)
    tally(0)
    together()
    tally(0)


def holds(writer: ArtifactWriter, part: Part) -> bool:
    """Whether a whole part of this number is there, with as many images at least."""
    record = writer.part(part.name)
    return record is not None and record["images"] >= part.num_images


def part_file(writer: ArtifactWriter, part: Part) -> Path:
    """Where the arrays of a part are, of an artifact that is put together from them."""
    return writer.path / SHARDS / f"{part.name}.npz"


def read_parts(writer: ArtifactWriter, parts: Sequence[Part], name: str) -> Iterator[np.ndarray]:
    """The array `name` of each part, one part in memory. Raises IntegrityError for one that is not as it was made."""
    for part in parts:
        if not holds(writer, part):
            raise IntegrityError(
                "A part of the images has changed since it was made",
                path=part_file(writer, part),
                fix="Run the same command again: only this part is made anew.",
            )
        with np.load(part_file(writer, part), allow_pickle=False) as arrays:
            yield arrays[name]


def remove_parts(writer: ArtifactWriter, parts: Sequence[Part]) -> None:
    """Once what they were put together to is whole."""
    for part in parts:
        (writer.path / PARTS / f"{part.name}.json").unlink(missing_ok=True)
    if (writer.path / SHARDS).is_dir():
        shutil.rmtree(writer.path / SHARDS)


class _Tally:
    """Counts the images of all processes by the parts that they have committed."""

    def __init__(self, writer: ArtifactWriter, parts: Sequence[Part], progress: Progress) -> None:
        self.folder, self.progress = writer.path / PARTS, progress
        self.counts = {f"{part.name}.json": part.num_images for part in parts}
        self.begun, self.before, self.told = time.monotonic(), self._committed(), -1

    def __call__(self, within: int) -> None:
        """within: images of the part that this process is at."""
        if self.progress is silent:
            return
        done, total = self._committed() + within, sum(self.counts.values())
        if done == self.told == total:
            return
        self.told = done
        rate = (done - self.before) / max(time.monotonic() - self.begun, 1e-9)
        self.progress(min(done, total), total, "sampling", images_per_second=max(rate, 0.0))

    def _committed(self) -> int:
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        return sum(count for name, count in self.counts.items() if name in names)
