"""What every encoder is: images in, a feature map and a vector out.

Owns how images enter a network (resize, grey or RGB, normalisation). Which network it is, the other modules say.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from nestdiff_core.config import EncoderConfig
from nestdiff_core.errors import ConfigError


class Encoder(nn.Module):
    """A frozen visual encoder.

        images (B, H, W, C) of 0..255  ->  map (B, map_channels, map_side, map_side), vector (B, vector_channels)

    Images become values in [0, 1], are resized to `input_size` (bicubic, antialiased, clamped), repeated to three
    channels where the network wants RGB, and normalised by `mean` and `std`. A subclass gives `forward`, and
    keeps as its submodule `network` what is saved.
    """

    resize = "bicubic, antialiased"  # as it stands in the artifact's record of the preprocessing

    def __init__(
        self,
        *,
        map_channels: int,
        map_side: int,
        vector_channels: int,
        input_size: int,
        in_channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.map_channels, self.map_side, self.vector_channels = map_channels, map_side, vector_channels
        self.input_size, self.in_channels = input_size, in_channels
        self.mean, self.std = mean, std
        for name, values in (("_mean", mean), ("_std", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @abstractmethod
    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B D S S"], Float[Tensor, "B V"]]:
        """Map and vector of normalised images at the encoder's input size."""

    @property
    def device(self) -> torch.device:
        return self.get_buffer("_mean").device

    @torch.no_grad()
    def encode(
        self, images: UInt8[np.ndarray, "B H W C"] | UInt8[Tensor, "B H W C"]
    ) -> tuple[Float[Tensor, "B D S S"], Float[Tensor, "B V"]]:
        """Map and vector of uint8 images of any side, on the encoder's device."""
        self.eval()
        return self(self.prepare(images))

    def prepare(self, images: UInt8[np.ndarray, "B H W C"] | UInt8[Tensor, "B H W C"]) -> Float[Tensor, "B _ S S"]:
        """uint8 images of any side as `forward` wants them, on the encoder's device."""
        return self.normalise(unit_range(torch.as_tensor(images).to(self.device), self.input_size))

    def normalise(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B _ H W"]:
        """Values in [0, 1] as the network wants them."""
        if x.shape[1] == 1:
            x = x.expand(-1, self.in_channels, -1, -1)
        return (x - self.get_buffer("_mean")) / self.get_buffer("_std")


def unit_range(images: UInt8[Tensor, "B H W C"], side: int) -> Float[Tensor, "B C S S"]:
    """uint8 images as floats in [0, 1] with channels first, resized to `side` (bicubic, antialiased)."""
    x = images.permute(0, 3, 1, 2).to(torch.float32) / 255
    if x.shape[-1] != side:
        x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return x


def normalisation(
    config: EncoderConfig, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel: the experiment's where it gives them (a lone number for every channel), else
    those of the model."""

    def chosen(name: str, given: tuple[float, ...], published: tuple[float, ...]) -> tuple[float, ...]:
        if len(given) not in (0, 1, len(published)):
            raise ConfigError(
                f"encoder.{name} does not fit the encoder's images",
                key=f"encoder.{name}",
                expected=f"{len(published)} numbers, or one for all channels",
                found=given,
                fix="Give one number for each channel of the images.",
            )
        return given * len(published) if len(given) == 1 else given or published

    return chosen("mean", config.mean, mean), chosen("std", config.std, std)


def feature_shapes(encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """Shape of one image's features: {"map": (C, S, S), "vector": (D,)}."""
    return {"map": (encoder.map_channels, encoder.map_side, encoder.map_side), "vector": (encoder.vector_channels,)}
