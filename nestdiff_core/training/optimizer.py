"""What turns gradients into steps: AdamW, or Muon for the matrices of the blocks and AdamW for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn, optim

from nestdiff_core.config import TrainConfig
from nestdiff_core.models.layers import MLP, Block


def make_optimizer(model: nn.Module, train: TrainConfig) -> optim.Optimizer:
    """The optimiser of `train`, at its full learning rate. Where its `found_inf` is 1 a step changes nothing."""

    def adamw(parameters: list[Tensor]) -> optim.AdamW:
        betas = train.beta1, train.beta2
        return optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay, betas=betas, fused=True)

    if train.optimizer == "adamw":
        return adamw(list(model.parameters()))
    matrices = block_matrices(model)
    chosen = {id(p) for p in matrices}
    # Scaled so that a matrix moves as far as AdamW would move it (arXiv 2502.16982): one rate serves both.
    muon = optim.Muon(matrices, lr=train.lr, weight_decay=train.weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonAdamW(muon, adamw([p for p in model.parameters() if id(p) not in chosen]))


def block_matrices(model: nn.Module) -> list[Tensor]:
    """Weights of the linear layers in transformer blocks and in fusion's MLPs; neither what reads the input nor what
    writes the output, as Muon's authors advise."""
    inside = {id(layer): layer for part in model.modules() if isinstance(part, Block | MLP) for layer in part.modules()}
    return [layer.weight for layer in inside.values() if isinstance(layer, nn.Linear)]


class MuonAdamW(optim.Optimizer):
    """Both as one: their parameter groups, Muon's first, and their state are this one's."""

    found_inf: Tensor | None = None

    def __init__(self, muon: optim.Muon, adamw: optim.AdamW) -> None:
        self.parts = muon, adamw
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """One state, and the same groups: a rate that is set here, and slots that are loaded here, are theirs."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Muon has no kernel that asks for `found_inf` by itself: here the host waits for it."""
        if self.found_inf is not None and self.found_inf.item():
            return
        for part in self.parts:
            part.step()
