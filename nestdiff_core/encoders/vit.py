"""Vision transformers of timm as encoders: building them, and loading weights from a file."""

from __future__ import annotations

import importlib
from pathlib import Path

import timm
import torch
from jaxtyping import Float
from timm.data.config import resolve_model_data_config
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models import Beit, Eva, VisionTransformer
from torch import Tensor, nn

from nestdiff_core.config import EncoderConfig
from nestdiff_core.encoders.base import Encoder, normalisation
from nestdiff_core.encoders.weights import fill, not_fetched, read_weights, require_known, seeded
from nestdiff_core.errors import ConfigError

PlainViT = VisionTransformer | Eva | Beit

_HEADS = ("head.", "head_dist.", "fc.")  # behind the features: left out
_STEM = "patch_embed.proj.weight"


class ViTEncoder(Encoder):
    """A vision transformer: the map is its patch tokens after the final norm, the vector what a head would read.

    That is the class token for MoCo v3, DINO and most others, the mean of the patches for those trained with it.
    """

    def __init__(
        self,
        network: PlainViT,
        *,
        input_size: int,
        in_channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        channels, side = network.num_features, network.patch_embed.grid_size[0]
        super().__init__(
            map_channels=channels,
            map_side=side,
            vector_channels=channels,
            input_size=input_size,
            in_channels=in_channels,
            mean=mean,
            std=std,
        )
        self.network = network

    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B D S S"], Float[Tensor, "B V"]]:
        tokens = self.network.forward_features(x)  # (B, prefix + S S, D)
        patches = (
            tokens[:, self.network.num_prefix_tokens :].transpose(1, 2).unflatten(2, (self.map_side, self.map_side))
        )
        return patches, self.network.forward_head(tokens, pre_logits=True)


def moco_network(config: EncoderConfig, channels: int) -> VisionTransformer:
    """An untrained ViT as MoCo v3 begins with: its initialisation, fixed sine positions, frozen random patches."""
    vit = config.vit
    with seeded(config.moco.seed):
        network = VisionTransformer(
            img_size=config.input_size,
            patch_size=vit.patch_size,
            in_chans=channels,
            num_classes=0,
            embed_dim=vit.width,
            depth=vit.depth,
            num_heads=vit.num_heads,
            weight_init="moco",
        )
        bound = (6 / (channels * vit.patch_size**2 + vit.width)) ** 0.5
        nn.init.uniform_(network.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(network.patch_embed.proj.bias)
    positions = build_sincos2d_pos_embed(list(network.patch_embed.grid_size), vit.width)
    network.pos_embed = nn.Parameter(torch.cat([torch.zeros(1, vit.width), positions])[None], requires_grad=False)
    network.patch_embed.requires_grad_(False)
    return network


def timm_network(config: EncoderConfig, *, pretrained: bool = False) -> PlainViT:
    """timm's vision transformer `config.name` for `config.input_size`, from a fixed seed or timm's download.

    Raises ConfigError for a name that timm does not know or that is no plain vision transformer, EnvironmentFault
    when the download fails.
    """
    known = {*timm.list_models(pretrained=True), *timm.list_models()}
    require_known(config.name, known, "timm", listing="timm.list_models('vit_*')")
    try:
        with seeded(0):
            network = timm.create_model(config.name, pretrained=pretrained, num_classes=0, img_size=config.input_size)
    except Exception as error:  # the hub's client has errors of its own, not derived from OSError
        if pretrained:
            raise not_fetched(f"timm's weights of {config.name}", error) from error
        raise _not_a_vit(config, str(error)) from error
    if not isinstance(network, PlainViT) or len(set(network.patch_embed.grid_size)) > 1:
        raise _not_a_vit(config, type(network).__name__)
    return network


def timm_encoder(config: EncoderConfig, network: PlainViT) -> ViTEncoder:
    """Joins a network of timm with the normalisation it was trained with, or with the experiment's."""
    data = resolve_model_data_config(network)
    mean, std = normalisation(config, tuple(data["mean"]), tuple(data["std"]))
    return ViTEncoder(network, input_size=config.input_size, in_channels=3, mean=mean, std=std)


def load_weights(network: PlainViT, path: Path) -> None:
    """Load a published file (.safetensors, or plain tensors saved by torch) into `network`.

    The encoder's weights may lie under any prefix (a MoCo v3 file has `module.base_encoder.`); position embeddings
    are resampled to another grid; classification and projection heads are left out. Any other difference is an
    IntegrityError that names the keys.
    """
    state = _without_prefix(read_weights(path))
    adapt = getattr(importlib.import_module(type(network).__module__), "checkpoint_filter_fn", None)
    state = adapt(state, network) if adapt else state
    fill(network, {k: v for k, v in state.items() if not k.startswith(_HEADS)}, path)


def _not_a_vit(config: EncoderConfig, found: str) -> ConfigError:
    return ConfigError(
        f"{config.name} cannot be used as an encoder at input size {config.input_size}",
        key="encoder.name",
        expected="a plain vision transformer (patch tokens on a square grid)",
        found=found,
        fix="Choose another encoder.name, or an encoder.input_size that fits its patches.",
    )


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a file that is an encoder; of several, not the momentum encoder or the student."""
    prefixes = [key.removesuffix(_STEM) for key in state if key.endswith(_STEM)]
    if not prefixes:
        return state
    prefix = min(prefixes, key=lambda p: ("momentum" in p or "student" in p, len(p)))
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
