"""The training loss of one level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from nestdiff_core.diffusion.process import Prediction, add_noise, target
from nestdiff_core.diffusion.schedule import NoiseSchedule


def level_loss(
    model: Callable[..., Tensor],
    schedule: NoiseSchedule,
    prediction: Prediction,
    z_l: Float[Tensor, "B C H W"],
    z_above: Mapping[int, Float[Tensor, "B _ _ _"]],
    condition_noise: Mapping[int, float],
    t: Float[Tensor, " B"],
    eps: Float[Tensor, "B C H W"],
    eta: Mapping[int, Float[Tensor, "B _ _ _"]],
    labels: Int[Tensor, " B"] | Float[Tensor, "B _ _"] | None = None,
    drop: Bool[Tensor, " B"] | Mapping[Any, Bool[Tensor, " B"]] | None = None,
) -> Float[Tensor, " B"]:
    """Mean squared error of each sample (arXiv 2412.05984; the losses of eps, v and x have different scales):

        z_l^(t) = alpha_t z_l + sigma_t eps
        z_m^    = z_m + sigma_m eta_m,  m > l
        loss    = mean || D_l(z_l^(t), t; {z_m^}) - target ||^2

    model: called as NestedDenoiser is. z_l, z_above: clean latents. condition_noise: sigma_m by level. t, eps, eta,
    drop are all the randomness there is.
    """
    z_l_t = add_noise(z_l, eps, t, schedule)
    z_above_noised = {m: z_m + condition_noise[m] * eta[m] for m, z_m in z_above.items()}
    output = model(z_l_t, t, z_above_noised, labels, drop)
    return (output.float() - target(z_l, eps, t, schedule, prediction)).square().flatten(1).mean(1)
