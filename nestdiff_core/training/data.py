"""What step `s` trains on: a function of (seed, s) and nothing else.

The order of the images, the noise, the times and the drops are drawn for the *global* batch and then sliced by
rank, so neither the number of processes nor a stop and resume changes what a step sees (design decision 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nestdiff_core.diffusion.schedule import NoiseSchedule
from nestdiff_core.stores.reader import StoreReader


class BatchOrder:
    """An endless sequence of rows: one seeded permutation of `rows` after another, cut into batches.

    A set smaller than a batch simply recurs within it.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._epoch, self._permuted = -1, rows

    def batch(self, step: int) -> np.ndarray:
        """Rows of the global batch of `step` (counted from 0)."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.rows))
        return np.concatenate([self._permutation(int(e))[offsets[epochs == e]] for e in np.unique(epochs)])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._permuted = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return self._permuted


@dataclass(frozen=True)
class Draws:
    """All randomness of one batch: times t (B,), noise eps (B, C, H, W), condition noise eta by level, drops (B,)."""

    t: Tensor
    eps: Tensor
    eta: dict[int, Tensor]
    drop: Tensor


def draw(
    *,
    seed: int,
    step: int,
    batch_size: int,
    shapes: dict[int, tuple[int, int, int]],
    level: int,
    schedule: NoiseSchedule,
    condition_drop: float,
) -> Draws:
    """Randomness of the global batch of `step`; `shapes` holds (C, H, W) of the level and of those above it.

    Nothing depends on the level's number, which another experiment may change; conditions are drawn from the top.
    """
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
    )
    eps = torch.randn(batch_size, *shapes[level], generator=generator)
    t = schedule.sample_t(batch_size, generator)
    eta = {
        m: torch.randn(batch_size, *shapes[m], generator=generator) for m in sorted(shapes, reverse=True) if m != level
    }
    drop = torch.rand(batch_size, generator=generator) < condition_drop
    return Draws(t=t, eps=eps, eta=eta, drop=drop)


class LatentBatches:
    """Latents of one level and of its conditions, joined by image row."""

    def __init__(self, readers: dict[int, StoreReader], labels: np.ndarray | None) -> None:
        self.readers, self.labels = readers, labels

    def shapes(self) -> dict[int, tuple[int, int, int]]:
        return {m: (c, h, w) for m, reader in self.readers.items() for _, c, h, w in [reader.shape]}

    def read(self, rows: np.ndarray, device: torch.device) -> tuple[dict[int, Tensor], Tensor | None]:
        """Latents (B, C, H, W) as float32 by level, and labels (B,) where the experiment has them."""
        latents = {
            m: torch.from_numpy(reader.read(rows)).to(device, torch.float32) for m, reader in self.readers.items()
        }
        labels = None if self.labels is None else torch.from_numpy(self.labels[rows]).to(device)
        return latents, labels
