"""The best linear denoiser of a level: a network whose loss is not below its has learnt no more than a Gaussian.

Knowing mean and covariance of z_l, and of the noised levels above where it is told them, the linear estimate of least
mean squared error is that of a Gaussian with these moments, of which each principal component is shrunk alone:

    z_hat = m + sum_i k_i v_i v_i^T (z_l^(t) - alpha m),   k_i = alpha w_i / (alpha^2 w_i + sigma^2)

m and (v_i, w_i): mean, and eigenvectors and -values of the covariance, of z_l given what is told.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from nestdiff_core.diffusion.process import Prediction
from nestdiff_core.diffusion.schedule import NoiseSchedule
from nestdiff_core.latents.moments import Moments


@dataclass(frozen=True)
class LinearDenoiser:
    """mean, told_mean: of z_l and of what it is told, as rows. gain (K, D): what a told number adds to the mean.
    vectors (D, D), variances (D,): principal components of z_l given what is told."""

    mean: Float[np.ndarray, " D"]
    told_mean: Float[np.ndarray, " K"]
    gain: Float[np.ndarray, "K D"]
    vectors: Float[np.ndarray, "D D"]
    variances: Float[np.ndarray, " D"]

    @classmethod
    def fit(cls, moments: Moments, size: int, noise: Float[np.ndarray, " K"]) -> LinearDenoiser:
        """moments: of rows that are z_l, of `size` numbers, then the clean latents that it is told. noise: the
        deviation of the noise on each number of these; empty where it is told nothing."""
        covariance = moments.scatter / moments.count
        own, told = covariance[:size, :size], covariance[size:, size:] + np.diag(noise**2)
        gain = np.linalg.lstsq(told, covariance[size:, :size], rcond=None)[0]
        left = own - covariance[:size, size:] @ gain
        variances, vectors = np.linalg.eigh((left + left.T) / 2)
        return cls(moments.mean[:size], moments.mean[size:], gain, vectors, variances.clip(0))

    def losses(
        self,
        z_l: Float[np.ndarray, "N D"],
        told: Float[np.ndarray, "N K"],
        times: Float[np.ndarray, " T"],
        schedule: NoiseSchedule,
        prediction: Prediction,
    ) -> Float[np.ndarray, " T"]:
        """Mean loss at each time, as training measures it: exact over the noise, a mean over the N rows.

        told: noised. The errors of z, eps and v are in the ratio 1 : alpha / sigma : 1 / sigma.
        """
        off = (z_l - self.mean - (told - self.told_mean) @ self.gain) @ self.vectors
        power = (off**2).mean(0)
        t = torch.from_numpy(times)
        alpha, sigma = schedule.alpha(t).numpy()[:, None], schedule.sigma(t).numpy()[:, None]
        k = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        error = ((1.0 - alpha * k) ** 2 * power + (k * sigma) ** 2).mean(1)
        scale = {"x": 1.0, "eps": alpha[:, 0] / sigma[:, 0], "v": 1.0 / sigma[:, 0]}[prediction]
        return error * scale**2
