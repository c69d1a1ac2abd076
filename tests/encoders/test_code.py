"""The experiment's own autoencoder as an encoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nestdiff_core.autoencoders import make_autoencoder
from nestdiff_core.config import AutoencoderConfig, EncoderConfig
from nestdiff_core.encoders.base import feature_shapes
from nestdiff_core.encoders.code import code_encoder
from nestdiff_core.encoders.extract import encode_crops
from nestdiff_core.errors import ConfigError

FOLD_2 = EncoderConfig(kind="autoencoder", fold=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small KL-f8 autoencoder as diffusers saves it."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    path = tmp_path_factory.mktemp("kl")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    ).save_pretrained(path)
    return path


def images(n: int, side: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, channels), np.uint8)


def folded(z_1: Tensor, f: int) -> Tensor:
    """Channel c f f + i f + j of block (y, x) is z_1[c, f y + i, f x + j]."""
    b, c, h, w = z_1.shape
    return z_1.view(b, c, h // f, f, w // f, f).permute(0, 1, 3, 5, 2, 4).reshape(b, c * f * f, h // f, w // f)


@pytest.mark.parametrize("kind", ["identity", "kl", "taef2"])
def test_map_is_the_folded_code(kind: Any, folder: Path) -> None:
    """The map holds z_1's values, scaled as z_1 is, and of a distribution its mean; the vector is the map's mean."""
    weights = {"identity": "", "kl": str(folder), "taef2": "random"}[kind]
    config = AutoencoderConfig(kind=kind, weights=weights, scale=0.5, posterior="sample")
    encoder = code_encoder(FOLD_2, config, channels=3, resolution=32)
    x = images(3, 32)
    z_1 = make_autoencoder(dataclasses.replace(config, posterior="mean")).encode(x)
    feature_map, vector = encoder.encode(x)
    torch.testing.assert_close(feature_map, folded(z_1, 2))
    torch.testing.assert_close(vector, feature_map.mean((2, 3)))
    assert feature_shapes(encoder) == {"map": feature_map.shape[1:], "vector": vector.shape[1:]}
    assert not any("decoder" in key for key, _ in encoder.named_parameters())
    assert encoder.device.type == "cpu" and encoder.resize == "none"


def test_crops_are_brought_to_the_resolution(folder: Path) -> None:
    """A crop is enlarged to the experiment's resolution before it is encoded, so that its code can be folded."""
    encoder = code_encoder(FOLD_2, AutoencoderConfig(), channels=1, resolution=16)
    flat = np.full((1, 16, 16, 1), 10, np.uint8)
    flat[0, :8, 8:] = 200
    vectors = encode_crops(encoder, flat, 2)
    assert vectors.shape == (1, 4, 2, 2)
    expected = torch.tensor([[10, 200], [10, 10]]) / 127.5 - 1
    torch.testing.assert_close(vectors[0], expected.expand(4, 2, 2))


def test_a_code_that_cannot_be_folded_is_refused() -> None:
    """The side of the code is named."""
    with pytest.raises(ConfigError, match="divisor of 4, the side of the code") as caught:
        code_encoder(
            EncoderConfig(kind="autoencoder", fold=3),
            AutoencoderConfig(kind="taef2", weights="random"),
            channels=3,
            resolution=32,
        )
    assert caught.value.key == "encoder.fold"
