"""Samplers against closed forms, the published solver and diffusers' schedulers."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from nestdiff_core.diffusion import (
    DiscreteSchedule,
    VPSchedule,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_dpm_solver_pp,
    time_grid,
)
from nestdiff_core.diffusion.samplers import step_orders

SCHEDULES = [DiscreteSchedule(), VPSchedule()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_ode_sampler = pytest.mark.parametrize("sampler", [sample_ddim, sample_dpm_solver_pp, sample_dpm_solver])
SHARED = Path(os.environ.get("NESTDIFF_SHARED", "../shared")) / "uvit_parity"
needs_fixtures = pytest.mark.skipif(
    not (SHARED / "dpm_gaussian.pt").is_file(), reason="no sampler fixtures at NESTDIFF_SHARED"
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on NumPy 2


def gaussian(schedule, mu, s):
    """E[z | z^(t)] for z ~ N(mu, s^2)."""

    def model(z_t, t):
        alpha, sigma = (f(t).to(z_t.dtype).view(-1, *[1] * (z_t.ndim - 1)) for f in (schedule.alpha, schedule.sigma))
        return mu + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (z_t - alpha * mu)

    return model


def marginal(schedule, mu, s, t):
    """Mean and standard deviation of z^(t)."""
    t = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return alpha * mu, (alpha**2 * s**2 + sigma**2).sqrt()


def exact(schedule, mu, s, z_T, t):
    """The probability-flow ODE keeps z^(t)'s place in its marginal."""
    (mean_T, std_T), (mean, std) = marginal(schedule, mu, s, 1.0), marginal(schedule, mu, s, t)
    return mean + std * (z_T - mean_T) / std_T


def order_of(numbers, errors):
    return -np.polyfit(np.log(numbers), np.log(errors), 1)[0]


def never():
    pytest.fail("noise was asked for")


# --- orders of convergence ----------------------------------------------------------------------------------------


@every_schedule
@pytest.mark.parametrize(
    ("sampler", "order", "tolerance"),
    [(sample_ddim, 1, 0.05), (sample_dpm_solver_pp, 2, 0.05), (sample_dpm_solver, 3, 0.15)],
)
def test_samplers_converge_with_their_order(schedule, sampler, order, tolerance):
    """The slope of log error against log evaluations is the advertised order, on a Gaussian whose flow is known.

    All numbers are 2 mod 3, as the paper's 50: the single-step solver then ends with a step of second order.
    """
    z_T = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    numbers, errors = [98, 194, 386, 770], []
    for n in numbers:
        out = sampler(gaussian(schedule, 0.7, 0.5), z_T, time_grid(schedule, n, to_zero=False), schedule)
        errors.append((out - exact(schedule, 0.7, 0.5, z_T, schedule.t_min)).abs().max().item())
    assert order_of(numbers, errors) == pytest.approx(order, abs=tolerance)


def ddpm_law(schedule, mu, s, n):
    """Exact mean and variance of what DDPM makes of noise: z is affine in z_T and every n_i, seen one at a time."""
    units = iter(torch.eye(n + 2, dtype=torch.float64)[1:, :, None])  # row 0 without noise, row i + 1 with n_i = 1
    times = time_grid(schedule, n, to_zero=False)
    out = sample_ddpm(gaussian(schedule, mu, s), next(units), times, schedule, lambda: next(units))[:, 0]
    assert next(units, None) is None  # one draw for each step
    weights = out[1:] - out[0]
    mean_T, std_T = marginal(schedule, mu, s, 1.0)
    return out[0] + weights[0] * mean_T, weights[0] ** 2 * std_T**2 + weights[1:].square().sum()


@every_schedule
@pytest.mark.parametrize(("mu", "s"), [(0.7, 0.5), (-1.3, 2.0)])
def test_ddpm_converges_in_law(schedule, mu, s):
    """On a Gaussian the mean is right in any number of steps, and the variance's error is of first order."""
    mean, std = marginal(schedule, mu, s, schedule.t_min)
    numbers, errors = [64, 128, 256, 512], []
    for n in numbers:
        mean_n, variance_n = ddpm_law(schedule, mu, s, n)
        assert mean_n.item() == pytest.approx(mean.item(), abs=1e-12)
        errors.append(abs(variance_n - std**2).item())
    assert order_of(numbers, errors) == pytest.approx(1, abs=0.1)
    assert errors[-1] < 0.02 * std**2


# --- cases with known answers -------------------------------------------------------------------------------------


@every_ode_sampler
@every_schedule
def test_a_single_point_is_reached_exactly(schedule, sampler):
    """Where all data is one point, any grid leads to alpha z + sigma eps, and to the point itself at t = 0."""
    point, eps = torch.randn(1, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    times = torch.tensor([1.0, 0.7, 0.65, 0.4, 0.3, 0.2], dtype=torch.float64)
    z_T = schedule.alpha(times[0]) * point + schedule.sigma(times[0]) * eps
    out = sampler(lambda z, t: point.expand_as(z), z_T, times, schedule)
    torch.testing.assert_close(out, schedule.alpha(times[-1]) * point + schedule.sigma(times[-1]) * eps)
    if sampler is not sample_dpm_solver:  # it ends above 0
        to_zero = torch.cat([times, torch.zeros(1, dtype=torch.float64)])
        out = sampler(lambda z, t: point.expand_as(z), z_T, to_zero, schedule)
        torch.testing.assert_close(out, point.expand(2, 5))


@every_schedule
def test_ddpm_draws_from_the_posterior(schedule):
    """One step of DDPM is q(z_s | z_t, z_hat), here by Bayes' rule: z_s given z_hat, times z_t given z_s."""
    t, s = 0.8, 0.3
    times = torch.tensor([t, s], dtype=torch.float64)
    z_t, z_hat, n = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (alpha_t, alpha_s), (sigma_t, sigma_s) = schedule.alpha(times), schedule.sigma(times)
    a = alpha_t / alpha_s  # z_t = a z_s + b eps
    b2 = sigma_t**2 - a**2 * sigma_s**2
    precision = 1 / sigma_s**2 + a**2 / b2
    mean = (alpha_s * z_hat / sigma_s**2 + a * z_t / b2) / precision
    out = sample_ddpm(lambda z, t: z_hat, z_t, times, schedule, lambda: n)
    torch.testing.assert_close(out, mean + n / precision.sqrt())


def test_ddpm_ends_without_noise():
    """The step to 0 returns the last estimate and asks for no noise."""
    times, z_T = torch.tensor([0.3, 0.0], dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    out = sample_ddpm(lambda z, t: z + 1, z_T, times, DiscreteSchedule(), never)
    torch.testing.assert_close(out, z_T + 1)


@every_ode_sampler
@every_schedule
@pytest.mark.parametrize(("mu", "s"), [(0.0, 1.0), (0.7, 0.5), (-1.3, 2.0)])
def test_fifty_evaluations_sample_a_gaussian(schedule, sampler, mu, s):
    """Noise becomes N(mu, s^2): every number ends at its place in the target, to the sampler's accuracy."""
    z_T = marginal(schedule, mu, s, 1.0)[0].item() + torch.linspace(-2, 2, 41)[:, None]
    end, accuracy = {
        sample_ddim: (0.0, 0.1),
        sample_dpm_solver_pp: (0.0, 0.02),
        sample_dpm_solver: (schedule.t_min, 5e-4),
    }[sampler]
    out = sampler(gaussian(schedule, mu, s), z_T, time_grid(schedule, 50, to_zero=end == 0), schedule)
    expected = exact(schedule, mu, s, z_T.double(), end).float()
    torch.testing.assert_close(out, expected, rtol=0, atol=accuracy * s)


# --- the published solver -----------------------------------------------------------------------------------------


@needs_fixtures
def test_dpm_solver_is_the_published_one():
    """On Gaussians with the exact eps, the same numbers at 10 to 999 evaluations, within single precision."""
    fixture, schedule = torch.load(SHARED / "dpm_gaussian.pt", weights_only=True), DiscreteSchedule()
    assert len(fixture["runs"]) == 15
    for run in fixture["runs"].values():
        times = time_grid(schedule, run["steps"], "time", to_zero=False)
        out = sample_dpm_solver(gaussian(schedule, run["mu"], run["s"]), fixture["xT"], times, schedule)
        atol = 1e-5 if run["steps"] <= 200 else 3e-5  # rounding of single precision grows with the steps
        torch.testing.assert_close(out, run["out"], rtol=0, atol=atol)


@needs_fixtures
def test_orders_and_times_are_the_published_ones():
    """The solver's steps and the uniform grid, for every number of evaluations that the fixture holds."""
    steps = torch.load(SHARED / "schedule.pt", weights_only=True)["fast_steps"]
    assert len(steps) == 6
    for n, published in steps.items():
        assert step_orders(int(n)) == [int(order) for order in published["orders"]]
        times = time_grid(DiscreteSchedule(), int(n), "time", to_zero=False)
        torch.testing.assert_close(times, published["t"].double(), rtol=0, atol=1e-7)


@needs_fixtures
@pytest.mark.parametrize("steps", [50, 200])
def test_published_problems_are_solved_at_least_as_well(steps):
    """On the published solver's own problems, from the paper's 50 evaluations on, DPM-Solver++ in even steps of lambda
    has the smaller error."""
    fixture, schedule = torch.load(SHARED / "dpm_gaussian.pt", weights_only=True), DiscreteSchedule()
    runs = [run for run in fixture["runs"].values() if run["steps"] == steps]
    assert len(runs) == 3
    for run in runs:
        times = time_grid(schedule, steps, to_zero=False)  # `steps` evaluations that end at 1e-3, as theirs
        out = sample_dpm_solver_pp(gaussian(schedule, run["mu"], run["s"]), fixture["xT"], times, schedule)
        assert (out - run["exact"]).abs().max() < (run["out"] - run["exact"]).abs().max()


# --- diffusers' schedulers ----------------------------------------------------------------------------------------


def curved(z_t, t):
    """An estimate that is no affine function of z_t."""
    t = t.view(-1, 1)
    return torch.tanh((1.5 - t) * z_t) + 0.3 * torch.cos(3.0 * z_t + t)


class Theirs:
    """A scheduler of diffusers with Stable Diffusion's betas, which reads the estimate as the model's output.

    Its integer n is our time (n + 1) / 1000.
    """

    def __init__(self, name, **options):
        diffusers = pytest.importorskip("diffusers")
        betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        self.scheduler = getattr(diffusers, name)(**betas, prediction_type="sample", **options)

    def at(self, times):
        """The times that are to be visited, less the last."""
        self.scheduler.set_timesteps(timesteps=((times[:-1] * 1000).round().long() - 1).tolist())
        return self

    def evenly(self, n):
        """The number of steps, and the times they visit: 1, 1 - 1/n, ..., 1/n, 0."""
        self.scheduler.set_timesteps(n)
        return torch.cat([(self.scheduler.timesteps + 1) / 1000, torch.zeros(1)]).double()

    def sample(self, z_T, **options):
        z = z_T
        for n in self.scheduler.timesteps:
            t = torch.full((len(z),), (n.item() + 1) / 1000)
            z = self.scheduler.step(curved(z, t), n, z, **options).prev_sample
        return z


def start():
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


close = partial(torch.testing.assert_close, rtol=0, atol=5e-5)  # their tables have single precision


@pytest.mark.parametrize("n", [1, 10, 50, 250])
def test_ddim_is_diffusers(n):
    """The same samples on the same times."""
    theirs = Theirs("DDIMScheduler", clip_sample=False, timestep_spacing="trailing")
    times = theirs.evenly(n)
    assert (times[0], times[-1], len(times)) == (1, 0, n + 1)
    close(sample_ddim(curved, start(), times, DiscreteSchedule()), theirs.sample(start()))


@pytest.mark.parametrize("n", [1, 10, 50, 250])
def test_ddpm_is_diffusers(n):
    """The same samples on the same times, from the same noise."""
    theirs = Theirs("DDPMScheduler", clip_sample=False, timestep_spacing="trailing")
    times, (a, b) = theirs.evenly(n), (torch.Generator().manual_seed(1) for _ in range(2))
    ours = sample_ddpm(curved, start(), times, DiscreteSchedule(), lambda: torch.randn(16, 8, generator=a))
    close(ours, theirs.sample(start(), generator=b))


@pytest.mark.parametrize("n", [1, 2, 10, 50])
@pytest.mark.parametrize("spacing", ["lambda", "time"])
def test_dpm_solver_pp_is_diffusers(n, spacing):
    """The same samples on the same times, which are those of our grids rounded to thousandths."""
    times = (time_grid(DiscreteSchedule(), n, spacing) * 1000).round().unique().flip(0) / 1000
    theirs = Theirs("DPMSolverMultistepScheduler", solver_order=2, algorithm_type="dpmsolver++").at(times)
    close(sample_dpm_solver_pp(curved, start(), times, DiscreteSchedule()), theirs.sample(start()))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_lower_orders_of_dpm_solver_are_diffusers(n):
    """The steps of order 1 and 2 agree. (Diffusers' step of order 3 weighs its second stage by 1/2, unlike the
    published one.)"""
    times = torch.linspace(1000, 1, n + 1, dtype=torch.float64).round() / 1000
    options = {"solver_order": 3, "lower_order_final": True, "final_sigmas_type": "sigma_min"}
    theirs = Theirs("DPMSolverSinglestepScheduler", **options).at(times)
    close(sample_dpm_solver(curved, start(), times, DiscreteSchedule()), theirs.sample(start()))


# --- grids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [sample_ddim, sample_dpm_solver_pp, sample_dpm_solver, sample_ddpm])
@every_schedule
@pytest.mark.parametrize("n", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("spacing", ["lambda", "time"])
def test_a_grid_spends_its_evaluations(schedule, sampler, n, spacing):
    """n evaluations from t = 1 downwards, one at each time of the grid but the last."""
    to_zero, seen = sampler is not sample_dpm_solver, []
    times = time_grid(schedule, n, spacing, to_zero=to_zero)
    z_T = torch.zeros(1, 2, dtype=torch.float64)
    noise = (lambda: torch.zeros_like(z_T),) if sampler is sample_ddpm else ()
    sampler(lambda z, t: seen.append(t[0].item()) or z, z_T, times, schedule, *noise)
    assert len(seen) == n
    assert seen == times[:-1].tolist()
    assert times[0] == 1
    assert times[-1].item() == (0 if to_zero else pytest.approx(schedule.t_min))


@every_schedule
@pytest.mark.parametrize("to_zero", [False, True])
def test_spacing_is_even(schedule, to_zero):
    """Down to t_min, steps are even in lambda or in t; the step to 0 comes on top."""
    for spacing, place in (("lambda", schedule.lambda_), ("time", lambda t: t)):
        times = time_grid(schedule, 20, spacing, to_zero=to_zero)
        even = times[:-1] if to_zero else times
        assert len(even) == (20 if to_zero else 21)
        assert even[-1].item() == pytest.approx(schedule.t_min)
        steps = place(even).diff()
        torch.testing.assert_close(steps, steps.mean().expand_as(steps))
