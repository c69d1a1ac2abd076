"""The best linear denoiser."""

import numpy as np
import pytest
import torch

from nestdiff_core.diffusion import DiscreteSchedule
from nestdiff_core.diffusion.process import add_noise, target
from nestdiff_core.evaluation.linear_denoiser import LinearDenoiser
from nestdiff_core.latents.moments import Moments

SIZE, TOLD = 6, 3


def rows(count: int, seed: int) -> np.ndarray:
    """Six numbers that depend on three others, none of them Gaussian."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    above = rng.exponential(1.0, (count, TOLD)) + 0.5
    own = above @ fixed.normal(size=(TOLD, SIZE)) + rng.laplace(0.3, 0.4, (count, SIZE)) @ fixed.normal(
        size=(SIZE, SIZE)
    )
    return np.concatenate([own, above], 1)


@pytest.mark.parametrize("prediction", ["x", "eps", "v"])
@pytest.mark.parametrize("told", [True, False])
def test_no_linear_regression_does_better(prediction: str, told: bool) -> None:
    """Least squares over noised rows, fitted and measured on the target itself, comes to the same loss."""
    schedule, t, sigma_above = DiscreteSchedule(), 0.4, 0.5
    data, count = rows(200_000, 0), TOLD if told else 0
    rng = np.random.default_rng(1)
    z_above = data[:, SIZE : SIZE + count] + sigma_above * rng.normal(size=(len(data), count))
    z, eps = torch.from_numpy(data[:, :SIZE]), torch.from_numpy(rng.normal(size=(len(data), SIZE)))
    times = torch.full((len(z),), t, dtype=torch.float64)
    z_t = add_noise(z, eps, times, schedule)
    wanted = target(z, eps, times, schedule, prediction).numpy()  # pyright: ignore[reportArgumentType]
    inputs = np.concatenate([z_t.numpy(), z_above, np.ones((len(z), 1))], 1)
    rest = wanted - inputs @ np.linalg.lstsq(inputs, wanted, rcond=None)[0]

    linear = LinearDenoiser.fit(Moments.of(data[:, : SIZE + count]), SIZE, np.full(count, sigma_above))
    found = linear.losses(z.numpy(), z_above, np.array([t]), schedule, prediction)  # pyright: ignore[reportArgumentType]
    assert found[0] == pytest.approx((rest**2).mean(), rel=0.01)


def test_what_is_told_lowers_the_loss_most_where_noise_is_most() -> None:
    """The share that it takes off grows with t; at t near 0 the noised latent says it all."""
    schedule, data = DiscreteSchedule(), rows(20_000, 0)
    times, noise = np.array([0.05, 0.5, 0.95]), np.full(TOLD, 0.1)
    knowing = LinearDenoiser.fit(Moments.of(data), SIZE, noise)
    alone = LinearDenoiser.fit(Moments.of(data[:, :SIZE]), SIZE, np.empty(0))
    z_above = data[:, SIZE:] + noise * np.random.default_rng(1).normal(size=(len(data), TOLD))
    share = 1.0 - knowing.losses(data[:, :SIZE], z_above, times, schedule, "v") / alone.losses(
        data[:, :SIZE], np.empty((len(data), 0)), times, schedule, "v"
    )
    assert 0.0 < share[0] < share[1] < share[2]
