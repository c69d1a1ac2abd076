"""The frozen visual encoder: pre-trained here (moco), from timm, open_clip or torchvision, or the autoencoder.

An `encoder` artifact holds `model.safetensors` and `config.json`; the second says how to build the network again.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import safetensors.torch
import torch

from nestdiff_core.artifacts import Artifact, ArtifactWriter, read_json, replacing, sha256_file, write_json
from nestdiff_core.config import AutoencoderConfig, EncoderConfig
from nestdiff_core.config_io import from_dict, to_dict
from nestdiff_core.encoders.base import Encoder, feature_shapes
from nestdiff_core.encoders.clip import ClipEncoder, clip_encoder
from nestdiff_core.encoders.code import CodeEncoder
from nestdiff_core.encoders.convnet import ConvEncoder, torchvision_encoder
from nestdiff_core.encoders.extract import encode_captions, encode_crops, extract_crops, extract_features
from nestdiff_core.encoders.knn import compare
from nestdiff_core.encoders.moco import pixel_statistics, train_moco, training_batches, untrained
from nestdiff_core.encoders.vit import ViTEncoder, load_weights, moco_network, timm_encoder, timm_network
from nestdiff_core.encoders.weights import fill, read_weights
from nestdiff_core.images import ImageIndex
from nestdiff_core.progress import Progress

__all__ = [
    "Encoder",
    "build_encoder",
    "encode_captions",
    "encode_crops",
    "extract_crops",
    "extract_features",
    "feature_shapes",
    "load_encoder",
]

SavedEncoder = ViTEncoder | ClipEncoder | ConvEncoder | CodeEncoder

MODEL, CONFIG = "model.safetensors", "config.json"


def build_encoder(
    config: EncoderConfig,
    index: ImageIndex,
    writer: ArtifactWriter,
    *,
    autoencoder: AutoencoderConfig | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the encoder and write it below `writer.path`; returns what it is and how well its vectors classify.

    autoencoder: of the experiment, for kind autoencoder. Does not seal. `knn` in the result is there where the images
    have labels: held-out accuracy of the encoder, of raw pixels, and of the untrained network of the same shape.
    """
    losses: list[float] = []
    autoencoder = autoencoder or AutoencoderConfig()
    if config.kind == "moco":
        mean, std = pixel_statistics(index)
        batches = training_batches(index, config.moco.batch_size, config.moco.seed)
        encoder, losses = train_moco(config, batches, mean, std, device=device, progress=progress)
    else:
        record = {"in_channels": index.channels, "resolution": index.resolution, "mean": [], "std": []}
        encoder = _make(config, autoencoder, record, fetch=True, device=device)
    encoder.to(device).eval().requires_grad_(False)
    with replacing(writer.path / MODEL) as temporary:
        safetensors.torch.save_file(
            {k: v.cpu().contiguous() for k, v in encoder.network.state_dict().items()}, temporary
        )
    record = {
        "encoder": to_dict(config),
        "autoencoder": to_dict(autoencoder),
        "resolution": index.resolution,
        "in_channels": encoder.in_channels,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
    }
    write_json(writer.path / CONFIG, record)
    shapes = {name: list(shape) for name, shape in feature_shapes(encoder).items()}
    knn = None
    if index.num_classes:
        others = {} if config.kind == "autoencoder" else {"untrained": _untrained(config, encoder).to(device)}
        knn = compare({"encoder": encoder, **others}, index)
    return {
        **shapes,
        "num_parameters": sum(p.numel() for p in encoder.parameters()),
        "weights_sha256": sha256_file(writer.path / MODEL),
        "preprocessing": {
            "input_size": encoder.input_size,
            "resize": encoder.resize,
            "mean": list(encoder.mean),
            "std": list(encoder.std),
        },
        "loss": _thinned(losses),
        "knn": knn,
    }


def load_encoder(artifact: Artifact, *, device: str | torch.device = "cpu") -> Encoder:
    """The encoder of a sealed artifact, frozen, in eval mode, on `device`."""
    record = read_json(artifact.path / CONFIG, stage="encoder")
    config = from_dict(EncoderConfig, record["encoder"])
    autoencoder = from_dict(AutoencoderConfig, record["autoencoder"])
    encoder = _make(config, autoencoder, record, fetch=False, device=device)
    path = artifact.path / MODEL
    fill(encoder.network, read_weights(path), path)
    return encoder.to(device).eval().requires_grad_(False)


def _make(
    config: EncoderConfig,
    autoencoder: AutoencoderConfig,
    record: dict[str, Any],
    *,
    fetch: bool,
    device: str | torch.device,
) -> SavedEncoder:
    """The encoder with its published weights, or without `fetch` as it is before weights are loaded.

    record: in_channels and resolution of the images; mean and std of those that a MoCo network was trained on.
    """
    match config.kind:
        case "moco":
            return ViTEncoder(
                moco_network(config, record["in_channels"]),
                input_size=config.input_size,
                in_channels=record["in_channels"],
                mean=tuple(record["mean"]),
                std=tuple(record["std"]),
            )
        case "timm":
            network = timm_network(config, pretrained=fetch and config.weights == "hub")
            if fetch and config.weights not in ("hub", "random"):
                load_weights(network, Path(config.weights).expanduser())
            return timm_encoder(config, network)
        case "open_clip":
            return clip_encoder(config, fetch=fetch)
        case "torchvision":
            return torchvision_encoder(config, fetch=fetch)
        case "autoencoder":
            return CodeEncoder(
                autoencoder,
                fold=config.fold,
                channels=record["in_channels"],
                resolution=record["resolution"],
                device=device,
            )


def _untrained(config: EncoderConfig, encoder: SavedEncoder) -> SavedEncoder:
    if config.kind == "moco":
        return untrained(config, encoder.mean, encoder.std)
    return _make(config, AutoencoderConfig(), {}, fetch=False, device="cpu")


def _thinned(losses: list[float], points: int = 50) -> list[tuple[int, float]]:
    """[step, mean loss since the point before] at about `points` steps."""
    every = max(1, len(losses) // points)
    return [(end, fmean(losses[end - every : end])) for end in range(every, len(losses) + 1, every)]
