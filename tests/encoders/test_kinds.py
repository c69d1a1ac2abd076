"""Encoders of open_clip, torchvision and the autoencoder, text towers, and crops: against the libraries themselves."""

from __future__ import annotations

import dataclasses
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from nestdiff_core.artifacts import writing
from nestdiff_core.autoencoders import make_autoencoder
from nestdiff_core.config import AutoencoderConfig, EncoderConfig, ImagesConfig, TextConfig
from nestdiff_core.encoders import (
    build_encoder,
    encode_captions,
    encode_crops,
    extract_crops,
    extract_features,
    load_encoder,
)
from nestdiff_core.encoders.base import unit_range
from nestdiff_core.encoders.clip import clip_encoder
from nestdiff_core.encoders.code import CodeEncoder
from nestdiff_core.encoders.convnet import torchvision_encoder
from nestdiff_core.encoders.text import build_text_tower
from nestdiff_core.errors import ConfigError, EnvironmentFault, IntegrityError
from nestdiff_core.images import ImageIndex, build_images

SHARED = Path(os.environ.get("NESTDIFF_SHARED", "../shared"))
SQUEEZENET = SHARED / "weights" / "squeezenet1_0_imagenet_fp16.safetensors"
PUBLISHED = {"mean": (123 / 255, 117 / 255, 104 / 255), "std": (1 / 255,)}  # the shared file's own preprocessing

CLIP = EncoderConfig(kind="open_clip", name="RN50-quickgelu", weights="random", input_size=64)
VIT = dataclasses.replace(CLIP, name="ViT-B-32")
CONV = EncoderConfig(kind="torchvision", name="squeezenet1_1", weights="random", input_size=64)
TEXT = TextConfig(name="RN50", weights="random", width=512)


def images(n: int = 3, side: int = 64, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, channels), np.uint8)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """64 grey digits of 8 pixels, with labels."""
    path = tmp_path_factory.mktemp("images") / "images"
    config = ImagesConfig(source="toy", resolution=8, channels=1, labels=True, images_per_shard=128)
    header = {"stage": "images", "level": None, "fingerprint": "0", "config": {}, "inputs": [], "experiment": "test"}
    with writing(path, header) as writer:
        return ImageIndex(writer.seal(**build_images(config, writer)))


# --- open_clip ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a whole CLIP with another seed than the encoder's."""
    path = tmp_path_factory.mktemp("clip") / "open_clip.safetensors"
    torch.manual_seed(5)
    save_file(open_clip.create_model("ViT-B-32").state_dict(), path)
    return path


def test_clip_is_open_clips_own(clip_file: Path) -> None:
    """The vector is encode_image's before normalisation, the map the normed patch tokens behind it."""
    encoder = clip_encoder(dataclasses.replace(VIT, weights=str(clip_file), input_size=224), fetch=True).eval()
    own = open_clip.create_model("ViT-B-32", pretrained=str(clip_file)).eval()
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    pixels = images(2, 224)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    feature_map, vector = encoder.encode(pixels)
    with torch.no_grad():
        torch.testing.assert_close(vector, own.encode_image(x), atol=1e-4, rtol=1e-4)
        own.visual.output_tokens = True
        tokens = own.visual(x)[1]
    assert feature_map.shape == (2, 768, 7, 7) and vector.shape == (2, 512)
    torch.testing.assert_close(feature_map[0, :, 2, 3], tokens[0, 2 * 7 + 3], atol=1e-4, rtol=1e-4)


def test_openais_tag_brings_its_activation() -> None:
    """Weights that were trained with quick GELU are run with it, also when the artifact is read again."""
    published = dataclasses.replace(VIT, weights="hub:openai")
    encoder = clip_encoder(published, fetch=False)
    assert type(encoder.network.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    other = clip_encoder(dataclasses.replace(VIT, weights="hub:laion2b_e16"), fetch=False)
    assert type(other.network.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"


# --- torchvision --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SQUEEZENET.is_file(), reason=f"no {SQUEEZENET} (NESTDIFF_SHARED)")
def test_squeezenet_from_a_file_sees_what_is_there() -> None:
    """The shared ImageNet weights at 227 pixels: a 512x13x13 map, the library's own logits on top of it, and
    photographs of the same class closer together than others."""
    config = EncoderConfig(
        kind="torchvision", name="squeezenet1_0", weights=str(SQUEEZENET), input_size=227, **PUBLISHED
    )
    encoder = torchvision_encoder(config, fetch=True).eval()
    own = torchvision.models.squeezenet1_0().eval()
    own.load_state_dict({k: v.float() for k, v in load_file(SQUEEZENET).items()})
    shard = SHARED / "data" / "tinyimagenet20" / "tin20-val-00000.tar.gz"
    with tarfile.open(shard) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()[:200]}  # pyright: ignore[reportOptionalMemberAccess]
    keys = [name[:-4] for name in members if name.endswith(".jpg") and name[:-4] + ".cls" in members][:60]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(members[k + ".jpg"])).convert("RGB")) for k in keys])
    labels = torch.tensor([int(members[k + ".cls"]) for k in keys])
    feature_map, vector = encoder.encode(pixels)
    assert feature_map.shape[1:] == (512, 13, 13) and vector.shape[1:] == (512,)
    x = unit_range(torch.from_numpy(pixels), 227) * 255 - torch.tensor([123.0, 117.0, 104.0])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(own.classifier(feature_map).flatten(1), own(x), atol=1e-2, rtol=1e-3)
    similarity = torch.corrcoef(vector).fill_diagonal_(float("nan"))
    same = labels[:, None] == labels
    assert similarity[same].nanmean() > similarity[~same].nanmean() + 0.05


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        ({"name": "squeezenet1_2"}, "encoder.name", "squeezenet1_1"),
        ({"layer": "blocks"}, "encoder.layer", "features"),
        ({"name": "resnet18", "layer": "fc"}, "encoder.layer", "square feature map"),
        ({"input_size": 4}, "encoder.layer", "larger"),
    ],
)
def test_unusable_layers_are_named(change: dict, key: str, said: str) -> None:
    """A wrong name, layer or size is one ConfigError that says what there is."""
    with pytest.raises(ConfigError) as caught:
        torchvision_encoder(dataclasses.replace(CONV, **change), fetch=True)
    assert caught.value.key == key and said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"name": "ViT-B-31"}, ConfigError, "ViT-B-32"),
        ({"name": "RN50"}, ConfigError, "class token"),
        ({"weights": "hub:nothing"}, ConfigError, "openai"),
        ({"weights": "/nowhere.pt"}, ConfigError, "not a file"),
        ({"weights": "hub:openai"}, EnvironmentFault, "could not be fetched"),
    ],
)
def test_unusable_clips_are_named(
    change: dict, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong name, tag, file or tower, and a download that fails."""

    def unreachable(*_: object, **options: object) -> None:
        raise OSError("no network")

    if error is EnvironmentFault:
        monkeypatch.setattr(open_clip, "create_model", unreachable)
    with pytest.raises(error, match=said):
        clip_encoder(dataclasses.replace(VIT, **change), fetch=True)


def test_another_models_weights_are_refused(clip_file: Path) -> None:
    """A file of another model says where it does not fit."""
    with pytest.raises(IntegrityError, match=r"conv1\.weight has another shape"):
        clip_encoder(dataclasses.replace(VIT, name="ViT-B-16", weights=str(clip_file)), fetch=True)


# --- the autoencoder's code ---------------------------------------------------------------------------------------


def test_code_is_folded_and_complete() -> None:
    """The map holds all of z_1, a block of positions as the channels of one."""
    encoder = CodeEncoder(AutoencoderConfig(), fold=4, channels=3, resolution=64)
    pixels = images(2)
    feature_map, vector = encoder.encode(pixels)
    assert feature_map.shape == (2, 48, 16, 16) and vector.shape == (2, 48)
    z_1 = make_autoencoder(AutoencoderConfig()).encode(pixels)
    torch.testing.assert_close(feature_map[1, 16 + 4 * 2 + 3, 5, 7], z_1[1, 1, 4 * 5 + 2, 4 * 7 + 3])
    torch.testing.assert_close(vector, feature_map.mean((2, 3)))
    with pytest.raises(ConfigError, match="folded evenly"):
        CodeEncoder(AutoencoderConfig(), fold=5, channels=3, resolution=64)


# --- artifacts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["open_clip", "torchvision", "autoencoder"])
def test_encoder_comes_back_from_its_artifact(kind: str, index: ImageIndex, tmp_path: Path, clip_file: Path) -> None:
    """A loaded encoder gives the features of the one that was built, without the file that it came from."""
    own = tmp_path / "weights.safetensors"
    own.write_bytes(clip_file.read_bytes())
    config = {
        "open_clip": dataclasses.replace(VIT, weights=str(own)),
        "torchvision": dataclasses.replace(CONV, mean=(0.3,), std=(0.2,)),
        "autoencoder": EncoderConfig(kind="autoencoder", fold=2),
    }[kind]
    header = {"stage": "encoder", "level": None, "fingerprint": "0", "config": {}, "inputs": [], "experiment": "test"}
    with writing(tmp_path / "encoder", header) as writer:
        artifact = writer.seal(**build_encoder(config, index, writer, autoencoder=AutoencoderConfig()))
    own.unlink()
    before = None
    for _ in range(2):
        encoder = load_encoder(artifact)
        features = extract_features(encoder, index.read_shard(0)[:8], 8, "float32")
        before = before or features
        for a, b in zip(features, before, strict=True):
            np.testing.assert_array_equal(a, b)
    assert list(features[0].shape[2:]) == artifact.info["map"]
    assert 0 <= artifact.info["knn"]["encoder"] <= 1
    if kind == "torchvision":
        assert artifact.info["preprocessing"]["mean"] == [0.3] * 3
    if kind == "open_clip":
        visual = {k[7:]: v for k, v in load_file(clip_file).items() if k.startswith("visual.")}
        saved = load_file(artifact.path / "model.safetensors")
        assert torch.equal(saved["conv1.weight"], visual["conv1.weight"])


# --- crops and views ----------------------------------------------------------------------------------------------


def test_crops_are_encoded_in_their_places() -> None:
    """Position (i, j) of the map is the vector of crop (i, j), resized like any image."""
    encoder = torchvision_encoder(CONV, fetch=True).eval()
    pixels = images(3, 64)
    crops = encode_crops(encoder, pixels, 2)
    for i, j in np.ndindex(2, 2):
        _, expected = encoder.encode(pixels[:, 32 * i : 32 * i + 32, 32 * j : 32 * j + 32])
        torch.testing.assert_close(crops[:, :, i, j], expected, atol=1e-5, rtol=1e-4)
    stored = extract_crops(encoder, pixels, 2, 8, "float32", flip=True)
    assert stored.shape == (3, 2, 512, 2, 2)
    np.testing.assert_allclose(stored[:, 0], crops, atol=1e-5)
    mirrored = encode_crops(encoder, pixels[:, :, ::-1].copy(), 2)
    np.testing.assert_allclose(stored[:, 1], mirrored, atol=1e-5)


def test_mirror_images_are_the_second_view() -> None:
    """View 1 is the features of the flipped image; without `flip` there is one view."""
    encoder, pixels = torchvision_encoder(CONV, fetch=True).eval(), images(5)
    maps, vectors = extract_features(encoder, pixels, 2, "float32", flip=True)
    flipped, _ = extract_features(encoder, pixels[:, :, ::-1].copy(), 2, "float32")
    np.testing.assert_array_equal(maps[:, 1], flipped[:, 0])
    assert flipped.shape[1] == 1 and vectors.shape == (5, 2, 512) and not np.array_equal(maps[:, 0], maps[:, 1])


# --- text ---------------------------------------------------------------------------------------------------------


def test_text_tokens_are_those_before_pooling() -> None:
    """Pooled at the end token and projected they are encode_text's; every caption stands for itself."""
    tower = build_text_tower(TEXT)
    captions = ["two dogs on a beach", "", "a very long caption " * 40]
    tokens = encode_captions(tower.encode, captions, 2, "float32")
    assert tokens.shape == (3, 77, 512)
    own = tower.tower
    ids = open_clip.get_tokenizer("RN50")(captions)
    with torch.no_grad():
        pooled = torch.from_numpy(tokens)[range(3), ids.argmax(1)] @ own.text_projection
        torch.testing.assert_close(pooled, own.encode_text(ids), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(torch.from_numpy(tokens[0]), torch.from_numpy(tokens[1]), atol=1e-3)


def test_text_weights_from_a_file_and_another_shape(tmp_path: Path) -> None:
    """A file's text tower is used; a width that is not the tower's names both."""
    torch.manual_seed(9)
    other = open_clip.create_model("RN50")
    path = tmp_path / "clip.safetensors"
    save_file({k: v.contiguous() for k, v in other.state_dict().items()}, path)
    tower = build_text_tower(dataclasses.replace(TEXT, weights=str(path)))
    assert torch.equal(tower.tower.token_embedding.weight, other.token_embedding.weight)
    with pytest.raises(ConfigError, match="77 tokens of 512") as caught:
        build_text_tower(dataclasses.replace(TEXT, width=768))
    assert caught.value.key == "conditioning.text.width"
