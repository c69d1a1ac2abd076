"""Whether samples are copies: of training images, or of one another.

In each space (the latent of a level, the encoder's vector) a sample has a nearest training image at distance d_1 and a
second at d_2. Small distances alone do not tell copies: guided or smooth samples are near to everything. A copy is
near to one training image and not to the others, so it counts as one only where both d_1 and d_1 / d_2 are smaller
than the q-quantile of those of held-out images, which no model has seen. Of held-out images themselves at most a share
q does (`floor`). Held-out images that are training images too, as a source with duplicates has them, are no measure
of the unseen: they are left out, and counted (`in_training`).

    copies     share of samples that count as copies
    nearer     share of samples whose d_1 alone is that small: q for samples that are like unseen images
    twins      share of samples whose nearest other sample is nearer than the q-quantile of as many training images
    distinct   share of different training images among the nearest ones of as many samples as held-out images
    coverage   share of real images whose ball holds a sample (latent_metrics.py), of as many as held-out images

Copies and twins are said to be there where their share is over twice that of real images and by chance such a
difference came in less than one of a thousand cases (Fisher's exact test). A mirror image of a training image is that
image: distances are those to the nearest view.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64

from nestdiff_core.errors import InputError
from nestdiff_core.evaluation.latent_metrics import density_coverage

BLOCK_DISTANCES = 2**23  # that are in memory at once
CHANCE = 1e-3
SAME = 1e-3  # of the usual distance to the nearest training image: nearer, a held-out image is one of them


class Nearest(NamedTuple):
    """Of each query the k nearest images, nearest first: their distances, and their rows in the index."""

    distances: Float[np.ndarray, "N k"]
    rows: Int64[np.ndarray, "N k"]

    def part(self, which: slice) -> Nearest:
        """Of some of the queries."""
        return Nearest(self.distances[which], self.rows[which])


Block = tuple[Int64[np.ndarray, " _"], Float[np.ndarray, "_ _ _"]]  # rows (B,), and the views of each image (B, V, D)


def block_size(num_queries: int) -> int:
    """Images in a block whose distances to so many queries fit into memory."""
    return max(1, BLOCK_DISTANCES // num_queries)


def nearest(
    queries: Float[np.ndarray, "N D"],
    blocks: Iterable[Block],
    k: int,
    *,
    own: Int64[np.ndarray, " N"] | None = None,
) -> Nearest:
    """The k nearest images (Euclidean, an image's nearest view) of each query, by looking at all, a block at a time.

    own: rows that the queries themselves have, which do not count. Raises InputError for fewer than k images.
    """
    from sklearn.metrics import pairwise_distances  # scikit-learn takes a second to import

    distances, found = np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64)
    queries = queries.astype(np.float64)
    for rows, views in blocks:
        values = views.astype(np.float64)
        block = np.min([pairwise_distances(queries, values[:, view]) for view in range(values.shape[1])], axis=0)
        if own is not None:
            block[own[:, None] == rows[None]] = np.inf
        distances = np.concatenate([distances, block], axis=1)
        found = np.concatenate([found, np.broadcast_to(rows, block.shape)], axis=1)
        if distances.shape[1] > k:
            few = np.argpartition(distances, k - 1, axis=1)[:, :k]
            distances, found = (np.take_along_axis(values, few, axis=1) for values in (distances, found))
    if distances.shape[1] < k or not np.isfinite(distances).all():
        raise InputError(
            "There are too few images to look for neighbours among",
            stage="neighbours",
            expected=f">= {k + (own is not None)}",
            found=distances.shape[1],
            fix="Lower neighbours.num_shown, or give more images.",
        )
    order = np.lexsort((found, distances), axis=1)  # equally near ones by their row
    return Nearest(*(np.take_along_axis(values, order, axis=1) for values in (distances, found)))


def copy_numbers(
    samples: Float[np.ndarray, "N D"],
    held_out: Float[np.ndarray, "H D"],
    real: Float[np.ndarray, "M D"],
    of_samples: Nearest,
    of_held_out: Nearest,
    *,
    quantile: float,
    num_neighbours: int = 3,
) -> dict[str, Any]:
    """The numbers of one space as plain JSON data; see the module.

    real: some training images, of which at most N are used. of_samples, of_held_out: their nearest training images.
    """
    d, ratio = _d_and_ratio(of_samples)
    d_floor, ratio_floor = _d_and_ratio(of_held_out)
    unseen = d_floor > SAME * np.median(d_floor)
    if unseen.any():
        d_floor, ratio_floor = d_floor[unseen], ratio_floor[unseen]
    limit, ratio_limit = np.quantile(d_floor, quantile), np.quantile(ratio_floor, quantile)
    copies, alike = (d < limit) & (ratio < ratio_limit), (d_floor < limit) & (ratio_floor < ratio_limit)
    num = min(len(samples), len(real))
    among, among_real = (_to_others(values[:num]) for values in (samples, real))
    apart = np.quantile(among_real, quantile)
    twins, real_twins = among < apart, among_real < apart
    few = min(len(samples), len(held_out), len(real))
    covered = {
        name: density_coverage(values[:few], real[:few], num_neighbours)["coverage"]
        for name, values in (("samples", samples), ("held_out", held_out))
        if few > num_neighbours
    }
    return {
        "num_samples": len(samples),
        "num_held_out": len(d_floor),
        "in_training": int((~unseen).sum()),
        "distance": _medians(d, d_floor, limit),
        "ratio": _medians(ratio, ratio_floor, ratio_limit),
        "nearer": float((d < limit).mean()),
        "copies": {**_shares(copies, alike), "seen": _more(copies, alike)},
        "twins": {**_shares(twins, real_twins), "seen": _more(twins, real_twins)},
        "distinct": {
            "samples": len(np.unique(of_samples.rows[:few, 0])) / few,
            "floor": len(np.unique(of_held_out.rows[:few, 0])) / few,
        },
        "coverage": {"samples": covered.get("samples"), "floor": covered.get("held_out")},
    }


def _d_and_ratio(found: Nearest) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    first, second = found.distances[:, 0], found.distances[:, 1]
    return first, first / np.maximum(second, np.finfo(np.float64).tiny)


def _to_others(values: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    """Distance of each to the nearest other."""
    rows, size = np.arange(len(values)), block_size(len(values))
    blocks = ((rows[i : i + size], values[i : i + size, None]) for i in range(0, len(values), size))
    return nearest(values, blocks, 1, own=rows).distances[:, 0]


def _medians(samples: np.ndarray, held_out: np.ndarray, limit: float) -> dict[str, float]:
    return {"samples": float(np.median(samples)), "held_out": float(np.median(held_out)), "limit": float(limit)}


def _shares(samples: np.ndarray, real: np.ndarray) -> dict[str, float]:
    return {"samples": float(samples.mean()), "floor": float(real.mean())}


def _more(samples: np.ndarray, real: np.ndarray) -> bool:
    """Whether the share of the samples is over twice that of real images, and more than chance makes it."""
    from scipy.stats import fisher_exact

    table = [[int(samples.sum()), int((~samples).sum())], [int(real.sum()), int((~real).sum())]]
    chance = fisher_exact(table, alternative="greater").pvalue  # pyright: ignore[reportAttributeAccessIssue]
    return bool(samples.mean() > 2 * real.mean() and chance < CHANCE)


def neighbour_table(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per space, the numbers of real images beside those of the samples."""
    return [
        {
            "space": name,
            "d_1": found["distance"]["samples"],
            "d_1, held out": found["distance"]["held_out"],
            "d_1 / d_2": found["ratio"]["samples"],
            "d_1 / d_2, held out": found["ratio"]["held_out"],
            "nearer": found["nearer"],
            **{
                column: found[number][key]
                for number, real in (
                    ("copies", "held out"),
                    ("twins", "training"),
                    ("distinct", "held out"),
                    ("coverage", "held out"),
                )
                for column, key in ((number, "samples"), (f"{number}, {real}", "floor"))
            },
        }
        for name, found in record["spaces"].items()
    ]


def verdicts(record: Mapping[str, Any]) -> list[str]:
    """A sentence for the whole, then one for each space in which something is seen."""
    said = []
    for name, found in record["spaces"].items():
        copies, twins, num = found["copies"], found["twins"], found["num_samples"]
        if copies["seen"]:
            said.append(
                f"{name}: {copies['samples']:.1%} of {num:,} samples are as near to one training image alone as "
                f"{copies['floor']:.1%} of {found['num_held_out']:,} unseen images are: the model copies."
            )
        if twins["seen"]:
            said.append(
                f"{name}: {twins['samples']:.1%} of {num:,} samples have a twin among them, where {twins['floor']:.1%} "
                "of as many training images have: the model repeats itself."
            )
    spaces, seen = ", ".join(record["spaces"]), {text.split(":")[0] for text in said}
    leaked = max(found["in_training"] for found in record["spaces"].values())
    also = [f"{leaked:,} held-out images are in the training split too; they are no measure of unseen ones."]
    if not said:
        return [f"No sign of copied training images or of repeated samples ({spaces}).", *also[: leaked > 0]]
    said += also[: leaked > 0]
    return [f"Copies or repetitions are seen in {len(seen)} of {len(record['spaces'])} spaces ({spaces}).", *said]
