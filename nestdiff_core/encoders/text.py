"""Captions as tokens: the last hidden states of a frozen CLIP text tower (77 x 768 for ViT-L/14, as U-ViT uses)."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from jaxtyping import Float
from torch import Tensor

from nestdiff_core.config import TextConfig
from nestdiff_core.encoders.clip import clip_model
from nestdiff_core.errors import ConfigError

WHERE = "conditioning.text"


class TextTower:
    """captions -> tokens (B, T, W): after the final norm, before pooling and projection."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device | str) -> None:
        tower = model if hasattr(model, "token_embedding") else model.text
        self.tower = tower.to(device).eval().requires_grad_(False)
        self.tokenizer, self.device = tokenizer, torch.device(device)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of tokens and their width."""
        return tuple(self.tower.positional_embedding.shape)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Float[Tensor, "B T W"]:
        """Longer captions are cut at the tower's length."""
        tower, tokens = self.tower, self.tokenizer(captions).to(self.device)
        x = tower.token_embedding(tokens) + tower.positional_embedding
        return tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))


def build_text_tower(config: TextConfig, *, device: torch.device | str = "cpu") -> TextTower:
    """The text tower of open_clip's `config.name`.

    Raises ConfigError for a name that open_clip does not know or a tower of another shape than the configuration
    says, EnvironmentFault when a download fails, IntegrityError for a file that does not fit.
    """
    model = clip_model(config, WHERE, fetch=True)
    tower = TextTower(model, open_clip.get_tokenizer(config.name), device)
    if tower.shape != (config.length, config.width):
        raise ConfigError(
            f"The text tower of {config.name} has another shape",
            key=f"{WHERE}.width" if tower.shape[0] == config.length else f"{WHERE}.length",
            expected=f"{tower.shape[0]} tokens of {tower.shape[1]}",
            found=f"{config.length} tokens of {config.width}",
            fix="Set conditioning.text.length and width to these.",
        )
    return tower
