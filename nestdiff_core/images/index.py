"""The image index: which images there are, in what order, and the one way to read their pixels.

    index.parquet   a row per image in shard order: key, shard, row (position in the shard), split, label, captions,
                    width, height (of the upright original), sha256 (of the encoded bytes in the shard)
    shards.json     a record per shard: name, path (relative for shards of our own), size, sha256, count, first_row
    classes.json    the names of the classes; [] without labels

The global number of an image is its position in the index. Every store keeps this order.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8

from nestdiff_core.artifacts import Artifact
from nestdiff_core.errors import IntegrityError
from nestdiff_core.files import check_file, read_json
from nestdiff_core.images import tars
from nestdiff_core.images.decoding import Failure, decoders
from nestdiff_core.images.sources import fetch_shard, image_member, shard_cache
from nestdiff_core.remote import is_url

INDEX, SHARDS, CLASSES, REJECTS = "index.parquet", "shards.json", "classes.json", "rejects.jsonl"
PIXELS = "pixels.json"  # what a user's shards are decoded to
SPLITS = ("train", "held_out")
SCHEMA = pa.schema(
    [("key", pa.string()), ("shard", pa.int32()), ("row", pa.int32()), ("split", pa.string()), ("label", pa.int32()),
     ("captions", pa.list_(pa.string())), ("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string())]
)  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """One tar, at a path or a URL: `count` images, whose global numbers begin at `first_row`."""

    name: str
    path: str
    size: int
    sha256: str
    count: int
    first_row: int

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.count)


class ImageIndex:
    """The images of a sealed `images` artifact."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.resolution: int = artifact.info["resolution"]
        self.channels: int = artifact.info["channels"]
        self.class_names: list[str] = read_json(artifact.path / CLASSES, stage="images")
        self.shards = [
            Shard(**{**record, "path": _absolute(artifact.path, record["path"])})
            for record in read_json(artifact.path / SHARDS, stage="images")
        ]
        self._verified: set[int] = set()

    @cached_property
    def _table(self) -> pa.Table:
        path = self.artifact.path / INDEX
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise IntegrityError(
                f"{INDEX} cannot be read ({error})", stage="images", path=path, fix="Materialise images again."
            ) from error
        expected = sum(shard.count for shard in self.shards)
        if table.num_rows != expected or table.schema.names != SCHEMA.names:
            raise IntegrityError(
                f"{INDEX} does not fit {SHARDS}",
                stage="images",
                path=path,
                expected=expected,
                found=table.num_rows,
                fix="Materialise images again.",
            )
        return table

    def _column(self, name: str) -> np.ndarray:
        return self._table.column(name).to_numpy()

    @property
    def num_images(self) -> int:
        return self._table.num_rows

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def labels(self) -> Int64[np.ndarray, " N"]:
        """Class of every image, -1 where there is none."""
        return self._column("label").astype(np.int64)

    @cached_property
    def splits(self) -> np.ndarray:
        """`train` or `held_out` for every image."""
        return self._column("split")

    @cached_property
    def keys(self) -> list[str]:
        return self._table.column("key").to_pylist()

    def namer(self, shard: int) -> Callable[[int], str]:
        """What an error calls the i-th image of a shard."""
        first = self.shards[shard].first_row
        return lambda i: self.name(first + i)

    def name(self, row: int) -> str:
        """What an error calls an image: its key, and its row."""
        return f"{self._table.column('key')[row].as_py()} (row {row})"

    def captions(self, rows: slice = slice(None)) -> list[list[str]]:
        """The captions of the images `rows` (a slice without steps)."""
        start, stop, _ = rows.indices(self.num_images)
        return self._table.column("captions").slice(start, stop - start).to_pylist()

    def rows(self, split: str) -> Int64[np.ndarray, " M"]:
        """Global numbers of the images of a split, rising."""
        return np.flatnonzero(self.splits == split)

    def rejects(self, limit: int) -> list[dict[str, Any]]:
        """The first `limit` samples that were set aside: path, key, reason."""
        path = self.artifact.path / REJECTS
        if not path.is_file():
            return []
        with path.open(encoding="ascii") as lines:
            return [json.loads(line) for line in itertools.islice(lines, limit)]

    def read_shard(self, k: int) -> UInt8[np.ndarray, "n H W C"]:
        """Pixels of all images of shard `k` (its position), in the order of the index.

        The tar is compared with its recorded size and sha256 the first time. Raises IntegrityError, naming the
        shard, when it is missing or has changed.
        """
        shard = self.shards[k]
        path = self._local_file(k)
        wanted = set(self._column("row")[shard.rows].tolist())
        images = [image_member(members) for row, members in enumerate(tars.read_samples(path)) if row in wanted]
        if len(images) != shard.count:
            raise IntegrityError(
                f"Shard {shard.name} holds another number of images",
                stage="images",
                path=shard.path,
                expected=shard.count,
                found=len(images),
                fix="Materialise images again.",
            )
        pixels = np.empty((len(images), self.resolution, self.resolution, self.channels), np.uint8)
        found = decoders().map(images, self.resolution, self.channels, "pixels")
        for i, picture in enumerate(found):
            if isinstance(picture, Failure):
                raise IntegrityError(
                    f"An image of the index {picture.reason}",
                    stage="images",
                    path=shard.path,
                    key=self.namer(k)(i),
                    fix="It could be decoded when the index was made: see that memory and libraries are as they were.",
                )
            pixels[i] = np.frombuffer(picture.content, np.uint8).reshape(pixels.shape[1:])
        return pixels

    def iterate(self, split: str | None = None, batch_size: int = 256) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(global numbers, pixels uint8 (b, H, W, C)) of all images or of a split, in order; the last may be short."""
        rows = np.empty(0, np.int64)
        images = np.empty((0, self.resolution, self.resolution, self.channels), np.uint8)
        for k, shard in enumerate(self.shards):
            here = np.arange(shard.first_row, shard.first_row + shard.count)
            chosen = np.ones(shard.count, bool) if split is None else self.splits[shard.rows] == split
            if not chosen.any():
                continue
            rows, images = np.concatenate([rows, here[chosen]]), np.concatenate([images, self.read_shard(k)[chosen]])
            whole = len(rows) - len(rows) % batch_size
            for start in range(0, whole, batch_size):
                yield rows[start : start + batch_size], images[start : start + batch_size]
            rows, images = rows[whole:], images[whole:]
        if len(rows):
            yield rows, images

    def _local_file(self, k: int) -> Path:
        """The tar of shard `k` on this machine, compared with its recorded size and sha256 the first time."""
        shard, own = self.shards[k], Path(self.shards[k].path).is_relative_to(self.artifact.path)
        if is_url(shard.path):
            path = fetch_shard(shard.path, shard.sha256, shard.size, shard_cache(self.artifact.path.parents[1]))
        elif own:
            path = self.artifact.fetch(Path(shard.path).relative_to(self.artifact.path).as_posix())
        else:
            path = Path(shard.path)
        if k in self._verified and path.is_file():
            return path
        try:
            check_file(path, {"size": shard.size, "sha256": shard.sha256}, stage="images")
        except IntegrityError as error:
            error.key, error.path = shard.name, shard.path
            if is_url(shard.path):
                path.unlink(missing_ok=True)
            if own:
                error.fix = f"Remove {self.artifact.path} and materialise images again."
            else:
                error.fix = "Put the shard back as it was, or materialise images again and all that was made from it."
            raise
        self._verified.add(k)
        return path


def _absolute(folder: Path, path: str) -> str:
    """Shards of the artifact's own are recorded relative to it; others by their absolute path or URL."""
    return path if is_url(path) else str(folder / path)
