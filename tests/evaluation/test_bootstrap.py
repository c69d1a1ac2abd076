"""Bootstrap errors of Frechet distances: each resample's distance, and errors against fresh draws of Gaussians."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from nestdiff_core.evaluation.bootstrap import _distance, deviation, frechet_resamples
from nestdiff_core.evaluation.gaussian import Gaussian, frechet_distance
from nestdiff_core.latents.moments import Moments


def fitted(x: torch.Tensor | np.ndarray) -> Gaussian:
    return Gaussian.of(Moments.of(np.asarray(x)))


def gaussian(n: int, d: int, rng: np.random.Generator, *, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(shift + scale * rng.normal(size=(n, d)))


@pytest.mark.parametrize(("n", "d"), [(300, 12), (40, 60)])
def test_each_resample_is_the_distance_of_the_drawn_images(n: int, d: int) -> None:
    """Rows as they are, and rows drawn again with their repeats; with more dimensions than rows, too."""
    rng = np.random.default_rng(0)
    x, y = gaussian(n, d, rng, shift=0.3, scale=1.4) @ gaussian(d, d, rng), gaussian(500, d, rng)
    reference = fitted(y)
    centred = x.numpy() - reference.mean
    for rows in (np.arange(n), rng.integers(0, n, n)):
        count = np.bincount(rows, minlength=n)
        expected = frechet_distance(fitted(x[rows]), reference)
        assert _distance(centred, centred @ reference.root, reference, count) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "draw", "largest"),
    [
        ("shifted", lambda rng: gaussian(200, 8, rng, shift=0.5), 1.2),
        ("wider", lambda rng: gaussian(200, 8, rng, scale=1.5), 1.2),
        ("equal", lambda rng: gaussian(200, 8, rng), 2.0),  # nothing but noise: sqrt(3) too wide
    ],
)
def test_errors_are_the_deviation_over_fresh_draws(
    name: str, draw: Callable[[np.random.Generator], torch.Tensor], largest: float
) -> None:
    """Of 300 independent sets of 200 images, and of 12 of them the mean bootstrap error: never a tenth too small."""
    rng = np.random.default_rng(1)
    reference = fitted(gaussian(4000, 8, rng))
    sets = [draw(rng) for _ in range(300)]
    truth = np.std([frechet_distance(fitted(x), reference) for x in sets])
    told = [deviation(frechet_resamples({"x": x}, reference, seed=i)["x"]) for i, x in enumerate(sets[:12])]
    assert 0.9 < np.mean(told) / truth < largest, name


def test_two_errors_hold_the_distance_that_many_images_would_show() -> None:
    """For 100 sets, as many as 95 % of fresh sets' distances lie within two errors of their mean, give or take."""
    rng = np.random.default_rng(2)
    reference = fitted(gaussian(4000, 6, rng))
    sets = [gaussian(150, 6, rng, shift=0.4, scale=1.2) for _ in range(100)]
    found = np.array([frechet_distance(fitted(x), reference) for x in sets])
    errors = [deviation(frechet_resamples({"x": x}, reference, seed=i)["x"]) for i, x in enumerate(sets)]
    held = np.mean(np.abs(found - found.mean()) < 2 * np.array(errors))
    assert 0.88 <= held <= 1.0


def test_what_all_sets_share_cancels_in_their_difference() -> None:
    """Rungs made from the same images differ by little noise: the error of a cost is theirs, not that of the rungs."""
    rng = np.random.default_rng(3)
    reference = fitted(gaussian(3000, 8, rng))

    def rungs() -> dict[int, torch.Tensor]:
        same = gaussian(200, 8, rng, shift=0.5)
        return {1: same, 2: same + 0.1 * gaussian(200, 8, rng)}

    costs = []
    for _ in range(200):
        d = {k: frechet_distance(fitted(x), reference) for k, x in rungs().items()}
        costs.append(d[2] - d[1])
    drawn = [frechet_resamples(rungs(), reference, seed=i) for i in range(12)]
    told = np.mean([deviation(d[2] - d[1]) for d in drawn])
    alone = np.mean([np.hypot(deviation(d[1]), deviation(d[2])) for d in drawn])
    assert 0.85 < told / np.std(costs) < 1.2
    assert told < alone / 3


def test_the_same_errors_twice() -> None:
    """Seeded; another seed draws others."""
    rng = np.random.default_rng(4)
    x, y = gaussian(50, 4, rng), fitted(gaussian(80, 4, rng))
    first, again, other = (frechet_resamples({1: x}, y, resamples=7, seed=seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other) and len(first) == 7
