"""Building blocks of U-ViT: time embedding, positions, patches, attention blocks, initialisation.

How blocks are wired into a network is said in uvit.py; which tokens enter it, there and in nested.py.

B batch; T tokens; D token width; C, H, W channels and grid of a latent; p patch side.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-5
INIT_STD = 0.02


def timestep_embedding(n: Float[Tensor, " B"], width: int) -> Float[Tensor, "B {width}"]:
    """[cos(n f_i), sin(n f_i)] with f_i = 10000^(-i / half), half = width // 2; an odd width ends in a zero column.

    n is a time in 0..1000 and need not be whole.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=n.device) / half)
    angles = n.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


def sincos_positions(rows: int, columns: int, width: int, *, spacing: float = 1.0) -> Float[Tensor, "1 T {width}"]:
    """2-d sine and cosine embedding of the token centres of a grid: half of the width says the row, half the column.

    Centres are measured in tokens of a reference grid that covers the same square, on which this grid's tokens lie
    `spacing` apart: the tokens of a coarse condition then stand in the middle of the image tokens that they cover.
    """

    def axis(count: int, size: int) -> Tensor:
        centres = (torch.arange(count) + 0.5) * spacing
        return timestep_embedding(centres, size)

    row = axis(rows, width // 2)[:, None].expand(-1, columns, -1)
    column = axis(columns, width - width // 2)[None].expand(rows, -1, -1)
    return torch.cat([row, column], dim=-1).reshape(1, rows * columns, width)


class PatchEmbed(nn.Module):
    """Cuts a latent into p x p patches, row by row, and maps each to a token."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, z: Float[Tensor, "B C H W"]) -> Float[Tensor, "B T D"]:
        return self.proj(z).flatten(2).transpose(1, 2)


def unpatchify(
    patches: Float[Tensor, "B T D"], channels: int, rows: int, columns: int, patch_size: int
) -> Float[Tensor, "B {channels} H W"]:
    """Puts rows x columns tokens of p * p * channels numbers, ordered (p, p, channels), back on the grid."""
    x = patches.unflatten(2, (patch_size, patch_size, channels)).unflatten(1, (rows, columns))  # B r c p q C
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * patch_size, columns * patch_size)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, width: int, num_heads: int, *, qkv_bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads T D/heads
        return self.proj(_attend(q, k, v).transpose(1, 2).flatten(2))


def _attend(
    q: Float[Tensor, "B heads T D"], k: Float[Tensor, "B heads T D"], v: Float[Tensor, "B heads T D"]
) -> Float[Tensor, "B heads T D"]:
    """softmax(q k^T / sqrt(D)) v."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        # The gradient of the CPU's kernel takes 14 times as long in bfloat16.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP; an out-block first merges its long skip, x <- Linear([x, skip])."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, *, qkv_bias: bool = False, skip: bool = False
    ) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Float[Tensor, "B T D"], skip: Float[Tensor, "B T D"] | None = None) -> Float[Tensor, "B T D"]:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def initialise(
    module: nn.Module,
    generator: torch.Generator | None = None,
    linear: Literal["normal", "xavier"] = "normal",
) -> None:
    """U-ViT's published initialisation of every layer below `module`; bare parameters are their owner's.

    Linear weights from N(0, .02) cut at +-2 (xavier: uniform with variance 2 / (fan-in + fan-out), Glorot and Bengio
    2010), their biases 0; convolutions uniform within +-1/sqrt(fan-in), weight and bias (torch's default); embedding
    tables from N(0, 1).
    """
    for layer in module.modules():
        match layer:
            case nn.Linear():
                if linear == "xavier":
                    nn.init.xavier_uniform_(layer.weight, generator=generator)
                else:
                    nn.init.trunc_normal_(layer.weight, std=INIT_STD, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            case nn.Conv2d() | nn.ConvTranspose2d():
                bound = 1.0 / math.sqrt(layer.weight[0].numel())
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                if layer.bias is not None:
                    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
            case nn.Embedding():
                nn.init.normal_(layer.weight, generator=generator)
            case nn.LayerNorm():
                nn.init.ones_(layer.weight)
                nn.init.zeros_(layer.bias)
