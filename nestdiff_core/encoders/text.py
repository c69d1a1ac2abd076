"""Captions as tokens: the last hidden states of a frozen CLIP text tower (77 x 768 for ViT-L/14, as U-ViT uses)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import open_clip
import safetensors.torch
import torch
from jaxtyping import Float, Int64
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from nestdiff_core.config import TextConfig
from nestdiff_core.encoders.clip import clip_file, clip_shape, clip_state, text_model
from nestdiff_core.encoders.weights import fill
from nestdiff_core.errors import ConfigError

WHERE = "conditioning.text"
_FOREIGN = ("hf_model_name", "hf_tokenizer_name", "embed_cls", "no_causal_mask")


class TextTower(nn.Module):
    """captions -> states (B, length, width) after the final norm, before pooling and projection.

    What Hugging Face's CLIPTextModel calls `last_hidden_state`, with its padding too: after the end of a caption
    every token is the end token (open_clip pads with zeros). States up to the end do not see it, those behind it do.
    """

    def __init__(self, network: TextTransformer) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.length, self.width = network.context_length, network.width
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.length)
        state = {key: value.contiguous() for key, value in network.state_dict().items()}
        self.weights_sha256 = hashlib.sha256(safetensors.torch.save(state)).hexdigest()

    def tokens(self, captions: Sequence[str]) -> Int64[Tensor, "B T"]:
        """Byte-pair tokens: start, caption (cut where it is too long), then end to the last."""
        tokens, end = self.tokenizer(list(captions)), self.tokenizer.eot_token_id
        return tokens.masked_fill((tokens == end).cumsum(1) > 0, end)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Float[Tensor, "B T W"]:
        """States of captions as float32, on the tower's device."""
        tokens = self.tokens(captions).to(self.network.token_embedding.weight.device)
        out: dict[str, Any] = self.network.forward_intermediates(
            tokens, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        return out["text_intermediates"][-1]


def build_text_tower(config: TextConfig, *, device: str | torch.device = "cpu") -> TextTower:
    """The frozen text tower of open_clip's `config.name`, on `device`.

    Raises ConfigError for a name or tag that open_clip does not know, or a tower that is not CLIP's or of another
    shape than the configuration says; EnvironmentFault when a download fails; IntegrityError for a file that does
    not fit.
    """
    shape = clip_shape(config.name, config.weights, where=WHERE)
    text = shape["text_cfg"]
    if foreign := [key for key in _FOREIGN if text.get(key)]:
        raise ConfigError(
            f"The text tower of {config.name} cannot be used",
            key=f"{WHERE}.name",
            expected="a causal transformer with CLIP's own tokeniser, such as ViT-L-14",
            found=foreign,
            fix=f"Choose another {WHERE}.name.",
        )
    if (text["context_length"], text["width"]) != (config.length, config.width):
        raise ConfigError(
            f"The text tower of {config.name} has another shape",
            key=f"{WHERE}.width" if text["context_length"] == config.length else f"{WHERE}.length",
            expected={"length": text["context_length"], "width": text["width"]},
            found={"length": config.length, "width": config.width},
            fix=f"Set {WHERE}.length and {WHERE}.width to what is expected, or choose another {WHERE}.name.",
        )
    network = text_model(shape)
    if path := clip_file(config.name, config.weights, where=WHERE):
        fill(network, clip_state(path, "text", shape, where=WHERE), path, where=WHERE)
    return TextTower(network).to(device)
