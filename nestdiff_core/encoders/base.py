"""What every encoder is: images in, a feature map and a vector out.

Owns how images enter a network (resize, grey or RGB, normalisation). Which network it is, vit.py says.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn


class Encoder(nn.Module):
    """A frozen visual encoder.

        images (B, H, W, C) of 0..255  ->  map (B, map_channels, map_side, map_side), vector (B, vector_channels)

    Images become values in [0, 1], are resized to `input_size` (bicubic, antialiased, clamped), repeated to three
    channels where the network wants RGB, and normalised by `mean` and `std`. A subclass gives `forward`.
    """

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

    @abstractmethod
    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B D S S"], Float[Tensor, "B V"]]:
        """Map and vector of normalised images at the encoder's input size."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def encode(
        self, images: UInt8[np.ndarray, "B H W C"] | UInt8[Tensor, "B H W C"]
    ) -> tuple[Float[Tensor, "B D S S"], Float[Tensor, "B V"]]:
        """Map and vector of uint8 images of any side, on the encoder's device."""
        self.eval()
        x = unit_range(torch.as_tensor(images).to(self.device), self.input_size)
        return self(self.normalise(x))

    def normalise(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B _ H W"]:
        """Values in [0, 1] as the network wants them."""
        if x.shape[1] == 1:
            x = x.expand(-1, self.in_channels, -1, -1)
        mean, std = (
            torch.tensor(values, device=x.device, dtype=x.dtype)[:, None, None] for values in (self.mean, self.std)
        )
        return (x - mean) / std


def unit_range(images: UInt8[Tensor, "B H W C"], side: int) -> Float[Tensor, "B C S S"]:
    """uint8 images as floats in [0, 1] with channels first, resized to `side` (bicubic, antialiased)."""
    x = images.permute(0, 3, 1, 2).to(torch.float32) / 255
    if x.shape[-1] != side:
        x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return x


def feature_shapes(encoder: Encoder) -> dict[str, tuple[int, ...]]:
    """Shape of one image's features: {"map": (C, S, S), "vector": (D,)}."""
    return {"map": (encoder.map_channels, encoder.map_side, encoder.map_side), "vector": (encoder.vector_channels,)}
