"""The basis V_l of a level: leading principal components of its pooled tokens, and their standardisation.

    score = diag(lambda)^(-1/2) V (token - mean)        zero mean, unit variance per channel on the training split

Fitted from moments alone. The sign of each component is fixed, so a refit from the same moments has the same bits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits
from torch import Tensor

from nestdiff_core.errors import ConfigError, IntegrityError, NumericsError
from nestdiff_core.latents.capacity import spectrum_nats
from nestdiff_core.latents.moments import Moments

EIGENVALUE_FLOOR = 1e-7
"""Directions with less than this share of the largest variance count as noise: rounding features to float16 alone
leaves about 1e-8, and whitening would blow that up to unit variance."""

_CONSTANT = (
    1e-13  # variance of a channel over its squared mean: what float32 rounding in the pooling leaves of a constant
)
_SIGN_TIE = 1e-6  # entries this close in magnitude count as equally large
_METADATA = "nestdiff_basis"


@dataclass(frozen=True)
class Basis:
    """k orthonormal components of a C-channel feature space, in descending order of variance.

    eigenvalues: variances along all C principal directions (population, over n), those of the kept k first.
    rank: how many of them lie above the floor. dead_channels: feature channels that never change.
    count: tokens it was fitted on.
    """

    components: Float[Tensor, "k C"]
    mean: Float[Tensor, " C"]
    eigenvalues: Float[np.ndarray, " C"]
    rank: int
    dead_channels: tuple[int, ...]
    count: int

    @property
    def channels(self) -> int:
        """k, the channels of the latent."""
        return self.components.shape[0]

    @property
    def width(self) -> int:
        """C, the channels of the feature map."""
        return self.components.shape[1]

    @property
    def std(self) -> Float[Tensor, " k"]:
        """Standard deviation of each raw score on the training split: the square root of its eigenvalue."""
        return torch.from_numpy(np.sqrt(self.eigenvalues[: self.channels])).to(self.mean)

    @property
    def variance_share(self) -> float:
        """Share of the tokens' total variance that the kept components carry, in [0, 1]."""
        return float(self.eigenvalues[: self.channels].sum() / self.eigenvalues.sum())

    def project(self, tokens: Float[Tensor, "*shape C"]) -> Float[Tensor, "*shape k"]:
        """Standardised scores of feature tokens."""
        return (tokens - self.mean) @ (self.components / self.std[:, None]).T

    def reconstruct(self, scores: Float[Tensor, "*shape k"]) -> Float[Tensor, "*shape C"]:
        """The tokens closest to what `project` was given, in the span of the components."""
        return (scores * self.std) @ self.components + self.mean

    def summary(self) -> dict[str, Any]:
        """Plain figures: sizes, rank, and how much variance and how many nats the kept components carry.

        nats: 1/2 sum log(1 + lambda_i / sigma^2) per token, with sigma^2 the mean variance of a feature channel, over
        the kept and over all components.
        """
        noise = float(np.sqrt(self.eigenvalues.mean()))
        return {
            "channels": self.channels,
            "width": self.width,
            "tokens": self.count,
            "rank": self.rank,
            "eigenvalue_floor": EIGENVALUE_FLOOR,
            "dead_channels": list(self.dead_channels),
            "variance_share": self.variance_share,
            "nats_kept": spectrum_nats(self.eigenvalues[: self.channels], noise),
            "nats_total": spectrum_nats(self.eigenvalues, noise),
        }

    def save(self, path: Path) -> None:
        """One safetensors file: components and mean (float32), eigenvalues (float64), `summary()` as JSON metadata."""
        tensors = {"components": self.components, "mean": self.mean, "eigenvalues": torch.from_numpy(self.eigenvalues)}
        save_file(tensors, path, metadata={_METADATA: json.dumps(self.summary())})

    @classmethod
    def load(cls, path: Path) -> Basis:
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()[_METADATA])
                components, mean, eigenvalues = (
                    file.get_tensor(name) for name in ("components", "mean", "eigenvalues")
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(
                f"{path.name} holds no basis ({error})", path=path, fix="Materialise its stage again."
            ) from None
        return cls(components, mean, eigenvalues.numpy(), about["rank"], tuple(about["dead_channels"]), about["tokens"])


def fit_basis(moments: Moments, channels: int, level: int) -> Basis:
    """Centred PCA with `channels` components, from the moments of the training tokens of `level` (named in errors).

    Raises ConfigError when the features have fewer channels than asked for, NumericsError when the tokens vary in
    fewer directions (constant channels, or too few tokens).
    """
    width = len(moments.mean)
    if not 1 <= channels <= width:
        raise ConfigError(
            f"Level {level} keeps {channels} components of features with {width} channels",
            stage="svd_basis",
            level=level,
            key="levels.channels",
            expected=f"1 to {width}",
            found=channels,
            fix="Change it in the experiment.",
        )
    covariance = moments.scatter / max(moments.count, 1)
    if not np.isfinite(covariance).all():
        raise NumericsError(
            "The moments of the features are not finite",
            stage="svd_basis",
            level=level,
            fix="Materialise the features again.",
        )
    dead = np.diagonal(covariance) <= _CONSTANT * moments.mean**2
    covariance[dead] = 0.0
    covariance[:, dead] = 0.0
    with threadpool_limits(1):  # LAPACK's last bits depend on the number of threads
        values, vectors = np.linalg.eigh(covariance)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    rank = int((values > EIGENVALUE_FLOOR * values[0]).sum())
    if channels > rank:
        raise NumericsError(
            f"Level {level} keeps {channels} components, but its {moments.count} tokens vary in {rank} directions",
            stage="svd_basis",
            level=level,
            key="levels.channels",
            expected=f"at most {rank}",
            found=channels,
            fix=f"Set levels.{level}.channels to {rank} or less, or use more images or another encoder.",
        )
    components = _fix_signs(vectors[:, :channels].T)
    return Basis(
        components=torch.from_numpy(np.ascontiguousarray(components, np.float32)),
        mean=torch.from_numpy(moments.mean.astype(np.float32)),
        eigenvalues=values.copy(),
        rank=rank,
        dead_channels=tuple(np.flatnonzero(dead).tolist()),
        count=moments.count,
    )


def _fix_signs(components: Float[np.ndarray, "k C"]) -> Float[np.ndarray, "k C"]:
    """Each row with its largest entry positive; of (nearly) equal ones the first decides."""
    magnitudes = np.abs(components)
    first = (magnitudes >= (1 - _SIGN_TIE) * magnitudes.max(axis=1, keepdims=True)).argmax(axis=1)
    return components * np.sign(np.take_along_axis(components, first[:, None], axis=1))
