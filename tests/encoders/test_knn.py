"""Nearest-neighbour accuracy against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from nestdiff_core.encoders.knn import knn_accuracy


@pytest.mark.parametrize("k", [1, 5, 20])
def test_weighted_vote_is_scikit_learns(k: int) -> None:
    """Cosine neighbours weighted by exp(cosine / 0.07), on digits of which every second pixel was hidden."""
    digits = load_digits()
    x, y = digits.data[:, ::9].astype(np.float32) + 0.01, digits.target
    reference = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(
        x[:1200], y[:1200]
    )
    tensors = (torch.from_numpy(a) for a in (x[:1200], y[:1200], x[1200:], y[1200:]))
    assert knn_accuracy(*tensors, k=k) == pytest.approx(reference.score(x[1200:], y[1200:]), abs=0.004)


def test_perfect_and_hopeless() -> None:
    """Vectors that are their class, and labels that have nothing to do with them."""
    eye, labels = torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5)
    assert knn_accuracy(eye, labels, torch.eye(4), torch.arange(4), k=5) == 1
    assert knn_accuracy(eye, labels, torch.eye(4), (torch.arange(4) + 1) % 4, k=5) == 0
