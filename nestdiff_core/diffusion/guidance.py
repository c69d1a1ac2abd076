"""Guidance over labels and nested conditions: classifier-free (Ho and Salimans, arXiv 2207.12598), or by a weaker
network (autoguidance, Karras et al., arXiv 2406.02507)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

NullBranch = Literal["all", "conditions"]


def guided(
    model: Callable[..., Tensor],
    w: float,
    interval: tuple[float, ...] = (0.0, 1.0),
    null_branch: NullBranch = "all",
    guide: Callable[..., Tensor] | None = None,
) -> Callable[..., Tensor]:
    """A denoiser that exaggerates what its conditions change:  eps = cond + w (cond - null), first <= t <= last.

    model: called as NestedDenoiser is. interval: (first, last); at other times eps = cond (arXiv 2404.07724).
    null_branch: `all` drops label and conditions together, `conditions` keeps the label (the paper leaves that open).
    guide: another network, called alike, whose answer to the same conditions takes null's place: what is exaggerated
    is then in what `model` is better, and a network without conditions can be guided too.

    Both branches of one network are one forward pass of a doubled batch. eps, v and x are affine in each other, so the
    raw output is guided whatever it is. Where there is nothing to guide (w = 0, no sample's t in the interval, or
    nothing that the null branch would drop) it is the model's single pass.
    """
    first, last = interval
    always = first <= 0.0 and last >= 1.0  # asked first: a question to the times makes a GPU's queue wait

    def guided_model(
        z_l_t: Float[Tensor, "B C H W"],
        t: Float[Tensor, " B"],
        z_above: Mapping[int, Float[Tensor, "B _ _ _"]],
        labels: Int[Tensor, " B"] | Float[Tensor, "B _ _"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        differs = bool(z_above) or (labels is not None and null_branch == "all")
        inside = (first <= t) & (t <= last)
        if w == 0.0 or not (differs or guide is not None) or not (always or inside.any()):
            return model(z_l_t, t, z_above, labels)
        if guide is not None:
            cond = model(z_l_t, t, z_above, labels)
            return extrapolated(cond, guide(z_l_t, t, z_above, labels), inside)
        null = torch.arange(2 * len(t), device=t.device) >= len(t)
        match null_branch:
            case "all":
                drop = null
            case "conditions":
                drop = {"labels": torch.zeros_like(null)} | dict.fromkeys(z_above, null)
        z_twice, t_twice = torch.cat([z_l_t, z_l_t]), torch.cat([t, t])
        above_twice = {m: torch.cat([z_m, z_m]) for m, z_m in z_above.items()}
        labels_twice = None if labels is None else torch.cat([labels, labels])
        cond, null_output = model(z_twice, t_twice, above_twice, labels_twice, drop).chunk(2)
        return extrapolated(cond, null_output, inside)

    def extrapolated(cond: Tensor, other: Tensor, inside: Tensor) -> Tensor:
        return torch.where(inside.view(-1, 1, 1, 1), cond + w * (cond - other), cond)

    return guided_model
