"""Noise schedules."""

import os
from pathlib import Path

import pytest
import scipy.stats
import torch

from nestdiff_core.config import DiffusionConfig
from nestdiff_core.diffusion import DiscreteSchedule, VPSchedule, make_schedule

SCHEDULES = [DiscreteSchedule(), VPSchedule()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
FIXTURE = Path(os.environ.get("NESTDIFF_SHARED", "../shared")) / "uvit_parity" / "schedule.pt"


@pytest.mark.skipif(not FIXTURE.is_file(), reason="no schedule fixture at NESTDIFF_SHARED")
def test_discrete_schedule_is_the_published_one():
    """betas, alpha-bar and log-SNR agree in double precision; log alpha, sigma, lambda and its inverse with published
    values of single precision."""
    published, schedule = torch.load(FIXTURE, weights_only=True), DiscreteSchedule()
    assert torch.equal(schedule.betas, published["betas"])
    n = torch.arange(1, 1001, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(n / 1000) ** 2, published["cum_alpha"], rtol=1e-12, atol=0)
    torch.testing.assert_close(2 * schedule.lambda_(n / 1000), published["log_snr"], rtol=0, atol=1e-12)
    t = published["t"]
    for ours, theirs, atol in (
        (schedule.log_alpha(t), published["log_mean_coeff"], 2e-6),
        (schedule.sigma(t), published["std"], 2e-6),
        (schedule.lambda_(t), published["marginal_lambda"], 3e-5),
        (schedule.t_of_lambda(published["lambda_grid"]), published["inverse_lambda"], 2e-6),
    ):
        torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=atol)


def test_vp_schedule_has_the_linear_beta():
    """-2 d log alpha / dt is beta(t) = 0.1 + 19.9 t."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(VPSchedule().log_alpha(t).sum(), t)
    torch.testing.assert_close(-2 * slope, 0.1 + 19.9 * t.detach())


@every_schedule
def test_schedules_preserve_variance_and_lose_signal(schedule):
    """alpha^2 + sigma^2 = 1, alpha starts at 1, and lambda falls all the way."""
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))
    assert schedule.alpha(t)[0] == 1
    assert (schedule.lambda_(t)[1:].diff() < 0).all()
    torch.testing.assert_close(schedule.lambda_(t)[1:], (schedule.alpha(t) / schedule.sigma(t)).log()[1:])


@every_schedule
def test_t_of_lambda_inverts_lambda(schedule):
    """Down to t = 1e-6, where alpha is 1 within 1e-9."""
    t = torch.cat(
        [torch.logspace(-6, 0, 200, dtype=torch.float64), torch.linspace(0.001, 1, 1000, dtype=torch.float64)]
    )
    torch.testing.assert_close(schedule.t_of_lambda(schedule.lambda_(t)), t, rtol=1e-6, atol=0)


def test_discrete_training_times_are_all_thousandths():
    """sample_t draws n / 1000 for every n from 1 to 1000, about equally often, and only these."""
    t = DiscreteSchedule().sample_t(200_000, torch.Generator().manual_seed(0))
    n = (t * 1000).round().long()
    assert torch.equal(n.float() / 1000, t)
    counts = n.bincount(minlength=1001)
    assert counts[0] == 0
    assert len(counts) == 1001
    assert counts[1:].min() > 200 - 6 * 200**0.5
    assert counts[1:].max() < 200 + 6 * 200**0.5


def test_vp_training_times_are_uniform():
    """sample_t stays in [1e-5, 1], and its quantiles are those of a uniform."""
    t = VPSchedule().sample_t(100_000, torch.Generator().manual_seed(0)).sort().values
    assert t[0] >= 1e-5
    assert t[-1] <= 1
    torch.testing.assert_close(t, torch.linspace(0, 1, 100_000), rtol=0, atol=0.006)  # Kolmogorov-Smirnov, p about 1e-3


@every_schedule
@pytest.mark.parametrize(("mean", "std"), [(0.7, 1.4), (-3.0, 0.5), (9.0, 1.0)])
def test_training_times_around_a_noise_level(schedule, mean, std):
    """lambda is the truncated normal of scipy, between the ends of what is sampled, also far out in a tail."""
    t = schedule.sample_t_around(mean, std, 100_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32 and t.min() >= schedule.t_min and t.max() <= 1.0
    first, last = schedule.lambda_(torch.tensor([1.0, schedule.t_min], dtype=torch.float64)).tolist()
    expected = scipy.stats.truncnorm((first - mean) / std, (last - mean) / std, loc=mean, scale=std)
    found = scipy.stats.kstest(schedule.lambda_(t.double()).numpy(), expected.cdf)
    assert found.statistic < 0.006  # p about 1e-3


@every_schedule
def test_the_generator_decides_the_times(schedule):
    """The same generator state gives the same times."""
    a, b, c = (schedule.sample_t(8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(("name", "kind"), [("discrete", DiscreteSchedule), ("vp", VPSchedule)])
def test_make_schedule_follows_the_configuration(name, kind):
    """Each configured name gives its schedule."""
    assert isinstance(make_schedule(DiffusionConfig(schedule=name)), kind)
