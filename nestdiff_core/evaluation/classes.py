"""Which classes a classifier sees in a set of images, and how sure it is: from its probabilities for each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Classes:
    """share (K,) of the images assigned to each class; num_seen, classes with at least one; balance, the entropy of the
    shares in nats (log K when even, 0 when all are of one); confidence, the mean largest probability; entropy, the mean
    entropy of one image's probabilities in nats (0 is certain)."""

    share: Float[np.ndarray, " K"]
    num_seen: int
    balance: float
    confidence: float
    entropy: float


def classes_of(probabilities: Float[np.ndarray, "N K"]) -> Classes:
    """What a classifier's probabilities, a row an image, say of the set."""
    share = np.bincount(probabilities.argmax(axis=1), minlength=probabilities.shape[1]) / len(probabilities)
    return Classes(
        share=share,
        num_seen=int((share > 0).sum()),
        balance=float(_entropy(share[None])[0]),
        confidence=float(probabilities.max(axis=1).mean()),
        entropy=float(_entropy(probabilities).mean()),
    )


def _entropy(p: Float[np.ndarray, "N K"]) -> Float[np.ndarray, " N"]:
    return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=-1)
