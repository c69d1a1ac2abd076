"""The forward process, and every conversion between what a network predicts and what is wanted.

    z^(t) = alpha_t z + sigma_t eps
    eps   : the noise
    x     : the clean latent z
    v     = alpha_t eps - sigma_t z       (Salimans and Ho, arXiv 2202.00512)

For a fixed z^(t) each is an affine function of each other one, so guiding one of them guides all alike.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from nestdiff_core.diffusion.schedule import NoiseSchedule

Prediction = Literal["eps", "v", "x"]


def coefficients(
    schedule: NoiseSchedule, t: Float[Tensor, " B"], like: Float[Tensor, " B *rest"]
) -> tuple[Tensor, Tensor]:
    """(alpha_t, sigma_t) in the precision of `like`, shaped to multiply it."""
    shape = (-1,) + (1,) * (like.ndim - 1)
    return schedule.alpha(t).to(like.dtype).view(shape), schedule.sigma(t).to(like.dtype).view(shape)


def add_noise(
    z: Float[Tensor, " B *rest"], eps: Float[Tensor, " B *rest"], t: Float[Tensor, " B"], schedule: NoiseSchedule
) -> Float[Tensor, " B *rest"]:
    """z^(t)."""
    alpha_t, sigma_t = coefficients(schedule, t, z)
    return alpha_t * z + sigma_t * eps


def target(
    z: Float[Tensor, " B *rest"],
    eps: Float[Tensor, " B *rest"],
    t: Float[Tensor, " B"],
    schedule: NoiseSchedule,
    prediction: Prediction,
) -> Float[Tensor, " B *rest"]:
    """What the network is trained to output."""
    match prediction:
        case "eps":
            return eps
        case "x":
            return z
        case "v":
            alpha_t, sigma_t = coefficients(schedule, t, z)
            return alpha_t * eps - sigma_t * z


def to_z_hat(
    output: Float[Tensor, " B *rest"],
    z_t: Float[Tensor, " B *rest"],
    t: Float[Tensor, " B"],
    schedule: NoiseSchedule,
    prediction: Prediction,
) -> Float[Tensor, " B *rest"]:
    """The clean latent that the network's output stands for."""
    alpha_t, sigma_t = coefficients(schedule, t, z_t)
    match prediction:
        case "eps":
            return (z_t - sigma_t * output) / alpha_t
        case "x":
            return output
        case "v":
            return alpha_t * z_t - sigma_t * output


def to_eps_hat(
    output: Float[Tensor, " B *rest"],
    z_t: Float[Tensor, " B *rest"],
    t: Float[Tensor, " B"],
    schedule: NoiseSchedule,
    prediction: Prediction,
) -> Float[Tensor, " B *rest"]:
    """The noise that the network's output stands for; t > 0."""
    alpha_t, sigma_t = coefficients(schedule, t, z_t)
    match prediction:
        case "eps":
            return output
        case "x":
            return (z_t - alpha_t * output) / sigma_t
        case "v":
            return sigma_t * z_t + alpha_t * output
