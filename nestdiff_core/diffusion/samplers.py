"""Samplers: plain functions that carry z from noise to data along a grid of times.

The model is any callable `z_hat = model(z_t, t)` with z_t (B, ...) and t (B,) of the same precision: its estimate of
the clean latent. `process.to_z_hat` makes one from a network of any prediction; guidance and conditions are wrapped
around it before it comes here (cascade.py).

Every sampler evaluates the model once at each time of its grid but the last. The times fall; the last may be 0, for
sample_dpm_solver it is above 0. The deterministic ones are made of one step, the exact solution of the probability-flow
ODE where the estimate stays as it is (arXiv 2211.01095, proposition 4.1, its integral done), h = lambda_s - lambda_t:

    z_s = sigma_s / sigma_t z_t - alpha_s (e^-h - 1) z_hat

and differ in what they put for z_hat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nestdiff_core.diffusion.schedule import NoiseSchedule

Model = Callable[[Tensor, Tensor], Tensor]
Spacing = Literal["lambda", "time"]


def time_grid(
    schedule: NoiseSchedule, num_evaluations: int, spacing: Spacing = "lambda", *, to_zero: bool = True
) -> Float64[Tensor, " N"]:
    """The times for `num_evaluations` evaluations, one more than these: from 1 to schedule.t_min, then 0.

    spacing: even steps in `time` (the paper, for the single-step solver) or in `lambda`, which a multistep method
    wants: it extrapolates over a step by the ratio of neighbouring steps, and evenly spaced times make the last finite
    step several times longer in lambda. to_zero: the step to 0 replaces the noise that is left at t_min by the last
    estimate; without it the even steps end at t_min.
    """
    count = num_evaluations if to_zero else num_evaluations + 1
    match spacing:
        case "lambda":
            first, last = schedule.lambda_(torch.tensor([1.0, schedule.t_min], dtype=torch.float64))
            times = schedule.t_of_lambda(torch.linspace(first, last, count, dtype=torch.float64))
            times[0] = 1.0
        case "time":
            times = torch.linspace(1.0, schedule.t_min, count, dtype=torch.float64)
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)]) if to_zero else times


TERMINAL_EVALUATIONS = 2


def terminal_step(model: Model, noise: Float[Tensor, " B *rest"], schedule: NoiseSchedule) -> Float[Tensor, " B *rest"]:
    """z at t = 1 with the signal that it holds, from pure noise; any sampler goes on from it.

    No schedule here ends in pure noise: alpha_1 is .068 in the paper's. Who starts there with eps alone lacks
    alpha_1 E[z | conditions], and an ODE never makes up for it (the flaw that arXiv 2305.08891 describes): a Gaussian
    of mean m and deviation s comes out with mean m (1 - alpha_1 s / sqrt(alpha_1^2 s^2 + sigma_1^2)), and at the lowest
    frequencies of an image s is many times that of a pixel. So a share of what conditions tell is lost there; without
    conditions, brightness varies too little. Ancestral sampling forgets where it started.

    This is the ODE's own step from alpha = 0, z_1 = sigma_1 eps + integral of z_hat over alpha, by the trapezoidal
    rule; at alpha = 0 the estimate does not depend on eps and is taken to be the even part of the one at alpha_1:

        z_1 = sigma_1 eps + alpha_1 (3 z_hat(eps) + z_hat(-eps)) / 4

    A Gaussian's mean and deviation then have errors of order alpha_1^3 and less, not alpha_1 and alpha_1^2.
    """
    t = torch.ones(len(noise), dtype=noise.dtype, device=noise.device)
    alpha, sigma = schedule.alpha(t[:1]).item(), schedule.sigma(t[:1]).item()
    return sigma * noise + alpha * (0.75 * model(noise, t) + 0.25 * model(-noise, t))


class _Grid(NamedTuple):
    """Times with their alpha, sigma and lambda, as numbers: one transfer instead of one a step."""

    times: list[float]
    alpha: list[float]
    sigma: list[float]
    lambda_: list[float]

    @classmethod
    def of(cls, times: Tensor, schedule: NoiseSchedule) -> _Grid:
        alpha, sigma, lambda_ = schedule.alpha(times), schedule.sigma(times), schedule.lambda_(times)
        return cls(times.tolist(), alpha.tolist(), sigma.tolist(), lambda_.tolist())

    @property
    def num_evaluations(self) -> int:
        return len(self.times) - 1

    def estimate(self, model: Model, z: Tensor, i: int) -> Tensor:
        """The model's z_hat for z at time i."""
        return model(z, torch.full((len(z),), self.times[i], dtype=z.dtype, device=z.device))

    def step(self, z: Tensor, z_hat: Tensor, i: int, j: int) -> Tensor:
        """From time i to time j with a constant estimate (the module's equation); z_hat itself where time j is 0."""
        h = self.lambda_[j] - self.lambda_[i]
        return self.sigma[j] / self.sigma[i] * z - self.alpha[j] * math.expm1(-h) * z_hat


def sample_ddim(
    model: Model, z_T: Float[Tensor, " B *rest"], times: Float64[Tensor, " N"], schedule: NoiseSchedule
) -> Float[Tensor, " B *rest"]:
    """Deterministic DDIM (Song et al., arXiv 2010.02502, equation 12 with eta = 0): first order.

    Its z_s = alpha_s z_hat + sigma_s eps_hat, eps_hat = (z_t - alpha_t z_hat) / sigma_t, is the module's step.
    """
    grid, z = _Grid.of(times, schedule), z_T
    for i in range(grid.num_evaluations):
        z = grid.step(z, grid.estimate(model, z, i), i, i + 1)
    return z


def sample_ddpm(
    model: Model,
    z_T: Float[Tensor, " B *rest"],
    times: Float64[Tensor, " N"],
    schedule: NoiseSchedule,
    noise: Callable[[], Tensor],
) -> Float[Tensor, " B *rest"]:
    """Ancestral sampling (DDPM, Ho et al., arXiv 2006.11239, equations 6 and 7, for any two times t > s; DDIM's
    equations 12 and 16 with eta = 1): z_s is drawn from its posterior q(z_s | z_t, z_hat), h = lambda_s - lambda_t:

        z_s = e^-2h alpha_s / alpha_t z_t + (1 - e^-2h) alpha_s z_hat + sqrt(1 - e^-2h) sigma_s n

    noise: gives the next n ~ N(0, I) in the shape of z_T. No noise is asked for on the step to 0, which has none.
    """
    grid, z = _Grid.of(times, schedule), z_T
    alpha, sigma, lambda_ = grid.alpha, grid.sigma, grid.lambda_
    for i in range(grid.num_evaluations):
        z_hat = grid.estimate(model, z, i)
        renewed = -math.expm1(-2.0 * (lambda_[i + 1] - lambda_[i]))  # 1 - e^-2h
        z = (1.0 - renewed) * alpha[i + 1] / alpha[i] * z + renewed * alpha[i + 1] * z_hat
        if sigma[i + 1] > 0.0:
            z = z + math.sqrt(renewed) * sigma[i + 1] * noise()
    return z


def sample_dpm_solver_pp(
    model: Model, z_T: Float[Tensor, " B *rest"], times: Float64[Tensor, " N"], schedule: NoiseSchedule
) -> Float[Tensor, " B *rest"]:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2): second order, one evaluation a step.

        h_i = lambda_{i+1} - lambda_i,   r_i = h_{i-1} / h_i
        z_{i+1} = the module's step with z_hat_i + (z_hat_i - z_hat_{i-1}) / (2 r_i)

    The first step has no past and the step to 0 no finite h: both are first order, with z_hat_i.
    """
    grid, z, z_hat_before = _Grid.of(times, schedule), z_T, None
    for i in range(grid.num_evaluations):
        z_hat = estimate = grid.estimate(model, z, i)
        h = grid.lambda_[i + 1] - grid.lambda_[i]
        if z_hat_before is not None and math.isfinite(h):
            r = (grid.lambda_[i] - grid.lambda_[i - 1]) / h
            estimate = z_hat + (z_hat - z_hat_before) / (2.0 * r)
        z = grid.step(z, estimate, i, i + 1)
        z_hat_before = z_hat
    return z


def step_orders(num_evaluations: int) -> list[int]:
    """Orders, and so evaluations, of the single-step solver's steps, as published ("DPM-Solver-fast",
    arXiv 2206.00927): third order, and what is left at the end of lower order.

    A last step of first order (where num_evaluations is not 2 mod 3; the paper's 50 is) holds the whole to second order
    in the limit of many evaluations.
    """
    thirds, left = divmod(num_evaluations, 3)
    return [3] * thirds + [left] if left else [3] * (thirds - 1) + [2, 1]


def sample_dpm_solver(
    model: Model, z_T: Float[Tensor, " B *rest"], times: Float64[Tensor, " N"], schedule: NoiseSchedule
) -> Float[Tensor, " B *rest"]:
    """The single-step DPM-Solver of order 3 for the estimate of the data, which the paper samples with: DPM-Solver-3
    (arXiv 2206.00927, algorithm 2) in the form of DPM-Solver++(2S) (arXiv 2211.01095, algorithm 1).

    A step of order k spans k intervals of the grid, and each of its evaluations is at a time of the grid. All its
    stages start from its first latent; the one to time j adds the slope of the estimate seen at time j-1:

        h = lambda_j - lambda_i,   r = (lambda_{j-1} - lambda_i) / h
        z_j = the module's step with z_hat_i + w (z_hat_{j-1} - z_hat_i) / r,   z_{i+1}: with z_hat_i
        w = 1/2 (order 2),   1 / (1 - e^-h) - 1 / h (order 3: the integral of a slope, 1/2 for small h)

    The last time is above 0: the published solver ends at t_min.
    """
    grid, z, i = _Grid.of(times, schedule), z_T, 0
    for order in step_orders(grid.num_evaluations):
        start, z_hat = z, grid.estimate(model, z, i)
        z = grid.step(start, z_hat, i, i + 1)
        for j in range(i + 2, i + order + 1):
            h = grid.lambda_[j] - grid.lambda_[i]
            r = (grid.lambda_[j - 1] - grid.lambda_[i]) / h
            w = 0.5 if order == 2 else -1.0 / math.expm1(-h) - 1.0 / h
            estimate = z_hat + w / r * (grid.estimate(model, z, j - 1) - z_hat)
            z = grid.step(start, estimate, i, j)
        i += order
    return z
