"""The denoiser of one level: a U-ViT that also reads every latent above as tokens.

Owns how conditions become tokens, what stands for "none", and how a denoiser follows from an experiment. What the
output means (eps, v or x) is the diffusion's business; condition noise is added before the latents come here.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from nestdiff_core.config import ExperimentConfig, UViTConfig
from nestdiff_core.errors import ConfigError, IntegrityError
from nestdiff_core.models.fusion import Fusion
from nestdiff_core.models.layers import INIT_STD, PatchEmbed, initialise, sincos_positions, timestep_embedding
from nestdiff_core.models.uvit import Backbone, UViT

# Samples of a batch whose conditions are withheld: all of them, or by "labels" and level number.
Drop = Bool[Tensor, " B"] | Mapping[Any, Bool[Tensor, " B"]]


# What scaled_dot_product_attention consists of on the meta device; nothing else here multiplies batches of matrices.
_ATTENTION = ("bmm", "attention")


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

    With injection `tokens` there is one sequence from abstract to concrete; only the last group is read out:

        [ label | time | text | z_L | ... | z_{l+1} | z_l^(t) ]

    Conditions enter as tokens because levels live on different grids: attention does the resizing. With `fusion` the
    sequence has no condition tokens, and convolutions add the conditions to the patches every two blocks (fusion.py).
    Conditions are kept in order from the top, so weights do not know level numbers: inserting a level below leaves a
    denoiser as it is. Names and order of everything else are the published U-ViT's, whose weights can be a start.

    level: its number. latent: z_l. above: the conditions by level number. num_classes: without the null class, which
    becomes the last row of the label table; 0 is no label token. text: number and width of the caption tokens that it
    reads, None for none; `null_context` holds the tokens of the empty caption, zeros until they are given.
    generator: of the initialisation.
    """

    null_context: Tensor

    def __init__(
        self,
        level: int,
        latent: LatentTokens,
        above: Mapping[int, LatentTokens],
        config: UViTConfig,
        *,
        injection: Literal["tokens", "fusion"] = "tokens",
        num_classes: int = 0,
        text: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        num_context, context_dim = text or (0, 0)
        super().__init__(latent.shape, latent.patch_size, config, num_extras=1 + (num_classes > 0) + num_context)
        self.level, self.levels_above = level, tuple(sorted(above, reverse=True))
        self.num_classes, self.num_context = num_classes, num_context
        self.label_emb = nn.Embedding(num_classes + 1, config.width) if num_classes else None
        self.context_embed = nn.Linear(context_dim, config.width) if text else None
        if text:
            self.register_buffer("null_context", torch.zeros(1, *text))
        self.above = {m: above[m] for m in self.levels_above}
        embeds, self.fusion = [], None
        if injection == "tokens":
            embeds = [ConditionEmbed(tokens, config.width) for tokens in self.above.values()]
        elif self.above:
            grids = {m: tokens.shape[:2] for m, tokens in self.above.items()}
            self.fusion = Fusion(grids, latent.shape[1], self.token_grid[0], config.width, config.depth)
        self.conditions = nn.ModuleList(embeds)

        initialise(self, generator, config.weight_init)
        if self.fusion is not None and config.weight_init == "xavier":
            self.fusion.begin_as_nothing()
        nn.init.trunc_normal_(self.pos_embed, std=INIT_STD, generator=generator)
        for condition in embeds:
            nn.init.trunc_normal_(condition.pos_embed, std=INIT_STD, generator=generator)
            nn.init.trunc_normal_(condition.empty, std=INIT_STD, generator=generator)
        if config.position_init == "sincos":
            self.pos_embed.data[:, -self.num_patches :] = sincos_positions(*self.token_grid, self.width)
            for tokens, condition in zip(self.above.values(), embeds, strict=False):
                rows, columns = tokens.token_grid
                condition.pos_embed.data[:] = sincos_positions(
                    rows, columns, self.width, spacing=self.token_grid[0] / rows
                )

    @property
    def num_condition_tokens(self) -> int:
        """Input tokens of one image that come from levels above."""
        return 0 if self.fusion else sum(tokens.num_tokens for tokens in self.above.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, all groups together."""
        return self.pos_embed.shape[1] + self.num_condition_tokens

    def forward(
        self,
        z_l_t: Float[Tensor, "B C H W"],
        t: Float[Tensor, " B"],
        z_above: Mapping[int, Float[Tensor, "B _ _ _"]],
        labels: Int[Tensor, " B"] | Float[Tensor, "B _ _"] | None = None,
        drop: Drop | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """The network's raw output for z_l^(t), at the scale of its training target.

        t runs from 0 (data) to 1 (noise). z_above is keyed by level number and holds exactly `levels_above`; {} for
        the top level. labels: class indices (B,) or caption tokens (B, T, W); None for the null class or the empty
        caption everywhere. drop: samples (B,) that see neither conditions nor label, or, to drop them one by one, such
        a mask for "labels" and for each level number; what is not there is kept.

        Raises ConfigError for another set of levels, or labels that the network has no table for.
        """
        self._check(z_above, labels)
        drops = drop if isinstance(drop, Mapping) else dict.fromkeys(("labels", *self.levels_above), drop)
        extras = [timestep_embedding(t * 1000.0, self.width)[:, None]]
        if self.label_emb is not None:
            extras.insert(0, self.label_emb(self._class_rows(len(t), labels, drops.get("labels")))[:, None])
        if self.context_embed is not None:
            extras.append(self.context_embed(self._context(len(t), labels, drops.get("labels"))))
        own = torch.cat([*extras, self.patch_embed(z_l_t)], dim=1) + self.pos_embed
        if self.fusion is not None:
            features = self.fusion.features(z_above, {m: _kept(drops.get(m)) for m in self.levels_above})
            return self.read_out(self.transform(own, partial(self.fusion.join, features=features)))
        above = [embed(z_above[m], drops.get(m)) for m, embed in zip(self.levels_above, self.conditions, strict=True)]
        tokens = torch.cat([own[:, : -self.num_patches], *above, own[:, -self.num_patches :]], dim=1)
        return self.read_out(self.transform(tokens))

    def start_from(self, published: Mapping[str, Tensor]) -> None:
        """Take the weights of a published U-ViT of the same shape; what reads the levels above stays as it is.

        Raises IntegrityError, naming the level and both shapes, for weights of another network.
        """
        own = {k: v for k, v in self.state_dict().items() if not k.startswith(("conditions.", "fusion."))}
        own.pop("null_context", None)
        for name in sorted(set(own) | set(published)):
            expected, found = (tuple(w[name].shape) if name in w else None for w in (own, published))
            if expected != found:
                raise IntegrityError(
                    f"The weights to start level {self.level} from are of another network",
                    stage="denoiser",
                    level=self.level,
                    key=name,
                    expected=expected,
                    found=found,
                    fix="Give the level the shape, patch size, labels and model that they were trained with.",
                )
        self.load_state_dict(dict(published), strict=False)

    def _class_rows(self, batch: int, labels: Tensor | None, drop: Tensor | None) -> Int[Tensor, " B"]:
        """Rows of the label table: the null class, the last, where there is no label or it is dropped."""
        if labels is None:
            return torch.full((batch,), self.num_classes, device=self.pos_embed.device)
        return labels if drop is None else torch.where(drop, self.num_classes, labels)

    def _context(self, batch: int, captions: Tensor | None, drop: Tensor | None) -> Float[Tensor, "B T W"]:
        """Caption tokens: those of the empty caption where there is none or it is dropped."""
        if captions is None:
            return self.null_context.expand(batch, -1, -1)
        return captions if drop is None else torch.where(drop[:, None, None], self.null_context, captions)

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
        if labels is not None and self.label_emb is None and self.context_embed is None:
            raise ConfigError(
                f"The denoiser of level {self.level} takes no labels",
                level=self.level,
                key="labels",
                expected=None,
                found=f"{len(labels)} labels",
                fix="Leave them out, or set conditioning.labels and train it so.",
            )

    def example_inputs(self, batch_size: int, device: torch.device | str) -> tuple[object, ...]:
        """Zeros in the shapes that `forward` takes, labels and drops included."""
        z_above = {m: torch.zeros(batch_size, *tokens.shape, device=device) for m, tokens in self.above.items()}
        labels = torch.zeros(batch_size, dtype=torch.long, device=device) if self.num_classes else None
        if self.context_embed is not None:
            labels = torch.zeros(batch_size, self.num_context, self.context_embed.in_features, device=device)
        drop = torch.zeros(batch_size, dtype=torch.bool, device=device)
        z_l_t, t = torch.zeros(batch_size, *self.shape, device=device), torch.zeros(batch_size, device=device)
        return z_l_t, t, z_above, labels, drop


def _kept(drop: Bool[Tensor, " B"] | None) -> Float[Tensor, " B"] | None:
    return None if drop is None else (~drop).float()


def build_denoiser(
    config: ExperimentConfig, level: int, num_classes: int, *, generator: torch.Generator | None = None
) -> NestedDenoiser:
    """The untrained denoiser of `level`. num_classes: without the null class; 0 where the experiment has no labels."""

    def latent(m: int) -> LatentTokens:
        return LatentTokens(config.latent_shape(m), config.level(m).patch_size)

    conditioning = config.conditioning
    has_classes = conditioning.labels == "class"
    if has_classes != (num_classes > 0):
        raise ConfigError(
            "The number of classes contradicts conditioning.labels",
            level=level,
            key="num_classes",
            expected=">= 1" if has_classes else 0,
            found=num_classes,
            fix="Set conditioning.labels to `class` where the images have labels, else to `none` or `text`.",
        )
    return NestedDenoiser(
        level,
        latent(level),
        {m: latent(m) for m in config.levels_above(level)},
        config.level(level).model,
        injection=conditioning.injection,
        num_classes=num_classes,
        text=(conditioning.text.length, conditioning.text.width) if conditioning.labels == "text" else None,
        generator=generator,
    )


def count_parameters(module: nn.Module, *, positions: bool = True) -> int:
    """Numbers in all parameters; without `positions`, less the position embedding of a U-ViT (as the paper counts)."""
    left_out = () if positions else ("pos_embed",)
    return sum(p.numel() for name, p in module.named_parameters() if name not in left_out)


def count_layer_norms(module: NestedDenoiser) -> int:
    """Five operations for every number that a LayerNorm sees in one forward pass for one image, as fvcore counts.

    MACs and these together are the count with which the paper's second version agrees in all three totals it prints.
    """
    num_norms = sum(isinstance(layer, nn.LayerNorm) for layer in module.modules())
    return 5 * module.width * ((num_norms - 1) * module.num_tokens + module.num_patches)  # the last: patches alone


def count_macs(module: UViT | NestedDenoiser, *, attention: bool = True) -> int:
    """Multiply-accumulates of one forward pass for one image: linear, convolution and both attention products.

    attention: without it the two products of queries, keys and values are left out (the paper's first version, which
    prints twice this number as GFlops). Traced on the meta device: nothing is computed and the module's own weights
    stay where they are.
    """
    weights = {
        name: p.detach().to("meta") for name, p in itertools.chain(module.named_parameters(), module.named_buffers())
    }
    # A compiled module cannot be traced. Where there is one the compiler is there, which takes seconds to load.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with torch.no_grad(), eager, FlopCounterMode(display=False) as counter:
        functional_call(module, weights, module.example_inputs(1, "meta"))
    by_operation = counter.get_flop_counts()["Global"]
    flops = sum(n for operation, n in by_operation.items() if attention or not str(operation).endswith(_ATTENTION))
    return flops // 2
