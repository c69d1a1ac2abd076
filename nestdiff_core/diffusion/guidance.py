"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) over labels and nested conditions together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor


def guided(model: Callable[..., Tensor], w: float) -> Callable[..., Tensor]:
    """A denoiser that exaggerates what its conditions change:  eps = cond + w (cond - null).

    model: called as NestedDenoiser is. The null branch drops label and conditions together (the paper leaves that
    open); both branches are one forward pass of a doubled batch. eps, v and x are affine in each other, so the raw
    output is guided whatever it is. Without anything to guide (w = 0, or neither conditions nor labels) it is the
    model's single pass.
    """

    def guided_model(
        z_l_t: Float[Tensor, "B C H W"],
        t: Float[Tensor, " B"],
        z_above: Mapping[int, Float[Tensor, "B _ _ _"]],
        labels: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        if w == 0.0 or not (z_above or labels is not None):
            return model(z_l_t, t, z_above, labels)
        drop = torch.arange(2 * len(t), device=t.device) >= len(t)
        twice = {m: torch.cat([z_m, z_m]) for m, z_m in z_above.items()}
        both = model(
            torch.cat([z_l_t, z_l_t]),
            torch.cat([t, t]),
            twice,
            None if labels is None else torch.cat([labels, labels]),
            drop,
        )
        cond, null = both.chunk(2)
        return cond + w * (cond - null)

    return guided_model
