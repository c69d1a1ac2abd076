"""Distances between two equally large sets of latents z_l of one level, as the denoisers know them.

    fd, kd, precision, recall   as for images (image_metrics.py), on flattened latents
    density    mean number of real balls that a sample is in, over k (arXiv 2002.09797); 1 for two equal distributions
    coverage   share of real latents whose ball holds a sample; about 1 - 2^-k for two equal distributions
    sliced_wasserstein   root of the mean squared 1-d Wasserstein-2 distance over random unit directions
    mean_error           largest difference of a channel's mean, in the real channel's standard deviations
    std_ratio_min, _max  smallest and largest ratio of a channel's standard deviation to the real one

A ball reaches to the k-th nearest other real latent. Every one of these numbers depends on how many latents there are,
so both sets must have the same number, and only numbers of that number compare. A latent of more than `MAX_NUMBERS`
numbers is first averaged over square areas (`averaged`), channel moments included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nestdiff_core.errors import InputError, NumericsError
from nestdiff_core.evaluation.extractors import Extractor
from nestdiff_core.evaluation.features import FeatureSet
from nestdiff_core.evaluation.image_metrics import MAX_NEIGHBOUR_IMAGES, feature_metrics

MAX_NUMBERS = 1024
DIRECTIONS = 512


@dataclass(frozen=True)
class LatentNumbers:
    """One comparison: values by name, the moments of every channel (mean_error, std_ratio), what to know before
    believing them, and how they were computed."""

    values: dict[str, float]
    channels: dict[str, list[float]]
    warnings: tuple[str, ...]
    settings: dict[str, Any]


def averaged(z: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C h w"]:
    """Means over square areas, the smallest that divide the grid and leave at most `MAX_NUMBERS` numbers (or 1x1)."""
    channels, side = z.shape[1], z.shape[2]
    sides = [s for s in range(1, side + 1) if side % s == 0 and (s == 1 or channels * s * s <= MAX_NUMBERS)]
    return z if max(sides) == side else F.avg_pool2d(z, side // max(sides))


def gaussian_like(z: Float[Tensor, "M C H W"], num: int, *, seed: int) -> Float[Tensor, "{num} C H W"]:
    """Draws from the Gaussian with the mean and the (unbiased) covariance of the latents z.

    A random combination of the centred latents has exactly that covariance, which therefore need not be regular.
    """
    _require_enough(len(z))
    rng = np.random.default_rng(seed)
    values = z.flatten(1).double()
    mean = values.mean(dim=0)
    weights = torch.from_numpy(rng.standard_normal((num, len(z)))) / (len(z) - 1) ** 0.5
    return (mean + weights @ (values - mean)).reshape(num, *z.shape[1:]).to(z.dtype)


def latent_metrics(
    samples: Float[Tensor, "N C H W"],
    real: Float[Tensor, "M _ _ _"],
    *,
    name: str = "z",
    num_neighbours: int = 3,
    seed: int = 0,
) -> LatentNumbers:
    """Every number that N = M latents allow; `warnings` (which call the level `name`) say what is left out or singular.

    seed: of the directions, and of the subsets of kd, precision and recall. Raises InputError for sets of different
    shapes or fewer than two latents, NumericsError naming the latent or the channel for numbers that are not finite
    and channels that never change.
    """
    if samples.shape != real.shape:
        raise InputError(
            f"Two sets of {name} differ in number or shape",
            stage="ladder",
            key=name,
            expected=tuple(real.shape),
            found=tuple(samples.shape),
            fix="Compare as many latents of one level.",
        )
    _require_enough(len(real))
    for what, z in (("generated", samples), ("real", real)):
        broken = (~z.flatten(1).isfinite().all(dim=1)).nonzero()
        if len(broken):
            raise NumericsError(
                f"A {what} latent is not finite",
                stage="ladder",
                key=f"{name} of image {int(broken[0])}",
                found=f"{len(broken)} of {len(z)} latents",
                fix="Look at the losses of this level, and at its stored latents.",
            )
    fake, true = (averaged(z.double()) for z in (samples, real))
    channels = _moments(fake, true, name)
    x, y = fake.flatten(1), true.flatten(1)
    space = Extractor(name, "none", {}, lambda images: (torch.from_numpy(images).flatten(1), None))
    fake_set, true_set = (FeatureSet(values, None, "", (1, 1, 1)) for values in (x, y))
    found = feature_metrics(fake_set, true_set, space, num_neighbours=num_neighbours, seed=seed)
    values = {metric.removesuffix(f"_{name}"): value for metric, value in found.values.items()}
    if len(real) > num_neighbours:
        values |= density_coverage(x.numpy(), y.numpy(), num_neighbours, seed=seed)
    values["sliced_wasserstein"] = sliced_wasserstein(x.numpy(), y.numpy(), seed=seed)
    values["mean_error"] = max(map(abs, channels["mean_error"]))
    values["std_ratio_min"], values["std_ratio_max"] = min(channels["std_ratio"]), max(channels["std_ratio"])
    settings = {**found.settings, "latents": len(real), "averaged_to": list(true.shape[1:]), "directions": DIRECTIONS}
    return LatentNumbers(values, channels, found.warnings, settings)


def density_coverage(
    samples: Float[np.ndarray, "N D"], real: Float[np.ndarray, "M D"], num_neighbours: int, *, seed: int = 0
) -> dict[str, float]:
    """Density and coverage; of random subsets where there are more than `MAX_NEIGHBOUR_IMAGES`. M > num_neighbours."""
    from sklearn.metrics import pairwise_distances_chunked  # scikit-learn takes a second to import
    from sklearn.neighbors import NearestNeighbors

    samples, real = (_subset(values, MAX_NEIGHBOUR_IMAGES, seed) for values in (samples, real))
    distances, _ = NearestNeighbors(n_neighbors=num_neighbours).fit(real).kneighbors()
    first = inside = covered = 0
    for block in pairwise_distances_chunked(real, samples):
        within = block <= distances[first : first + len(block), -1:]
        first, inside, covered = first + len(block), inside + int(within.sum()), covered + int(within.any(1).sum())
    return {"density": inside / (num_neighbours * len(samples)), "coverage": covered / len(real)}


def sliced_wasserstein(samples: Float[np.ndarray, "N D"], real: Float[np.ndarray, "N D"], *, seed: int = 0) -> float:
    """Over `DIRECTIONS` directions uniform on the sphere; two sets of as many points. In one dimension it is exact."""
    directions = np.random.default_rng(seed).standard_normal((DIRECTIONS, real.shape[1]))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    x, y = (np.sort(directions @ values.T, axis=1) for values in (samples, real))
    return float(np.sqrt(np.mean((x - y) ** 2)))


def _moments(fake: Float[Tensor, "N C h w"], true: Float[Tensor, "N C h w"], name: str) -> dict[str, list[float]]:
    std = true.std(dim=(0, 2, 3))
    still = (std == 0).nonzero()
    if len(still):
        raise NumericsError(
            f"Channel {int(still[0])} of the real {name} never changes",
            stage="ladder",
            key=name,
            expected="a standard deviation > 0",
            found=0.0,
            fix="Compare more images, or keep fewer channels.",
        )
    error = (fake.mean(dim=(0, 2, 3)) - true.mean(dim=(0, 2, 3))) / std
    return {"mean_error": error.tolist(), "std_ratio": (fake.std(dim=(0, 2, 3)) / std).tolist()}


def _subset(values: Float[np.ndarray, "N D"], num: int, seed: int) -> Float[np.ndarray, "n D"]:
    return values if num >= len(values) else values[np.random.default_rng(seed).permutation(len(values))[:num]]


def _require_enough(num: int) -> None:
    if num < 2:
        raise InputError(
            "A distribution needs at least two latents",
            stage="ladder",
            expected=">= 2",
            found=num,
            fix="Raise ladder.num_images, or hold out more images.",
        )
