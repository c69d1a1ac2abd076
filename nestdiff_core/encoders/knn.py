"""How good an encoder's vectors are: nearest-neighbour classification of the held-out images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from nestdiff_core.encoders.base import Encoder, unit_range
from nestdiff_core.images.index import ImageIndex

MAX_TRAIN, MAX_HELD_OUT = 20_000, 5_000
MAX_PIXEL_SIDE = 32

Embed = Callable[[UInt8[np.ndarray, "B H W C"]], Float[Tensor, "B D"]]


def knn_accuracy(
    train: Float[Tensor, "N D"],
    train_labels: Int64[Tensor, " N"],
    test: Float[Tensor, "M D"],
    test_labels: Int64[Tensor, " M"],
    *,
    k: int,
    temperature: float = 0.07,
) -> float:
    """Share of test vectors whose k nearest train vectors (cosine), weighted by exp(cosine / temperature), vote right.

    The weighted vote of Wu et al. (arXiv 1805.01978), with which the literature reports k = 20.
    """
    train, num_classes = F.normalize(train, dim=1), int(max(train_labels.max(), test_labels.max())) + 1
    right = 0
    for vectors, labels in zip(F.normalize(test, dim=1).split(1024), test_labels.split(1024), strict=True):
        similarity, neighbours = (vectors @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(vectors), num_classes, device=train.device)
        votes.scatter_add_(1, train_labels[neighbours], (similarity / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return right / len(test_labels)


def compare(
    encoders: dict[str, Encoder], index: ImageIndex, *, batch_size: int = 256, seed: int = 0
) -> dict[str, float | int]:
    """kNN accuracy on the held-out split of each encoder's vectors, and of raw pixels (at most 32 x 32).

    Judged on at most 20,000 train and 5,000 held-out images, whole shards of them in a seeded order; k is 20, or 5
    where there are fewer than 10,000 train images.
    """
    embeds: dict[str, Embed] = {"pixels": _pixels, **{name: _vectors(encoder) for name, encoder in encoders.items()}}
    train, train_labels = _embed(index, "train", MAX_TRAIN, embeds, batch_size, seed)
    test, test_labels = _embed(index, "held_out", MAX_HELD_OUT, embeds, batch_size, seed)
    k = 20 if len(train_labels) >= 10_000 else 5
    accuracies = {name: knn_accuracy(train[name], train_labels, test[name], test_labels, k=k) for name in embeds}
    return {"k": k, "num_train": len(train_labels), "num_held_out": len(test_labels), **accuracies}


def _embed(
    index: ImageIndex, split: str, limit: int, embeds: dict[str, Embed], batch_size: int, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Vectors of every kind, and labels, of the first `limit` images of a split in the shards' seeded order."""
    found: dict[str, list[Tensor]] = {name: [] for name in embeds}
    rows: list[np.ndarray] = []
    for k in np.random.default_rng(seed).permutation(len(index.shards)).tolist():
        shard = index.shards[k]
        chosen = np.flatnonzero(index.splits[shard.rows] == split)[: limit - sum(map(len, rows))]
        if len(chosen) == 0:
            continue
        images = index.read_shard(k)[chosen]
        rows.append(shard.first_row + chosen)
        for name, embed in embeds.items():
            found[name] += [embed(images[i : i + batch_size]).float().cpu() for i in range(0, len(images), batch_size)]
    labels = torch.from_numpy(index.labels[np.concatenate(rows)])
    return {name: torch.cat(vectors) for name, vectors in found.items()}, labels


def _pixels(images: np.ndarray) -> Tensor:
    return unit_range(torch.from_numpy(images), min(images.shape[1], MAX_PIXEL_SIDE)).flatten(1)


def _vectors(encoder: Encoder) -> Embed:
    return lambda images: encoder.encode(images)[1]
