"""Autoencoders: the way to z_1 and back, against the libraries they come from and on real photographs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
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


def photographs(side: int, n: int) -> np.ndarray:
    """Real photographs, reduced to `side` pixels."""
    shard = SHARED / "data" / "coco_captions" / "coco256-open-00000.tar"
    if not shard.is_file():
        pytest.skip(f"no photographs in {shard} (NESTDIFF_SHARED)")
    with tarfile.open(shard) as tar:
        files = [tar.extractfile(m) for m in tar if m.name.endswith(".jpg")][:n]
        pictures = [Image.open(io.BytesIO(file.read())).convert("RGB") for file in files if file]
    return np.stack([np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)) for picture in pictures])


def test_identity_is_exact() -> None:
    """Every byte comes back, and the code is the image in [-1, 1]."""
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    identity = make_autoencoder(AutoencoderConfig())
    z = identity.encode(images)
    assert z.shape == (1, 1, 16, 16) and z.min() == -1 and z.max() == 1
    back = ((identity.decode(z) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(back, images)


@needs_weights
@pytest.mark.parametrize(("side", "count", "documented"), [(64, 48, 25.7), (128, 16, 27.7)])
def test_taef2_reconstructs_photographs(side: int, count: int, documented: float) -> None:
    """To the signal-to-noise ratio in dB that is documented for these weights, on another set of photographs.

    All 111 of this set: 25.5 at 64 pixels, 28.2 at 128. (Not on every set: tiny-imagenet's JPEG files reach 22.7.)
    """
    images = photographs(side, count)
    taef2 = make_autoencoder(AutoencoderConfig(kind="taef2", weights=str(TAEF2)))
    z = taef2.encode(images)
    assert tuple(z.shape) == (len(images), 32, side // 8, side // 8) and 0.75 < z.std() < 1.0
    error = (taef2.decode(z) - torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 + 1).square().mean((1, 2, 3)) / 4
    assert (-10 * error.log10()).mean().item() == pytest.approx(documented, abs=0.8)


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


def test_a_damaged_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    """Weights that are cut off are an integrity error with the folder's name."""
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    weights = damaged / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(IntegrityError, match="damaged"):
        make_autoencoder(AutoencoderConfig(kind="kl", weights=str(damaged)))


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is needed for kl only, and the error says how to get it."""
    monkeypatch.setitem(sys.modules, "diffusers.models.autoencoders.autoencoder_kl", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'nestdiff\[vae\]'"):
        make_autoencoder(AutoencoderConfig(kind="kl", weights="random"))
    make_autoencoder(AutoencoderConfig(kind="taef2", weights="random"))


def test_half_precision_files_run_in_single(folder: Path, tmp_path: Path) -> None:
    """A folder saved in float16 gives a float32 network."""
    from diffusers import AutoencoderKL

    AutoencoderKL.from_pretrained(folder).half().save_pretrained(tmp_path)
    kl = make_autoencoder(AutoencoderConfig(kind="kl", weights=str(tmp_path)))
    assert {p.dtype for p in kl.network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("hub:a/b", ("a/b", None)), ("hub:a/b/vae", ("a/b", "vae")), ("hub:a/b/c/d", ("a/b", "c/d"))],
)
def test_names_on_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, weights: str, expected: tuple[str, str | None]
) -> None:
    """Behind owner and name stands a folder of the repository (Stable Diffusion's is `vae`)."""
    from diffusers import AutoencoderKL

    own, asked = AutoencoderKL.from_pretrained(folder), []

    def fetch(name: str, *, subfolder: str | None, **_: object) -> AutoencoderKL:
        asked.append((name, subfolder))
        return own

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", fetch)
    make_autoencoder(AutoencoderConfig(kind="kl", weights=weights))
    assert asked == [expected]


@pytest.mark.parametrize("kind", ["identity", "kl", "taef2"])
def test_a_network_of_the_same_shape(kind: str, folder: Path) -> None:
    """From `shape`, which is plain data, a network is made that takes the weights."""
    config = AutoencoderConfig(kind=kind, weights=str(folder) if kind == "kl" else "random")  # pyright: ignore[reportArgumentType]
    made = make_autoencoder(config)
    shape = json.loads(json.dumps(made.shape))
    again = make_autoencoder(dataclasses.replace(config, weights="random"), shape=shape)
    again.network.load_state_dict(made.network.state_dict())
    images = pictures()
    torch.testing.assert_close(again.encode(images), made.encode(images))
