"""Image towers of open_clip's CLIP models as encoders."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
from jaxtyping import Float
from open_clip.transformer import VisionTransformer
from torch import Tensor

from nestdiff_core.config import EncoderConfig, TextConfig
from nestdiff_core.encoders.base import Encoder, normalisation
from nestdiff_core.encoders.weights import brief, fill, not_fetched, read_weights, require_known, seeded
from nestdiff_core.errors import ConfigError

HUB, QUICK = "hub:", "-quickgelu"


class ClipEncoder(Encoder):
    """A CLIP vision transformer: the map is its patch tokens after the final norm, the vector the projected embedding.

    For ViT-B/16 at 224 pixels 14 x 14 tokens of 768 channels and a vector of 512.
    """

    def __init__(self, network: VisionTransformer, *, input_size: int, mean: tuple[float, ...], std: tuple[float, ...]):
        channels = network.conv1.out_channels
        super().__init__(
            map_channels=channels,
            map_side=network.grid_size[0],
            vector_channels=channels if network.proj is None else network.proj.shape[1],
            input_size=input_size,
            in_channels=3,
            mean=mean,
            std=std,
        )
        self.network = network

    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B D S S"], Float[Tensor, "B V"]]:
        network: Any = self.network
        tokens = network.ln_post(network.transformer(network._embeds(x)))
        vector = tokens[:, 0] if network.proj is None else tokens[:, 0] @ network.proj
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (self.map_side, self.map_side)), vector


def clip_encoder(config: EncoderConfig, *, fetch: bool) -> ClipEncoder:
    """The image tower of `config.name`; without `fetch` its weights are random, from a fixed seed.

    Raises ConfigError for a name that open_clip does not know or a tower that is no plain vision transformer with a
    class token, EnvironmentFault when a download fails, IntegrityError for a file that does not fit.
    """
    model = clip_model(config, "encoder", fetch=fetch, image_size=config.input_size)
    visual = model.visual
    if not isinstance(visual, VisionTransformer) or visual.pool_type != "tok" or visual.attn_pool is not None:
        raise ConfigError(
            f"{config.name} cannot be used as an encoder",
            key="encoder.name",
            expected="a vision transformer with a class token",
            found=type(visual).__name__,
            fix="Choose another encoder.name, such as ViT-B-16.",
        )
    published = open_clip.get_model_preprocess_cfg(model)
    mean, std = normalisation(config, tuple(published["mean"]), tuple(published["std"]))
    return ClipEncoder(visual, input_size=config.input_size, mean=mean, std=std)


def clip_model(config: EncoderConfig | TextConfig, where: str, *, fetch: bool, image_size: int | None = None) -> Any:
    """open_clip's model `config.name` with `config.weights`; `where` is the setting's place, for errors.

    OpenAI's weights need the activation that they were trained with: their tags choose it, for a file the name has to
    end in -quickgelu.
    """
    name, weights = config.name, config.weights
    require_known(name, open_clip.list_models(), "open_clip", key=f"{where}.name", listing="open_clip.list_models()")
    tag = weights.removeprefix(HUB) if weights.startswith(HUB) else None
    if tag is not None:
        published = open_clip.get_pretrained_cfg(name, tag)
        if not published:
            raise ConfigError(
                f"open_clip has no weights {tag!r} of {name}",
                key=f"{where}.weights",
                expected=[f"{HUB}{known}" for known in open_clip.list_pretrained_tags_by_model(name)],
                found=weights,
                fix="Name one of these, or a file.",
            )
        if published.get("quick_gelu") and not name.endswith(QUICK):
            name += QUICK
    try:
        with seeded(0), _without_warnings():
            model = open_clip.create_model(name, pretrained=tag if fetch else None, force_image_size=image_size)
    except Exception as error:  # the hub's client has errors of its own, not derived from OSError
        if tag is not None and fetch:
            raise not_fetched(f"open_clip's weights {tag} of {name}", error, where=where) from error
        raise ConfigError(
            f"{name} cannot be built ({brief(error)})",
            key=f"{where}.name",
            found=name,
            fix="Choose another name, or an input_size that fits its patches.",
        ) from error
    if fetch and tag is None and weights != "random":
        _load(model, Path(weights).expanduser(), where)
    return model.eval()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """open_clip warns of random weights, which are asked for here, or loaded next."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load(model: Any, path: Path, where: str) -> None:
    """Fill the tower that is used; the other one may be missing in the file."""
    state = {key.removeprefix("module."): value for key, value in read_weights(path, where=where).items()}
    state = open_clip.factory.convert_state_dict(model, state)
    if where == "encoder":
        open_clip.factory.resize_pos_embed(state, model)
        visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        fill(model.visual, visual, path, where=where)
        return
    text = {key: value for key, value in state.items() if not key.startswith("visual.")}
    own = {key: value for key, value in model.state_dict().items() if key.startswith("visual.")}
    sizes = ("input_resolution", "context_length", "vocab_size")  # OpenAI's files hold these beside the weights
    fill(model, {**text, **own}, path, where=where, spare=sizes)
