"""Conditions by fusion, as the paper's first version feeds them: latents above are brought to the token grid by
convolutions and joined to the tokens every two blocks (arXiv 2412.05984v1).

That version leaves widths and kernels open. What is here is the construction whose sizes and costs come closest to
its printed growth per level: a stem of one transposed and one plain convolution for each condition, and after every
second in- or out-block two linear layers over all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nestdiff_core.models.layers import MLP

_LONGEST_STRIDE = 4  # beyond it a kernel for every position would outweigh the network: positions are repeated


class StemGeometry(NamedTuple):
    """How a condition's grid becomes the token grid: a transposed convolution, a crop, and a convolution.

    kernel: of both convolutions (at most 3 of the plain one). up_stride: of the transposed one, whose output is cut to
    `up_side`. stride: of the plain one.
    """

    kernel: int
    up_stride: int
    up_side: int
    stride: int


def stem_geometry(condition: int, latent: int, tokens: int) -> StemGeometry:
    """From the sides of three grids: the condition's, the latent's, and the token grid of the latent.

    A condition nearly as fine as the latent goes there first, by a kernel as long as the difference; else it goes to
    the token grid, or to the smallest multiple of it that is not coarser than the condition.
    """
    up = latent if 0 <= latent - condition <= 2 else tokens * math.ceil(condition / tokens)
    if up - condition <= 2:
        return StemGeometry(up - condition + 1, 1, up, up // tokens)
    stride = math.ceil(up / condition)
    return StemGeometry(stride, stride, up, up // tokens)


class Stem(nn.Module):
    """One latent above as features at every token position."""

    def __init__(self, channels: int, width: int, geometry: StemGeometry) -> None:
        super().__init__()
        self.side, self.repeats = geometry.up_side, geometry.up_stride > _LONGEST_STRIDE
        kernel, stride = (1, 1) if self.repeats else (geometry.kernel, geometry.up_stride)
        self.up = nn.ConvTranspose2d(channels, width, kernel, stride)
        kernel = max(min(geometry.kernel, 3), geometry.stride)  # shorter than the stride it would skip positions
        self.conv = nn.Conv2d(width, width, kernel, geometry.stride)
        self.padding = kernel - geometry.stride

    def forward(self, z_m: Float[Tensor, "B C h w"]) -> Float[Tensor, "B T D"]:
        x = self.up(z_m)
        if self.repeats:
            x = F.interpolate(x, size=(self.side, self.side))
        first = (x.shape[-1] - self.side) // 2
        x = F.gelu(x[..., first : first + self.side, first : first + self.side])
        left, right = self.padding // 2, self.padding - self.padding // 2
        return self.conv(F.pad(x, (left, right, left, right))).flatten(2).transpose(1, 2)


class Fusion(nn.Module):
    """A stem for each condition, and a joint after every second block.

    conditions: (channels, side) by level. latent, tokens: sides of the latent and of its token grid.
    """

    def __init__(
        self, conditions: Mapping[int, tuple[int, int]], latent: int, tokens: int, width: int, depth: int
    ) -> None:
        super().__init__()
        self.levels = tuple(conditions)
        self.stems = nn.ModuleList(
            Stem(channels, width, stem_geometry(side, latent, tokens)) for channels, side in conditions.values()
        )
        self.mlps = nn.ModuleList(MLP(width, 4 * width) for _ in range(depth // 2))

    def begin_as_nothing(self) -> None:
        """Let no token be changed at first."""
        for name, value in self.mlps.named_parameters():
            if ".fc2." in name:
                nn.init.zeros_(value)

    def features(
        self, z_above: Mapping[int, Float[Tensor, "B _ _ _"]], kept: Mapping[int, Float[Tensor, " B"] | None]
    ) -> Float[Tensor, "B T D"]:
        """The conditions at the patch tokens, summed; kept[m] is 0 where level m is dropped and 1 elsewhere."""
        total = None
        for m, stem in zip(self.levels, self.stems, strict=True):
            x, keep = stem(z_above[m]), kept[m]
            x = x if keep is None else x * keep[:, None, None]
            total = x if total is None else total + x
        assert total is not None
        return total

    def join(
        self, block: int, tokens: Float[Tensor, "B N D"], features: Float[Tensor, "B T D"]
    ) -> Float[Tensor, "B N D"]:
        """The tokens after in- or out-block `block` (counted through both, from 0), joined where it is the second."""
        if block % 2 == 0:
            return tokens
        joined = tokens + F.pad(features, (0, 0, tokens.shape[1] - features.shape[1], 0))
        return tokens + self.mlps[block // 2](joined)
