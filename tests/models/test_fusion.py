"""Conditions by fusion: grids, joints, and the sizes that the paper's first version leads to."""

import pytest
import torch

from nestdiff_core.config import UViTConfig
from nestdiff_core.models import LatentTokens, NestedDenoiser, count_macs, count_parameters
from nestdiff_core.models.fusion import Stem, stem_geometry


@pytest.mark.parametrize(
    ("condition", "latent", "patch"),
    [
        *((8, 32, 2), (6, 8, 2), (4, 6, 2), (2, 4, 2), (6, 32, 2), (1, 8, 2), (1, 1, 1), (2, 2, 1), (8, 8, 2)),
        *((16, 32, 2), (1, 32, 2), (8, 16, 4), (6, 16, 4), (7, 14, 1), (5, 9, 3)),
        *((14, 8, 2), (14, 8, 1), (16, 4, 1)),  # finer than the latent
    ],
)
def test_every_position_hears_the_condition_in_its_place(condition, latent, patch):
    """A stem gives one feature a token; each token hears at least one position, and the corners their own."""
    tokens = latent // patch
    stem = Stem(3, 8, stem_geometry(condition, latent, tokens))
    z_m = torch.randn(1, 3, condition, condition, requires_grad=True)
    features = stem(z_m).unflatten(1, (tokens, tokens))
    assert features.shape == (1, tokens, tokens, 8)
    for row in range(tokens):
        for column in range(tokens):
            (gradient,) = torch.autograd.grad(features[0, row, column].sum(), z_m, retain_graph=True)
            heard = gradient[0].abs().sum(0).nonzero().float()
            assert len(heard) > 0
            centre, own = heard.mean(0) + 0.5, (torch.tensor([row, column]) + 0.5) * condition / tokens
            assert (centre - own).abs().max() <= max(1.0, condition / tokens), "features are displaced"


# arXiv 2412.05984v1, COCO: z_l's channels, side and patch; growth of parameters (without positions, in millions) and
# of 2 x MACs without attention (in 10^9), counted independently of this code for this construction.
COCO = {1: (4, 32, 2), 2: (64, 8, 2), 3: (56, 6, 2), 4: (48, 4, 2), 5: (40, 2, 1)}
GROWTH = {1: ("44.13", "22.65"), 2: ("58.19", "8.53"), 3: ("59.59", "1.41"), 4: ("59.51", "0.74"), 5: ("59.31", "0.59")}


def test_growth_per_level_is_what_was_counted_for_the_paper():
    """Each level adds an unconditional network at the top and conditions to the one below it."""
    small = UViTConfig(width=512, depth=12, num_heads=8)
    latents = {m: LatentTokens((c, g, g), p) for m, (c, g, p) in COCO.items()}

    def cost(level: int, top: int) -> torch.Tensor:
        above = {level + 1: latents[level + 1]} if level < top else {}
        with torch.device("meta"):
            model = NestedDenoiser(level, latents[level], above, small, injection="fusion")
        parameters, macs = count_parameters(model, positions=False), count_macs(model, attention=False)
        return torch.tensor([parameters / 1e6, 2 * macs / 1e9], dtype=torch.float64)

    before = torch.zeros(2, dtype=torch.float64)
    for top, growth in GROWTH.items():
        total = sum((cost(level, top) for level in range(1, top + 1)), torch.zeros(2, dtype=torch.float64))
        assert tuple(f"{value:.2f}" for value in (total - before).tolist()) == growth, f"level {top}"
        before = total
