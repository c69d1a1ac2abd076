"""CLIP's image towers against open_clip's own models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from open_clip.transformer import QuickGELU

from nestdiff_core.config import EncoderConfig
from nestdiff_core.encoders.base import feature_shapes
from nestdiff_core.encoders.clip import ClipEncoder, clip_encoder, clip_network, clip_shape
from nestdiff_core.errors import ConfigError, EnvironmentFault, IntegrityError

NAME = "ViT-S-32-alt"
RANDOM = EncoderConfig(kind="open_clip", name=NAME, weights="random", input_size=64)


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    """A whole CLIP with weights that are no initialisation of ours."""
    torch.manual_seed(3)
    return open_clip.create_model(NAME, pretrained=None).eval()


@pytest.fixture(scope="module")
def file(model: open_clip.CLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


def make(config: EncoderConfig) -> ClipEncoder:
    return clip_encoder(config, clip_network(config, fetch=True))


def with_file(path: Path, **changes: object) -> EncoderConfig:
    return dataclasses.replace(RANDOM, weights=str(path), **changes)


def test_vector_and_map_are_open_clips(model: open_clip.CLIP, file: Path) -> None:
    """The vector is encode_image; the map is the patch tokens after the final norm, row by row."""
    encoder = make(with_file(file, input_size=224))
    assert feature_shapes(encoder) == {"map": (384, 7, 7), "vector": (256,)}
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        feature_map, vector = encoder(x)
        torch.testing.assert_close(vector, model.encode_image(x))
        tokens = model.visual.ln_post(model.visual.transformer(model.visual._embeds(x)))
    torch.testing.assert_close(feature_map[:, :, 2, 5], tokens[:, 1 + 2 * 7 + 5])


def test_preprocessing_is_clips(model: open_clip.CLIP, file: Path) -> None:
    """Images of the tower's size are normalised as open_clip's own transform does; the experiment may say otherwise."""
    encoder = make(with_file(file, input_size=224))
    image = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    mean, std = model.visual.image_mean, model.visual.image_std
    x = ((torch.from_numpy(image) / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(image)[1], model.encode_image(x), atol=1e-5, rtol=1e-4)
    own = clip_encoder(dataclasses.replace(RANDOM, mean=(0.5,), std=(0.25,)), clip_network(RANDOM, fetch=True))
    assert (own.mean, own.std) == ((0.5,) * 3, (0.25,) * 3)


def test_positions_are_resampled_as_open_clip_does(file: Path) -> None:
    """A file for 224 px serves another size through the position embedding that open_clip itself would make."""
    reference = open_clip.create_model(NAME, pretrained=str(file), force_image_size=128).eval()
    encoder = make(with_file(file, input_size=128))
    x = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(encoder(x)[1], reference.encode_image(x))
    assert encoder.map_side == 4


def test_layouts_of_files(model: open_clip.CLIP, tmp_path: Path) -> None:
    """A tower alone, a training checkpoint, and a model with the text tower under `text.` all give the same tower."""
    state, path = model.state_dict(), tmp_path / "clip.pt"
    visual = {k: v for k, v in state.items() if k.startswith("visual.")}
    custom = visual | {f"text.{k}": v for k, v in state.items() if k not in visual and k != "logit_scale"}
    for content in (
        {k.removeprefix("visual."): v for k, v in visual.items()},
        {"epoch": 3, "state_dict": {f"module.{k}": v.half() for k, v in state.items()}},
        custom,
    ):
        torch.save(content, path)
        network = clip_network(with_file(path, input_size=224), fetch=True)
        torch.testing.assert_close(network.proj, model.visual.proj, atol=1e-3, rtol=1e-3)
        assert network.proj.dtype == torch.float32


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "text only"])
def test_a_file_that_does_not_fit_is_refused(model: open_clip.CLIP, tmp_path: Path, change: str) -> None:
    """The keys are named."""
    state, path = dict(model.state_dict()), tmp_path / "clip.safetensors"
    match change:
        case "missing":
            del state["visual.ln_post.bias"]
        case "unexpected":
            state["visual.ln_post.extra"] = torch.zeros(1)
        case "shape":
            state["visual.ln_post.bias"] = torch.zeros(7)
        case "text only":
            state = {k: v for k, v in state.items() if not k.startswith("visual.")}
    safetensors.torch.save_file(state, path)
    with pytest.raises(IntegrityError, match="ln_post"):
        clip_network(with_file(path), fetch=True)


def test_random_weights_are_seeded() -> None:
    """`random` is the same tower every time."""
    a, b = (clip_network(RANDOM, fetch=True).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


# --- names, tags, activations -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "ViT-B-61"}, "ViT-B-16"),
        ({"name": "hf-hub:a/b"}, "no such model"),
        ({"name": "RN50"}, "such as ViT-B-16"),
        ({"name": "ViT-B-16-SigLIP"}, "vit_base_patch16_siglip_224"),
        ({"name": "coca_ViT-B-32"}, "attention pooling"),
        ({"input_size": 72}, "multiple of the patch size 32"),
        ({"weights": "hub"}, "several weights"),
        ({"name": "ViT-B-16", "weights": "hub:opanai"}, "hub:openai"),
        ({"weights": "absent.pt"}, "not a file"),
    ],
)
def test_what_cannot_be_is_told(changes: dict[str, object], message: str) -> None:
    """Names, tags and sizes that cannot be used bring those that can."""
    with pytest.raises(ConfigError, match=message):
        clip_network(dataclasses.replace(RANDOM, **changes), fetch=True)


def test_a_tag_brings_its_activation() -> None:
    """OpenAI's weights need QuickGELU, which open_clip's model of the same name does not have."""
    assert clip_shape("ViT-L-14", "hub:openai")["quick_gelu"]
    assert not clip_shape("ViT-B-16", "hub:laion2b_s34b_b88k").get("quick_gelu")
    config = EncoderConfig(kind="open_clip", name="ViT-B-32", weights="hub:openai", input_size=32)
    assert isinstance(clip_network(config, fetch=False).transformer.resblocks[0].mlp.gelu, QuickGELU)


def test_openais_own_file_needs_its_activations_name(model: open_clip.CLIP, tmp_path: Path) -> None:
    """A file with OpenAI's marks is refused under a name that has the other activation."""
    path = tmp_path / "openai.pt"
    torch.save({**model.state_dict(), "input_resolution": torch.tensor(224)}, path)
    with pytest.raises(ConfigError, match="-quickgelu"):
        clip_network(with_file(path), fetch=True)


def test_a_tag_is_fetched_once_asked(model: open_clip.CLIP, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's file is read like a local one; a failing download names the way out."""
    tag = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _: ["ours"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: tag)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda _: str(file))
    config = dataclasses.replace(RANDOM, weights="hub:ours", input_size=224)
    encoder = make(config)
    torch.testing.assert_close(encoder.network.proj, model.visual.proj)
    assert (encoder.mean, encoder.std) == (tag["mean"], tag["std"])

    def offline(_: object) -> str:
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(EnvironmentFault, match=r"no network.*give it as encoder\.weights"):
        make(config)
