"""The frozen visual encoder: pre-trained here (moco), from timm, open_clip or torchvision, or the autoencoder.

An `encoder` artifact holds `model.safetensors` and `config.json`; the second says how to build the network again.

The libraries are imported where a network of theirs is built: together they take seconds, which a denoiser's worker,
a check or a table of numbers need not wait for.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import safetensors.torch
import torch

from nestdiff_core.artifacts import Artifact, ArtifactWriter, open_artifact
from nestdiff_core.config import AutoencoderConfig, EncoderConfig
from nestdiff_core.config_io import from_dict, to_dict
from nestdiff_core.encoders.base import Encoder, feature_shapes, normalisation
from nestdiff_core.encoders.code import CodeEncoder, code_encoder
from nestdiff_core.encoders.extract import (
    encode_captions,
    encode_crops,
    extract_crops,
    extract_features,
)
from nestdiff_core.encoders.knn import compare
from nestdiff_core.encoders.weights import fill, read_weights
from nestdiff_core.errors import ConfigError
from nestdiff_core.files import read_json, replacing, sha256_file, write_json
from nestdiff_core.images.index import ImageIndex
from nestdiff_core.progress import Progress

__all__ = [
    "Encoder",
    "build_encoder",
    "build_judge",
    "encode_captions",
    "encode_crops",
    "extract_crops",
    "extract_features",
    "feature_shapes",
    "load_encoder",
]

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

    Does not seal. autoencoder: the experiment's, for kind autoencoder. `knn` in the result is there where the images
    have labels: held-out accuracy of the encoder, of raw pixels, and of the untrained network of the same shape.
    """
    losses: list[float] = []
    match config.kind:
        case "moco":
            from nestdiff_core.encoders.moco import pixel_statistics, train_moco, training_batches

            mean, std = normalisation(config, *pixel_statistics(index))
            batches = training_batches(index, config.moco.batch_size, config.moco.seed)
            encoder, losses = train_moco(config, batches, mean, std, device=device, progress=progress)
        case "autoencoder":
            encoder = code_encoder(
                config,
                _required(autoencoder),
                channels=index.channels,
                resolution=index.resolution,
                device=device,
            )
        case _:
            encoder = _published(config)
    encoder.to(device).eval().requires_grad_(False)
    with replacing(writer.path / MODEL) as temporary:
        safetensors.torch.save_file(
            {k: v.cpu().contiguous() for k, v in encoder.get_submodule("network").state_dict().items()}, temporary
        )
    record = {
        "encoder": to_dict(config),
        "in_channels": encoder.in_channels,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
    }
    if isinstance(encoder, CodeEncoder):
        record |= {
            "autoencoder": to_dict(autoencoder),
            "autoencoder_shape": encoder.autoencoder.shape,
            "resolution": index.resolution,
        }
    write_json(writer.path / CONFIG, record)
    shapes = {name: list(shape) for name, shape in feature_shapes(encoder).items()}
    knn = compare({"encoder": encoder, "untrained": _untrained(record, device)}, index) if index.num_classes else None
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


def build_judge(config: EncoderConfig, *, num_classes: int = 0, device: str | torch.device = "cpu") -> Encoder:
    """An encoder that is made from its configuration alone, frozen, in eval mode, on `device`.

    Kind moco: `config.weights` is the folder of an `encoder` artifact, as an experiment has left it. num_classes: of
    the head of a network of torchvision, which then is a `Classifier`.
    """
    if num_classes:
        from nestdiff_core.encoders.convnet import torchvision_classifier

        return torchvision_classifier(config, num_classes).to(device).eval().requires_grad_(False)
    if config.kind == "moco":
        artifact = open_artifact(Path(config.weights).expanduser(), stage="encoder")
        artifact.verify()
        return load_encoder(artifact, device=device)
    return _published(config).to(device).eval().requires_grad_(False)


def load_encoder(artifact: Artifact, *, device: str | torch.device = "cpu", compiled: bool = False) -> Encoder:
    """The encoder of a sealed artifact, frozen, in eval mode, on `device`; no file outside of it is read.

    compiled: by torch.compile, for one shape of batch.
    """
    encoder = _untrained(read_json(artifact.path / CONFIG, stage="encoder"), device)
    path = artifact.path / MODEL
    fill(encoder.get_submodule("network"), read_weights(path), path)
    if compiled:
        encoder.forward = torch.compile(encoder.forward, dynamic=False, fullgraph=True)
    return encoder


def _untrained(record: dict[str, Any], device: str | torch.device) -> Encoder:
    """The encoder that an artifact's config.json describes, with the weights that a fixed seed gives."""
    config = from_dict(EncoderConfig, record["encoder"])
    mean, std = tuple(record["mean"]), tuple(record["std"])
    size = config.input_size
    match config.kind:
        case "moco":
            from nestdiff_core.encoders.moco import untrained

            encoder = untrained(config, mean, std)
        case "timm":
            from nestdiff_core.encoders.vit import ViTEncoder, timm_network

            encoder = ViTEncoder(timm_network(config), input_size=size, in_channels=3, mean=mean, std=std)
        case "open_clip":
            from nestdiff_core.encoders.clip import ClipEncoder, clip_network

            encoder = ClipEncoder(clip_network(config, fetch=False), input_size=size, mean=mean, std=std)
        case "torchvision":
            from nestdiff_core.encoders.convnet import ConvEncoder, torchvision_network

            network = torchvision_network(config, fetch=False)
            encoder = ConvEncoder(network, input_size=size, mean=mean, std=std)
        case "autoencoder":
            encoder = code_encoder(
                config,
                from_dict(AutoencoderConfig, record["autoencoder"]),
                channels=record["in_channels"],
                resolution=record["resolution"],
                shape=record["autoencoder_shape"],
                device=device,
            )
    return encoder.to(device).eval().requires_grad_(False)


def _published(config: EncoderConfig) -> Encoder:
    """A library's network with the weights that `config` names."""
    match config.kind:
        case "timm":
            from nestdiff_core.encoders.vit import load_weights, timm_encoder, timm_network

            network = timm_network(config, pretrained=config.weights == "hub")
            if config.weights not in ("hub", "random"):
                load_weights(network, Path(config.weights).expanduser())
            return timm_encoder(config, network)
        case "open_clip":
            from nestdiff_core.encoders.clip import clip_encoder, clip_network

            return clip_encoder(config, clip_network(config, fetch=True))
        case "torchvision":
            from nestdiff_core.encoders.convnet import torchvision_encoder, torchvision_network

            return torchvision_encoder(config, torchvision_network(config, fetch=True))
    raise ConfigError(
        "An encoder of this kind cannot be made without images",
        key="encoder.kind",
        expected=["timm", "open_clip", "torchvision"],
        found=config.kind,
        fix="Choose one of these.",
    )


def _required(autoencoder: AutoencoderConfig | None) -> AutoencoderConfig:
    if autoencoder is None:
        raise ConfigError(
            "An encoder of kind autoencoder needs the experiment's autoencoder",
            stage="encoder",
            key="encoder.kind",
            fix="Pass build_encoder(..., autoencoder=config.autoencoder).",
        )
    return autoencoder


def _thinned(losses: list[float], points: int = 50) -> list[tuple[int, float]]:
    """[step, mean loss since the point before] at about `points` steps."""
    every = max(1, len(losses) // points)
    return [(end, fmean(losses[end - every : end])) for end in range(every, len(losses) + 1, every)]
