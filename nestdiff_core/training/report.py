"""What a training step tells, and what a line of the log says of many.

Nothing here makes a GPU wait: a step's numbers are copied while the next one is computed, and read then.
"""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Line = dict[str, int | float]  # of the log: numbers by name, "step" among them
NOISE_LEVELS = 4  # equal parts of t in [0, 1], of which the loss is told
MEASURED = ("images_per_second", "loader_wait", "mfu", "memory_gib")  # what is of the machine, not of the training


def by_noise_level(losses: Float[Tensor, " B"], t: Float[Tensor, " B"]) -> Float[Tensor, "2 4"]:
    """Sums of the losses within each quarter of t, and how many there are, in float64."""
    level = (t * NOISE_LEVELS).long().clamp(max=NOISE_LEVELS - 1)
    member = level == torch.arange(NOISE_LEVELS, device=t.device)[:, None]
    sums = torch.where(member, losses.double(), 0.0).sum(1)  # not a product: one loss may be no number
    return torch.stack([sums, member.sum(1).double()])


def named_losses(name: str, sums: np.ndarray) -> dict[str, float]:
    """The mean as `name`, and of each quarter of t as `name_t0.00`, `name_t0.25`, ...; nothing where there is none.

    sums: as of `by_noise_level`.
    """
    (total, count), parts = np.sum(sums, axis=1), zip(*sums, strict=True)
    named = {f"{name}_t{i / NOISE_LEVELS:.2f}": float(s / n) for i, (s, n) in enumerate(parts) if n}
    return {name: float(total / count), **named} if count else {}


class StepReport:
    """The numbers of one step, on their way from the device.

    step: from 0. rows, losses, t (B,): of this process's images. sums: of all processes, by noise level; norm: of the
    gradient; exploded, stop: whether the step was left out, how many processes were asked to stop.
    """

    def __init__(
        self,
        step: int,
        rows: np.ndarray,
        losses: Tensor,
        *,
        sums: Tensor,
        norm: Tensor,
        exploded: Tensor,
        stop: Tensor,
    ) -> None:
        self.step, self.rows, self.losses = step, rows, losses
        numbers = torch.cat([sums.flatten(), torch.stack([norm.double(), exploded.double(), stop.double()])])
        self._arrived = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))  # the current device may be another
        else:
            self._numbers = numbers

    def read(self) -> StepNumbers:
        """Waits until the device has done this step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        *sums, norm, exploded, stop = self._numbers.tolist()
        return StepNumbers(np.reshape(sums, (2, NOISE_LEVELS)), norm, bool(exploded), bool(stop))


@dataclass(frozen=True)
class StepNumbers:
    """What a StepReport says, on this side."""

    sums: np.ndarray
    gradient_norm: float
    exploded: bool
    stop: bool

    @property
    def loss(self) -> float:
        return float(self.sums[0].sum() / self.sums[1].sum())


@dataclass
class Window:
    """What happened since the last line of the log. All but the clock is saved with a checkpoint, so that the next
    line is the same wherever a run was stopped."""

    sums: np.ndarray = field(default_factory=lambda: np.zeros((2, NOISE_LEVELS)))
    gradient_norm: float = 0.0  # of the last step
    clock: float = field(default_factory=time.monotonic)
    timed_steps: int = 0  # since `clock`

    def add(self, numbers: StepNumbers) -> None:
        self.timed_steps += 1
        if not numbers.exploded:
            self.sums = self.sums + numbers.sums
            self.gradient_norm = numbers.gradient_norm

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums.tolist(), "gradient_norm": self.gradient_norm}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> Window:
        return cls(np.asarray(state["sums"], np.float64), state["gradient_norm"]) if state else cls()


@lru_cache
def matrix_rate(device: torch.device, precision: str) -> float:
    """Floating point operations per second that `device` reaches in a large matrix product in `precision`, measured.

    What model FLOPs utilisation (MFU) is counted against. Its own memory does not count as the peak of `device`.
    """
    on_gpu = device.type == "cuda"
    side, repeats = (8192, 16) if on_gpu else (1024, 1)
    dtype, best = torch.bfloat16 if precision == "bfloat16" else torch.float32, math.inf
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    for _ in range(8):
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.monotonic()
        for _ in range(repeats):
            torch.matmul(a, b)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, (time.monotonic() - start) / repeats)
    if on_gpu:
        del a, b
        torch.cuda.reset_peak_memory_stats(device)
    return 2.0 * side**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that its allocator has held, else the most that this process has been resident with."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
