"""A sample set in a folder, for other programs: shards of .npz or WebDataset, beside what they were made with.

    request.json      the configuration that decides the images, seed, and the denoisers' digests
    00000.npz         arr_0 uint8 (n, H, W, 3), arr_1 int64 class labels where there are any, index; or
    00000.tar         00000123.png and .json (seed, index, label or caption), and .cls where there are labels
    manifest.json     once the set is whole: counts, and the sha256 of every file (`nestdiff_core verify FOLDER`)

Shard k holds the images k * size, ..., whichever were asked for: sets of other ranges can be put together.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from nestdiff_core.artifacts import Artifact, ArtifactWriter, open_artifact, writing
from nestdiff_core.errors import ConfigError, IntegrityError
from nestdiff_core.evaluation.samples import Blocks, StoredSamples, save_samples
from nestdiff_core.experiment import Experiment, Ref, differences
from nestdiff_core.files import (
    LOCK,
    MANIFEST,
    PARTS,
    TEMPORARY,
    DirectoryLock,
    environment_faults,
    fingerprint,
    fsync_directory,
    read_json,
    replacing,
    write_json,
)
from nestdiff_core.loading import Cascade
from nestdiff_core.progress import Progress, silent
from nestdiff_core.sampling.parts import Part, in_parts, make_parts, rank, together

FORMATS = {"npz": ".npz", "webdataset": ".tar"}
REQUEST = "request.json"
USUAL_SHARD = 1_000  # images
_PNG_THREADS = 4


def write_folder(
    x: Experiment,
    folder: Path,
    *,
    seed: int,
    num_images: int,
    first: int = 0,
    shard_size: int | None = None,
    kind: str = "npz",
    device: str = "cpu",
    progress: Progress = silent,
) -> Artifact:
    """Sample images `first` to `first + num_images` into shards of `shard_size` below `folder`; the same call resumes,
    and one for more images goes on. Runs in each process of a torchrun group.

    shard_size: a multiple of sampling.batch_size; default: the first from 1,000 on. first: a multiple of shard_size.

    Raises IntegrityError, saying what differs, for a folder of another experiment, seed, or layout; ConfigError for
    numbers that do not fit or a folder with other files; NumericsError with the image for one that is not finite.
    """
    size = _shard_size(x, shard_size)
    if first % size:
        raise ConfigError(
            "A sample set begins with a whole shard",
            stage="samples",
            key="first image",
            expected=f"a multiple of the shard size {size}",
            found=first,
            fix="Change either.",
        )
    header, parts = _header(x, seed, size, kind), in_parts(num_images, size, first=first)
    with ExitStack() as stack:
        writer = ArtifactWriter(folder, header)
        if rank() == 0:
            check = partial(_require_same, folder, header)
            writer = stack.enter_context(writing(folder, header, keep_parts=True, check=check))
            write_json(folder / REQUEST, _request(header))
        together()
        make_parts(writer, parts, partial(Cascade, x, device=device), _maker(folder, seed, kind), progress=progress)
        sealed = _seal(writer, kind, seed) if rank() == 0 else None
    together()
    return sealed or open_artifact(folder, stage="samples")


def write_npz_file(x: Experiment, path: Path, *, progress: Progress = silent, **request: Any) -> int:
    """Sample into one .npz; returns how many images. Until it is whole its shards are in a folder beside it, from which
    the same call goes on. request: as for `write_folder`. Runs in each process of a torchrun group."""
    folder = path.with_name(f"{path.name}.parts")
    made = write_folder(x, folder, progress=progress, **request)
    together()  # all have read the folder's manifest
    if rank() == 0:
        with DirectoryLock(folder, stage="samples"), environment_faults(path):
            joined = folder / f"{TEMPORARY}joined.npz"  # within, where the next run removes it
            wanted = range(first := request.get("first", 0), first + request["num_images"])
            _join(folder, made.info["shards"], wanted, joined)
            os.replace(joined, path)
            fsync_directory(path.absolute().parent)
            _remove(folder)
    return request["num_images"]


def _remove(folder: Path) -> None:
    """First what vouches for files, last the request: as long as anything is left it says whose it is."""
    (folder / MANIFEST).unlink()
    shutil.rmtree(folder / PARTS)
    for path in folder.iterdir():
        if path.name != REQUEST:
            path.unlink()
    shutil.rmtree(folder)


def _join(folder: Path, files: list[dict[str, Any]], wanted: range, path: Path) -> None:
    """One sample file of the images `wanted`, of shards that may hold more, where a larger request had been stopped:
    images a shard at a time, then their small arrays."""
    shards, small = [], {}
    for shard in files:
        with np.load(folder / shard["file"], allow_pickle=False) as arrays:
            start, stop = np.searchsorted(arrays["index"], (wanted.start, wanted.stop)).tolist()
            if start == stop:
                continue
            for name in sorted({"arr_1", "index"} & set(arrays.files)):
                small.setdefault(name, []).append(arrays[name][start:stop])
        shards.append((StoredSamples(folder / shard["file"]), start, stop))
    first, *_ = shards[0]
    images = Blocks(
        (len(wanted), *first.shape[1:3], first.channels),
        np.dtype(np.uint8),
        (shard.read(start, stop - start) for shard, start, stop in shards),
    )
    save_samples(path, images, also={name: np.concatenate(found) for name, found in small.items()})


def _shard_size(x: Experiment, asked: int | None) -> int:
    batch = x.config.sampling.batch_size
    if asked is None:
        return batch * -(-USUAL_SHARD // batch)
    if asked < 1 or asked % batch:
        raise ConfigError(
            "Shards of this size would tear batches apart",
            stage="samples",
            key="shard size",
            expected=f"a multiple of sampling.batch_size = {batch}",
            found=asked,
            fix="Change either.",
        )
    return asked


def _header(x: Experiment, seed: int, shard_size: int, kind: str) -> dict[str, Any]:
    """What decides the files of a set, which how many images it has does not."""
    own = x.header(Ref("samples"))
    sampling = {k: v for k, v in own["config"]["sampling"].items() if k != "num_images"} | {"seed": seed}
    config = {**own["config"], "sampling": sampling, "shard_size": shard_size, "format": kind}
    name = fingerprint([config, own["inputs"]])
    return {**own, "config": config, "fingerprint": name}


def _request(header: dict[str, Any]) -> dict[str, Any]:
    return {name: header[name] for name in ("config", "inputs")}


def _require_same(folder: Path, header: dict[str, Any]) -> None:
    """Refuse a folder with anything but this set, or the beginning of it."""
    names = (path.name for path in folder.iterdir())
    there = sorted(name for name in names if name != LOCK and not name.startswith(TEMPORARY))
    if there and REQUEST not in there:
        raise ConfigError(
            "The folder holds other files",
            stage="samples",
            path=folder,
            expected=f"an empty folder, or one with {REQUEST}",
            found=there[:5],
            fix="Choose another folder.",
        )
    if not there:
        return
    differing = differences(_request(header), read_json(folder / REQUEST, stage="samples"))
    if differing:
        raise IntegrityError(
            "The folder holds a sample set that was made in another way",
            stage="samples",
            path=folder,
            expected={name: values[0] for name, values in differing.items()},
            found={name: values[1] for name, values in differing.items()},
            fix="Choose another folder, or remove this one.",
        )


def _maker(folder: Path, seed: int, kind: str) -> Callable[[Cascade, Part, Callable[[int], None]], list[Path]]:
    def make(cascade: Cascade, part: Part, report: Callable[[int], None]) -> list[Path]:
        z = cascade.latents(part.indices, seed=seed, progress=lambda done, *_, **__: report(done))
        pictures = cascade.images(part.indices, z[1])
        told = [{"seed": seed, "index": i, **cascade.told(i)} for i in part.indices]
        path = folder / f"{part.name}{FORMATS[kind]}"
        match kind:
            case "npz":
                _write_npz(path, pictures, told)
            case "webdataset":
                _write_tar(path, pictures, told)
        return [path]

    return make


def _write_npz(path: Path, pictures: np.ndarray, told: list[dict[str, Any]]) -> None:
    labels = {"arr_1": np.array([one["label"] for one in told])} if "label" in told[0] else {}
    save_samples(path, pictures, also={**labels, "index": np.array([one["index"] for one in told])})


def _write_tar(path: Path, pictures: np.ndarray, told: list[dict[str, Any]]) -> None:
    """A WebDataset shard whose bytes depend on its images only."""
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        TarWriter(file, user="", group="", compress=False, encoder=False, mtime=0) as tar,
        ThreadPoolExecutor(_PNG_THREADS) as threads,
    ):
        for one, png in zip(told, threads.map(_png, pictures), strict=True):
            label = {"cls": str(one["label"]).encode()} if "label" in one else {}
            about = json.dumps(one, sort_keys=True).encode()
            tar.write({"__key__": f"{one['index']:08d}", "png": png, "json": about, **label})


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture).save(buffer, "PNG")
    return buffer.getvalue()


def _seal(writer: ArtifactWriter, kind: str, seed: int) -> Artifact:
    """The manifest over every shard that is there; those of earlier, longer requests included."""
    shards = []
    for name in sorted(record.stem for record in (writer.path / PARTS).glob("*.json")):
        if (record := writer.part(name)) is None:
            raise IntegrityError(
                "A shard that was not asked for this time is damaged",
                stage="samples",
                path=writer.path / f"{name}{FORMATS[kind]}",
                fix="Ask for all images again: it is made anew.",
            )
        [file] = record["files"]
        shards.append({"file": file, "first": record["first"], "images": record["images"]})
    for file in _unvouched(writer.path, kind, {shard["file"] for shard in shards}):
        file.unlink()
    return writer.seal(seed=seed, images=sum(shard["images"] for shard in shards), shards=shards)


def _unvouched(folder: Path, kind: str, named: set[str]) -> Iterator[Path]:
    """Shards of a run that was stopped before it could commit them."""
    for file in folder.glob(f"*{FORMATS[kind]}"):
        if re.fullmatch(r"\d{5,}", file.stem) and file.name not in named:
            yield file
