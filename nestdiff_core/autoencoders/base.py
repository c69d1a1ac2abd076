"""What every autoencoder is, the identity, and what those with a network share: batches, colour, scale."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

BATCH_PIXELS = 2**20  # pixels in one pass of a network: 16 images of 256 x 256, for which KL-f8 takes 5 GiB


@runtime_checkable
class Autoencoder(Protocol):
    """encode: images uint8 (B, H, W, C) -> z_1 (B, C', H', W'). decode: z_1 -> images in [-1, 1] (B, C, H, W).

    rows: a number for each image that decides its random numbers, where the code is a sample. Both give float32 on
    the CPU, one image's numbers do not depend on the others', and the network is there to be saved. shape: what
    make_autoencoder needs to know, beside the configuration, to make a network of the same shape.
    """

    network: nn.Module
    shape: dict[str, Any]

    def encode(
        self, images: UInt8[np.ndarray, "B H W C"], *, rows: Sequence[int] | np.ndarray | None = None
    ) -> Float[Tensor, "B _ _ _"]: ...

    def decode(self, z_1: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B C H W"]: ...


def symmetric(images: UInt8[np.ndarray, "B H W C"]) -> Float[Tensor, "B C H W"]:
    """0..255 as -1..1, channels first."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class IdentityAutoencoder:
    """z_1 is the image, scaled from 0..255 to [-1, 1]."""

    def __init__(self) -> None:
        self.network: nn.Module = nn.Identity()
        self.shape: dict[str, Any] = {}

    def encode(
        self, images: UInt8[np.ndarray, "B H W C"], *, rows: Sequence[int] | np.ndarray | None = None
    ) -> Float[Tensor, "B C H W"]:
        return symmetric(images)

    def decode(self, z_1: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return z_1.float().cpu().clamp(-1.0, 1.0)


class NetworkAutoencoder(ABC):
    """An autoencoder with a network for RGB images: z_1 = scale * code.

    Grey-scale images are repeated to RGB on the way in; with `channels` 1 RGB is averaged on the way out.
    """

    def __init__(self, network: nn.Module, scale: float, channels: int, device: torch.device | str) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.scale, self.channels, self.device = scale, channels, torch.device(device)
        self.shape: dict[str, Any] = {}

    @abstractmethod
    def code(self, x: Float[Tensor, "B 3 H W"], rows: np.ndarray | None) -> Float[Tensor, "B _ _ _"]:
        """The code of images in [-1, 1]."""

    @abstractmethod
    def image(self, code: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B 3 H W"]:
        """The image in about [-1, 1] of a code."""

    @torch.no_grad()
    def encode(
        self, images: UInt8[np.ndarray, "B H W C"], *, rows: Sequence[int] | np.ndarray | None = None
    ) -> Float[Tensor, "B _ _ _"]:
        step = max(1, BATCH_PIXELS // (images.shape[1] * images.shape[2]))
        codes = []
        for start in range(0, len(images), step):
            x = symmetric(images[start : start + step]).to(self.device).expand(-1, 3, -1, -1)
            mine = None if rows is None else np.asarray(rows[start : start + step])
            codes.append((self.scale * self.code(x, mine)).float().cpu())
        return torch.cat(codes)

    @torch.no_grad()
    def decode(self, z_1: Float[Tensor, "B _ _ _"]) -> Float[Tensor, "B C H W"]:
        step = max(1, BATCH_PIXELS // (64 * z_1.shape[2] * z_1.shape[3]))
        images = [self.image(z.to(self.device, torch.float32) / self.scale) for z in z_1.split(step)]
        x = torch.cat([image.float().cpu() for image in images]).clamp(-1.0, 1.0)
        return x.mean(1, keepdim=True) if self.channels == 1 else x
