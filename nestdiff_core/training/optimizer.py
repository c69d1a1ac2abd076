"""What turns gradients into steps: AdamW, or Muon for the matrices of the blocks and AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from jaxtyping import BFloat16, Float
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
    muon = Muon(matrices, lr=train.lr, weight_decay=train.weight_decay)
    return MuonAdamW(muon, adamw([p for p in model.parameters() if id(p) not in chosen]))


def block_matrices(model: nn.Module) -> list[Tensor]:
    """Weights of the linear layers in transformer blocks and in fusion's MLPs; neither what reads the input nor what
    writes the output, as Muon's authors advise."""
    inside = {id(layer): layer for part in model.modules() if isinstance(part, Block | MLP) for layer in part.modules()}
    return [layer.weight for layer in inside.values() if isinstance(layer, nn.Linear)]


class Muon(optim.Optimizer):
    """torch.optim.Muon with Nesterov's momentum, all matrices of a shape at once: a network of 128 channels has thirty,
    each of them many small products. (A test holds it to torch's.)

    Steps are scaled so that a matrix moves as far as AdamW would move it (arXiv 2502.16982): one rate serves both.
    """

    def __init__(self, matrices: Iterable[Tensor], *, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for settings in self.param_groups:
            lr, momentum = settings["lr"], settings["momentum"]
            moved = [p for p in settings["params"] if p.grad is not None]
            for _, some in groupby(sorted(moved, key=_shape), key=_shape):
                same = list(some)
                for p in same:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    self.state[p]["momentum_buffer"].lerp_(p.grad, 1.0 - momentum)
                ahead = torch.stack([p.grad.lerp(self.state[p]["momentum_buffer"], momentum) for p in same])
                step = 0.2 * math.sqrt(max(ahead.shape[1:])) * lr
                for p, update in zip(same, orthogonalised(ahead), strict=True):
                    p.mul_(1.0 - lr * settings["weight_decay"]).add_(update, alpha=-step)


def _shape(matrix: Tensor) -> tuple[int, ...]:
    return tuple(matrix.shape)


def orthogonalised(matrices: Float[Tensor, "N A B"]) -> BFloat16[Tensor, "N A B"]:
    """U V^T of each matrix U S V^T, up to factors of about .7 to 1.2 on its singular values: five steps of Newton and
    Schulz in bfloat16 with the coefficients of Keller Jordan (2024), which torch.optim.Muon has, too."""
    x = matrices.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class MuonAdamW(optim.Optimizer):
    """Both as one: their parameter groups, Muon's first, and their state are this one's."""

    found_inf: Tensor | None = None

    def __init__(self, muon: Muon, adamw: optim.AdamW) -> None:
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
        """Muon does not ask for `found_inf` on the device, as AdamW's kernel does: here the host waits for it."""
        if self.found_inf is not None and self.found_inf.item():
            return
        for part in self.parts:
            part.step()
