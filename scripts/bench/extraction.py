"""Encoding images into a store, against a plain timm loop that stores nothing; convolutions against torchvision."""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision.transforms.v2 as transforms
import webdataset as wds
from PIL import Image
from torch import nn
from webdataset.writer import TarWriter

from nestdiff_core import stages
from nestdiff_core.artifacts import writing
from nestdiff_core.config import EncoderConfig, ExperimentConfig, FeaturesConfig, ImagesConfig
from nestdiff_core.encoders.base import feature_shapes
from nestdiff_core.encoders.convnet import torchvision_encoder, torchvision_network
from nestdiff_core.encoders.extract import extract_features
from nestdiff_core.encoders.vit import timm_encoder, timm_network
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.stores.writer import create_store, write_shard
from scripts.bench.measure import compare, pictures

IMAGES, BATCH, SIDE, FILE_SIDE = 96, 32, 224, 256
VIT = EncoderConfig(kind="timm", name="vit_tiny_patch16_224", weights="random", input_size=SIDE)


def run() -> None:
    _decoded()
    _encoded()
    _convolutions()


def _decoded() -> None:
    encoder = timm_encoder(VIT, timm_network(VIT)).eval().requires_grad_(False)
    model, images = _plain_timm(), pictures(IMAGES, SIDE)

    def plain() -> None:
        for start in range(0, IMAGES, BATCH):
            _forward(model, torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2))

    with tempfile.TemporaryDirectory() as name:
        folder, shapes = Path(name), {kind: (1, *shape) for kind, shape in feature_shapes(encoder).items()}
        header = {"stage": "features", "level": None, "fingerprint": "", "config": {}, "inputs": []}
        with writing(folder, header, keep_parts=True) as writer:
            create_store(folder / "store.zarr", shapes, "float16", [IMAGES], 32, {})

            def ours() -> None:
                maps, vectors = extract_features(encoder, images, BATCH, "float16")
                files = write_shard(folder / "store.zarr", 0, {"map": maps, "vector": vectors})
                writer.commit_part("0", files)

            compare(
                f"{IMAGES} decoded images of {SIDE} pixels through {VIT.name}, batches of {BATCH}",
                ("timm, nothing stored", plain),
                {"extract_features, write_shard, commit": ours},
            )


def _encoded() -> None:
    model = _plain_timm()
    squared = transforms.Compose(
        [transforms.Resize(SIDE, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(SIDE)]
    )
    for kind, options in (("jpg", {"format": "JPEG", "quality": 90}), ("png", {"format": "PNG"})):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with TarWriter(str(folder / "0.tar")) as tar:
                for number, picture in enumerate(pictures(IMAGES, FILE_SIDE)):
                    buffer = io.BytesIO()
                    Image.fromarray(picture).save(buffer, **options)
                    tar.write({"__key__": f"{number:05d}", kind: buffer.getvalue()})
            config = ExperimentConfig(
                images=ImagesConfig(source="webdataset", path=str(folder / "*.tar"), resolution=SIDE),
                encoder=VIT,
                features=FeaturesConfig(batch_size=BATCH),
            )
            x = Experiment(config, folder / "artifacts")
            stages.images(x)
            stages.encoder(x)

            def plain(folder: Path = folder, kind: str = kind) -> None:
                samples = wds.WebDataset(str(folder / "0.tar"), shardshuffle=False).decode("pil").to_tuple(kind)  # pyright: ignore
                batch = []
                for (image,) in samples:
                    batch.append(torch.from_numpy(np.array(squared(image))).permute(2, 0, 1))
                    if len(batch) == BATCH:
                        _forward(model, torch.stack(batch))
                        batch = []

            def ours(x: Experiment = x) -> None:
                shutil.rmtree(x.path(Ref("features")), ignore_errors=True)
                stages.features(x)

            compare(
                f"The same from {kind} files of {FILE_SIDE} pixels in a tar",
                ("webdataset, timm, nothing stored", plain),
                {"the stage `features`": ours},
            )


def _convolutions() -> None:
    for name, layer, side in (("resnet50", "layer3", 224), ("squeezenet1_0", "features", 128)):
        config = EncoderConfig(kind="torchvision", name=name, weights="random", layer=layer, input_size=side)
        encoder = torchvision_encoder(config, torchvision_network(config, fetch=False)).eval()
        x = encoder.normalise(torch.rand(16, 3, side, side))
        with torch.inference_mode():
            compare(
                f"16 images of {side} pixels through torchvision's {name} up to {layer}",
                ("torchvision, contiguous", lambda encoder=encoder, x=x: encoder.network(x)),
                {"ConvEncoder, channels last": lambda encoder=encoder, x=x: encoder(x)},
            )


def _plain_timm() -> nn.Module:
    return timm.create_model(VIT.name, num_classes=0).eval()


@torch.inference_mode()
def _forward(model: nn.Module, x: torch.Tensor) -> None:
    model((x.float() / 255 - 0.5) / 0.5)
