"""The diffusion of a hierarchy: schedules, training loss, samplers, guidance, cascade."""

from nestdiff_core.diffusion.cascade import sample_cascade
from nestdiff_core.diffusion.guidance import guided
from nestdiff_core.diffusion.loss import level_loss
from nestdiff_core.diffusion.process import add_noise, to_eps_hat, to_z_hat
from nestdiff_core.diffusion.samplers import (
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_dpm_solver_pp,
    terminal_step,
    time_grid,
)
from nestdiff_core.diffusion.schedule import DiscreteSchedule, NoiseSchedule, VPSchedule, make_schedule

__all__ = [
    "DiscreteSchedule",
    "NoiseSchedule",
    "VPSchedule",
    "add_noise",
    "guided",
    "level_loss",
    "make_schedule",
    "sample_cascade",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpm_solver",
    "sample_dpm_solver_pp",
    "terminal_step",
    "time_grid",
    "to_eps_hat",
    "to_z_hat",
]
