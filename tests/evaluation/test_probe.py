"""The probe: accurate and calibrated on real digits, unsure on noise, honest about collapse."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.datasets import load_digits

from nestdiff_core.errors import InputError, IntegrityError
from nestdiff_core.evaluation.probe import Probe, accuracy, fit_probe, judge


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = np.round(pixels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    return images[order], labels[order]


@pytest.fixture(scope="module")
def probe(digits: tuple[np.ndarray, np.ndarray]) -> Probe:
    images, labels = digits
    start = time.process_time()
    fitted = fit_probe(images[200:], labels[200:])
    assert time.process_time() - start < 5
    return fitted


def test_it_knows_held_out_digits(probe: Probe, digits: tuple[np.ndarray, np.ndarray]) -> None:
    """Held-out accuracy is above 95 %, and mean confidence within 3 points of it."""
    images, labels = digits[0][:200], digits[1][:200]
    right = accuracy(probe, images, labels)
    assert right > 0.95
    assert judge(probe, images)["confidence"] == pytest.approx(right, abs=0.03)


def test_it_counts_classes(probe: Probe, digits: tuple[np.ndarray, np.ndarray]) -> None:
    """Shares of real digits are those of their labels; a set of ones collapses to one class with no entropy."""
    images, labels = digits
    found = judge(probe, images[200:])
    shares = np.bincount(labels[200:], minlength=10) / len(labels[200:])
    assert found["num_classes_seen"] == 10
    assert np.allclose(list(found["class_share"].values()), shares, atol=0.005)
    assert found["class_entropy"] == pytest.approx(np.log(10), abs=0.01)
    ones = judge(probe, images[200:][labels[200:] == 1])
    assert ones["num_classes_seen"] == 1
    assert ones["class_share"]["1"] == 1.0
    assert ones["class_entropy"] == 0.0


def test_it_is_unsure_on_noise(probe: Probe, digits: tuple[np.ndarray, np.ndarray]) -> None:
    """Noise, and digits whose pixels come from different images, have far less confidence than real digits."""
    images, rng = digits[0][:200], np.random.default_rng(0)
    real = judge(probe, images)
    for fake in (rng.integers(0, 256, images.shape, dtype=np.uint8), rng.permuted(images, axis=0)):
        found = judge(probe, fake)
        assert found["confidence"] < real["confidence"] - 0.25
        assert found["entropy"] > real["entropy"] + 0.5


def test_it_is_the_same_for_one_seed(probe: Probe, digits: tuple[np.ndarray, np.ndarray]) -> None:
    """Fitting again gives the same probabilities."""
    images, labels = digits
    assert judge(fit_probe(images[200:], labels[200:]), images[:50]) == judge(probe, images[:50])


def test_large_images_are_averaged_to_16(digits: tuple[np.ndarray, np.ndarray]) -> None:
    """A 32x32 image is judged as its 16x16 area means."""
    images, labels = digits[0][:300].repeat(4, axis=1).repeat(4, axis=2), digits[1][:300]
    probe = fit_probe(images, labels)
    assert probe.classifier.n_features_in_ == 256
    assert accuracy(probe, images, labels) > 0.95


def test_labels_that_teach_nothing_are_refused(digits: tuple[np.ndarray, np.ndarray]) -> None:
    """One class, a class with fewer than three images, or a missing label: InputError."""
    images = digits[0][:20]
    for labels in (np.zeros(20, int), np.array([0] * 18 + [1] * 2), np.zeros(19, int)):
        with pytest.raises(InputError):
            fit_probe(images, labels)


def test_images_of_another_shape_are_refused(probe: Probe) -> None:
    """RGB or larger samples are not judged by a probe of grey 8x8 images."""
    with pytest.raises(IntegrityError, match="another shape"):
        judge(probe, np.zeros((4, 8, 8, 3), np.uint8))
