"""The forward process and the conversions between predictions."""

import os
from pathlib import Path

import pytest
import torch

from nestdiff_core.diffusion import DiscreteSchedule, VPSchedule, add_noise, to_eps_hat, to_z_hat
from nestdiff_core.diffusion.process import target

FIXTURE = Path(os.environ.get("NESTDIFF_SHARED", "../shared")) / "uvit_parity" / "schedule.pt"


@pytest.mark.skipif(not FIXTURE.is_file(), reason="no schedule fixture at NESTDIFF_SHARED")
def test_add_noise_is_the_published_process():
    """z^(n/1000) agrees with the published q(x_n | x_0)."""
    q = torch.load(FIXTURE, weights_only=True)["q_sample"]
    z_t = add_noise(q["x0"], q["eps"], q["n"] / 1000, DiscreteSchedule())
    torch.testing.assert_close(z_t, q["xn"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", [DiscreteSchedule(), VPSchedule()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("prediction", ["eps", "v", "x"])
def test_a_perfect_prediction_gives_back_latent_and_noise(schedule, prediction):
    """From the training target, to_z_hat recovers z and to_eps_hat recovers eps, at every time."""
    generator = torch.Generator().manual_seed(0)
    z, eps = (torch.randn(64, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.linspace(1e-3, 1, 64, dtype=torch.float64)
    z_t, output = add_noise(z, eps, t, schedule), target(z, eps, t, schedule, prediction)
    torch.testing.assert_close(to_z_hat(output, z_t, t, schedule, prediction), z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(to_eps_hat(output, z_t, t, schedule, prediction), eps, rtol=1e-9, atol=1e-9)


def test_v_is_the_direction_of_motion():
    """v = d z^(t) / d phi with alpha = cos phi, sigma = sin phi."""
    schedule, t = VPSchedule(), torch.tensor([0.3], dtype=torch.float64)
    z, eps = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    phi = torch.atan2(schedule.sigma(t), schedule.alpha(t))
    expected = -phi.sin() * z + phi.cos() * eps
    torch.testing.assert_close(target(z, eps, t, schedule, "v"), expected)
