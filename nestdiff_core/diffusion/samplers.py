"""Samplers: plain functions that carry z from noise to data along a grid of times.

The model is any callable `z_hat = model(z_t, t)` with z_t (B, ...) and t (B,) of the same precision: its estimate of
the clean latent. `process.to_z_hat` makes one from a network of any prediction; guidance and conditions are wrapped
around it before it comes here (cascade.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nestdiff_core.diffusion.schedule import NoiseSchedule

Model = Callable[[Tensor, Tensor], Tensor]


def time_grid(schedule: NoiseSchedule, num_evaluations: int) -> Float64[Tensor, " N"]:
    """`num_evaluations` times from 1 to schedule.t_min, evenly spaced in lambda, and 0 at the end.

    Even steps in lambda rather than in t (the paper's choice, made for another solver): a multistep method extrapolates
    over the last step by the ratio of neighbouring steps, and evenly spaced times make that step several times longer.
    The step to 0 replaces the noise that is left at t_min by the last estimate.
    """
    first, last = schedule.lambda_(torch.tensor([1.0, schedule.t_min], dtype=torch.float64))
    times = schedule.t_of_lambda(torch.linspace(first, last, num_evaluations, dtype=torch.float64))
    times[0] = 1.0
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def _levels(schedule: NoiseSchedule, times: Tensor) -> tuple[list[float], list[float], list[float]]:
    """alpha, sigma and lambda at every time, as numbers: one transfer instead of one a step."""
    return schedule.alpha(times).tolist(), schedule.sigma(times).tolist(), schedule.lambda_(times).tolist()


def _estimate(model: Model, z: Tensor, time: float) -> Tensor:
    return model(z, torch.full((len(z),), time, dtype=z.dtype, device=z.device))


def sample_ddim(
    model: Model, z_T: Float[Tensor, " B *rest"], times: Float64[Tensor, " N"], schedule: NoiseSchedule
) -> Float[Tensor, " B *rest"]:
    """Deterministic DDIM (Song et al., arXiv 2010.02502, equation 12 with eta = 0): first order.

        z_s = alpha_s z_hat + sigma_s eps_hat,   eps_hat = (z_t - alpha_t z_hat) / sigma_t

    times fall; the last may be 0, and then the last estimate itself is returned.
    """
    alpha, sigma, _ = _levels(schedule, times)
    z = z_T
    for i, time in enumerate(times.tolist()[:-1]):
        z_hat = _estimate(model, z, time)
        ratio = sigma[i + 1] / sigma[i]
        z = ratio * z + (alpha[i + 1] - ratio * alpha[i]) * z_hat
    return z


def sample_dpm_solver_pp(
    model: Model, z_T: Float[Tensor, " B *rest"], times: Float64[Tensor, " N"], schedule: NoiseSchedule
) -> Float[Tensor, " B *rest"]:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2): second order, one evaluation a step.

        h_i = lambda_{i+1} - lambda_i,   r_i = h_{i-1} / h_i
        D_i = z_hat_i + (z_hat_i - z_hat_{i-1}) / (2 r_i)
        z_{i+1} = sigma_{i+1} / sigma_i z_i - alpha_{i+1} (e^{-h_i} - 1) D_i

    The first step has no past and the step to 0 no finite h: both are first order (D_i = z_hat_i).
    """
    alpha, sigma, lambda_ = _levels(schedule, times)
    z, z_hat_before = z_T, None
    for i, time in enumerate(times.tolist()[:-1]):
        z_hat = _estimate(model, z, time)
        h = lambda_[i + 1] - lambda_[i]
        estimate = z_hat
        if z_hat_before is not None and math.isfinite(h):
            r = (lambda_[i] - lambda_[i - 1]) / h
            estimate = z_hat + (z_hat - z_hat_before) / (2.0 * r)
        z = sigma[i + 1] / sigma[i] * z - alpha[i + 1] * math.expm1(-h) * estimate
        z_hat_before = z_hat
    return z
