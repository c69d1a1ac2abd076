"""The code of the experiment's own autoencoder as features: the paper's control for a semantic encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from nestdiff_core.autoencoders import Autoencoder, make_autoencoder
from nestdiff_core.config import AutoencoderConfig, EncoderConfig
from nestdiff_core.encoders.base import Encoder, unit_range
from nestdiff_core.errors import ConfigError

_DECODING = ("decoder", "post_quant_conv")  # parts of autoencoders that features do not need


class CodeEncoder(Encoder):
    """The map is z_1 with its fold x fold blocks of positions as channels, the vector the map's average.

    For a code (C, H, W): map (C fold^2, H / fold, W / fold). Images enter at the experiment's resolution; where the
    code is a distribution, z_1 is its mean.
    """

    resize = "none"

    def __init__(
        self, autoencoder: Autoencoder, code: int, side: int, fold: int, *, channels: int, resolution: int
    ) -> None:
        """code, side: channels and side of the code. channels, resolution: of the images."""
        super().__init__(
            map_channels=code * fold**2,
            map_side=side // fold,
            vector_channels=code * fold**2,
            input_size=resolution,
            in_channels=channels,
            mean=(0.5,) * channels,  # [-1, 1], as every autoencoder here scales its images by itself
            std=(0.5,) * channels,
        )
        self.autoencoder, self.network, self.fold = autoencoder, autoencoder.network, fold

    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B D S S"], Float[Tensor, "B D"]]:
        """Map and vector of z_1."""
        feature_map = F.pixel_unshuffle(x, self.fold)
        return feature_map, feature_map.mean((2, 3))

    @torch.no_grad()
    def encode(
        self, images: UInt8[np.ndarray, "B H W C"] | UInt8[Tensor, "B H W C"]
    ) -> tuple[Float[Tensor, "B D S S"], Float[Tensor, "B D"]]:
        """Map and vector of uint8 images, on the encoder's device; those of another side (crops) are resized."""
        pixels = torch.as_tensor(images)
        if pixels.shape[1] != self.input_size:
            pixels = (unit_range(pixels, self.input_size) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return self(self.autoencoder.encode(pixels.cpu().numpy()).to(self.device))


def code_encoder(
    config: EncoderConfig,
    autoencoder: AutoencoderConfig,
    *,
    channels: int,
    resolution: int,
    shape: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> CodeEncoder:
    """The encoder of an experiment with such images and this autoencoder, whose decoder it leaves out.

    shape: of an autoencoder whose weights will be filled in; it is then made without reading a file.
    """
    code, side, _ = autoencoder.latent_shape(channels, resolution)
    if side % config.fold:
        raise ConfigError(
            "The autoencoder's code cannot be folded",
            key="encoder.fold",
            expected=f"a divisor of {side}, the side of the code",
            found=config.fold,
            fix="Change encoder.fold.",
        )
    wanted = replace(autoencoder, posterior="mean")
    if shape is not None:
        wanted = replace(wanted, weights="random")
    made = make_autoencoder(wanted, shape=shape, device=device)
    for part in _DECODING:
        if hasattr(made.network, part):
            delattr(made.network, part)
    return CodeEncoder(made, code, side, config.fold, channels=channels, resolution=resolution)
