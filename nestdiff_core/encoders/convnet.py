"""torchvision's networks as encoders: the output of one of their layers is the feature map."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from nestdiff_core.config import EncoderConfig
from nestdiff_core.encoders.base import Encoder, normalisation
from nestdiff_core.encoders.weights import brief, fill, not_fetched, read_weights, require_known, seeded
from nestdiff_core.errors import ConfigError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ConvEncoder(Encoder):
    """The map is what `layer` puts out, the vector its average over positions."""

    def __init__(
        self, network: nn.Module, layer: str, *, input_size: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        extractor = create_feature_extractor(network, {layer: "map"})
        with torch.no_grad():
            shape = extractor.eval()(torch.zeros(1, 3, input_size, input_size))["map"].shape
        if len(shape) != 4 or shape[2] != shape[3]:
            raise ConfigError(
                "encoder.layer has no square feature map",
                key="encoder.layer",
                expected="an output (channels, side, side)",
                found=f"{layer} with {tuple(shape[1:])}",
                fix="Name a layer before the pooling.",
            )
        super().__init__(
            map_channels=shape[1],
            map_side=shape[2],
            vector_channels=shape[1],
            input_size=input_size,
            in_channels=3,
            mean=mean,
            std=std,
        )
        self.network, self._extractor = network, extractor

    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B D S S"], Float[Tensor, "B D"]]:
        feature_map = self._extractor(x)["map"]
        return feature_map, feature_map.mean((2, 3))


def torchvision_encoder(config: EncoderConfig, *, fetch: bool) -> ConvEncoder:
    """torchvision's `config.name`; without `fetch` its weights are random, from a fixed seed.

    Raises ConfigError for a name, layer or input size that cannot be used, EnvironmentFault when a download fails,
    IntegrityError for a file that does not fit.
    """
    require_known(
        config.name, torchvision.models.list_models(), "torchvision", listing="torchvision.models.list_models()"
    )
    hub = fetch and config.weights == "hub"
    try:
        with seeded(0):
            network = torchvision.models.get_model(config.name, weights="DEFAULT" if hub else None)
    except Exception as error:
        if not hub:
            raise
        raise not_fetched(f"torchvision's weights of {config.name}", error) from error
    layers = dict(network.named_modules())
    if not config.layer or config.layer not in layers:
        raise ConfigError(
            f"{config.name} has no such layer",
            key="encoder.layer",
            expected=[name for name, _ in network.named_children()],
            found=config.layer,
            fix="Name one of these, or a layer inside of them.",
        )
    if fetch and config.weights not in ("hub", "random"):
        path = Path(config.weights).expanduser()
        fill(network, read_weights(path), path)
    mean, std = normalisation(config, *IMAGENET)
    try:
        return ConvEncoder(network, config.layer, input_size=config.input_size, mean=mean, std=std)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{config.name} cannot be used up to {config.layer} ({brief(error)})",
            key="encoder.layer",
            found=f"{config.layer} at {config.input_size} pixels",
            fix="Choose another layer, or a larger encoder.input_size.",
        ) from error
