"""Stable Diffusion's KL-f8 autoencoder through diffusers: images in [-1, 1] <-> 4 x H/8 x W/8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nestdiff_core.autoencoders.base import NetworkAutoencoder
from nestdiff_core.config import AutoencoderConfig
from nestdiff_core.errors import ConfigError, EnvironmentFault, IntegrityError

CODE, SHRINK = 4, 8
HUB = "hub:"

# In float32 whatever the file's precision, and without the package accelerate.
EXACT: dict[str, Any] = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}

# Stable Diffusion's, for `random`.
SHAPE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": CODE,
}


class KLAutoencoder(NetworkAutoencoder):
    """The code is the mean of the encoder's Gaussian, or with `sample` one draw of it for each row."""

    def __init__(self, network: Any, config: AutoencoderConfig, device: torch.device | str) -> None:
        super().__init__(network, config.scale, config.channels, device)
        self.kl = network
        self.sample = config.posterior == "sample"
        self.shape = json.loads(network.to_json_string())

    def code(self, x: Float[Tensor, "B 3 H W"], rows: np.ndarray | None) -> Float[Tensor, "B 4 h w"]:
        posterior = self.kl.encode(x).latent_dist
        if not self.sample:
            return posterior.mean
        if rows is None:
            raise ConfigError(
                "A sampled code needs to know which rows it is for",
                key="rows",
                expected="a number for each image",
                found=None,
                fix="Give encode(images, rows=...), or set autoencoder.posterior: mean.",
            )
        shape = posterior.mean.shape[1:]
        noise = np.stack([np.random.default_rng(int(row)).standard_normal(shape, np.float32) for row in rows])
        return posterior.mean + posterior.std * torch.from_numpy(noise).to(posterior.mean.device)

    def image(self, code: Float[Tensor, "B 4 h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.kl.decode(code).sample


def load_kl(
    config: AutoencoderConfig, device: torch.device | str = "cpu", *, shape: dict[str, Any] | None = None
) -> KLAutoencoder:
    """From a folder as diffusers saves it, from `hub:NAME` (`hub:NAME/FOLDER` inside of it), or `random`.

    shape: of a random one, as `KLAutoencoder.shape` gave it; else Stable Diffusion's. Raises EnvironmentFault without
    diffusers or when the download fails, ConfigError for a path that is no such folder or an autoencoder of another
    shape, IntegrityError for a damaged folder.
    """
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise EnvironmentFault(
            "autoencoder.kind kl needs the package diffusers",
            key="autoencoder.kind",
            fix="Install it: pip install 'nestdiff[vae]'.",
        ) from error
    weights = config.weights
    network: Any
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = AutoencoderKL.from_config(shape or SHAPE)
    elif weights.startswith(HUB):
        parts = weights.removeprefix(HUB).split("/")
        name, folder = "/".join(parts[:2]), "/".join(parts[2:])
        try:
            network = AutoencoderKL.from_pretrained(name, subfolder=folder or None, **EXACT)
        except Exception as error:  # the hub's client has errors of its own, not derived from OSError
            raise EnvironmentFault(
                f"diffusers could not fetch {weights.removeprefix(HUB)} ({' '.join(str(error).split())[:300]})",
                stage="latents",
                key="autoencoder.weights",
                fix="Fetch it where there is a network, and give the folder as autoencoder.weights.",
            ) from error
    else:
        network = _from_folder(AutoencoderKL, Path(weights).expanduser())
    shrink = 2 ** (len(network.config.block_out_channels) - 1)
    if (network.config.latent_channels, shrink) != (CODE, SHRINK):
        raise ConfigError(
            "The autoencoder has another shape than Stable Diffusion's KL-f8",
            key="autoencoder.weights",
            expected=f"{CODE} channels, an {SHRINK}th of the side",
            found=f"{network.config.latent_channels} channels, 1/{shrink} of the side",
            fix="Use a KL-f8 autoencoder.",
        )
    return KLAutoencoder(network, config, device)


def _from_folder(cls: Any, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            "autoencoder.weights is not a folder that diffusers saved",
            key="autoencoder.weights",
            path=folder,
            expected="a folder with config.json and diffusion_pytorch_model.safetensors, or hub:NAME",
            fix="Correct the path.",
        )
    try:
        return cls.from_pretrained(folder, local_files_only=True, **EXACT)
    except Exception as error:  # what diffusers raises for a damaged folder has no common class
        raise IntegrityError(
            f"diffusers cannot read this autoencoder ({' '.join(str(error).split())[:300]})",
            stage="latents",
            key="autoencoder.weights",
            path=folder,
            fix="Get the folder again.",
        ) from error
