"""Sample sets: from a decoder's output to uint8 images, and to a file that other evaluators read.

The file is the convention of ADM's evaluation suite: an .npz whose `arr_0` is uint8 (N, H, W, 3). Its readers know
RGB only, so grey images are written three times over, and `channels` (1 or 3) says what they were.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nestdiff_core.errors import InputError, IntegrityError, NumericsError
from nestdiff_core.files import replacing

ROUNDING = "clamp to [-1, 1], x * 127.5 + 127.5 in float32, round half to even"


def to_uint8(images: Float[Tensor, "B C H W"], *, numbers: Sequence[int] | None = None) -> UInt8[np.ndarray, "B H W C"]:
    """Images in [-1, 1] to 0..255, by the rule `ROUNDING`.

    Raises NumericsError, naming the image (of `numbers`, else its place), for a pixel that is not a number.
    """
    images = images.detach().float()
    broken = images.isnan().flatten(1).any(dim=1).nonzero()
    if len(broken):
        raise NumericsError(
            "A generated image has pixels that are not numbers",
            key=f"image {int(broken[0]) if numbers is None else numbers[int(broken[0])]}",
            found=f"{len(broken)} of {len(images)} images",
            fix="Look at the denoisers' losses.",
        )
    pixels = (images.clamp(-1.0, 1.0) * 127.5 + 127.5).round()  # torch rounds halves to even
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def with_contrast(images: Float[Tensor, "B C H W"], factor: float) -> Float[Tensor, "B C H W"]:
    """Each image with its deviations from its own mean multiplied; as it is where factor is 1."""
    if factor == 1.0:
        return images
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + factor * (images - mean)


class Blocks(NamedTuple):
    """An array that comes in pieces along its first axis, so that it never has to be in memory."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Iterable[np.ndarray]


def write_npz(path: Path, arrays: Mapping[str, np.ndarray | Blocks]) -> None:
    """An uncompressed .npz, as numpy.savez writes it, whose bytes depend on the arrays only; one block in memory."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            shape, dtype, blocks = array if isinstance(array, Blocks) else (array.shape, array.dtype, (array,))
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))  # np.savez writes the time of day
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for block in blocks:
                    file.write(np.ascontiguousarray(block, dtype).data)


def write_safetensors(path: Path, tensors: Mapping[str, Blocks]) -> None:
    """The bytes that safetensors' save_file writes for float16 tensors, one block in memory."""
    header, end = {}, 0
    for name in sorted(tensors):
        shape = tensors[name].shape
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            for block in tensors[name].blocks:
                file.write(np.ascontiguousarray(block, np.float16).data)


def save_samples(
    path: Path, images: np.ndarray | Blocks, *, also: Mapping[str, np.ndarray | Blocks] | None = None
) -> None:
    """Write uint8 images (N, H, W, 1 or 3) so that equal images give equal bytes.

    also: further arrays by name; ADM's own files have class labels as arr_1.
    """
    shape, dtype, blocks = images if isinstance(images, Blocks) else (images.shape, images.dtype, (images,))
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
        raise InputError(
            "These are not images",
            path=path,
            expected="uint8 (N, H, W, 1 or 3)",
            found=f"{dtype} {shape}",
            fix="Use to_uint8 for network outputs.",
        )
    rgb = (np.broadcast_to(block, (*block.shape[:3], 3)) for block in blocks)
    write_npz(path, {"arr_0": Blocks((*shape[:3], 3), dtype, rgb), "channels": np.array(shape[3]), **(also or {})})


class StoredSamples:
    """The images of a sample file, read one at a time: nothing stays in memory. Whole again by `load_samples`.

    Raises IntegrityError when the file is missing, damaged, or does not hold `num_images`; their content is not
    checked here.
    """

    def __init__(self, path: Path, *, num_images: int | None = None) -> None:
        with _reading(path), zipfile.ZipFile(path) as archive:
            entry = archive.getinfo("arr_0.npy")
            with archive.open(entry) as file:
                np.lib.format.read_magic(file)
                shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
                within = file.tell()
            with np.load(path, allow_pickle=False) as arrays:
                self.channels = int(arrays["channels"]) if "channels" in arrays else shape[-1]
            self._file = path.open("rb")
            name, extra = struct.unpack("<26xHH", os.pread(self._file.fileno(), 30, entry.header_offset))
            if entry.compress_type != zipfile.ZIP_STORED or by_column:
                raise ValueError("arr_0 is compressed, or in another order than it is read")
        _check_images(path, shape, dtype, num_images)
        self.shape: tuple[int, ...] = shape
        self._start, self._bytes = entry.header_offset + 30 + name + extra + within, math.prod(shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W C"]:
        return self.read(index, 1)[0]

    def read(self, first: int, count: int) -> UInt8[np.ndarray, "n H W C"]:
        """Images first, first + 1, ..., at most `count` of them."""
        count = max(0, min(count, len(self) - first))
        if not 0 <= first < len(self):
            raise IndexError(f"image {first} of {len(self)}")
        data = os.pread(self._file.fileno(), count * self._bytes, self._start + first * self._bytes)
        return np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])[..., : self.channels]


def load_samples(path: Path, *, num_images: int | None = None) -> UInt8[np.ndarray, "N H W C"]:
    """The images of `save_samples` with the channels they had, or those of any ADM sample file (3 channels).

    Raises IntegrityError when the file is missing, damaged, or does not hold `num_images`.
    """
    with _reading(path), np.load(path, allow_pickle=False) as archive:
        images = archive["arr_0"]
        channels = int(archive["channels"]) if "channels" in archive else images.shape[-1]
    _check_images(path, images.shape, images.dtype, num_images)
    return np.ascontiguousarray(images[..., :channels])


_AGAIN = "Materialise `samples` again."


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        what = f"The sample set cannot be read ({error})"
        raise IntegrityError(what, stage="samples", path=path, fix=_AGAIN) from error


def _check_images(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], num_images: int | None) -> None:
    if dtype != np.uint8 or len(shape) != 4:
        raise IntegrityError(
            "The sample set does not hold images",
            stage="samples",
            path=path,
            key="arr_0",
            expected="uint8 (N, H, W, C)",
            found=f"{dtype} {shape}",
            fix=_AGAIN,
        )
    if num_images is not None and shape[0] != num_images:
        raise IntegrityError(
            "The sample set is not complete",
            stage="samples",
            path=path,
            expected=num_images,
            found=shape[0],
            fix=_AGAIN,
        )
