"""The training loss of one level."""

import pytest
import torch

from nestdiff_core.diffusion import DiscreteSchedule, VPSchedule, level_loss
from nestdiff_core.diffusion.process import coefficients

SHAPE = (4096, 2, 4, 4)


def draw(seed=0, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def gaussian_denoiser(schedule, prediction, s):
    """The optimal network for z ~ N(0, s^2 I): a multiple of z^(t), the regression of the target on it."""

    def model(z_t, t, z_above, labels, drop):
        alpha, sigma = coefficients(schedule, t, z_t)
        covariance = {"eps": sigma, "x": alpha * s**2, "v": alpha * sigma * (1 - s**2)}[prediction]
        return covariance / (alpha**2 * s**2 + sigma**2) * z_t

    return model


@pytest.mark.parametrize("schedule", [DiscreteSchedule(), VPSchedule()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("prediction", ["eps", "v", "x"])
@pytest.mark.parametrize(("s", "time"), [(0.5, 0.1), (1.0, 0.5), (2.0, 0.9)])
def test_the_optimal_denoiser_reaches_the_bayes_risk(schedule, prediction, s, time):
    """For z ~ N(0, s^2 I) the smallest loss is known: s^2 / (alpha^2 s^2 + sigma^2) times alpha^2, 1 or sigma^2."""
    z, eps = draw()
    t = torch.full((len(z),), time)
    loss = level_loss(gaussian_denoiser(schedule, prediction, s), schedule, prediction, s * z, {}, {}, t, eps, {})
    alpha, sigma = schedule.alpha(t[:1]), schedule.sigma(t[:1])
    risk = s**2 / (alpha**2 * s**2 + sigma**2) * {"eps": alpha**2, "v": 1.0, "x": sigma**2}[prediction]
    assert loss.shape == (len(z),)
    assert loss.mean() == pytest.approx(risk.item(), rel=0.02)  # 131,072 numbers: standard error 0.4 %


def test_only_the_conditions_get_condition_noise():
    """The network sees z_m + sigma_m eta_m of each level above, and z_l^(t) without any of it."""
    schedule, seen = DiscreteSchedule(), {}
    z, eps = draw(shape=(3, 1, 2, 2))
    z_2, eta_2 = draw(1, (3, 4, 1, 1))
    z_3, eta_3 = draw(2, (3, 5, 1, 1))
    t = torch.tensor([0.1, 0.5, 1.0])
    labels, drop = torch.tensor([0, 1, 2]), torch.tensor([True, False, True])

    def model(*inputs):
        seen["inputs"] = inputs
        return inputs[0]

    level_loss(
        model, schedule, "eps", z, {3: z_3, 2: z_2}, {2: 0.5, 3: 0.0}, t, eps, {2: eta_2, 3: eta_3}, labels, drop
    )
    z_t, seen_t, z_above, seen_labels, seen_drop = seen["inputs"]
    torch.testing.assert_close(z_above, {3: z_3, 2: z_2 + 0.5 * eta_2})
    alpha, sigma = coefficients(schedule, t, z)
    torch.testing.assert_close(z_t, alpha * z + sigma * eps)
    assert seen_t is t
    assert seen_labels is labels
    assert seen_drop is drop


def test_noise_on_a_condition_costs_what_it_hides():
    """For z_1 = z_2 ~ N(0, 1), seen through sigma_2, the smallest x loss is 1 / (1 + SNR_t + 1 / sigma_2^2)."""
    schedule, sigma_2, time = DiscreteSchedule(), 0.5, 0.6
    z, eps = draw()
    eta = draw(1)[0]
    t = torch.full((len(z),), time)
    snr = (2 * schedule.lambda_(t[0])).exp().item()

    def model(z_t, t, z_above, labels, drop):
        alpha, sigma = coefficients(schedule, t, z_t)
        return (alpha / sigma**2 * z_t + z_above[2] / sigma_2**2) / (1 + snr + sigma_2**-2)

    loss = level_loss(model, schedule, "x", z, {2: z}, {2: sigma_2}, t, eps, {2: eta})
    assert loss.mean() == pytest.approx(1 / (1 + snr + sigma_2**-2), rel=0.02)
