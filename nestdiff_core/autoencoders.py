"""Autoencoders: the way from an image to the space of z_1 and back."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nestdiff_core.config import AutoencoderConfig


@runtime_checkable
class Autoencoder(Protocol):
    """encode: images uint8 (B, H, W, C) -> z_1 (B, C', H', W'). decode: z_1 -> images in [-1, 1] (B, C, H, W)."""

    def encode(self, images: UInt8[np.ndarray, "B H W C"]) -> Float[Tensor, "B _ _ _"]: ...

    def decode(self, z_1: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B C H W"]: ...


class IdentityAutoencoder:
    """z_1 is the image, scaled from 0..255 to [-1, 1]."""

    def encode(self, images: UInt8[np.ndarray, "B H W C"]) -> Float[Tensor, "B _ _ _"]:
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0

    def decode(self, z_1: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B C H W"]:
        return z_1.clamp(-1.0, 1.0)


def make_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    match config.kind:
        case "identity":
            return IdentityAutoencoder()
