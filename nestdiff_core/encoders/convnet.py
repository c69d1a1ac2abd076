"""torchvision's networks as encoders: the output of one of their layers is the feature map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torchvision
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from nestdiff_core.config import EncoderConfig
from nestdiff_core.encoders.base import Encoder, normalisation
from nestdiff_core.encoders.weights import brief, fill, not_fetched, read_weights, require_known, seeded
from nestdiff_core.errors import ConfigError


class ConvEncoder(Encoder):
    """The map is what a layer puts out, the vector its average over positions.

    network: gives {"map": (B, C, S, S)}; a network of torchvision up to that layer, as `torchvision_network` makes.
    """

    def __init__(self, network: nn.Module, *, input_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        with torch.no_grad():  # only a run tells the shape
            channels, side, _ = network.eval()(torch.zeros(1, 3, input_size, input_size))["map"].shape[1:]
        super().__init__(
            map_channels=channels,
            map_side=side,
            vector_channels=channels,
            input_size=input_size,
            in_channels=3,
            mean=mean,
            std=std,
        )
        self.network = network

    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B D S S"], Float[Tensor, "B D"]]:
        x = x.contiguous(memory_format=torch.channels_last)  # colour images come so; faster on a CPU
        feature_map = self.network(x)["map"]
        return feature_map, feature_map.mean((2, 3))


class Classifier(ConvEncoder):
    """A network of torchvision with its head: which class it takes an image for, beside map and vector.

    network: gives {"map": (B, C, S, S), "logits": (B, num_classes)}.
    """

    def logits(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Of normalised images at the input size, in whichever mode the network is: what training needs."""
        return self.network(x.contiguous(memory_format=torch.channels_last))["logits"]

    @torch.no_grad()
    def classify(self, images: UInt8[np.ndarray, "B H W C"]) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B K"]]:
        """Vector, as `encode` gives it, and logits of uint8 images of any side, on the encoder's device."""
        self.eval()
        found = self.network(self.prepare(images).contiguous(memory_format=torch.channels_last))
        return found["map"].mean((2, 3)), found["logits"]


def torchvision_network(config: EncoderConfig, *, fetch: bool, num_classes: int = 0, seed: int = 0) -> nn.Module:
    """torchvision's `config.name` up to `config.layer`; without `fetch` from `seed`, whatever config.weights.

    num_classes: of its head, which is there too and gives `logits`; 0: only the layer's `map`. Raises ConfigError for
    a name, layer or input size that cannot be used, EnvironmentFault when a download fails, IntegrityError for a file
    that does not fit the whole network (a head that is not asked for is not missed).
    """
    known = torchvision.models.list_models(module=torchvision.models)
    require_known(config.name, known, "torchvision", listing="torchvision.models.list_models()")
    hub = fetch and config.weights == "hub"
    try:
        with seeded(seed):
            head = {"num_classes": num_classes} if num_classes and not hub else {}
            whole = torchvision.models.get_model(config.name, weights="DEFAULT" if hub else None, **head).eval()
    except Exception as error:  # urllib's errors, and those of a damaged download
        if hub:
            raise not_fetched(f"torchvision's weights of {config.name}", error) from error
        raise
    network = _up_to(whole, config, num_classes)
    if fetch and config.weights not in ("hub", "random"):
        path = Path(config.weights).expanduser()
        fill(network, read_weights(path), path, spare=whole.state_dict())
    return network


def torchvision_normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation with which torchvision's own weights of this network were trained."""
    transforms = torchvision.models.get_model_weights(name)["DEFAULT"].transforms()
    return tuple(transforms.mean), tuple(transforms.std)


def torchvision_encoder(config: EncoderConfig, network: nn.Module) -> ConvEncoder:
    """Joins a network of torchvision with the normalisation it was trained with, or with the experiment's."""
    mean, std = normalisation(config, *torchvision_normalisation(config.name))
    return ConvEncoder(network, input_size=config.input_size, mean=mean, std=std)


def torchvision_classifier(config: EncoderConfig, num_classes: int, *, seed: int | None = None) -> Classifier:
    """torchvision's network with the head that `config.weights` has; with a seed untrained instead.

    Raises what `torchvision_network` raises.
    """
    network = torchvision_network(config, fetch=seed is None, num_classes=num_classes, seed=seed or 0)
    mean, std = normalisation(config, *torchvision_normalisation(config.name))
    return Classifier(network, input_size=config.input_size, mean=mean, std=std)


def _up_to(whole: nn.Module, config: EncoderConfig, num_classes: int) -> nn.Module:
    """The part of a network that `config.layer` depends on, and with `num_classes` what gives these."""
    if not config.layer or config.layer not in dict(whole.named_modules()):
        raise ConfigError(
            f"{config.name} has no such layer",
            key="encoder.layer",
            expected=[name for name, _ in whole.named_children()],
            found=config.layer,
            fix="Name one of these, or a layer inside of them (features.3).",
        )
    try:
        wanted = {config.layer: "map"}
        if num_classes:
            wanted[get_graph_node_names(whole, suppress_diff_warning=True)[1][-1]] = "logits"
        part = create_feature_extractor(whole, wanted, suppress_diff_warning=True).eval()
        with torch.no_grad():
            found = part(torch.zeros(1, 3, config.input_size, config.input_size))
        shape = found["map"].shape
    except (RuntimeError, ValueError) as error:  # torch's for too small an image, fx's for a layer that is not reached
        raise ConfigError(
            f"{config.name} cannot be used up to {config.layer} ({brief(error)})",
            key="encoder.layer",
            found=f"{config.layer} at {config.input_size} pixels",
            fix="Choose another encoder.layer, or a larger encoder.input_size.",
        ) from error
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ConfigError(
            f"{config.layer} of {config.name} has no square feature map",
            key="encoder.layer",
            expected="an output (channels, side, side)",
            found=tuple(shape[1:]),
            fix="Name a layer before the pooling.",
        )
    if num_classes and found["logits"].shape != (1, num_classes):
        raise ConfigError(
            f"The head of {config.name} tells another number of classes apart",
            key="evaluation.judges.num_classes",
            expected=tuple(found["logits"].shape[1:]),
            found=num_classes,
            fix="Give the number of classes that it was trained for.",
        )
    return part
