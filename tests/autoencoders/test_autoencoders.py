"""Autoencoders: the way to z_1 and back, against the libraries they come from and on real photographs."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nestdiff_core.autoencoders import Autoencoder, make_autoencoder
from nestdiff_core.config import AutoencoderConfig
from nestdiff_core.errors import ConfigError, EnvironmentFault, IntegrityError

SHARED = Path(os.environ.get("NESTDIFF_SHARED", "../shared"))
TAEF2 = SHARED / "weights"
needs_weights = pytest.mark.skipif(
    not (TAEF2 / "taef2_encoder.safetensors").is_file(), reason=f"no taef2 weights in {TAEF2} (NESTDIFF_SHARED)"
)
SMALL = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def pictures(n: int = 3, side: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small KL-f8 autoencoder as diffusers saves it."""
    from diffusers import AutoencoderKL

    path = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(**SMALL).save_pretrained(path)
    return path


def photographs(n: int = 8) -> np.ndarray:
    """Real 256-pixel photographs."""
    shard = SHARED / "data" / "coco_captions" / "coco256-open-00000.tar"
    if not shard.is_file():
        pytest.skip(f"no photographs in {shard} (NESTDIFF_SHARED)")
    with tarfile.open(shard) as tar:
        files = [tar.extractfile(m) for m in tar if m.name.endswith(".jpg")][:n]
        return np.stack([np.asarray(Image.open(io.BytesIO(f.read())).convert("RGB")) for f in files if f])


def test_identity_is_exact() -> None:
    """Every byte comes back, and the code is the image in [-1, 1]."""
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    identity = make_autoencoder(AutoencoderConfig())
    z = identity.encode(images)
    assert z.shape == (1, 1, 16, 16) and z.min() == -1 and z.max() == 1
    back = ((identity.decode(z) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(back, images)


@needs_weights
def test_taef2_reconstructs_photographs() -> None:
    """28.8 dB at 256 pixels is documented for these weights, on another set of photographs; 25 dB is a blur."""
    images = photographs()
    taef2 = make_autoencoder(AutoencoderConfig(kind="taef2", weights=str(TAEF2)))
    z = taef2.encode(images)
    assert z.shape == (8, 32, 32, 32) and 0.6 < z.std() < 1.2
    error = (taef2.decode(z) - torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 + 1).square().mean((1, 2, 3)) / 4
    psnr = (-10 * error.log10()).mean().item()
    assert psnr == pytest.approx(28.8, abs=1.5)


def test_kl_is_diffusers_own(folder: Path) -> None:
    """Code and image are those of AutoencoderKL, scaled."""
    from diffusers import AutoencoderKL

    kl = make_autoencoder(AutoencoderConfig(kind="kl", weights=str(folder), scale=0.25))
    own, images = AutoencoderKL.from_pretrained(folder), pictures()
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        mean = own.encode(x).latent_dist.mean
        image = own.decode(mean).sample.clamp(-1, 1)
    z = kl.encode(images)
    torch.testing.assert_close(z, 0.25 * mean)
    torch.testing.assert_close(kl.decode(z), image, atol=1e-5, rtol=1e-5)


def test_a_sampled_code_belongs_to_its_row(folder: Path) -> None:
    """The draw depends on the row alone, has the posterior's deviation, and needs a row."""
    config = AutoencoderConfig(kind="kl", weights=str(folder), posterior="sample")
    kl, mean = make_autoencoder(config), make_autoencoder(AutoencoderConfig(kind="kl", weights=str(folder)))
    images = np.repeat(pictures(1), 200, axis=0)
    z = kl.encode(images, rows=range(200))
    assert not torch.equal(z[0], z[1])
    torch.testing.assert_close(kl.encode(images[:2], rows=[7, 3]), z[[7, 3]], atol=1e-5, rtol=1e-5)
    from diffusers import AutoencoderKL

    x = torch.from_numpy(images[:1]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        std = AutoencoderKL.from_pretrained(folder).encode(x).latent_dist.std
    spread = ((z - mean.encode(images)) / std).std(0)
    torch.testing.assert_close(spread.mean(), torch.tensor(1.0), atol=0.02, rtol=0)
    with pytest.raises(ConfigError, match="which rows"):
        kl.encode(images)


@pytest.mark.parametrize("kind", ["kl", "taef2"])
def test_shapes_batches_and_grey(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are those the configuration promises, in batches as well, for grey-scale images too."""
    weights = str(folder) if kind == "kl" else "random"
    config = AutoencoderConfig(kind=kind, weights=weights, channels=1)  # pyright: ignore[reportArgumentType]
    autoencoder = make_autoencoder(config)
    assert isinstance(autoencoder, Autoencoder)
    grey = pictures(5, 64, 1)
    z = autoencoder.encode(grey)
    assert tuple(z.shape) == (5, *config.latent_shape(1, 64))
    assert autoencoder.decode(z).shape == (5, 1, 64, 64)
    torch.testing.assert_close(autoencoder.encode(np.repeat(grey, 3, axis=3)), z)
    monkeypatch.setattr("nestdiff_core.autoencoders.base.BATCH_PIXELS", 2 * 64 * 64)
    torch.testing.assert_close(autoencoder.encode(grey), z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "weights", "error", "said"),
    [
        ("kl", "/nowhere", ConfigError, "not a folder that diffusers saved"),
        ("taef2", "/nowhere", ConfigError, "not a folder with taef2"),
        ("kl", "hub:nobody/nothing", EnvironmentFault, "could not fetch"),
    ],
)
def test_missing_weights_are_named(
    kind: str, weights: str, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence with the path or the name."""

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    if weights.startswith("hub:"):
        monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", unreachable)
    with pytest.raises(error, match=said):
        make_autoencoder(AutoencoderConfig(kind=kind, weights=weights))  # pyright: ignore[reportArgumentType]


def test_other_shapes_and_damage_are_refused(tmp_path: Path) -> None:
    """An autoencoder that is not KL-f8, and files that hold something else."""
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    AutoencoderKL(**{**SMALL, "latent_channels": 16}).save_pretrained(tmp_path / "sixteen")
    with pytest.raises(ConfigError, match="another shape") as caught:
        make_autoencoder(AutoencoderConfig(kind="kl", weights=str(tmp_path / "sixteen")))
    assert "16 channels" in str(caught.value)
    for part in ("encoder", "decoder"):
        save_file({"0.weight": torch.zeros(1)}, tmp_path / f"taef2_{part}.safetensors")
    with pytest.raises(IntegrityError, match="taef2"):
        make_autoencoder(AutoencoderConfig(kind="taef2", weights=str(tmp_path)))
