"""Vision transformers of timm as encoders: building them, and loading weights from a file."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import torch
from jaxtyping import Float
from timm.data.config import resolve_model_data_config
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models import Beit, Eva, VisionTransformer
from torch import Tensor, nn

from nestdiff_core.config import EncoderConfig
from nestdiff_core.encoders.base import Encoder
from nestdiff_core.errors import ConfigError, EnvironmentFault, IntegrityError

PlainViT = VisionTransformer | Eva | Beit

_CONTAINERS = ("state_dict", "model", "teacher")  # under which published files keep their weights
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


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The block's initialisations come from `seed`; torch's own state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


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
    _check_name(config.name)
    try:
        with seeded(0):
            network = timm.create_model(config.name, pretrained=pretrained, num_classes=0, img_size=config.input_size)
    except Exception as error:  # the hub's client has errors of its own, not derived from OSError
        if pretrained:
            raise EnvironmentFault(
                f"timm could not fetch the weights of {config.name} ({error})",
                stage="encoder",
                key="encoder.weights",
                fix="Fetch them where there is a network, and give the file as encoder.weights.",
            ) from error
        raise _not_a_vit(config, str(error)) from error
    if not isinstance(network, PlainViT) or len(set(network.patch_embed.grid_size)) > 1:
        raise _not_a_vit(config, type(network).__name__)
    return network


def timm_encoder(config: EncoderConfig, network: PlainViT) -> ViTEncoder:
    """Joins a network of timm with the normalisation it was trained with."""
    data = resolve_model_data_config(network)
    return ViTEncoder(
        network, input_size=config.input_size, in_channels=3, mean=tuple(data["mean"]), std=tuple(data["std"])
    )


def load_weights(network: PlainViT, path: Path) -> None:
    """Load a published file (.safetensors, or plain tensors saved by torch) into `network`.

    The encoder's weights may lie under any prefix (a MoCo v3 file has `module.base_encoder.`); position embeddings
    are resampled to another grid; classification and projection heads are left out. Any other difference is an
    IntegrityError that names the keys.
    """
    state = _without_prefix(_read(path))
    adapt = getattr(importlib.import_module(type(network).__module__), "checkpoint_filter_fn", None)
    state = {k: v for k, v in (adapt(state, network) if adapt else state).items() if not k.startswith(_HEADS)}
    own = network.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise _misfit(
            path, f"{len(missing)} weights are missing and {len(unexpected)} are not known", missing[:5], unexpected[:5]
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise _misfit(path, f"{key} has another shape", tuple(own[key].shape), tuple(value.shape))
    network.load_state_dict(state)


def _check_name(name: str) -> None:
    known = set(timm.list_models(pretrained=True)) | set(timm.list_models())
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "timm.list_models('vit_*') lists them."
        raise ConfigError(
            "timm has no such model",
            key="encoder.name",
            found=name,
            expected=near or "a name that timm knows",
            fix=hint,
        )


def _not_a_vit(config: EncoderConfig, found: str) -> ConfigError:
    return ConfigError(
        f"{config.name} cannot be used as an encoder at input size {config.input_size}",
        key="encoder.name",
        expected="a plain vision transformer (patch tokens on a square grid)",
        found=found,
        fix="Choose another encoder.name, or an encoder.input_size that fits its patches.",
    )


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(
            "encoder.weights is not a file",
            key="encoder.weights",
            path=path,
            fix="Correct the path, or use `hub` or `random`.",
        )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly any class in torch's zip and pickle readers
        raise IntegrityError(
            f"{path.name} cannot be read as weights ({type(error).__name__}: {' '.join(str(error).split())[:300]})",
            stage="encoder",
            path=path,
            expected="a .safetensors file, or plain tensors saved by torch",
            fix="Get the file again, or save its tensors as .safetensors.",
        ) from error
    while name := next((name for name in _CONTAINERS if isinstance(content.get(name), Mapping)), None):
        content = content[name]
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a file that is an encoder; of several, not the momentum encoder or the student."""
    prefixes = [key.removesuffix(_STEM) for key in state if key.endswith(_STEM)]
    if not prefixes:
        return state
    prefix = min(prefixes, key=lambda p: ("momentum" in p or "student" in p, len(p)))
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _misfit(path: Path, what: str, expected: object, found: object) -> IntegrityError:
    return IntegrityError(
        f"The weights do not fit the encoder: {what}",
        stage="encoder",
        path=path,
        expected=expected,
        found=found,
        fix="Make encoder.name the model that the file was saved from.",
    )
