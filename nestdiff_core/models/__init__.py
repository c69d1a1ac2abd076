"""Networks: the published U-ViT, and the denoiser of one level of a hierarchy."""

from nestdiff_core.models.nested import (
    LatentTokens,
    NestedDenoiser,
    build_denoiser,
    count_layer_norms,
    count_macs,
    count_parameters,
)
from nestdiff_core.models.uvit import UViT, from_published

__all__ = [
    "LatentTokens",
    "NestedDenoiser",
    "UViT",
    "build_denoiser",
    "count_layer_norms",
    "count_macs",
    "count_parameters",
    "from_published",
]
