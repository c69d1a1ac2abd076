"""Images of any origin, opened for evaluation: read one at a time, never all in memory.

    an .npz               arr_0, uint8 (N, H, W, C)
    a sample set          the folder that `python -m nestdiff_core sample --out FOLDER` leaves, once it is whole
    tars                  WebDataset shards: one, a folder of them, a pattern, or a URL
    a folder              image files, of any kind that training reads (images/pixels.py)

Pictures keep their size unless a resolution is asked for; then they come to it as training images do.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from nestdiff_core.artifacts import open_artifact
from nestdiff_core.config import ImagesConfig
from nestdiff_core.errors import InputError, IntegrityError
from nestdiff_core.evaluation.features import Images
from nestdiff_core.evaluation.samples import StoredSamples, load_samples
from nestdiff_core.experiment import home
from nestdiff_core.files import MANIFEST, PARTS, is_sealed, read_json
from nestdiff_core.images import tars
from nestdiff_core.images.pixels import decode, square
from nestdiff_core.images.sources import TAR_SUFFIXES, Folder, Shards, image_member, shard_cache
from nestdiff_core.remote import is_url
from nestdiff_core.sampling.folder import REQUEST


def open_images(
    place: str, *, resolution: int | None = None, channels: int | None = None, num_images: int | None = None
) -> Images:
    """The images at a path, pattern or URL. num_images: how many there must be. channels: 1 or 3, as which pictures are
    decoded; by default as the first of them is.

    Raises InputError for what holds no images, for pictures that cannot be decoded (when they are read) and for arrays
    of another kind; IntegrityError for a sample set that is not whole or damaged, and for another number of images.
    """
    try:
        images = _open(place, resolution)
    except InputError as error:
        if error.key == "images.path":  # as an experiment's images are called
            error.key, error.stage, error.fix = None, "evaluation", "Correct the path."
        raise
    if not len(images):
        raise InputError(
            "There are no images here",
            stage="evaluation",
            path=place,
            expected="at least one",
            found=0,
            fix="Name another set.",
        )
    if isinstance(images, _Pictures):
        images.channels = channels
    if num_images is not None and len(images) != num_images:
        raise IntegrityError(
            "The set of images is not complete",
            stage="evaluation",
            path=place,
            expected=num_images,
            found=len(images),
            fix="Make the missing images, or correct --num-images.",
        )
    return images


def _open(place: str, resolution: int | None) -> Images:
    path = Path(place).expanduser()
    if not is_url(place) and path.suffix == ".npz" and path.is_file():
        return _array(path, resolution)
    if not is_url(place) and (path / REQUEST).is_file():
        return _sample_set(path, resolution)
    holds_tars = path.is_dir() and any(name.name.endswith(TAR_SUFFIXES) for name in path.iterdir())
    if is_url(place) or holds_tars or place.endswith(TAR_SUFFIXES):
        config = ImagesConfig(source="webdataset", path=place, resolution=resolution or 256)
        cache = shard_cache(home())
        return _Tars([(file.fetch(cache), file.place) for file in Shards(config).files], resolution)
    if path.is_dir():
        paths = Folder(ImagesConfig(source="folder", path=str(path), resolution=resolution or 256)).paths
        return _Files(paths, resolution)
    raise InputError(
        "There are no images here",
        stage="evaluation",
        path=place,
        expected="an .npz, a folder of image files or of tar shards, a pattern or a URL of shards",
        fix="Correct the path.",
    )


class _Pictures:
    """Encoded pictures, decoded as they are asked for. encoded: (name, bytes) of number i."""

    def __init__(self, count: int, encoded: Callable[[int], tuple[str, bytes]], resolution: int | None) -> None:
        self._count, self._encoded, self._resolution = count, encoded, resolution
        self.channels: int | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W C"]:
        if not 0 <= index < self._count:
            raise IndexError(f"image {index} of {self._count}")
        name, data = self._encoded(index)
        try:
            image = decode(data).image
            self.channels = self.channels or (1 if image.mode == "L" else 3)
            if self._resolution is not None:
                return square(image, self._resolution, self.channels)
            pixels = np.array(image.convert("L" if self.channels == 1 else "RGB"))
            return pixels.reshape(*pixels.shape[:2], self.channels)
        except InputError as error:
            raise InputError(
                f"An image {error.what}",
                stage="evaluation",
                path=name,
                fix="Mend or remove it.",
            ) from error


class _Files(_Pictures):
    def __init__(self, paths: Sequence[Path], resolution: int | None) -> None:
        super().__init__(len(paths), lambda i: (str(paths[i]), paths[i].read_bytes()), resolution)


class _Tars(_Pictures):
    """Pictures of whole tars, one tar's in memory at a time. files: where each lies, and what errors call it."""

    def __init__(self, files: Sequence[tuple[Path, str]], resolution: int | None) -> None:
        counts = []
        for path, name in files:
            scan = tars.scan(path, name)
            if scan.skipped:
                raise InputError(
                    f"A member of {Path(name).name} {scan.skipped[0].reason}",
                    stage="evaluation",
                    path=name,
                    key=scan.skipped[0].name,
                    fix="Take it out of the shard.",
                )
            counts.append(scan.num_samples)
        self._files, self._first = files, np.cumsum([0, *counts])
        self._tar, self._samples = -1, []
        super().__init__(sum(counts), self._member, resolution)

    def _member(self, index: int) -> tuple[str, bytes]:
        tar = int(np.searchsorted(self._first, index, side="right")) - 1
        path, name = self._files[tar]
        if tar != self._tar:
            self._tar, self._samples = tar, [(s["__key__"], s) for s in tars.read_samples(path)]
        key, members = self._samples[index - int(self._first[tar])]
        try:
            return f"{name}, {key}", image_member(members)
        except ValueError as error:
            raise InputError(
                f"A sample {error}", stage="evaluation", path=name, key=key, fix="Mend or remove it."
            ) from error


class _Joined:
    """Sets one behind the other."""

    def __init__(self, sets: Sequence[Images]) -> None:
        self._sets, self._first = sets, np.cumsum([0, *(len(images) for images in sets)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W C"]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        k = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._sets[k][index - int(self._first[k])]


def _array(path: Path, resolution: int | None) -> Images:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path) from error
    if "arr_0" not in names:
        raise InputError(
            "The file holds no images",
            stage="evaluation",
            path=path,
            expected="uint8 (N, H, W, C) as arr_0",
            found=names,
            fix="Save them with numpy.savez(path, images).",
        )
    try:
        images: Images = StoredSamples(path)
    except IntegrityError as error:
        if error.key == "arr_0":
            raise InputError(
                "These are not images",
                stage="evaluation",
                path=path,
                key="arr_0",
                expected=error.expected,
                found=error.found,
                fix="Save values from 0 to 255 as uint8; to_uint8 makes them of network outputs.",
            ) from error
        try:
            images = load_samples(path)  # compressed, or in another order: as a whole
        except IntegrityError as damage:
            raise _unreadable(path) from damage
    if resolution is not None and images[0].shape[0] != resolution:
        raise IntegrityError(
            "The images have another resolution",
            stage="evaluation",
            path=path,
            expected=resolution,
            found=list(images[0].shape),
            fix="Compare images of one resolution: arrays are not resized.",
        )
    return images


def _unreadable(path: Path) -> InputError:
    return InputError(
        "The file cannot be read",
        stage="evaluation",
        path=path,
        expected="an .npz, as numpy.savez writes it",
        fix="Get or make it again.",
    )


def _sample_set(folder: Path, resolution: int | None) -> Images:
    if not is_sealed(folder):
        parts = [json.loads(file.read_text()) for file in sorted((folder / PARTS).glob("*.json"))]
        raise IntegrityError(
            "The sample set is not complete",
            stage="samples",
            path=folder,
            expected=MANIFEST,
            found=f"{sum(part['images'] for part in parts)} images in {len(parts)} whole shards",
            fix="Run the command that began it again: it goes on.",
        )
    artifact = open_artifact(folder, stage="samples")
    artifact.verify()
    files = [folder / shard["file"] for shard in artifact.info["shards"]]
    if files and files[0].suffix == ".tar":
        return _Tars([(file, str(file)) for file in files], resolution)
    return _Joined([_array(file, resolution) for file in files])


def made_with(place: str) -> dict[str, Any] | None:
    """What a sample set's folder says of how it was made."""
    request = Path(place).expanduser() / REQUEST
    return None if is_url(place) or not request.is_file() else read_json(request, stage="samples")
