"""Numbers of latents against closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nestdiff_core.errors import InputError, NumericsError
from nestdiff_core.evaluation.latent_metrics import (
    DIRECTIONS,
    averaged,
    density_coverage,
    gaussian_like,
    latent_metrics,
    sliced_wasserstein,
)


def latents(n: int, seed: int, shape: tuple[int, int, int] = (3, 2, 2)) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, *shape)))


def whitened(n: int, shape: tuple[int, int, int] = (3, 2, 2)) -> torch.Tensor:
    """Latents whose flattened sample has mean 0 and covariance I exactly."""
    z = latents(n, 0, shape).flatten(1).numpy()
    z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T
    return torch.from_numpy(z.reshape(n, *shape))


def test_numbers_of_a_shifted_and_scaled_gaussian() -> None:
    """Moments 0, I against 2, 9 I in 12 dimensions: distance 12 (2^2 + 2^2); each channel is off by 2 / 3 and 1 / 3."""
    z = whitened(300)
    found = latent_metrics(z, 2 + 3 * z)
    assert found.values["fd"] == pytest.approx(96, rel=1e-3)
    assert found.channels["mean_error"] == pytest.approx([-2 / 3] * 3, rel=2e-3)  # pooled over places: n - 1 once
    assert found.values["mean_error"] == pytest.approx(2 / 3, rel=2e-3)
    assert found.channels["std_ratio"] == pytest.approx([1 / 3] * 3, rel=1e-6)
    assert found.settings["latents"] == 300 and found.settings["averaged_to"] == [3, 2, 2]


def test_a_set_is_at_no_distance_from_itself() -> None:
    """Equal sets: distances 0, every share 1, moments alike."""
    z = latents(150, 1)
    found = latent_metrics(z, z).values
    assert abs(found["fd"]) < 1e-6
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert (found["sliced_wasserstein"], found["mean_error"]) == (0, 0)
    assert (found["std_ratio_min"], found["std_ratio_max"]) == (1, 1)


def test_wasserstein_distance_of_a_shift() -> None:
    """In one dimension a shift by s is at distance s; in D, s projected: the mean of its square is |s|^2 / D."""
    line = np.random.default_rng(0).normal(size=(200, 1))
    assert sliced_wasserstein(line[::-1] + 2.5, line) == pytest.approx(2.5)
    z, shift = latents(100, 2, (5, 1, 1)).flatten(1).numpy(), np.array([3.0, 0, -1, 0, 2])
    expected = np.sqrt(shift @ shift / 5)
    assert sliced_wasserstein(z + shift, z) == pytest.approx(expected, rel=4 * np.sqrt(2 / DIRECTIONS))


@pytest.mark.parametrize("k", [1, 3])
def test_density_and_coverage_are_those_of_brute_force(k: int) -> None:
    """Balls to the k-th other real point: how many hold each sample, and how many hold any."""
    rng = np.random.default_rng(k)
    fake, real = rng.normal(size=(90, 4)) * 0.7, rng.normal(size=(130, 4))
    among = np.sort(np.linalg.norm(real[:, None] - real[None], axis=-1), axis=1)
    inside = np.linalg.norm(real[:, None] - fake[None], axis=-1) <= among[:, k, None]  # column 0 is the point itself
    found = density_coverage(fake, real, k)
    assert found["density"] == pytest.approx(inside.sum() / (k * len(fake)), abs=1e-12)
    assert found["coverage"] == pytest.approx(inside.any(axis=1).mean(), abs=1e-12)


def test_density_and_coverage_of_equal_distributions() -> None:
    """Their expectations are 1 and 1 - prod (N - i) / (2N - i), i = 1..k, whatever the distribution is."""
    n, k = 250, 3
    expected = 1 - np.prod([(n - i) / (2 * n - i) for i in range(1, k + 1)])
    rng = np.random.default_rng(0)
    found = [density_coverage(rng.exponential(size=(n, 6)), rng.exponential(size=(n, 6)), k) for _ in range(30)]
    for name, value in (("density", 1.0), ("coverage", expected)):
        runs = [numbers[name] for numbers in found]
        assert abs(np.mean(runs) - value) < 4 * np.std(runs) / np.sqrt(len(runs))


def test_a_collapse_is_seen_by_coverage_not_by_density() -> None:
    """All samples near one central real point: density is that of good ones, and next to nothing is covered."""
    real = latents(200, 0, (2, 1, 1))
    centre = real[real.flatten(1).norm(dim=1).argmin()]
    spread = centre + 1e-3 * latents(200, 1, (2, 1, 1))
    found = latent_metrics(spread, real).values
    assert found["density"] > 0.5 and found["coverage"] < 0.1 and found["std_ratio_max"] < 0.01


def test_gaussian_draws_have_the_moments() -> None:
    """Mean and covariance of many draws are those of the latents, singular covariances included."""
    z = latents(40, 3) @ torch.diag(torch.tensor([1.0, 3.0]).double()) + 5
    z[:, 1] = 2 * z[:, 0]
    drawn = gaussian_like(z, 60_000, seed=0).flatten(1)
    want, scale = z.flatten(1), z.flatten(1).std(dim=0)
    assert (((drawn.mean(0) - want.mean(0)) / scale).abs() < 4 / np.sqrt(60_000)).all()
    error = (torch.cov(drawn.T) - torch.cov(want.T)) / torch.outer(scale, scale)
    assert (error.abs() < 4 * np.sqrt(2 / 60_000)).all()


def test_large_latents_are_averaged_over_areas() -> None:
    """64x64x3 becomes 16x16x3, means over 4x4 areas; what is small stays, what has many channels is one area."""
    z = latents(2, 0, (3, 64, 64))
    torch.testing.assert_close(averaged(z), z.reshape(2, 3, 16, 4, 16, 4).mean(dim=(3, 5)))
    assert averaged(latents(2, 0, (4, 16, 16))).shape == (2, 4, 16, 16)
    assert averaged(latents(2, 0, (600, 2, 2))).shape == (2, 600, 1, 1)


def test_the_same_numbers_twice() -> None:
    """Seeded: equal calls give equal numbers; float32 and float64 latents of the same values do too."""
    a, b = latents(130, 0).float(), latents(130, 1).float()
    assert latent_metrics(a, b) == latent_metrics(a, b) == latent_metrics(a.double(), b.double())


def test_few_latents_leave_out_what_needs_more() -> None:
    """Three latents and three neighbours: no neighbour is counted, and a warning says so."""
    found = latent_metrics(latents(3, 0), latents(3, 1), name="z_2")
    assert not {"precision", "recall", "density", "coverage", "kd"} & found.values.keys()
    assert any("precision" in text for text in found.warnings) and any("fd_z_2" in text for text in found.warnings)
    assert all(np.isfinite(value) for value in found.values.values())


def test_what_cannot_be_compared_is_refused() -> None:
    """Other numbers or shapes, one latent, a value that is not finite, a channel that never changes: by name."""
    z = latents(20, 0)
    for other in (z[:19], z[:, :2]):
        with pytest.raises(InputError, match="differ in number or shape"):
            latent_metrics(other, z)
    with pytest.raises(InputError, match="at least two"):
        latent_metrics(z[:1], z[:1])
    broken = z.clone()
    broken[7, 0, 0, 0] = torch.nan
    with pytest.raises(NumericsError, match="z_3 of image 7"):
        latent_metrics(broken, z, name="z_3")
    still = z.clone()
    still[:, 1] = 0.5
    with pytest.raises(NumericsError, match="Channel 1"):
        latent_metrics(z, still)
