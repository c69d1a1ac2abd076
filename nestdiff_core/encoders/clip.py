"""CLIP models of open_clip: their image towers as encoders, and what their text towers (text.py) share with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from jaxtyping import Float
from open_clip.transformer import VisionTransformer
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from nestdiff_core.config import EncoderConfig
from nestdiff_core.encoders.base import Encoder, normalisation
from nestdiff_core.encoders.weights import fill, not_fetched, read_weights, require_known, seeded
from nestdiff_core.errors import ConfigError

HUB = "hub:"
_POSITIONS = "positional_embedding"
_OPENAI = ("input_resolution", "context_length", "vocab_size")  # numbers that only OpenAI's own files hold
_JOINT = ("logit_scale", "logit_bias")  # of neither tower
_TINY = {"layers": 1, "width": 64}  # the tower that a model must have and nobody uses


class ClipEncoder(Encoder):
    """The image tower of a CLIP: the map is its patch tokens after the final norm, the vector the embedding.

    The map is not projected (ViT-B/16 at 224 pixels: 768 x 14 x 14); the vector is (512), and not normalised.
    """

    def __init__(
        self, network: VisionTransformer, *, input_size: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__(
            map_channels=network.conv1.out_channels,
            map_side=network.grid_size[0],
            vector_channels=network.output_dim,
            input_size=input_size,
            in_channels=3,
            mean=mean,
            std=std,
        )
        self.network = network

    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B D S S"], Float[Tensor, "B V"]]:
        out: dict[str, Any] = self.network.forward_intermediates(x, indices=1, normalize_intermediates=True)
        return out["image_intermediates"][-1], out["image_features"]


def clip_network(config: EncoderConfig, *, fetch: bool) -> VisionTransformer:
    """open_clip's image tower `config.name` for `config.input_size`; without `fetch` from a fixed seed.

    Raises ConfigError for a name or tag that open_clip does not know, for a tower that is no vision transformer of
    open_clip's own, and for an input size that does not fit its patches; EnvironmentFault when a download fails;
    IntegrityError for a file that does not fit.
    """
    shape = clip_shape(config.name, config.weights)
    vision = shape["vision_cfg"]
    if "timm_model_name" in vision or isinstance(vision["layers"], list) or vision.get("attentional_pool"):
        raise ConfigError(
            f"The image tower of {config.name} cannot be used as an encoder",
            key="encoder.name",
            expected="a vision transformer of open_clip's own, such as ViT-B-16",
            found=vision.get("timm_model_name", "a ResNet, or attention pooling"),
            fix="Choose another encoder.name; timm has SigLIP, EVA and more under encoder.kind: timm.",
        )
    if config.input_size % vision["patch_size"]:
        raise ConfigError(
            f"{config.name} cannot be used at this size",
            key="encoder.input_size",
            expected=f"a multiple of the patch size {vision['patch_size']}",
            found=config.input_size,
            fix="Change encoder.input_size.",
        )
    with seeded(0):
        network = _model(shape, vision={**vision, "image_size": config.input_size}, text=_TINY).visual
    if fetch and (path := clip_file(config.name, config.weights)):
        state = clip_state(path, "visual", shape)
        positions = state.get(_POSITIONS)
        if positions is not None and math.isqrt(len(positions) - 1) ** 2 == len(positions) - 1:  # else no image tower's
            state[_POSITIONS] = resample_abs_pos_embed(positions[None].float(), list(network.grid_size))[0]
        fill(network, state, path)
    return network


def clip_encoder(config: EncoderConfig, network: VisionTransformer) -> ClipEncoder:
    """Joins an image tower with the normalisation it was trained with, or with the experiment's."""
    published = open_clip.get_pretrained_cfg(config.name, _tag(config.weights) or "")
    mean, std = normalisation(
        config,
        tuple(published.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        tuple(published.get("std", open_clip.OPENAI_DATASET_STD)),
    )
    return ClipEncoder(network, input_size=config.input_size, mean=mean, std=std)


class ImageTower(NamedTuple):
    """The image tower of a CLIP of any kind, images -> embeddings, and how images enter it."""

    network: nn.Module
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def image_tower(name: str, weights: str, *, where: str = "encoder") -> ImageTower:
    """The whole image tower of open_clip's `name` at its own input size, residual networks and timm's included.

    Raises ConfigError, EnvironmentFault and IntegrityError as `clip_network`.
    """
    shape = clip_shape(name, weights, where=where)
    size = shape["vision_cfg"]["image_size"]
    with seeded(0):
        network = _model(shape, vision=shape["vision_cfg"], text=_TINY).visual
    if path := clip_file(name, weights, where=where):
        fill(network, clip_state(path, "visual", shape, where=where), path, where=where)
    published = open_clip.get_pretrained_cfg(name, _tag(weights) or "")
    mean, std = (
        tuple(published.get(key, default))
        for key, default in (("mean", open_clip.OPENAI_DATASET_MEAN), ("std", open_clip.OPENAI_DATASET_STD))
    )
    return ImageTower(network, size if isinstance(size, int) else size[0], mean, std)


# --- what both towers share ---------------------------------------------------------------------------------------


def clip_shape(name: str, weights: str, *, where: str = "encoder") -> dict[str, Any]:
    """open_clip's description of model `name`, with the activation that `weights` were trained with.

    A tag of the hub says which that was. Of a file only the name can: it ends in -quickgelu for OpenAI's weights.
    """
    require_known(name, open_clip.list_models(), "open_clip", key=f"{where}.name", listing="open_clip.list_models()")
    shape: dict[str, Any] = open_clip.get_model_config(name) or {}
    if tag := _tag(weights):
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tag not in tags:
            raise ConfigError(
                f"open_clip has no such weights of {name}",
                key=f"{where}.weights",
                expected=[f"{HUB}{known}" for known in tags],
                found=weights,
                fix="Name one of these, or a local file.",
            )
        shape["quick_gelu"] = shape.get("quick_gelu") or open_clip.get_pretrained_cfg(name, tag).get("quick_gelu")
    return shape


def clip_file(name: str, weights: str, *, where: str = "encoder") -> Path | None:
    """The file of `weights`, which the hub's tag may have to fetch; None for random ones."""
    if weights == "random":
        return None
    if weights == "hub":
        raise ConfigError(
            "open_clip has several weights of a model",
            key=f"{where}.weights",
            expected=[f"{HUB}{tag}" for tag in open_clip.list_pretrained_tags_by_model(name)],
            found=weights,
            fix="Name one of these, or a local file.",
        )
    if not (tag := _tag(weights)):
        return Path(weights).expanduser()
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, tag)))
    except Exception as error:  # the hub's client has errors of its own, not derived from OSError
        raise not_fetched(f"open_clip's {tag} of {name}", error, where=where) from error


def clip_state(path: Path, tower: str, shape: dict[str, Any], *, where: str = "encoder") -> dict[str, Tensor]:
    """The weights of a tower (visual or text) in a file of a whole CLIP, or of that tower alone."""
    state = {key.removeprefix("module."): value for key, value in read_weights(path, where=where).items()}
    if any(key in state for key in _OPENAI) and not shape.get("quick_gelu"):
        raise ConfigError(
            f"{path.name} holds OpenAI's weights, which were trained with another activation (QuickGELU)",
            key=f"{where}.name",
            path=path,
            expected="a name that ends in -quickgelu",
            fix=f"Add -quickgelu to {where}.name.",
        )
    if mine := {k.removeprefix(f"{tower}."): v for k, v in state.items() if k.startswith(f"{tower}.")}:
        return mine
    # Models of OpenAI's layout have the text tower at the root, beside `visual.`.
    return {k: v for k, v in state.items() if not k.startswith("visual.") and k not in (*_JOINT, *_OPENAI)}


def text_model(shape: dict[str, Any]) -> Any:
    """The untrained text tower of a description, without its image tower."""
    with seeded(0):
        return _model(shape, vision={**_TINY, "patch_size": 32}, text=shape["text_cfg"]).text


def _model(shape: dict[str, Any], *, vision: dict[str, Any], text: dict[str, Any]) -> Any:
    towers = open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)
    return open_clip.CustomTextCLIP(shape["embed_dim"], *towers, quick_gelu=bool(shape.get("quick_gelu"))).eval()


def _tag(weights: str) -> str | None:
    return weights.removeprefix(HUB) if weights.startswith(HUB) else None
