"""The denoiser of one level: a U-ViT that also reads every latent above as tokens.

Owns how conditions become tokens, what stands for "none", and how a denoiser follows from an experiment. What the
output means (eps, v or x) is the diffusion's business; condition noise is added before the latents come here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from nestdiff_core.config import ExperimentConfig, UViTConfig
from nestdiff_core.errors import ConfigError
from nestdiff_core.models.layers import INIT_STD, PatchEmbed, initialise, sincos_positions, timestep_embedding
from nestdiff_core.models.uvit import Backbone, UViT


class LatentTokens(NamedTuple):
    """How a latent enters a transformer: its (channels, height, width) and the side of a patch."""

    shape: tuple[int, int, int]
    patch_size: int

    @property
    def token_grid(self) -> tuple[int, int]:
        return self.shape[1] // self.patch_size, self.shape[2] // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.token_grid[0] * self.token_grid[1]


class ConditionEmbed(nn.Module):
    """Tokens of one latent above: patches with positions, or a learned empty sequence where it is dropped."""

    def __init__(self, latent: LatentTokens, width: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(latent.shape[0], latent.patch_size, width)
        self.pos_embed = nn.Parameter(torch.empty(1, latent.num_tokens, width))
        self.empty = nn.Parameter(torch.empty(1, latent.num_tokens, width))

    def forward(self, z_m: Float[Tensor, "B C H W"], drop: Bool[Tensor, " B"] | None) -> Float[Tensor, "B T D"]:
        tokens = self.patch_embed(z_m) + self.pos_embed
        return tokens if drop is None else torch.where(drop[:, None, None], self.empty, tokens)


class NestedDenoiser(Backbone):
    """D_l: reads one noised latent and every latent above it that conditions it (arXiv 2412.05984).

        output = D_l(z_l^(t), t; z_L, ..., z_{l+1})

    One token sequence from abstract to concrete; only the last group is read out:

        [ time | label | z_L | ... | z_{l+1} | z_l^(t) ]

    Conditions enter as tokens because levels live on different grids: attention does the resizing. They are kept in
    order from the top, so weights do not know level numbers: inserting a level below leaves a denoiser as it is.

    level: its number. latent: z_l. above: the conditions by level number. num_classes: without the null class, which
    becomes the last row of the label table; 0 is no label token. generator: of the initialisation.
    """

    def __init__(
        self,
        level: int,
        latent: LatentTokens,
        above: Mapping[int, LatentTokens],
        config: UViTConfig,
        *,
        num_classes: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(latent.shape, latent.patch_size, config, num_extras=1 + (num_classes > 0))
        self.level, self.levels_above = level, tuple(sorted(above, reverse=True))
        self.num_classes = num_classes
        self.label_emb = nn.Embedding(num_classes + 1, config.width) if num_classes else None
        self.above = {m: above[m] for m in self.levels_above}
        conditions = [ConditionEmbed(tokens, config.width) for tokens in self.above.values()]
        self.conditions = nn.ModuleList(conditions)

        initialise(self, generator)
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD, generator=generator)
        for condition in conditions:
            nn.init.trunc_normal_(condition.pos_embed, std=INIT_STD, generator=generator)
            nn.init.trunc_normal_(condition.empty, std=INIT_STD, generator=generator)
        if config.position_init == "sincos":
            self.pos_embed.data[:, -self.num_patches :] = sincos_positions(*self.token_grid, self.width)
            for tokens, condition in zip(self.above.values(), conditions, strict=True):
                rows, columns = tokens.token_grid
                condition.pos_embed.data[:] = sincos_positions(
                    rows, columns, self.width, spacing=self.token_grid[0] / rows
                )

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, all groups together."""
        return self.pos_embed.shape[1] + sum(tokens.num_tokens for tokens in self.above.values())

    def forward(
        self,
        z_l_t: Float[Tensor, "B C H W"],
        t: Float[Tensor, " B"],
        z_above: Mapping[int, Float[Tensor, "B _ _ _"]],
        labels: Int[Tensor, " B"] | None = None,
        drop: Bool[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """The network's raw output for z_l^(t), at the scale of its training target.

        t runs from 0 (data) to 1 (noise). z_above is keyed by level number and holds exactly `levels_above`; {} for
        the top level. labels: class indices, None for the null class everywhere. drop: samples that see neither
        conditions nor label.

        Raises ConfigError for another set of levels, or labels that the network has no table for.
        """
        self._check(z_above, labels)
        extras = [timestep_embedding(t * 1000.0, self.width)[:, None]]
        if self.label_emb is not None:
            extras.append(self.label_emb(self._class_rows(len(t), labels, drop))[:, None])
        own = torch.cat([*extras, self.patch_embed(z_l_t)], dim=1) + self.pos_embed
        above = [embed(z_above[m], drop) for m, embed in zip(self.levels_above, self.conditions, strict=True)]
        tokens = torch.cat([own[:, : len(extras)], *above, own[:, len(extras) :]], dim=1)
        return self.read_out(self.transform(tokens))

    def _class_rows(self, batch: int, labels: Tensor | None, drop: Tensor | None) -> Int[Tensor, " B"]:
        """Rows of the label table: the null class, the last, where there is no label or it is dropped."""
        if labels is None:
            return torch.full((batch,), self.num_classes, device=self.pos_embed.device)
        return labels if drop is None else torch.where(drop, self.num_classes, labels)

    def _check(self, z_above: Mapping[int, Tensor], labels: Tensor | None) -> None:
        if set(z_above) != set(self.levels_above):
            raise ConfigError(
                f"The denoiser of level {self.level} got the wrong conditions",
                level=self.level,
                key="z_above",
                expected=list(self.levels_above),
                found=sorted(z_above, reverse=True),
                fix="Give it the latents of exactly these levels; config.levels_above(level) names them.",
            )
        if labels is not None and self.label_emb is None:
            raise ConfigError(
                f"The denoiser of level {self.level} takes no labels",
                level=self.level,
                key="labels",
                expected=None,
                found=f"{len(labels)} labels",
                fix="Leave them out, or set conditioning.labels: class and train it so.",
            )

    def example_inputs(self, batch_size: int, device: torch.device | str) -> tuple[object, ...]:
        """Zeros in the shapes that `forward` takes, labels and drops included."""
        z_above = {m: torch.zeros(batch_size, *tokens.shape, device=device) for m, tokens in self.above.items()}
        labels = torch.zeros(batch_size, dtype=torch.long, device=device) if self.num_classes else None
        drop = torch.zeros(batch_size, dtype=torch.bool, device=device)
        z_l_t, t = torch.zeros(batch_size, *self.shape, device=device), torch.zeros(batch_size, device=device)
        return z_l_t, t, z_above, labels, drop


def build_denoiser(
    config: ExperimentConfig, level: int, num_classes: int, *, generator: torch.Generator | None = None
) -> NestedDenoiser:
    """The untrained denoiser of `level`. num_classes: without the null class; 0 where the experiment has no labels."""

    def latent(m: int) -> LatentTokens:
        return LatentTokens(config.latent_shape(m), config.level(m).patch_size)

    has_labels = config.conditioning.labels == "class"
    if has_labels != (num_classes > 0):
        raise ConfigError(
            "The number of classes contradicts conditioning.labels",
            level=level,
            key="num_classes",
            expected=">= 1" if has_labels else 0,
            found=num_classes,
            fix="Set conditioning.labels to `class` where the images have labels, else to `none`.",
        )
    above = {m: latent(m) for m in config.levels_above(level)}
    return NestedDenoiser(
        level, latent(level), above, config.level(level).model, num_classes=num_classes, generator=generator
    )


def count_parameters(module: nn.Module) -> int:
    """Numbers in all parameters."""
    return sum(p.numel() for p in module.parameters())


def count_macs(module: UViT | NestedDenoiser) -> int:
    """Multiply-accumulates of one forward pass for one image: linear, convolution and both attention products.

    Traced on the meta device: nothing is computed and the module's own weights stay where they are.
    """
    weights = {name: p.detach().to("meta") for name, p in module.named_parameters()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(module, weights, module.example_inputs(1, "meta"))
    return counter.get_total_flops() // 2
