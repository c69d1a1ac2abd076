"""A classifier of real images as a judge of generated ones: which classes appear, and how sure it is of them.

It looks at pixels, so no network of the pipeline has a hand in it. Trees, calibrated by temperature: on digits they
are nearly as accurate as a support vector machine (0.978 against 0.989) and, unlike one that is calibrated in the same
way, or a multi-layer perceptron, they become unsure on noise (mean confidence 0.5 against 0.9).
Images larger than 16x16 are averaged down to that, which suits digits and textures more than small objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import ExtraTreesClassifier

from nestdiff_core.errors import InputError, IntegrityError
from nestdiff_core.evaluation.classes import classes_of
from nestdiff_core.evaluation.extractors import area_resize
from nestdiff_core.evaluation.features import Images, batches

SIDE = 16
MAX_TRAIN_IMAGES = 10_000
TREES, FOLDS = 100, 3
CALIBRATION: dict[str, Any] = {"method": "temperature", "cv": FOLDS, "ensemble": False}


@dataclass(frozen=True)
class Probe:
    """The fitted classifier, and the labels and images it was trained on."""

    classifier: CalibratedClassifierCV
    classes: tuple[int, ...]
    image_shape: tuple[int, ...]


def fit_probe(images: Images, labels: Int[np.ndarray, " N"], *, seed: int = 0) -> Probe:
    """Train on real labelled images: at most 10,000 of them, drawn by `seed`.

    Raises InputError when there are fewer than two classes or a class has fewer than three images.
    """
    if len(images) != len(labels):
        raise InputError(
            "Images and labels do not go together",
            stage="evaluation",
            expected=f"{len(images)} labels",
            found=len(labels),
            fix="Give one label an image.",
        )
    rows = np.sort(np.random.default_rng(seed).permutation(len(labels))[:MAX_TRAIN_IMAGES])
    labels = np.asarray(labels)[rows]
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or counts.min() < FOLDS:
        raise InputError(
            "The probe cannot learn from these labels",
            stage="evaluation",
            expected=f"two classes or more, each with {FOLDS} images or more",
            found={int(c): int(n) for c, n in zip(classes, counts, strict=True)},
            fix="Give more labelled images, or set evaluation.probe to false.",
        )
    trees = ExtraTreesClassifier(TREES, random_state=seed)
    classifier = CalibratedClassifierCV(trees, **CALIBRATION).fit(
        np.concatenate(list(_pixels(_Rows(images, rows)))), labels
    )
    return Probe(classifier, tuple(classes.tolist()), images[0].shape)


def judge(probe: Probe, images: Images) -> dict[str, Any]:
    """What the probe sees in a set of images:

    num_images; num_classes_seen, classes that at least one image is assigned to; class_share, per class; class_entropy
    of those shares in nats (log of the number of classes when even); confidence, the mean largest probability;
    entropy, the mean entropy of one image's probabilities in nats (0 is certain).
    """
    shape = images[0].shape
    if shape != probe.image_shape:
        raise IntegrityError(
            "The probe was trained on images of another shape",
            stage="evaluation",
            expected=probe.image_shape,
            found=shape,
            fix="Judge samples of the images' resolution and channels.",
        )
    found = classes_of(_probabilities(probe, images))
    return {
        "num_images": len(images),
        "num_classes_seen": found.num_seen,
        "class_share": {str(c): float(s) for c, s in zip(probe.classes, found.share, strict=True)},
        "class_entropy": found.balance,
        "confidence": found.confidence,
        "entropy": found.entropy,
    }


def accuracy(probe: Probe, images: Images, labels: Int[np.ndarray, " N"]) -> float:
    """Share of real images that the probe assigns to their label."""
    said = np.asarray(probe.classes)[_probabilities(probe, images).argmax(axis=1)]
    return float((said == np.asarray(labels)).mean())


def _probabilities(probe: Probe, images: Images) -> Float[np.ndarray, "N K"]:
    return np.concatenate([probe.classifier.predict_proba(block) for block in _pixels(images)])


@dataclass(frozen=True)
class _Rows:
    """Some of a set's images."""

    images: Images
    rows: Int[np.ndarray, " M"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[int(self.rows[index])]


def _pixels(images: Images) -> Iterator[Float[np.ndarray, "n D"]]:
    """Pixels in [0, 1] over at most 16x16 areas, one row an image, a thousand images at a time."""
    for batch in batches(images, 1024):
        x = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255.0
        yield area_resize(x, SIDE).flatten(1).numpy()
