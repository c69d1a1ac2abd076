"""Autoencoders: the way from an image to the space of z_1 and back."""

from __future__ import annotations

from typing import Any

import torch

from nestdiff_core.autoencoders.base import Autoencoder, IdentityAutoencoder
from nestdiff_core.config import AutoencoderConfig

__all__ = ["Autoencoder", "IdentityAutoencoder", "make_autoencoder"]


def make_autoencoder(
    config: AutoencoderConfig, *, device: torch.device | str = "cpu", shape: dict[str, Any] | None = None
) -> Autoencoder:
    """The frozen autoencoder of an experiment, on `device`.

    shape: for random weights, the `shape` of another autoencoder whose weights will be put in their place.
    """
    match config.kind:
        case "identity":
            return IdentityAutoencoder()
        case "kl":
            from nestdiff_core.autoencoders.kl import load_kl

            return load_kl(config, device, shape=shape)
        case "taef2":
            from nestdiff_core.autoencoders.taef2 import load_taef2

            return load_taef2(config, device)
