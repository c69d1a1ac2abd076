"""Where images come from: scikit-learn's digits, a folder of image files, or WebDataset shards.

A source names its samples and reads their bytes; whether these are an image is decided in build.py. What a source
itself cannot use, a link in a tar or a file without a label, it passes on as a `Reject`.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from braceexpand import braceexpand

from nestdiff_core.config import ImagesConfig
from nestdiff_core.errors import InputError
from nestdiff_core.files import TEMPORARY, sha256_file
from nestdiff_core.images import tars
from nestdiff_core.images.pixels import encode_png
from nestdiff_core.remote import Remote, cache_bytes, is_url, make_room

IMAGE_SUFFIXES = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"})
TOY_IMAGES = 256
MAX_CLASSES = 100_000
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
SPLIT_WORDS = {"train": "train", "training": "train", "val": "held_out", "valid": "held_out", "validation": "held_out",
               "test": "held_out", "heldout": "held_out"}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One image as it was found; `split`: None where the source names none; `row`: its position in its tar, if any."""

    path: str
    key: str
    data: bytes
    label: int = -1
    captions: list[str] = field(default_factory=list)
    split: str | None = None
    row: int = -1


@dataclass(frozen=True)
class Reject:
    """Something that should have been an image: where it is and what is wrong with it."""

    path: str
    key: str
    reason: str


# --- digits -------------------------------------------------------------------------------------------------------


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8, values 0..16 scaled to 0..255; or the first `limit` of them."""

    ignored_files = 0

    def __init__(self, config: ImagesConfig, limit: int | None = None) -> None:
        from sklearn.datasets import load_digits

        values, labels = load_digits(return_X_y=True)
        self._images = np.rint(values[:limit] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        self.total = len(self._images)
        self._labels = labels[:limit] if config.labels else np.full(self.total, -1)
        self.class_names = [str(digit) for digit in range(10)] if config.labels else []

    def samples(self) -> Iterator[Sample]:
        for row, (image, label) in enumerate(zip(self._images, self._labels, strict=True)):
            yield Sample("sklearn.datasets.load_digits", f"{row:05d}", encode_png(image), int(label))


# --- a folder -----------------------------------------------------------------------------------------------------


class Folder:
    """Every image file below a folder, in the order of the relative paths.

    With labels, the class is the sub-folder directly below the folder; names that are all split names (train, val,
    ...) are the splits instead, and the classes are one further down.
    """

    def __init__(self, config: ImagesConfig) -> None:
        root = Path(config.path).expanduser().absolute()
        if not root.is_dir():
            raise InputError(
                "images.path is not a folder", stage="images", path=root, key="images.path", fix="Correct images.path."
            )
        found = sorted(_files(root))
        files = [name for name in found if _suffix(name) in IMAGE_SUFFIXES]
        if not files:
            raise InputError(
                "The folder holds no image files",
                stage="images",
                path=root,
                key="images.path",
                expected=f"files ending in {', '.join(sorted(IMAGE_SUFFIXES))}",
                found=f"{len(found)} other files",
                fix="Correct images.path.",
            )
        self._root, self._labels = root, config.labels
        self.total, self.ignored_files = len(files), len(found) - len(files)
        self._splits = _named_splits({name.split("/")[0] for name in files})
        self._files = files
        self.class_names = sorted({name for f in files if (name := self._class(f)) is not None})
        if config.labels and not self.class_names:
            raise InputError(
                "images.labels is true, but no image lies in a sub-folder that would be its class",
                stage="images",
                path=root,
                key="images.labels",
                expected="CLASS/IMAGE.png",
                found=files[0],
                fix="Sort the images into a folder per class, or set images.labels: false.",
            )

    @property
    def paths(self) -> list[Path]:
        """The image files that are there (a dangling link is not)."""
        return [path for file in self._files if (path := self._root / file).exists()]

    def samples(self) -> Iterator[Sample | Reject]:
        classes = {name: number for number, name in enumerate(self.class_names)}
        for file in self._files:
            path, key, label = self._root / file, file_key(file), self._class(file)
            if self._labels and label is None:
                yield Reject(str(path), key, "lies in no sub-folder that would be its class")
            elif not path.is_file():
                yield Reject(str(path), key, "is not a regular file")
            else:
                try:
                    data = path.read_bytes()
                except OSError as error:
                    yield Reject(str(path), key, f"cannot be read ({error.strerror})")
                    continue
                number = -1 if label is None else classes[label]
                yield Sample(str(path), key, data, number, split=self._splits.get(file.split("/")[0]))

    def _class(self, file: str) -> str | None:
        folders = file.split("/")[1 if self._splits else 0 : -1]
        return folders[0] if folders and self._labels else None


def file_key(relative: str) -> str:
    """The sample key of a file: its relative path with all that means something in a tar percent-encoded.

    `urllib.parse.unquote` gives the path back. A key has no dots, since WebDataset ends it at the first one.
    """
    key = quote(os.fsencode(relative), safe="/ ").replace(".", "%2E")
    return key.replace("_", "%5F", 1) if key.startswith("__") else key  # __name__ is set aside by webdataset


def _files(root: Path) -> Iterator[str]:
    """Relative POSIX paths of all files below `root`; linked folders are entered once."""

    def refuse(error: OSError) -> None:  # os.walk would leave the folder out
        raise InputError(
            f"A folder cannot be read ({error.strerror})",
            stage="images",
            path=error.filename,
            fix="Give this user the right to read it.",
        ) from error

    seen = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        for name in names:
            yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _suffix(name: str) -> str:
    return name.rsplit(".", 1)[-1].lower() if "." in name else ""


def _named_splits(names: set[str]) -> dict[str, str]:
    """The split that each name names, or {} unless all of them do and both splits are there."""
    splits = {}
    for name in names:
        words = [SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS]
        if len(set(words)) != 1:
            return {}
        splits[name] = words[0]
    return splits if set(splits.values()) == {"train", "held_out"} else {}


# --- WebDataset shards --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardFile:
    """A tar of images at `place`, a path or a URL.

    state: what tells without reading it that it has changed; None: it is not there. remote: for a URL, its folder.
    """

    place: str
    state: str | None
    remote: Remote | None = None

    @property
    def name(self) -> str:
        return self.place.rpartition("/")[2]

    def fetch(self, cache: Path) -> Path:
        """Its file on this machine: a URL's is copied into `cache`, under the hash of its content."""
        if self.remote is None:
            return Path(self.place)
        make_room(cache.glob("*.tar"), cache_bytes(), self.remote.size(self.name) or 0)
        copy = cache / f"{TEMPORARY}{self.name}"
        self.remote.fetch(self.name, copy)
        return copy.rename(cached_shard(cache, sha256_file(copy)))


def cached_shard(cache: Path, sha256: str) -> Path:
    """Where the copy of a URL's shard lies."""
    return cache / f"{sha256}.tar"


def shard_cache(root: Path) -> Path:
    """Where an artifact root keeps copies of shards that are in object storage."""
    return root / "cache"


def fetch_shard(place: str, sha256: str, size: int, cache: Path) -> Path:
    """The file on this machine of a URL's shard that the index knows."""
    path = cached_shard(cache, sha256)
    if not path.is_file():
        make_room(cache.glob("*.tar"), cache_bytes(), size)
        folder, _, name = place.rpartition("/")
        Remote(folder).fetch(name, path)
    return path


class Shards:
    """Tar shards in a folder, or those that a pattern names (`*`, `?`, `{00000..00009}`), in the order of their paths.

    The folder or pattern may be a URL of object storage, or (braces only) of a web server. A shard whose file name
    holds train, or val or test, belongs to that split, when all of them say so.
    """

    def __init__(self, config: ImagesConfig) -> None:
        self.files = _remote_shards(config.path) if is_url(config.path) else _local_shards(config.path)
        self._labels = config.labels
        self._splits = _named_splits({file.name for file in self.files})

    def samples(self, file: ShardFile, path: Path) -> Iterator[Sample | Reject]:
        """The samples of one shard, whose content is at `path`; InputError when the tar is not whole."""
        scan = tars.scan(path, file.place)
        for skipped in scan.skipped:
            yield Reject(file.place, skipped.name, skipped.reason)
        if scan.num_samples == 0:
            raise InputError(
                f"{file.name} holds no samples",
                stage="images",
                path=file.place,
                fix="Get this shard again, or remove it.",
            )
        row = -1
        for row, members in enumerate(tars.read_samples(path)):
            yield self._sample(file, row, members)
        if row + 1 != scan.num_samples:
            raise InputError(
                f"{file.name} changed while it was read",
                stage="images",
                path=file.place,
                expected=scan.num_samples,
                found=row + 1,
                fix="Let nothing write to the shards, then run the same command again.",
            )

    def _sample(self, file: ShardFile, row: int, members: dict[str, Any]) -> Sample | Reject:
        key = members["__key__"]
        try:
            _check_key(key)
            label = _label(members) if self._labels else -1
            return Sample(
                file.place, key, image_member(members), label, _captions(members), self._splits.get(file.name), row
            )
        except ValueError as error:
            return Reject(file.place, key, str(error))


def image_member(members: dict[str, Any]) -> bytes:
    """The one image of a WebDataset sample, `jpg` before `mask.png`; ValueError when there is none or several."""
    images = [suffix for suffix in members if suffix.rsplit(".", 1)[-1] in IMAGE_SUFFIXES]
    plain = [suffix for suffix in images if suffix in IMAGE_SUFFIXES]
    match plain or images:
        case [suffix]:
            return members[suffix]
        case []:
            raise ValueError("has no image member")
        case several:
            names = ", ".join(several[:3])
            raise ValueError(f"has {len(several)} image members ({names}): a key ends at the first dot of a name")


def _check_key(key: str) -> None:
    if key.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", key) or "\0" in key:
        raise ValueError("has a name that points outside the shard")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ValueError("has a name that is not UTF-8") from None


def _label(members: dict[str, Any]) -> int:
    if "cls" not in members:
        raise ValueError("has no label (a .cls member)")
    text = members["cls"].strip()
    if not re.fullmatch(rb"[0-9]{1,9}", text) or int(text) >= MAX_CLASSES:
        shown = text[:40].decode(errors="backslashreplace")
        raise ValueError(f"has a label that is not a number from 0 to {MAX_CLASSES - 1} ({shown!r})")
    return int(text)


def _captions(members: dict[str, Any]) -> list[str]:
    """All captions of a sample: `captions` or `caption` of a .json member, else the .txt member."""
    try:
        record = json.loads(members["json"]) if "json" in members else {}
        captions = (record.get("captions") or record.get("caption") or []) if isinstance(record, dict) else []
        captions = [captions] if isinstance(captions, str) else captions
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise ValueError("captions that are not text")
        return captions or ([members["txt"].decode().strip()] if "txt" in members else [])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a caption that cannot be read ({error})") from None


def _local_shards(pattern: str) -> list[ShardFile]:
    place = Path(pattern).expanduser().absolute()
    if place.is_dir():
        paths = [path for path in place.iterdir() if path.name.endswith(TAR_SUFFIXES)]
    else:
        expanded = _expand_braces(str(place))
        paths = [Path(path) for name in expanded for path in (glob.glob(name) or [name])]
        if len(expanded) == 1 and not any(path.exists() for path in paths):
            paths = []
    files = []
    for path in sorted(set(paths)):
        status = path.stat() if path.is_file() else None
        files.append(ShardFile(str(path), status and f"{status.st_size} {status.st_mtime_ns}"))
    return _all_there(files, pattern)


def _remote_shards(pattern: str) -> list[ShardFile]:
    listings: dict[str, dict[str, str]] = {}  # states by folder and name; one request tells a thousand
    files: dict[str, ShardFile] = {}
    for url in _expand_braces(pattern.rstrip("/")):
        folder, name = (url, "") if not url.endswith(TAR_SUFFIXES) and not glob.has_magic(url) else url.rsplit("/", 1)
        remote = Remote(folder)
        if url.startswith("http"):
            states = {name: remote.state(name)}
        else:
            states = listings[folder] = listings.get(folder) or remote.states()
        if name == "":
            chosen = [key for key in states if key.endswith(TAR_SUFFIXES)]
        else:
            chosen = [key for key in states if fnmatch(key, name)] if glob.has_magic(name) else [name]
        for key in chosen:
            files[f"{folder}/{key}"] = ShardFile(f"{folder}/{key}", states.get(key), remote)
    return _all_there([files[place] for place in sorted(files)], pattern)


def _expand_braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError:  # unbalanced
        return [pattern]


def _all_there(files: list[ShardFile], pattern: str) -> list[ShardFile]:
    if not files:
        raise InputError(
            "images.path matches no shards",
            stage="images",
            path=pattern,
            key="images.path",
            expected=f"files ending in {', '.join(TAR_SUFFIXES)}",
            fix="Correct images.path.",
        )
    if missing := [file.place for file in files if file.state is None]:
        raise InputError(
            f"{len(missing)} of {len(files)} shards are missing",
            stage="images",
            path=missing[0],
            key="images.path",
            found=missing[:5],
            fix="Correct images.path, or get the missing shards.",
        )
    return files
