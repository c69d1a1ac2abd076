"""Sample sets: from a decoder's output to uint8 images, and to a file that other evaluators read.

The file is the convention of ADM's evaluation suite: an .npz whose `arr_0` is uint8 (N, H, W, 3). Its readers know
RGB only, so grey images are written three times over, and `channels` (1 or 3) says what they were.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nestdiff_core.errors import InputError, IntegrityError, NumericsError
from nestdiff_core.files import replacing

ROUNDING = "clamp to [-1, 1], x * 127.5 + 127.5 in float32, round half to even"


def to_uint8(images: Float[Tensor, "B C H W"]) -> UInt8[np.ndarray, "B H W C"]:
    """Images in [-1, 1] to 0..255, by the rule `ROUNDING`. Raises NumericsError for a pixel that is not a number."""
    images = images.detach().float()
    broken = images.isnan().flatten(1).any(dim=1).nonzero()
    if len(broken):
        raise NumericsError(
            "A generated image has pixels that are not numbers",
            key=f"image {int(broken[0])}",
            found=f"{len(broken)} of {len(images)} images",
            fix="Look at the denoisers' losses.",
        )
    pixels = (images.clamp(-1.0, 1.0) * 127.5 + 127.5).round()  # torch rounds halves to even
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def save_samples(path: Path, images: np.ndarray) -> None:
    """Write uint8 images (N, H, W, 1 or 3) so that equal images give equal bytes."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise InputError(
            "These are not images",
            path=path,
            expected="uint8 (N, H, W, 1 or 3)",
            found=f"{images.dtype} {images.shape}",
            fix="Use to_uint8 for network outputs.",
        )
    arrays = {
        "arr_0": np.broadcast_to(np.ascontiguousarray(images), (*images.shape[:3], 3)),
        "channels": np.array(images.shape[3]),
    }
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))  # np.savez writes the time of day
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def load_samples(path: Path, *, num_images: int | None = None) -> UInt8[np.ndarray, "N H W C"]:
    """The images of `save_samples` with the channels they had, or those of any ADM sample file (3 channels).

    Raises IntegrityError when the file is missing, damaged, or does not hold `num_images`.
    """
    fix = "Materialise `samples` again."
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = archive["arr_0"]
            channels = int(archive["channels"]) if "channels" in archive else images.shape[-1]
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise IntegrityError(f"The sample set cannot be read ({error})", stage="samples", path=path, fix=fix) from error
    if images.dtype != np.uint8 or images.ndim != 4:
        raise IntegrityError(
            "The sample set does not hold images",
            stage="samples",
            path=path,
            key="arr_0",
            expected="uint8 (N, H, W, C)",
            found=f"{images.dtype} {images.shape}",
            fix=fix,
        )
    if num_images is not None and len(images) != num_images:
        raise IntegrityError(
            "The sample set is not complete",
            stage="samples",
            path=path,
            expected=num_images,
            found=len(images),
            fix=fix,
        )
    return np.ascontiguousarray(images[..., :channels])
