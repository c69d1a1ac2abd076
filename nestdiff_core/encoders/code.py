"""The code of the experiment's own autoencoder as features: the paper's control for a semantic encoder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from nestdiff_core.autoencoders import make_autoencoder
from nestdiff_core.config import AutoencoderConfig
from nestdiff_core.encoders.base import Encoder
from nestdiff_core.errors import ConfigError


class CodeEncoder(Encoder):
    """The map is z_1 with fold x fold blocks of positions as channels, the vector its average over positions.

    Images enter at their own resolution.
    """

    resize = "none"

    def __init__(
        self,
        config: AutoencoderConfig,
        *,
        fold: int,
        channels: int,
        resolution: int,
        device: torch.device | str = "cpu",
    ) -> None:
        code_channels, side, _ = config.latent_shape(channels, resolution)
        if side % fold:
            raise ConfigError(
                "The code cannot be folded evenly",
                key="encoder.fold",
                expected=f"a divisor of {side}, the side of the code",
                found=fold,
                fix="Change encoder.fold.",
            )
        super().__init__(
            map_channels=code_channels * fold**2,
            map_side=side // fold,
            vector_channels=code_channels * fold**2,
            input_size=resolution,
            in_channels=channels,
            mean=(),
            std=(),
        )
        self.fold, self._autoencoder = fold, make_autoencoder(replace(config, posterior="mean"), device=device)
        self.network = self._autoencoder.network

    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B D S S"], Float[Tensor, "B D"]]:
        feature_map = F.pixel_unshuffle(x, self.fold)
        return feature_map, feature_map.mean((2, 3))

    @torch.no_grad()
    def encode(
        self, images: UInt8[np.ndarray, "B H W C"] | UInt8[Tensor, "B H W C"]
    ) -> tuple[Float[Tensor, "B D S S"], Float[Tensor, "B D"]]:
        return self(self._autoencoder.encode(np.asarray(images)))
