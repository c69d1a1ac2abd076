"""A little hierarchy and its denoisers, for the tests of the cascade."""

import pytest
import torch

from nestdiff_core.config import (
    ConditioningConfig,
    DiffusionConfig,
    ExperimentConfig,
    ImagesConfig,
    LevelConfig,
    SamplingConfig,
    TextConfig,
    UViTConfig,
)
from nestdiff_core.models import build_denoiser

MODEL = UViTConfig(width=16, depth=2, num_heads=2)
SHAPES = {1: (1, 8, 8), 2: (3, 2, 2), 3: (5, 1, 1)}
SAMPLERS = ["dpm_solver_pp", "dpm_solver", "ddim", "ddpm"]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def experiment(*, noise=0.0, guidance=0.0, interval=(0.0, 1.0), labels="none", prediction="x", shapes=SHAPES, **knobs):
    """The levels of `shapes`; each above the first carries the same condition noise. knobs: of the sampling."""
    levels = []
    for m, (channels, grid, _) in shapes.items():
        latent = {"patch_size": 2} if m == 1 else {"grid": grid, "channels": channels, "condition_noise": noise}
        levels.append(LevelConfig(level=m, guidance=guidance, guidance_interval=interval, model=MODEL, **latent))
    return ExperimentConfig(
        images=ImagesConfig(source="digits", resolution=8, channels=1, labels=True),
        levels=tuple(levels),
        conditioning=ConditioningConfig(
            labels=labels, drop="each", text=TextConfig(weights="random", length=3, width=4)
        ),
        diffusion=DiffusionConfig(prediction=prediction),
        sampling=SamplingConfig(**({"num_evaluations": 4, "batch_size": 4} | knobs)),
    )


def networks(config, num_classes=0):
    return {
        level.level: build_denoiser(
            config, level.level, num_classes, generator=torch.Generator().manual_seed(level.level)
        ).eval()
        for level in config.levels
    }


class Seen:
    """A denoiser that predicts zero and remembers what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, z_t, t, z_above, labels=None, drop=None):
        self.calls.append({"z_t": z_t, "t": t[0].item(), "z_above": z_above, "labels": labels, "drop": drop})
        return torch.zeros_like(z_t)


def given(config, count, *levels):
    return {m: torch.randn(count, *config.latent_shape(m), generator=torch.Generator().manual_seed(m)) for m in levels}
