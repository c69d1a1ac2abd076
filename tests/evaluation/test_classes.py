"""A judge's head among the numbers: class balance and confidence of known sets, beside those of real images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nestdiff_core.evaluation.classes import classes_of
from nestdiff_core.evaluation.extractors import build_extractor
from nestdiff_core.evaluation.report import evaluate, measured_spaces

SURE = 3.0  # the logit of the class that is seen; of the others 0
CONFIDENCE = math.exp(SURE) / (math.exp(SURE) + 3)


class Shades:
    """Four classes of grey, and two features; what evaluation needs of an encoder with a head."""

    input_size, mean, std = 8, (0.0,), (1.0,)

    def encode(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(images).double()
        return x.permute(0, 3, 1, 2), torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], dim=1)

    def classify(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        seen = torch.from_numpy(images).double().mean((1, 2, 3)) // 64
        return self.encode(images)[1], SURE * torch.nn.functional.one_hot(seen.long(), 4).double()

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def shades(classes: np.ndarray, seed: int) -> np.ndarray:
    """Images of these classes, with noise that changes none."""
    noise = np.random.default_rng(seed).integers(-20, 21, (len(classes), 8, 8, 1))
    return (64 * classes[:, None, None, None] + 32 + noise).astype(np.uint8)


@pytest.fixture(scope="module")
def metrics() -> dict[str, dict]:
    """Samples of one class, and of two in three parts to one; real images of four, evenly."""
    even = np.arange(400) % 4
    spaces = measured_spaces([build_extractor("shades", judges={"shades": Shades()})], shades(even, 0), shades(even, 1))
    two = {"two": shades(np.array([1, 1, 1, 3])[even], 3)}
    return evaluate(shades(np.full(400, 2), 2), spaces, origin=None, others=two)["metrics"]


def test_a_collapsed_set_has_no_entropy(metrics: dict[str, dict]) -> None:
    """One class: entropy 0 and one class seen; real images: log 4 and four classes; 3:1 in closed form."""
    entropy, seen = metrics["class_entropy_shades"], metrics["num_classes_seen_shades"]
    assert entropy["value"] == entropy["value_at_floor"] == 0
    assert entropy["floor"] == pytest.approx(math.log(4))
    assert entropy["others"]["two"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert (seen["value"], seen["floor"], seen["others"]["two"]) == (1, 4, 2)


def test_confidence_is_the_largest_probability(metrics: dict[str, dict]) -> None:
    """Of every set, since the head is as sure of all; its card says of how many images."""
    found = metrics["confidence_shades"]
    assert found["value"] == pytest.approx(CONFIDENCE)
    assert found["floor"] == pytest.approx(CONFIDENCE)
    assert found["card"]["settings"]["class_images"] == 400


def test_they_stand_beside_the_spaces_distances(metrics: dict[str, dict]) -> None:
    """And the score of Inception's classes is Inception's alone."""
    assert {"fd_shades", "precision_shades", "recall_shades"} < metrics.keys()
    assert not any(name.startswith("inception_score") for name in metrics)


def test_probabilities_in_closed_form() -> None:
    """Shares by the largest, which ties give to the first; entropy of an image beside that of the shares."""
    found = classes_of(np.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]))
    assert found.share.tolist() == [0.75, 0.25, 0.0]
    assert found.num_seen == 2
    assert found.confidence == pytest.approx(0.75)
    assert found.entropy == pytest.approx((1.5 + 0 + 1 + 0) * math.log(2) / 4)
