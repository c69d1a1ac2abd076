"""The encoder artifact: every kind comes back from it, without the files it was made from."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from nestdiff_core.artifacts import writing
from nestdiff_core.config import AutoencoderConfig, EncoderConfig, ImagesConfig, MoCoConfig, ViTConfig
from nestdiff_core.encoders import build_encoder, load_encoder
from nestdiff_core.encoders.code import code_encoder
from nestdiff_core.encoders.convnet import torchvision_encoder, torchvision_network
from nestdiff_core.encoders.extract import extract_features
from nestdiff_core.encoders.moco import pixel_statistics, train_moco, training_batches
from nestdiff_core.encoders.weights import weights_digest
from nestdiff_core.errors import ConfigError, IntegrityError
from nestdiff_core.files import DirectoryLock
from nestdiff_core.images.build import build_images
from nestdiff_core.images.index import ImageIndex

HEADER = {"stage": "encoder", "level": None, "fingerprint": "0", "config": {}, "inputs": [], "experiment": "test"}
MOCO = EncoderConfig(
    kind="moco",
    input_size=8,
    vit=ViTConfig(patch_size=2, width=16, depth=1, num_heads=2),
    moco=MoCoConfig(num_steps=3, batch_size=64, warmup_steps=3, projection_dim=16, hidden_dim=32),
)
CODE = EncoderConfig(kind="autoencoder", fold=2)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    with writing(tmp_path_factory.mktemp("images") / "a", {**HEADER, "stage": "images"}) as writer:
        info = build_images(
            ImagesConfig(source="toy", resolution=16, channels=1, labels=True, images_per_shard=64), writer
        )
        return ImageIndex(writer.seal(**info))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Weights that no seed of ours gives: a SqueezeNet and a small KL-f8 autoencoder."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    folder = tmp_path / "files"
    folder.mkdir()
    torch.manual_seed(11)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), folder / "squeezenet.pth")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    ).save_pretrained(folder / "kl")
    return folder


@pytest.mark.parametrize("kind", ["moco", "timm", "open_clip", "torchvision", "identity", "taef2", "kl"])
def test_encoder_comes_back_from_its_artifact(index: ImageIndex, tmp_path: Path, files: Path, kind: Any) -> None:
    """Two builds are equal; one is loaded when its files have gone; kNN of three kinds stands in the manifest."""
    autoencoder = None
    match kind:
        case "moco":
            config = MOCO
        case "timm":
            config = EncoderConfig(kind="timm", name="test_vit", weights="random", input_size=32, mean=(0.3,))
        case "open_clip":
            config = EncoderConfig(kind="open_clip", name="ViT-S-32-alt", weights="random", input_size=32, std=(0.3,))
        case "torchvision":
            weights = str(files / "squeezenet.pth")
            config = EncoderConfig(
                kind="torchvision", name="squeezenet1_1", weights=weights, input_size=33, std=(0.01,)
            )
        case _:
            config = CODE
            weights = {"identity": "", "taef2": "random", "kl": str(files / "kl")}[kind]
            autoencoder = AutoencoderConfig(kind=kind, weights=weights, channels=1, posterior="sample")
    digests = []
    for name in "ab":
        with writing(tmp_path / name, HEADER) as writer:
            artifact = writer.seal(**build_encoder(config, index, writer, autoencoder=autoencoder))
        digests.append(artifact.digest)
    assert digests[0] == digests[1]
    shutil.rmtree(files)
    encoder = load_encoder(artifact)
    feature_map, vector = extract_features(encoder, index.read_shard(0), 32, "float32")
    assert list(feature_map.shape[2:]) == artifact.info["map"] and list(vector.shape[2:]) == artifact.info["vector"]
    knn = artifact.info["knn"]
    assert set(knn) == {"k", "num_train", "num_held_out", "pixels", "encoder", "untrained"} and knn["pixels"] > 0.5
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert artifact.info["preprocessing"]["mean"] == list(encoder.mean)
    assert (artifact.info["preprocessing"]["resize"] == "none") == (config.kind == "autoencoder")
    if kind == "moco":
        trained, _ = train_moco(config, training_batches(index, 64, 0), *pixel_statistics(index))
        np.testing.assert_array_equal(extract_features(trained, index.read_shard(0), 32, "float32")[0], feature_map)


@pytest.mark.parametrize("kind", ["torchvision", "kl"])
def test_a_loaded_encoder_has_the_weights_of_the_file(
    index: ImageIndex, tmp_path: Path, files: Path, kind: str
) -> None:
    """Its features are, to the bit, those of an encoder made from the file, and not those of the seed's weights."""
    autoencoder = AutoencoderConfig(kind="kl", weights=str(files / "kl"), channels=1, scale=0.5)
    if kind == "torchvision":
        weights = str(files / "squeezenet.pth")
        config = EncoderConfig(kind="torchvision", name="squeezenet1_1", weights=weights, input_size=33)
        made = torchvision_encoder(config, torchvision_network(config, fetch=True))
        random = torchvision_encoder(config, torchvision_network(config, fetch=False))
    else:
        config = CODE
        made = code_encoder(config, autoencoder, channels=1, resolution=16)
        random = code_encoder(config, autoencoder, channels=1, resolution=16, shape=made.autoencoder.shape)
    with writing(tmp_path / "a", HEADER) as writer:
        artifact = writer.seal(**build_encoder(config, index, writer, autoencoder=autoencoder))
    shutil.rmtree(files)
    loaded, expected, other = (
        extract_features(encoder, index.read_shard(0), 32, "float32")[0]
        for encoder in (load_encoder(artifact), made, random)
    )
    np.testing.assert_array_equal(loaded, expected)
    assert not np.allclose(loaded, other, atol=0.01)


def test_an_artifact_of_other_weights_is_refused(index: ImageIndex, tmp_path: Path) -> None:
    """A config.json that does not belong to the weights does not go unnoticed."""
    with writing(tmp_path / "a", HEADER) as writer:
        artifact = writer.seal(**build_encoder(dataclasses.replace(MOCO, moco=MoCoConfig(num_steps=0)), index, writer))
    record = artifact.path / "config.json"
    record.write_text(record.read_text().replace('"width": 16', '"width": 32'))
    with pytest.raises(IntegrityError, match="another shape"):
        load_encoder(artifact)


def test_the_autoencoder_must_be_given(index: ImageIndex, tmp_path: Path) -> None:
    """Kind autoencoder without one is the caller's mistake, told as such."""
    with pytest.raises(ConfigError, match="needs the experiment's autoencoder"), writing(tmp_path / "a", HEADER) as w:
        build_encoder(CODE, index, w)


def test_weights_are_the_same_whoever_has_locked_their_folder(tmp_path: Path) -> None:
    """A judge's folder is an artifact: gc locks it, and a copy leaves the lock behind."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    before = weights_digest(str(tmp_path))
    with DirectoryLock(tmp_path, stage="encoder"):
        assert weights_digest(str(tmp_path)) == before
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert weights_digest(str(tmp_path)) != before
