"""The tiny autoencoder of FLUX.2's latent space: images in [0, 1] <-> 32 x H/8 x W/8, from two small files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nestdiff_core.autoencoders.base import NetworkAutoencoder
from nestdiff_core.config import AutoencoderConfig
from nestdiff_core.errors import ConfigError, IntegrityError

WIDTH, CODE = 64, 32
FILES = {"encoder": "taef2_encoder.safetensors", "decoder": "taef2_decoder.safetensors"}


class _Block(nn.Module):
    """relu(three convolutions + x); with `pool` it first adds a pointwise branch with group normalisation."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(WIDTH), nn.ReLU(), _conv(WIDTH), nn.ReLU(), _conv(WIDTH))
        self.pool = (
            nn.Sequential(
                nn.Conv2d(WIDTH, 256, 1, bias=False),
                nn.GroupNorm(4, 256),
                nn.ReLU(),
                nn.Conv2d(256, WIDTH, 1, bias=False),
            )
            if pool
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class _SoftLimit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _conv(inputs: int, outputs: int = WIDTH, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


def _blocks(*, pool: bool = False) -> list[nn.Module]:
    return [_Block(pool) for _ in range(3)]


def _encoder() -> nn.Sequential:
    down = [[_conv(WIDTH, stride=2, bias=False), *_blocks(pool=last)] for last in (False, False, True)]
    return nn.Sequential(_conv(3), _Block(), *(layer for stage in down for layer in stage), _conv(WIDTH, CODE))


def _decoder() -> nn.Sequential:
    up = [
        [*_blocks(pool=first), nn.Upsample(scale_factor=2), _conv(WIDTH, bias=False)] for first in (True, False, False)
    ]
    return nn.Sequential(
        _SoftLimit(), _conv(CODE), nn.ReLU(), *(layer for stage in up for layer in stage), _Block(), _conv(WIDTH, 3)
    )


class Taef2(NetworkAutoencoder):
    """See the module's docstring; the code has a deviation of about 0.9."""

    def code(self, x: Float[Tensor, "B 3 H W"], rows: np.ndarray | None) -> Float[Tensor, "B 32 h w"]:
        return self.network.get_submodule("encoder")((x + 1.0) / 2.0)

    def image(self, code: Float[Tensor, "B 32 h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.network.get_submodule("decoder")(code).clamp(0.0, 1.0) * 2.0 - 1.0


def load_taef2(config: AutoencoderConfig, device: torch.device | str = "cpu") -> Taef2:
    """From the folder `config.weights`. Raises ConfigError for a missing file, IntegrityError for another content."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.ModuleDict({"encoder": _encoder(), "decoder": _decoder()})
    if config.weights != "random":
        for part, name in FILES.items():
            path = Path(config.weights).expanduser() / name
            if not path.is_file():
                raise ConfigError(
                    "autoencoder.weights is not a folder with taef2's files",
                    key="autoencoder.weights",
                    path=path,
                    expected=sorted(FILES.values()),
                    fix="Correct the path.",
                )
            try:
                network[part].load_state_dict({k: v.float() for k, v in load_file(path).items()})
            except (SafetensorError, RuntimeError) as error:
                raise IntegrityError(
                    f"{name} does not hold taef2's weights ({str(error)[:300]})",
                    stage="latents",
                    path=path,
                    fix="Get the file again.",
                ) from error
    return Taef2(network, config.scale, config.channels, device)
