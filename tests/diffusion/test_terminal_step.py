"""Starting with the signal that a schedule leaves at its end."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from nestdiff_core.config import ExperimentConfig, ImagesConfig, LevelConfig, SamplingConfig, SweepConfig, UViTConfig
from nestdiff_core.diffusion import VPSchedule, make_schedule, sample_cascade, terminal_step
from nestdiff_core.errors import ConfigError
from nestdiff_core.experiment import Experiment, Ref

SAMPLERS = ["dpm_solver_pp", "dpm_solver", "ddim", "ddpm"]


def gaussian(schedule, mu, s):
    """E[z | z^(t)] for z ~ N(mu, s^2)."""

    def model(z_t, t):
        alpha, sigma = (f(t).to(z_t.dtype).view(-1, *[1] * (z_t.ndim - 1)) for f in (schedule.alpha, schedule.sigma))
        return mu + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (z_t - alpha * mu)

    return model


def experiment(**sampling):
    model = UViTConfig(width=16, depth=2, num_heads=2)
    return ExperimentConfig(
        images=ImagesConfig(source="digits", resolution=4, channels=1),
        levels=(LevelConfig(level=1, patch_size=2, model=model), LevelConfig(level=2, grid=1, channels=2, model=model)),
        sampling=SamplingConfig(**({"num_evaluations": 50, "batch_size": 1000} | sampling)),
    )


def test_a_gaussian_starts_in_its_own_marginal():
    """Errors of mean and deviation fall with alpha_1^3 at least; those of pure noise with alpha_1 and alpha_1^2."""
    mu, s = 1.5, 2.2
    alphas, found = [], []
    for beta_1 in (12.0, 16.0, 20.0, 24.0):
        schedule = VPSchedule()
        schedule.beta_1 = beta_1
        one = torch.ones((), dtype=torch.float64)
        alpha, sigma = schedule.alpha(one).item(), schedule.sigma(one).item()
        plus, minus = terminal_step(
            gaussian(schedule, mu, s), torch.tensor([[1.0], [-1.0]], dtype=torch.float64), schedule
        )
        mean, std = (plus + minus).item() / 2, (plus - minus).item() / 2  # the step is affine in the noise
        alphas.append(alpha)
        found.append((abs(mean - alpha * mu), abs(std - math.hypot(alpha * s, sigma))))
    slopes = np.polyfit(np.log(alphas), np.log(found), 1)[0]
    assert slopes[0] == pytest.approx(3.0, abs=0.1)
    assert slopes[1] > 3.0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_a_level_above_tells_arrives_whole(sampler):
    """z_1 ~ N(z_2, 1.5^2): regressed on z_2 it has slope 1. From pure noise the slope is 1 - alpha_1 s to first order,
    which is .90 with the paper's schedule; ancestral sampling forgets most of where it started."""
    s, slopes = 1.5, []
    for terminal in (False, True):
        config = experiment(sampler=sampler, terminal_step=terminal)
        schedule = make_schedule(config.diffusion)

        def denoiser(z_t, t, z_above, labels=None, drop=None, schedule=schedule):
            z_hat = gaussian(schedule, z_above[2][:, :1], s)(z_t, t)
            alpha, sigma = (f(t).float().view(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
            return (z_t - alpha * z_hat) / sigma

        told = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(0))
        z_1 = sample_cascade({1: denoiser}, config, image_indices=range(2000), seed=0, given={2: told})[1]
        z_2 = told[:, 0].flatten()
        slopes.append(((z_1.mean((1, 2, 3)) * z_2).mean() / (z_2 * z_2).mean()).item())
    noise = 4 * s / (16 * 2000) ** 0.5  # 16 values of an image are averaged
    assert slopes[1] == pytest.approx(1.0, abs=noise)
    if sampler != "ddpm":
        assert slopes[0] == pytest.approx(1.0 - 0.068 * s, abs=noise)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_its_evaluations_are_among_those_asked_for(sampler):
    """Two of them, at t = 1, at the noise and its negative."""
    calls = []

    def seen(z_t, t, z_above, labels=None, drop=None):
        calls.append((z_t, t[0].item()))
        return torch.zeros_like(z_t)

    config = experiment(sampler=sampler, terminal_step=True, num_evaluations=7, batch_size=4)
    sample_cascade({1: seen, 2: seen}, config, image_indices=range(4), seed=0)
    assert len(calls) == 2 * 7
    for level in (calls[:7], calls[7:]):
        assert torch.equal(level[0][0], -level[1][0])
        assert [t for _, t in level[:3]] == [1.0, 1.0, 1.0]
        assert level[3][1] < 1.0


def test_an_evaluation_must_be_left_for_the_sampler():
    """Refused where the configuration is read, for all levels, for one and in a sweep."""
    config = experiment(terminal_step=True, num_evaluations=3)
    few = dataclasses.replace(config.levels[1], num_evaluations=2)
    for key, made in (
        ("sampling.num_evaluations", lambda: experiment(terminal_step=True, num_evaluations=2)),
        ("levels.num_evaluations", lambda: dataclasses.replace(config, levels=(config.levels[0], few))),
        ("sweep.num_evaluations", lambda: dataclasses.replace(config, sweep=SweepConfig(num_evaluations=(10, 2)))),
    ):
        with pytest.raises(ConfigError) as caught:
            made()
        assert caught.value.key == key


def test_it_is_part_of_what_samples_are():
    """Samples that start otherwise are others; what was made before the knob keeps its name."""
    plain, other = Experiment(experiment()), Experiment(experiment(terminal_step=True))
    assert plain.config_hash(Ref("samples")) != other.config_hash(Ref("samples"))
    assert "terminal_step" not in plain.stage_config(Ref("samples"))["sampling"]
