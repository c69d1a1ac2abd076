"""Vision transformers as encoders: what they give, and what a weight file must be."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from nestdiff_core.config import EncoderConfig, ViTConfig
from nestdiff_core.encoders.base import feature_shapes, normalisation, unit_range
from nestdiff_core.encoders.moco import untrained
from nestdiff_core.encoders.vit import ViTEncoder, load_weights, timm_encoder, timm_network
from nestdiff_core.errors import ConfigError, IntegrityError

TIMM = EncoderConfig(kind="timm", name="vit_tiny_patch16_224", weights="random", input_size=32)
SMALL = EncoderConfig(kind="moco", input_size=8, vit=ViTConfig(patch_size=2, width=16, depth=2, num_heads=2))


@pytest.fixture
def encoder() -> ViTEncoder:
    return untrained(SMALL, (0.5,), (0.25,))


def images(n: int, side: int = 8, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, channels), np.uint8)


def test_map_and_vector_are_the_normed_tokens(encoder: ViTEncoder) -> None:
    """The vector is the class token; map[:, i, j] is the token of patch (i, j)."""
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    features, vector = encoder(x)
    tokens = encoder.network.forward_features(x)
    torch.testing.assert_close(vector, tokens[:, 0])
    torch.testing.assert_close(features[:, :, 1, 3], tokens[:, 1 + 1 * 4 + 3])
    assert feature_shapes(encoder) == {"map": features.shape[1:], "vector": vector.shape[1:]}


def test_a_patch_moves_its_own_place_of_the_map_most(encoder: ViTEncoder) -> None:
    """Rows of the map are rows of the image: a change in patch (0, 3) shows there first."""
    x = torch.zeros(2, 1, 8, 8)
    x[1, 0, 0:2, 6:8] = 3.0
    features, _ = encoder(x)
    change = (features[1] - features[0]).norm(dim=0)
    assert divmod(int(change.argmax()), 4) == (0, 3)


def test_images_enter_as_stated(encoder: ViTEncoder) -> None:
    """uint8 becomes (value / 255 - mean) / std, resized as Pillow's antialiased bicubic filter does."""
    given = images(1)
    expected = encoder(((torch.from_numpy(given) / 255 - 0.5) / 0.25).permute(0, 3, 1, 2))
    for found, value in zip(encoder.encode(given), expected, strict=True):
        torch.testing.assert_close(found, value)
    photograph = np.asarray(Image.effect_noise((40, 40), 60).resize((30, 30), Image.Resampling.BILINEAR))
    reference = np.asarray(Image.fromarray(photograph).resize((8, 8), Image.Resampling.BICUBIC)) / 255
    found = unit_range(torch.from_numpy(photograph.copy())[None, ..., None], 8)
    np.testing.assert_allclose(found[0, 0].numpy(), reference, atol=1.1 / 255)


def test_grey_images_are_repeated_for_timm() -> None:
    """A network of timm sees a grey image as an RGB image of that grey."""
    encoder = timm_encoder(TIMM, timm_network(TIMM))
    grey = images(2, side=32)
    torch.testing.assert_close(encoder.encode(grey), encoder.encode(grey.repeat(3, axis=-1)))
    assert encoder.mean == (0.5, 0.5, 0.5) and feature_shapes(encoder)["map"] == (192, 2, 2)


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "eva02_tiny_patch14_224"])
def test_other_transformers_of_timm(name: str) -> None:
    """SigLIP pools by attention and EVA by the mean: the vector is what the network itself hands on."""
    config = dataclasses.replace(TIMM, name=name, input_size=32 if "16" in name else 28)
    encoder = timm_encoder(config, timm_network(config))
    features, vector = encoder.encode(images(1, side=32, channels=3))
    assert features.shape[2:] == (2, 2) and vector.shape[1] == encoder.vector_channels
    x = torch.zeros(1, 3, config.input_size, config.input_size)
    torch.testing.assert_close(encoder(x)[1], encoder.network(x))


# --- weight files -------------------------------------------------------------------------------------------------


def published(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {k: torch.randn(v.shape, generator=generator) for k, v in network.state_dict().items()}


def test_moco_v3_file(tmp_path: Path) -> None:
    """A published MoCo v3 file: the query encoder is loaded, not its momentum copy, and heads are left out."""
    network, path = timm_network(TIMM), tmp_path / "vit.pth.tar"
    weights = published(network)
    state = {f"module.base_encoder.{k}": v for k, v in weights.items()}
    state |= {f"module.momentum_encoder.{k}": torch.zeros_like(v) for k, v in weights.items()}
    state |= {"module.base_encoder.head.0.weight": torch.zeros(4, 4), "module.predictor.0.weight": torch.zeros(4, 4)}
    torch.save({"epoch": 300, "arch": "vit", "state_dict": state, "optimizer": {"state": {}}}, path)
    load_weights(network, path)
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, weights[key])


def test_positions_are_resampled_to_another_grid(tmp_path: Path) -> None:
    """A file for 64 px (4 x 4 tokens) serves 32 px (2 x 2); constant positions stay what they are."""
    large, small = timm_network(dataclasses.replace(TIMM, input_size=64)), timm_network(TIMM)
    weights = published(large)
    weights["pos_embed"][:] = 0.25
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(weights, path)
    load_weights(small, path)
    assert small.pos_embed.shape == (1, 5, 192)
    torch.testing.assert_close(small.pos_embed.data, torch.full((1, 5, 192), 0.25))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, change: str) -> None:
    """Too few weights, too many, or of another shape: the key is named, and the network is as before."""
    network, path = timm_network(TIMM), tmp_path / "vit.safetensors"
    weights = published(network)
    match change:
        case "missing":
            del weights["blocks.3.attn.qkv.bias"]
        case "unexpected":
            weights["blocks.12.norm1.bias"] = torch.zeros(3)
        case "shape":
            weights["blocks.3.attn.qkv.bias"] = torch.zeros(3)
    safetensors.torch.save_file(weights, path)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(IntegrityError, match="do not fit") as caught:
        load_weights(network, path)
    assert "blocks." in str(caught.value)
    torch.testing.assert_close(dict(network.state_dict()), before)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    """A weight file that is a program is refused and not run; so is one that is noise."""
    path = tmp_path / "evil.pth"
    for write in (
        lambda: torch.save(Canary(tmp_path / "canary"), path),
        lambda: path.write_bytes(pickle.dumps(Canary(tmp_path / "canary"), protocol=2)),
    ):
        write()
        with pytest.raises(IntegrityError, match="cannot be read as weights"):
            load_weights(timm_network(TIMM), path)
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(IntegrityError, match="cannot be read as weights"):
        load_weights(timm_network(TIMM), tmp_path / "noise.safetensors")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_smal_patch16_224", "vit_small_patch16_224"),
        ("resnet18", "plain vision transformer"),
        ("hf-hub:a/b", "no such model"),
    ],
)
def test_a_wrong_name_is_told(name: str, message: str) -> None:
    """A misspelt name brings the near ones; a network without a square token grid is no encoder here."""
    with pytest.raises(ConfigError, match=message):
        timm_network(dataclasses.replace(TIMM, name=name))


def test_the_experiments_own_normalisation() -> None:
    """A lone number serves all channels; two numbers fit no image."""
    config = dataclasses.replace(TIMM, mean=(0.25,), std=(0.1, 0.2, 0.3))
    encoder = timm_encoder(config, timm_network(config))
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder.normalise(x)[0, 2], (x[0, 2] - 0.25) / 0.3)
    with pytest.raises(ConfigError, match=r"encoder\.mean"):
        normalisation(dataclasses.replace(TIMM, mean=(1.0, 2.0, 3.0)), (0.5,), (0.5,))


def test_missing_file_is_a_config_error() -> None:
    """A path that leads nowhere is the user's setting, not a damaged artifact."""
    with pytest.raises(ConfigError, match="not a file"):
        load_weights(timm_network(TIMM), Path("absent.safetensors"))


def test_random_weights_are_seeded() -> None:
    """`random` is the same network every time, and leaves torch's own generator alone."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    a, b = timm_network(TIMM).state_dict(), timm_network(TIMM).state_dict()
    assert torch.rand(1) == expected
    assert all(torch.equal(a[k], b[k]) for k in a)
