"""Samplers against closed forms."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from nestdiff_core.diffusion import DiscreteSchedule, VPSchedule, sample_ddim, sample_dpm_solver_pp, time_grid

SCHEDULES = [DiscreteSchedule(), VPSchedule()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_sampler = pytest.mark.parametrize("sampler", [sample_ddim, sample_dpm_solver_pp])
FIXTURE = Path(os.environ.get("NESTDIFF_SHARED", "../shared")) / "uvit_parity" / "dpm_gaussian.pt"


def gaussian(schedule, mu, s):
    """E[z | z^(t)] for z ~ N(mu, s^2)."""

    def model(z_t, t):
        alpha, sigma = (f(t).to(z_t.dtype).view(-1, *[1] * (z_t.ndim - 1)) for f in (schedule.alpha, schedule.sigma))
        return mu + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (z_t - alpha * mu)

    return model


def exact(schedule, mu, s, z_T, t):
    """The probability-flow ODE keeps z^(t)'s place in its marginal N(alpha_t mu, alpha_t^2 s^2 + sigma_t^2)."""

    def marginal(time):
        time = torch.tensor(time, dtype=torch.float64)
        alpha, sigma = schedule.alpha(time), schedule.sigma(time)
        return alpha * mu, (alpha**2 * s**2 + sigma**2).sqrt()

    (mean_T, std_T), (mean, std) = marginal(1.0), marginal(t)
    return mean + std * (z_T - mean_T) / std_T


@every_schedule
@pytest.mark.parametrize(("sampler", "order"), [(sample_ddim, 1), (sample_dpm_solver_pp, 2)])
def test_samplers_converge_with_their_order(schedule, sampler, order):
    """The slope of log error against log step is the advertised order, on a Gaussian whose flow is known."""
    z_T = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps, errors = [64, 128, 256, 512], []
    for n in steps:
        times = time_grid(schedule, n + 1)[:-1]  # n even steps in lambda, without the jump to 0
        out = sampler(gaussian(schedule, 0.7, 0.5), z_T, times, schedule)
        errors.append((out - exact(schedule, 0.7, 0.5, z_T, schedule.t_min)).abs().max().item())
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


@every_sampler
@every_schedule
def test_a_single_point_is_reached_exactly(schedule, sampler):
    """Where all data is one point, any grid leads to alpha z + sigma eps, and to the point itself at t = 0."""
    point, eps = torch.randn(1, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    times = torch.tensor([1.0, 0.7, 0.65, 0.2], dtype=torch.float64)
    z_T = schedule.alpha(times[0]) * point + schedule.sigma(times[0]) * eps
    out = sampler(lambda z, t: point.expand_as(z), z_T, times, schedule)
    torch.testing.assert_close(out, schedule.alpha(times[-1]) * point + schedule.sigma(times[-1]) * eps)
    to_zero = torch.cat([times, torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(sampler(lambda z, t: point.expand_as(z), z_T, to_zero, schedule), point.expand(2, 5))


@every_sampler
@every_schedule
@pytest.mark.parametrize(("mu", "s"), [(0.0, 1.0), (0.7, 0.5), (-1.3, 2.0)])
def test_fifty_evaluations_sample_a_gaussian(schedule, sampler, mu, s):
    """Noise becomes N(mu, s^2): every number ends at its place in the target, within 5 % (DDIM) or 1 % of s."""
    mean_T = schedule.alpha(torch.tensor(1.0)).item() * mu
    z_T = mean_T + torch.linspace(-2, 2, 41)[:, None]
    out = sampler(gaussian(schedule, mu, s), z_T, time_grid(schedule, 50), schedule)
    expected = exact(schedule, mu, s, z_T.double(), 0.0).float()
    torch.testing.assert_close(
        out, expected, rtol=0, atol={sample_ddim: 0.05, sample_dpm_solver_pp: 0.01}[sampler] * s * 2
    )


@pytest.mark.skipif(not FIXTURE.is_file(), reason="no sampler fixture at NESTDIFF_SHARED")
@pytest.mark.parametrize("steps", [50, 200])
def test_published_problems_are_solved_at_least_as_well(steps):
    """On the published solver's own problems, from the paper's 50 evaluations on, the error is smaller."""
    fixture, schedule = torch.load(FIXTURE, weights_only=True), DiscreteSchedule()
    runs = [run for run in fixture["runs"].values() if run["steps"] == steps]
    assert len(runs) == 3
    for run in runs:
        times = time_grid(schedule, steps + 1)[:-1]  # `steps` evaluations that end at 1e-3, as theirs
        out = sample_dpm_solver_pp(gaussian(schedule, run["mu"], run["s"]), fixture["xT"], times, schedule)
        assert (out - run["exact"]).abs().max() < (run["out"] - run["exact"]).abs().max()


@every_schedule
@pytest.mark.parametrize("n", [1, 2, 50])
def test_time_grid_spends_its_evaluations(schedule, n):
    """n evaluations from t = 1 down to t_min, evenly spaced in lambda, and a last time of 0 that costs none."""
    times, seen = time_grid(schedule, n), []
    sample_dpm_solver_pp(
        lambda z, t: seen.append(t[0].item()) or z, torch.zeros(1, 2, dtype=torch.float64), times, schedule
    )
    assert seen == times[:-1].tolist()
    assert len(seen) == n
    assert times[0] == 1
    assert times[-1] == 0
    if n > 1:
        assert times[-2].item() == pytest.approx(schedule.t_min)
        steps = schedule.lambda_(times[:-1]).diff()
        torch.testing.assert_close(steps, steps.mean().expand_as(steps))
