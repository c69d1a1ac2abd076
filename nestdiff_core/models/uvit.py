"""U-ViT (Bao et al., "All are Worth Words", arXiv 2209.12152): the transformer of every level.

`Backbone` is what all uses share: patches in, blocks with long skips, patches out. `UViT` puts the published
tokens in front of it and loads published weights; parameter names are the published ones. The denoiser of one
level of a hierarchy is in nested.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestdiff_core.config import UViTConfig
from nestdiff_core.errors import ConfigError, IntegrityError
from nestdiff_core.models.layers import (
    INIT_STD,
    LAYER_NORM_EPS,
    Block,
    PatchEmbed,
    initialise,
    timestep_embedding,
    unpatchify,
)

# Constructor arguments of the published networks.
PUBLISHED_DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "in_chans": 3,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
    "qkv_bias": False,
    "qk_scale": None,
    "mlp_time_embed": False,
    "num_classes": -1,
    "clip_dim": 768,
    "num_clip_token": 77,
    "conv": True,
    "skip": True,
    "use_checkpoint": False,
}


class Backbone(nn.Module):
    """Patch embedding, blocks with long skips, read-out.

        in-blocks x depth/2 -> mid-block -> out-blocks x depth/2 -> LayerNorm -> Linear -> grid -> 3x3 convolution

    shape: (C, H, W) of the latent. num_extras: tokens before the patches that have a position of this `pos_embed`.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        patch_size: int,
        config: UViTConfig,
        *,
        num_extras: int,
        qkv_bias: bool = False,
        skip: bool = True,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.shape, self.patch_size, self.width = shape, patch_size, config.width
        self.token_grid = height // patch_size, width // patch_size
        self.num_patches = self.token_grid[0] * self.token_grid[1]

        def block(*, skip: bool = False) -> Block:
            return Block(config.width, config.num_heads, config.mlp_ratio, qkv_bias=qkv_bias, skip=skip)

        self.patch_embed = PatchEmbed(channels, patch_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(1, num_extras + self.num_patches, config.width))
        self.in_blocks = nn.ModuleList(block() for _ in range(config.depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip=skip) for _ in range(config.depth // 2))
        self.checkpointing = False  # while training, compute each block again in the backward pass
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(config.width, patch_size**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if config.final_conv else nn.Identity()

    def transform(
        self, tokens: Float[Tensor, "B T D"], join: Callable[[int, Tensor], Tensor] = lambda _, tokens: tokens
    ) -> Float[Tensor, "B T D"]:
        """All blocks; out-block i reads the output of in-block depth/2 - i by its long skip.

        join: called with the number of each in- and out-block (from 0, through both) and the tokens that it made.
        """
        skips = []
        for i, block in enumerate(self.in_blocks):
            tokens = join(i, self._call(block, tokens))
            skips.append(tokens)
        tokens = self._call(self.mid_block, tokens)
        for i, block in enumerate(self.out_blocks, start=len(skips)):
            tokens = join(i, self._call(block, tokens, skips.pop()))
        return tokens

    def _call(self, block: nn.Module, *tokens: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *tokens, use_reentrant=False, preserve_rng_state=False)  # nothing is random
        return block(*tokens)

    def read_out(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B C H W"]:
        """The latent-shaped output, from the last `num_patches` tokens."""
        patches = self.decoder_pred(self.norm(tokens[:, -self.num_patches :]))
        return self.final_layer(unpatchify(patches, self.shape[0], *self.token_grid, self.patch_size))


class UViT(Backbone):
    """The published network: [time, patches], [label, time, patches] or [time, text, patches].

    num_classes: rows of the label table, the null class (the last) included; 0 is no label token.
    context_dim, num_context: width and number of the text tokens; 0 is none.
    time_mlp: two linear layers on the time token (published option, off in the published sizes).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        patch_size: int,
        config: UViTConfig,
        *,
        num_classes: int = 0,
        context_dim: int = 0,
        num_context: int = 0,
        time_mlp: bool = False,
        qkv_bias: bool = False,
        skip: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        num_extras = 1 + (num_classes > 0) + num_context
        super().__init__(shape, patch_size, config, num_extras=num_extras, qkv_bias=qkv_bias, skip=skip)
        width = config.width
        self.time_embed = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            if time_mlp
            else nn.Identity()
        )
        self.label_emb = nn.Embedding(num_classes, width) if num_classes else None
        self.context_embed = nn.Linear(context_dim, width) if num_context else None
        self.num_context = num_context
        initialise(self, generator, config.weight_init)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD, generator=generator)

    def forward(
        self, x: Float[Tensor, "B C H W"], t: Float[Tensor, " B"], condition: Tensor | None = None
    ) -> Float[Tensor, "B C H W"]:
        """t is n in 0..1000. condition: class indices (B,), text tokens (B, num_context, context_dim), or None."""
        time = self.time_embed(timestep_embedding(t, self.width))[:, None]
        patches = self.patch_embed(x)
        match condition, self.label_emb, self.context_embed:
            case None, None, None:
                tokens = [time, patches]
            case Tensor(), nn.Embedding() as embed, None:
                tokens = [embed(condition)[:, None], time, patches]
            case Tensor(), None, nn.Linear() as embed:
                tokens = [time, embed(condition), patches]
            case _:
                raise ConfigError(
                    "The condition does not fit this U-ViT",
                    key="condition",
                    expected=self._condition_kind(),
                    found=None if condition is None else tuple(condition.shape),
                    fix="Call it as module(x, n), module(x, n, labels) or module(x, n, context).",
                )
        return self.read_out(self.transform(torch.cat(tokens, dim=1) + self.pos_embed))

    def _condition_kind(self) -> str | None:
        if self.label_emb is not None:
            return "labels"
        return None if self.context_embed is None else "context"

    def example_inputs(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, ...]:
        """Zeros in the shapes that `forward` takes."""
        x, t = torch.zeros(batch_size, *self.shape, device=device), torch.zeros(batch_size, device=device)
        if self.label_emb is not None:
            return x, t, torch.zeros(batch_size, dtype=torch.long, device=device)
        if self.context_embed is not None:
            return x, t, torch.zeros(batch_size, self.num_context, self.context_embed.in_features, device=device)
        return x, t


def from_published(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> UViT:
    """The published network that `config` describes, with its weights; call it `module(x, n[, y or context])`.

    config: constructor arguments of the published U-ViT (img_size, patch_size, in_chans, embed_dim, depth, num_heads,
    mlp_ratio, qkv_bias, mlp_time_embed, num_classes, clip_dim, num_clip_token, conv, skip; what is left out has its
    published default). n is 0..1000. Raises ConfigError for a setting that this U-ViT does not have and
    IntegrityError when weights and config do not belong together.
    """
    unknown = {key: value for key, value in config.items() if key not in PUBLISHED_DEFAULTS}
    if unknown or config.get("qk_scale") is not None:
        raise ConfigError(
            "The published U-ViT is configured in a way that is not known here",
            key=", ".join(unknown) or "qk_scale",
            expected=f"settings among {sorted(PUBLISHED_DEFAULTS)}, qk_scale None",
            found=dict(config),
            fix="Leave the setting out if the weights do not depend on it.",
        )
    c = PUBLISHED_DEFAULTS | dict(config)
    is_text = "context_embed.weight" in state_dict
    module = UViT(
        (c["in_chans"], c["img_size"], c["img_size"]),
        c["patch_size"],
        UViTConfig(
            width=c["embed_dim"],
            depth=c["depth"] // 2 * 2,
            num_heads=c["num_heads"],
            mlp_ratio=float(c["mlp_ratio"]),
            final_conv=c["conv"],
        ),
        num_classes=max(c["num_classes"], 0),
        context_dim=c["clip_dim"],
        num_context=c["num_clip_token"] if is_text else 0,
        time_mlp=c["mlp_time_embed"],
        qkv_bias=c["qkv_bias"],
        skip=c["skip"],
    )
    _check_fit(module.state_dict(), state_dict)
    module.load_state_dict(state_dict)
    return module


def _check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name in sorted(set(expected) | set(found)):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (expected, found)]
        if shapes[0] != shapes[1]:
            raise IntegrityError(
                f"The weights do not fit the configuration in {name}",
                key=name,
                expected=shapes[0],
                found=shapes[1],
                fix="Give the constructor arguments that these weights were trained with.",
            )
