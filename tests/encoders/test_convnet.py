"""torchvision's networks as encoders: against torchvision's own forward pass, and on real photographs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image

from nestdiff_core.config import EncoderConfig
from nestdiff_core.encoders.base import feature_shapes
from nestdiff_core.encoders.convnet import (
    ConvEncoder,
    torchvision_encoder,
    torchvision_network,
    torchvision_normalisation,
)
from nestdiff_core.errors import ConfigError, EnvironmentFault, IntegrityError

SHARED = Path(os.environ.get("NESTDIFF_SHARED", "../shared"))
SQUEEZENET = SHARED / "weights" / "squeezenet1_0_imagenet_fp16.safetensors"
PHOTOGRAPHS = SHARED / "data" / "tinyimagenet20"
needs_squeezenet = pytest.mark.skipif(
    not SQUEEZENET.is_file(), reason=f"no SqueezeNet in {SQUEEZENET.parent} (NESTDIFF_SHARED)"
)
RESNET = EncoderConfig(kind="torchvision", name="resnet18", weights="random", layer="layer3", input_size=64)


def make(config: EncoderConfig) -> ConvEncoder:
    return torchvision_encoder(config, torchvision_network(config, fetch=True))


def test_map_is_the_layers_output(tmp_path: Path) -> None:
    """What a hook on the whole network sees; the vector is its mean; layers behind it are left out."""
    torch.manual_seed(5)
    whole = torchvision.models.resnet18().eval()
    path = tmp_path / "resnet.pth"
    torch.save(whole.state_dict(), path)
    encoder = make(dataclasses.replace(RESNET, weights=str(path)))
    assert feature_shapes(encoder) == {"map": (256, 4, 4), "vector": (256,)}
    seen: list[torch.Tensor] = []
    whole.layer3.register_forward_hook(lambda _, __, out: seen.append(out))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole(x)
        feature_map, vector = encoder(x)
    torch.testing.assert_close(feature_map, seen[0])
    torch.testing.assert_close(vector, seen[0].mean((2, 3)))
    assert not any(key.startswith(("layer4", "fc")) for key in encoder.network.state_dict())


def test_normalisation_is_the_published_one() -> None:
    """That of torchvision's own weights, which is not ImageNet's for all; the experiment's where it says so."""
    resnet = make(RESNET)
    assert resnet.mean == (0.485, 0.456, 0.406) and resnet.std == (0.229, 0.224, 0.225)
    assert torchvision_normalisation("efficientnet_v2_l") == ((0.5,) * 3, (0.5,) * 3)
    own = make(dataclasses.replace(RESNET, mean=(0.1, 0.2, 0.3), std=(0.5,)))
    assert own.mean == (0.1, 0.2, 0.3) and own.std == (0.5, 0.5, 0.5)


@needs_squeezenet
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"no photographs in {PHOTOGRAPHS} (NESTDIFF_SHARED)")
def test_squeezenet_recognises_photographs() -> None:
    """The shared weights, through the settings that a user would write, name the classes of real photographs.

    59 % of 256 such images of 64 pixels, enlarged to 128, out of 20 classes (chance: 5 %). With red and blue
    exchanged, or with ImageNet's usual normalisation, fewer: so images enter as these weights want them.
    """
    config = EncoderConfig(
        kind="torchvision",
        name="squeezenet1_0",
        weights=str(SQUEEZENET),
        input_size=128,
        mean=(123 / 255, 117 / 255, 104 / 255),
        std=(1 / 255,),
    )
    whole = torchvision.models.squeezenet1_0().eval()
    whole.load_state_dict({k: v.float() for k, v in safetensors.torch.load_file(SQUEEZENET).items()})
    names = json.loads((PHOTOGRAPHS / "index.json").read_text())["classes"]
    known = torchvision.models.SqueezeNet1_0_Weights.IMAGENET1K_V1.meta["categories"]
    columns = [known.index(name) for name in names]
    pictures, labels = photographs(96)

    def accuracy(config: EncoderConfig, pictures: np.ndarray) -> float:
        with torch.no_grad():
            logits = whole.classifier(make(config).encode(pictures)[0]).flatten(1)
        return float((logits[:, columns].argmax(1).numpy() == labels).mean())

    documented = accuracy(config, pictures)
    assert documented > 0.5
    assert documented > accuracy(config, pictures[..., ::-1].copy()) + 0.05
    assert documented > accuracy(dataclasses.replace(config, mean=(), std=()), pictures) + 0.2


@needs_squeezenet
def test_squeezenet_is_torchvisions() -> None:
    """Half-precision weights run in float32, at the documented size, and give what torchvision's own class gives."""
    config = EncoderConfig(kind="torchvision", name="squeezenet1_0", weights=str(SQUEEZENET), input_size=227)
    encoder = make(config)
    assert feature_shapes(encoder) == {"map": (512, 13, 13), "vector": (512,)}
    assert all(p.dtype == torch.float32 for p in encoder.parameters())
    whole = torchvision.models.squeezenet1_0().eval()
    whole.load_state_dict({k: v.float() for k, v in safetensors.torch.load_file(SQUEEZENET).items()})
    x = torch.randn(2, 3, 227, 227, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(whole.classifier(encoder(x)[0]).flatten(1), whole(x))


def photographs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images (n, 64, 64, 3) of the validation shard, and their classes."""
    with tarfile.open(PHOTOGRAPHS / "tin20-val-00000.tar.gz") as tar:
        files = {m.name: tar.extractfile(m) for m in tar.getmembers() if m.name.endswith((".jpg", ".cls"))}
        content = {name: file.read() for name, file in files.items() if file}
    keys = [name.removesuffix(".jpg") for name in content if name.endswith(".jpg")][:n]
    pictures = [np.asarray(Image.open(io.BytesIO(content[f"{key}.jpg"])).convert("RGB")) for key in keys]
    return np.stack(pictures), np.array([int(content[f"{key}.cls"]) for key in keys])


@pytest.mark.parametrize("change", ["missing", "unexpected", "headless", "counters"])
def test_files(tmp_path: Path, change: str) -> None:
    """What the map needs must be there, what nobody knows must not; a head, and batch norm's counters, may lack."""
    torch.manual_seed(5)
    state, path = dict(torchvision.models.resnet18().state_dict()), tmp_path / "resnet.safetensors"
    match change:
        case "missing":
            del state["layer1.0.conv1.weight"]
        case "unexpected":
            state["layer9.weight"] = torch.zeros(1)
        case "headless":
            state = {k: v for k, v in state.items() if not k.startswith("fc.")}
        case "counters":
            state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    safetensors.torch.save_file(state, path)
    config = dataclasses.replace(RESNET, weights=str(path))
    if change in ("missing", "unexpected"):
        with pytest.raises(IntegrityError, match=r"layer[19]"):
            torchvision_network(config, fetch=True)
    else:
        network = torchvision_network(config, fetch=True)
        torch.testing.assert_close(network.state_dict()["conv1.weight"], state["conv1.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "resnet81"}, "resnet18"),
        ({"name": "fasterrcnn_resnet50_fpn"}, "no such model"),
        ({"layer": "features"}, "layer4"),
        ({"layer": ""}, "layer4"),
        ({"layer": "fc"}, "no square feature map"),
        ({"name": "swin_t", "layer": "features"}, "no square feature map"),
        ({"name": "squeezenet1_0", "layer": "features", "input_size": 8}, "larger encoder.input_size"),
        ({"weights": "absent.pth"}, "not a file"),
    ],
)
def test_what_cannot_be_is_told(changes: dict[str, object], message: str) -> None:
    """Names, layers and sizes that cannot be used bring those that can."""
    with pytest.raises(ConfigError, match=message):
        torchvision_network(dataclasses.replace(RESNET, **changes), fetch=True)


def test_a_failed_download_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hub` asks torchvision for its own weights; a file is the alternative."""

    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(EnvironmentFault, match=r"no network.*give it as encoder\.weights"):
        torchvision_network(dataclasses.replace(RESNET, weights="hub"), fetch=True)


def test_random_weights_are_seeded() -> None:
    """`random` is the same network every time."""
    a, b = (torchvision_network(RESNET, fetch=True).state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
