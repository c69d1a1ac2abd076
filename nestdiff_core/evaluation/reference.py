"""Reference statistics of real images in a file that others read too, and theirs.

    mu (D), sigma (D, D)   float64, of all images, sigma with 1 / (N - 1); the names of ADM's evaluator and most others
    features (n, D)        of at most MAX_KEPT of the images; logits (n, K) where the network has classes
    about                  JSON as bytes: extractor, hash of its weights, preprocessing, images, their shape and digest

Of files by others, mu and sigma are taken where they are there, and images (`arr_0`, as in ADM's reference batches)
where they are: the features of these then serve what compares single images.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestdiff_core.errors import InputError, IntegrityError
from nestdiff_core.evaluation.extractors import Extractor
from nestdiff_core.evaluation.features import FeatureSet, extract
from nestdiff_core.evaluation.gaussian import Gaussian
from nestdiff_core.evaluation.samples import load_samples, write_npz
from nestdiff_core.files import sha256_file

SPACE_OF_OTHERS = "inception"  # what files that do not say it hold
BICUBIC, AS_THEY_ARE, NOT_KNOWN = (
    "bicubic",
    "none",
    "not known",
)  # resize filters: that of images/pixels.py; no resizing


def save_statistics(path: Path, features: FeatureSet, extractor: Extractor, *, resize_filter: str) -> None:
    """Write what is known of real images in one space. resize_filter: how the images came to their size."""
    about = {
        **_identity(extractor),
        "images": features.count,
        "image_shape": features.image_shape,
        "digest": features.digest,
        "resize_filter": resize_filter,
    }
    arrays = {
        "mu": features.gaussian.mean,
        "sigma": features.gaussian.covariance,
        "features": _compact(features.values),
        **({} if features.logits is None else {"logits": _compact(features.logits)}),
        "about": np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8),
    }
    write_npz(path, arrays)


def load_statistics(path: Path, extractor: Extractor, *, batch_size: int = 256) -> FeatureSet:
    """What `save_statistics` wrote, or another's file of moments or images, for a comparison in this space.

    Raises IntegrityError naming what differs for statistics of another extractor, and for a file that cannot be read;
    InputError for one that holds neither moments nor images.
    """
    about, arrays = describe(path), _arrays(path, "mu", "sigma", "features", "logits")
    if about is not None:
        expected = _identity(extractor)
        differing = [name for name, value in expected.items() if value != about.get(name)]
        if differing:
            raise IntegrityError(
                f"The reference statistics are those of another extractor ({', '.join(differing)} differs)",
                stage="reference",
                path=path,
                key=extractor.kind,
                expected={name: expected[name] for name in differing},
                found={name: about.get(name) for name in differing},
                fix="Make them again with this extractor, or use the one that they were made with.",
            )
    fitted = _fitted(path, arrays, None if about is None else about["images"])
    digest = f"file {sha256_file(path)}"
    if about is not None:
        values = torch.from_numpy(arrays["features"]).double()
        logits = torch.from_numpy(arrays["logits"]).double() if "logits" in arrays else None
        shape = about["image_shape"] and tuple(about["image_shape"])
        return FeatureSet(values, logits, about["digest"], shape, fitted=fitted)
    if holds_images(path):
        found = extract(load_samples(path), extractor, batch_size=batch_size)
        # Of ADM's files mu and sigma are of all of the images, arr_0 is some of them.
        return replace(found, digest=digest, **({} if fitted is None else {"fitted": fitted, "parts": ()}))
    if fitted is None:
        raise InputError(
            "The file holds no reference",
            stage="reference",
            path=path,
            expected="mu and sigma, or images as arr_0",
            found=_names(path),
            fix="Give statistics, or an .npz of uint8 images.",
        )
    return FeatureSet(torch.empty(0, fitted.dimension, dtype=torch.float64), None, digest, None, fitted=fitted)


def describe(path: Path) -> dict[str, Any] | None:
    """What a file of `save_statistics` says about itself; None for another's."""
    arrays = _arrays(path, "about")
    try:
        return json.loads(arrays["about"].tobytes()) if "about" in arrays else None
    except ValueError as error:
        raise _unreadable(path, error) from error


def space_of(path: Path) -> str:
    """The feature space of a file of statistics."""
    about = describe(path)
    return SPACE_OF_OTHERS if about is None else about["extractor"]


def resize_filter_of(path: Path) -> str:
    """How the images of a file of statistics came to their size."""
    about = describe(path)
    return NOT_KNOWN if about is None else about["resize_filter"]


def is_statistics(path: Path) -> bool:
    """Whether a file holds moments."""
    return {"mu", "sigma"} <= set(_names(path))


def holds_images(path: Path) -> bool:
    return "arr_0" in _names(path)


@dataclass(frozen=True)
class Space:
    """One feature space of an evaluation: its extractor, and what is known of the real images in it.

    held_out: of those that samples are not compared with; without it there are no floors. resize_filter: how the
    reference's images came to their size.
    """

    extractor: Extractor
    reference: FeatureSet
    held_out: FeatureSet | None
    resize_filter: str = BICUBIC


def _identity(extractor: Extractor) -> dict[str, Any]:
    """What tells one extractor from another, as JSON has it."""
    preprocessing = json.loads(json.dumps(extractor.preprocessing))
    return {"extractor": extractor.kind, "weights_sha256": extractor.weights_sha256, "preprocessing": preprocessing}


def _fitted(path: Path, arrays: dict[str, np.ndarray], count: int | None) -> Gaussian | None:
    if not {"mu", "sigma"} <= set(arrays):
        return None
    mean, covariance = (arrays[name].astype(np.float64) for name in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise IntegrityError(
            "mu and sigma are not a mean and its covariance",
            stage="reference",
            path=path,
            expected="shapes (D,) and (D, D)",
            found=[list(mean.shape), list(covariance.shape)],
            fix="Make the statistics again.",
        )
    return Gaussian(mean, covariance, count)


def _compact(values: Tensor) -> np.ndarray:
    """In float32 where that loses nothing, as with all networks."""
    single = values.float()
    return (single if torch.equal(single.double(), values) else values).numpy()


def _arrays(path: Path, *names: str) -> dict[str, np.ndarray]:
    with _reading(path), np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in names if name in archive}


def _names(path: Path) -> list[str]:
    with _reading(path), np.load(path, allow_pickle=False) as archive:
        return list(archive.files)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> IntegrityError:
    said = " ".join(str(error).split())
    return IntegrityError(
        f"The reference statistics cannot be read ({said})",
        stage="reference",
        path=path,
        fix="Get or make the file again.",
    )
