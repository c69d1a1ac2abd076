"""Noise schedules: how much signal and noise z^(t) holds at time t.

    z^(t) = alpha_t z + sigma_t eps,   alpha_t^2 + sigma_t^2 = 1,   t in [0, 1], 0 is data

Everything follows from log alpha_t, in float64: near t = 0 alpha is 1 to the last bits, and sigma is what is left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from nestdiff_core.config import DiffusionConfig

NUM_STEPS = 1000


class NoiseSchedule(ABC):
    """A variance-preserving schedule; sampling runs from t = 1 down to `t_min`.

    All functions of t take any shape and return float64 on t's device.
    """

    t_min: float = 1e-3

    @abstractmethod
    def log_alpha(self, t: Float[Tensor, " ..."]) -> Float64[Tensor, " ..."]:
        """log alpha_t."""

    @abstractmethod
    def t_of_log_alpha(self, log_alpha: Float[Tensor, " ..."]) -> Float64[Tensor, " ..."]:
        """Inverse of `log_alpha`."""

    @abstractmethod
    def sample_t(self, batch: int, generator: torch.Generator) -> Float32[Tensor, " batch"]:
        """Training times on the generator's device."""

    def sample_t_around(
        self, mean: float, std: float, batch: int, generator: torch.Generator
    ) -> Float32[Tensor, " batch"]:
        """Training times at which lambda is normal, cut to what is sampled, lambda(1) to lambda(t_min).

        EDM's choice (Karras et al., arXiv 2206.00364, table 1) is mean -P_mean = 1.2 and std 1.2, for data of deviation
        .5, which pixels in [-1, 1] have.
        """
        bounds = torch.tensor([1.0, self.t_min], dtype=torch.float64, device=generator.device)
        first, last = torch.special.ndtr((self.lambda_(bounds) - mean) / std)
        u = torch.rand(batch, generator=generator, dtype=torch.float64, device=generator.device)
        t = self.t_of_lambda(mean + std * torch.special.ndtri(first + (last - first) * u))
        return t.float().clamp(self.t_min, 1.0)

    def alpha(self, t: Float[Tensor, " ..."]) -> Float64[Tensor, " ..."]:
        return self.log_alpha(t).exp()

    def sigma(self, t: Float[Tensor, " ..."]) -> Float64[Tensor, " ..."]:
        return (-torch.expm1(2.0 * self.log_alpha(t))).sqrt()

    def lambda_(self, t: Float[Tensor, " ..."]) -> Float64[Tensor, " ..."]:
        """log(alpha_t / sigma_t), half the log signal-to-noise ratio; falls with t."""
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * torch.log(-torch.expm1(2.0 * log_alpha))

    def t_of_lambda(self, lambda_: Float[Tensor, " ..."]) -> Float64[Tensor, " ..."]:
        """Inverse of `lambda_`: alpha^2 = 1 / (1 + e^(-2 lambda))."""
        return self.t_of_log_alpha(-0.5 * torch.nn.functional.softplus(-2.0 * lambda_.double()))


class DiscreteSchedule(NoiseSchedule):
    """Stable Diffusion's betas = linspace(sqrt .00085, sqrt .012, 1000)^2, the paper's schedule.

    alpha_{n/1000}^2 = prod_{i <= n} (1 - beta_i). Training uses t = n / 1000, n = 1..1000. Between these times
    log alpha is linear (DPM-Solver, arXiv 2206.00927, appendix D.4), and it starts at alpha_0 = 1.
    """

    def __init__(self) -> None:
        self.betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_STEPS, dtype=torch.float64) ** 2
        knots = torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * torch.log1p(-self.betas).cumsum(0)])
        self._knots = {knots.device: knots}

    def _log_alpha_knots(self, device: torch.device) -> Float64[Tensor, " 1001"]:
        if device not in self._knots:
            self._knots[device] = self._knots[torch.device("cpu")].to(device)
        return self._knots[device]

    def log_alpha(self, t: Float[Tensor, " ..."]) -> Float64[Tensor, " ..."]:
        knots, position = self._log_alpha_knots(t.device), t.double() * NUM_STEPS
        left = position.floor().clamp(0, NUM_STEPS - 1).long()
        return torch.lerp(knots[left], knots[left + 1], position - left)

    def t_of_log_alpha(self, log_alpha: Float[Tensor, " ..."]) -> Float64[Tensor, " ..."]:
        knots, value = self._log_alpha_knots(log_alpha.device), log_alpha.double()
        left = (torch.searchsorted(-knots, -value) - 1).clamp(0, NUM_STEPS - 1)
        return (left + (value - knots[left]) / (knots[left + 1] - knots[left])) / NUM_STEPS

    def sample_t(self, batch: int, generator: torch.Generator) -> Float32[Tensor, " batch"]:
        """n / 1000 with n uniform in 1..1000."""
        n = torch.randint(1, NUM_STEPS + 1, (batch,), generator=generator, device=generator.device)
        return n.float() / NUM_STEPS


class VPSchedule(NoiseSchedule):
    """The continuous variance-preserving SDE (arXiv 2011.13456): beta(t) rises linearly from 0.1 to 20.

    log alpha_t = -(beta_1 - beta_0) t^2 / 4 - beta_0 t / 2
    """

    beta_0, beta_1 = 0.1, 20.0
    train_t_min = 1e-5

    def log_alpha(self, t: Float[Tensor, " ..."]) -> Float64[Tensor, " ..."]:
        t = t.double()
        return -0.25 * (self.beta_1 - self.beta_0) * t**2 - 0.5 * self.beta_0 * t

    def t_of_log_alpha(self, log_alpha: Float[Tensor, " ..."]) -> Float64[Tensor, " ..."]:
        c = -4.0 * log_alpha.double()  # (beta_1 - beta_0) t^2 + 2 beta_0 t = c, solved without cancellation near t = 0
        return c / (self.beta_0 + (self.beta_0**2 + (self.beta_1 - self.beta_0) * c).sqrt())

    def sample_t(self, batch: int, generator: torch.Generator) -> Float32[Tensor, " batch"]:
        """Uniform in [1e-5, 1]."""
        u = torch.rand(batch, generator=generator, device=generator.device)
        return self.train_t_min + (1.0 - self.train_t_min) * u


def make_schedule(config: DiffusionConfig) -> NoiseSchedule:
    match config.schedule:
        case "discrete":
            return DiscreteSchedule()
        case "vp":
            return VPSchedule()
