"""Makes an `images` artifact: reads a source, refuses or sets aside what is not an image, writes shards and index.

Nothing is lost without a word: every sample that is read is kept or listed in rejects.jsonl with its reason,
and more than `max_bad_samples` of those end the stage, after all images were looked at, so that one run tells all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.writer import TarWriter

from nestdiff_core.artifacts import ArtifactWriter
from nestdiff_core.config import ImagesConfig
from nestdiff_core.errors import InputError
from nestdiff_core.files import file_record, fingerprint, replacing, write_json
from nestdiff_core.images.decoding import Failure, Picture, decoders
from nestdiff_core.images.index import CLASSES, INDEX, PIXELS, REJECTS, SCHEMA, SHARDS, SPLITS
from nestdiff_core.images.sources import TOY_IMAGES, Digits, Folder, Reject, Sample, Shards, shard_cache
from nestdiff_core.progress import Progress, silent

T = TypeVar("T")

_NAMED = 5  # faults that an error spells out


def build_images(config: ImagesConfig, writer: ArtifactWriter, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write index, shards and class names below `writer.path`; returns counts for the manifest. Does not seal.

    Raises InputError for a source that is not there, a shard that is not whole, fewer than two images, or more
    unusable images than `config.max_bad_samples`; PATH.rejects.jsonl then lists all of these.
    """
    progress = progress or silent
    match config.source:
        case "digits":
            return _build_files(Digits(config), config, writer.path, progress)
        case "toy":
            return _build_files(Digits(config, limit=TOY_IMAGES), config, writer.path, progress)
        case "folder":
            return _build_files(Folder(config), config, writer.path, progress)
        case "webdataset":
            return _build_shards(Shards(config), config, writer.path, progress)


def source_listing(config: ImagesConfig) -> str | None:
    """A hash of names, sizes and times (or entity tags) of a source's files: tells a change without reading them.

    None for the sources that cannot change. Raises InputError for a source that is not there.
    """
    match config.source:
        case "folder":
            return fingerprint([[str(p), (s := p.stat()).st_size, s.st_mtime_ns] for p in Folder(config).paths])
        case "webdataset":
            return fingerprint([[file.place, file.state] for file in Shards(config).files])
        case "digits" | "toy":
            return None


def split_fraction(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on seed and key only; an image is held out where it is below the fraction."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64


def _build_files(source: Digits | Folder, config: ImagesConfig, path: Path, progress: Progress) -> dict[str, Any]:
    """Repack a source of image files into PNG shards of `images_per_shard`."""
    (path / "shards").mkdir()
    with _accounts(path, config) as ledger:
        kept = ledger.kept(_counted(source.samples(), source.total, progress), repack=True)
        while images := list(itertools.islice(kept, config.images_per_shard)):
            file = path / "shards" / f"{len(ledger.shards):05d}.tar"
            _write_tar(file, images)
            ledger.add_shard(file, images, range(len(images)), place=f"shards/{file.name}")
    return ledger.finish(source.class_names, ignored_files=source.ignored_files)


def _build_shards(source: Shards, config: ImagesConfig, path: Path, progress: Progress) -> dict[str, Any]:
    """Index a user's shards where they lie; damaged ones end the stage once all have been read."""
    damaged, cache = [], shard_cache(path.parents[1])
    with _accounts(path, config) as ledger:
        for file in _counted(source.files, len(source.files), progress, what="shards"):
            try:
                local = file.fetch(cache)
                images = list(ledger.kept(source.samples(file, local), repack=False))
            except InputError as error:
                damaged.append(error)
            else:
                if images:
                    ledger.add_shard(local, images, [image.sample.row for image in images], place=file.place)
    if damaged:
        raise _together(damaged, len(source.files))
    # The shards stay as they are: what is decoded from them belongs to the index, or others would pass for the same.
    write_json(path / PIXELS, {"resolution": config.resolution, "channels": config.channels})
    return ledger.finish([str(number) for number in range(1 + max(ledger.labels))])


def _counted(items: Iterable[T], total: int, progress: Progress, what: str = "images") -> Iterator[T]:
    for done, item in enumerate(items):
        progress(done, total, what)
        yield item
    progress(total, total, what)


def _together(damaged: list[InputError], num_shards: int) -> InputError:
    if len(damaged) == 1:
        return damaged[0]
    first = damaged[0]
    return InputError(
        f"{len(damaged)} of {num_shards} shards are damaged, the first: {first.what}",
        stage="images",
        path=first.path,
        found=[error.what for error in damaged[:_NAMED]],
        fix="Get these shards again, or remove them.",
    )


# --- images that are kept, and those that are not -----------------------------------------------------------------


class _Image(NamedTuple):
    """A sample that is an image, as it will be decoded later. content: its pixels as PNG for a shard of our own."""

    sample: Sample
    picture: Picture


def _write_tar(path: Path, images: list[_Image]) -> None:
    """A WebDataset shard whose bytes depend on its images only."""
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        TarWriter(file, user="", group="", compress=False, encoder=False, mtime=0) as tar,
    ):
        for image in images:
            label = {"cls": str(image.sample.label).encode()} if image.sample.label >= 0 else {}
            tar.write({"__key__": image.sample.key, "png": image.picture.content, **label})


@contextlib.contextmanager
def _accounts(path: Path, config: ImagesConfig) -> Iterator[_Ledger]:
    """A ledger whose index is on disk when the block ends well; `finish` comes after that."""
    with replacing(path / INDEX) as temporary, pq.ParquetWriter(temporary, SCHEMA) as index:
        yield _Ledger(path, config, index)


class _Ledger:
    """Keeps the accounts of one build: rows of the index, shards, rejects, counts. Use through `_accounts`."""

    def __init__(self, path: Path, config: ImagesConfig, index: pq.ParquetWriter) -> None:
        self.path, self.config, self._index = path, config, index
        self.shards: list[dict[str, Any]] = []
        self.labels: Counter[int] = Counter({-1: 0})
        self._counts = Counter(read=0, kept=0, rejected=0, animated=0, captioned=0)
        self._splits: Counter[str] = Counter()
        self._named_splits = False
        self._rejects: list[Reject] = []  # the first few; all are in rejects.jsonl
        self._places: dict[str, str] = {}  # key -> where it was first read

    def kept(self, samples: Iterator[Sample | Reject], *, repack: bool) -> Iterator[_Image]:
        """The images among the samples, in order; the rest is put on record as rejected."""
        asked: deque[Sample | Reject] = deque()  # those whose pictures are still to come

        def encoded() -> Iterator[bytes]:
            for sample in samples:
                new = self._without_duplicates(sample)
                asked.append(new if isinstance(new, Reject) else dataclasses.replace(new, data=b""))
                if isinstance(new, Sample):
                    yield new.data

        want = "png" if repack else "check"
        for picture in decoders().map(encoded(), self.config.resolution, self.config.channels, want):
            self._put_down_rejects(asked)
            sample = asked.popleft()
            assert isinstance(sample, Sample)
            self._counts["read"] += 1
            if isinstance(picture, Failure):
                self._reject(Reject(sample.path, sample.key, picture.reason))
            else:
                yield _Image(sample, picture)
        self._put_down_rejects(asked)

    def _put_down_rejects(self, asked: deque[Sample | Reject]) -> None:
        """Those that come before the next sample that was decoded."""
        while asked and isinstance(asked[0], Reject):
            self._counts["read"] += 1
            self._reject(cast(Reject, asked.popleft()))

    def add_shard(self, file: Path, images: list[_Image], rows: Iterable[int], *, place: str) -> None:
        """Record a shard whose images have the given positions in its tar. place: where it will be looked for."""
        number = len(self.shards)
        samples = [image.sample for image in images]
        splits = [self._split(sample) for sample in samples]
        columns = {
            "key": [sample.key for sample in samples],
            "shard": [number] * len(samples),
            "row": list(rows),
            "split": splits,
            "label": [sample.label for sample in samples],
            "captions": [sample.captions for sample in samples],
            "width": [image.picture.width for image in images],
            "height": [image.picture.height for image in images],
            "sha256": [image.picture.sha256 for image in images],
        }
        self._index.write_table(pa.table(columns, schema=SCHEMA))
        self.shards.append({"name": f"{number:05d}", "path": place, **file_record(file), "count": len(samples),
                            "first_row": self._counts["kept"]})  # fmt: skip
        self._counts["kept"] += len(samples)
        self._counts["animated"] += sum(image.picture.animated for image in images)
        self._counts["captioned"] += sum(bool(sample.captions) for sample in samples)
        self._splits.update(splits)
        self.labels.update(sample.label for sample in samples)

    def finish(self, class_names: list[str], **further: Any) -> dict[str, Any]:
        """Refuse what is beyond the budget, write the small files, and return the manifest's info."""
        self._refuse()
        self._fill_splits()
        write_json(self.path / SHARDS, self.shards)
        write_json(self.path / CLASSES, class_names)
        return {
            "num_images": self._counts["kept"],
            **self._counts,
            **{split: self._splits[split] for split in SPLITS},
            "split_by": "the source" if self._named_splits else f"seed {self.config.split_seed}",
            "num_shards": len(self.shards),
            "num_classes": len(class_names),
            "class_counts": [self.labels[number] for number in range(len(class_names))],
            "resolution": self.config.resolution,
            "channels": self.config.channels,
            **further,
        }

    def _without_duplicates(self, sample: Sample | Reject) -> Sample | Reject:
        if isinstance(sample, Reject):
            return sample
        if sample.key in self._places:
            return Reject(sample.path, sample.key, f"has a key that was there before, in {self._places[sample.key]}")
        self._places[sample.key] = sample.path
        return sample

    def _reject(self, reject: Reject) -> None:
        self._counts["rejected"] += 1
        if len(self._rejects) < _NAMED:
            self._rejects.append(reject)
        with (self.path / REJECTS).open("a", encoding="ascii") as file:
            file.write(json.dumps(dataclasses.asdict(reject)) + "\n")

    def _split(self, sample: Sample) -> str:
        if sample.split is not None:
            self._named_splits = True
            return sample.split
        held_out = split_fraction(self.config.split_seed, sample.key) < self.config.held_out_fraction
        return "held_out" if held_out else "train"

    def _refuse(self) -> None:
        counts, budget = self._counts, self.config.max_bad_samples
        if counts["rejected"] > budget:
            first = self._rejects[0]
            listed = self.path.with_name(f"{self.path.name}.{REJECTS}")  # beside it: an index of before comes back
            shutil.copyfile(self.path / REJECTS, listed)
            raise InputError(
                f"{counts['rejected']} of {counts['read']} images cannot be used: {first.key} {first.reason}",
                stage="images",
                path=first.path,
                key=first.key,
                expected=f"at most {budget} (images.max_bad_samples)",
                found=[f"{reject.key} {reject.reason}" for reject in self._rejects],
                fix=f"Mend or remove them, or raise images.max_bad_samples; {listed} lists them all.",
            )
        if counts["kept"] < 2:
            raise InputError(
                "There are too few images",
                stage="images",
                path=self.config.path or None,
                expected="at least 2, one to train on and one held out",
                found=counts["kept"],
                fix="Add images.",
            )

    def _fill_splits(self) -> None:
        """A split with fewer than two images, of which no distribution can be had, gets those that are nearest to it;
        one is enough where the source names the splits, or has fewer than four images."""
        least = 1 if self._named_splits else min(2, self._counts["kept"] // 2)
        short = next((split for split in SPLITS if self._splits[split] < least), None)
        if short is None:
            return
        table = pq.read_table(self.path / INDEX)
        fractions = [split_fraction(self.config.split_seed, key) for key in table.column("key").to_pylist()]
        nearest = np.argsort(fractions)[:: 1 if short == "held_out" else -1]
        splits = table.column("split").to_pylist()
        for row in [row for row in nearest if splits[row] != short][: least - self._splits[short]]:
            self._splits.update({splits[row]: -1, short: 1})
            splits[row] = short
        with replacing(self.path / INDEX) as temporary:
            pq.write_table(
                table.set_column(SCHEMA.get_field_index("split"), SCHEMA.field("split"), [splits]), temporary
            )
