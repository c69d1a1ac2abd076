"""What step `s` trains on: a function of (seed, s) and nothing else.

The order of the images, the noise, the times and the drops are drawn for the *global* batch and then sliced by
rank, so neither the number of processes nor a stop and resume changes what a step sees (design decision 6).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from nestdiff_core.diffusion.schedule import NoiseSchedule
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.training.ahead import Ahead

VALIDATION_IMAGES = 512


def validation_rows(held_out_rows: Int64[np.ndarray, " N"]) -> Int64[np.ndarray, " M"]:
    """The held-out images that losses are measured on: at most 512, of all kinds, in whatever order they lie."""
    return np.random.default_rng(0).permutation(held_out_rows)[:VALIDATION_IMAGES]


class BatchOrder:
    """An endless sequence of rows: one seeded permutation of `rows` after another, cut into batches.

    A set smaller than a batch simply recurs within it. The permutation after the one in use is made in a thread, as
    that of millions of rows takes longer than a step; `close` ends it.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._permutation = Ahead(self._permute, depth=1)

    def batch(self, step: int) -> np.ndarray:
        """Rows of the global batch of `step` (counted from 0)."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.rows))
        return np.concatenate([self._permutation(int(e))[offsets[epochs == e]] for e in np.unique(epochs)])

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows)

    def close(self) -> None:
        self._permutation.close()


@dataclass(frozen=True)
class Draws:
    """All randomness of one batch of B images.

    t (B,) times, eps (B, C, H, W) noise, eta condition noise by level, drop (B,) masks for "labels" and by level,
    view and caption (B,): which of the stored views and captions is read.
    """

    t: Tensor
    eps: Tensor
    eta: dict[int, Tensor]
    drop: dict[str | int, Tensor]
    view: Tensor
    caption: Tensor

    def share(self, rank: int, world_size: int) -> Draws:
        """Those of one process."""
        mine = slice(rank, None, world_size)
        eta = {m: noise[mine] for m, noise in self.eta.items()}
        drop = {name: mask[mine] for name, mask in self.drop.items()}
        return Draws(self.t[mine], self.eps[mine], eta, drop, self.view[mine], self.caption[mine])


def draw(
    *,
    seed: int,
    step: int,
    batch_size: int,
    shapes: dict[int, tuple[int, int, int]],
    level: int,
    schedule: NoiseSchedule,
    condition_drop: float,
    noise_levels: tuple[float, ...] = (),
    drop_each: bool = False,
    num_views: int = 1,
    num_captions: int = 1,
) -> Draws:
    """Randomness of the global batch of `step`; `shapes` holds (C, H, W) of the level and of those above it.

    Nothing depends on the level's number, which another experiment may change; conditions are drawn from the top.
    noise_levels: mean and deviation of lambda; empty for the schedule's own times. drop_each: a coin for the label and
    for each condition, else one for all of a sample's.
    """
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
    )
    above = [m for m in sorted(shapes, reverse=True) if m != level]
    eps = torch.randn(batch_size, *shapes[level], generator=generator)
    if noise_levels:
        mean, std = noise_levels
        t = schedule.sample_t_around(mean, std, batch_size, generator)
    else:
        t = schedule.sample_t(batch_size, generator)
    eta = {m: torch.randn(batch_size, *shapes[m], generator=generator) for m in above}
    conditions: list[str | int] = ["labels", *above]
    coins = torch.rand(len(conditions) if drop_each else 1, batch_size, generator=generator) < condition_drop
    drop = dict(zip(conditions, coins.expand(len(conditions), -1), strict=True))
    view, caption = (torch.randint(n, (batch_size,), generator=generator) for n in (num_views, num_captions))
    return Draws(t, eps, eta, drop, view, caption)


@dataclass(frozen=True)
class Batch:
    """What a loss reads: latents (B, C, H, W) in float32 by level, labels (B,) or caption tokens (B, T, W) or None,
    and the randomness; of the images `rows` (B,)."""

    rows: np.ndarray
    latents: dict[int, Tensor]
    labels: Tensor | None
    draws: Draws

    def share(self, part: int, parts: int) -> Batch:
        """Every `parts`-th image, from `part` on."""
        if parts == 1:
            return self
        mine = slice(part, None, parts)
        latents = {m: z[mine] for m, z in self.latents.items()}
        labels = None if self.labels is None else self.labels[mine]
        return Batch(self.rows[mine], latents, labels, self.draws.share(part, parts))


class LatentBatches:
    """Latents of one level and of its conditions, joined by image row.

    readers: by level, rows (views, C, H, W). labels: class of each image. captions: rows (captions, T, W).
    """

    def __init__(
        self, readers: dict[int, StoreReader], labels: np.ndarray | None = None, captions: StoreReader | None = None
    ) -> None:
        self.readers, self.labels, self.captions = readers, labels, captions
        self.num_views = next(iter(readers.values())).shape[1]
        self.num_captions = 1 if captions is None else captions.shape[1]

    def shapes(self) -> dict[int, tuple[int, int, int]]:
        return {m: (c, h, w) for m, reader in self.readers.items() for _, _, c, h, w in [reader.shape]}

    def load(self, rows: np.ndarray, draws: Draws, device: torch.device) -> Batch:
        """The images `rows` with their randomness, on `device`; for a GPU by way of pinned memory, without waiting."""

        def there(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            if device.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True).to(dtype or tensor.dtype)

        view, caption = draws.view.numpy(), draws.caption.numpy()
        latents = {
            m: there(torch.from_numpy(reader.read(rows, view)), torch.float32) for m, reader in self.readers.items()
        }
        labels = None
        if self.captions is not None:
            labels = there(torch.from_numpy(self.captions.read(rows, caption)), torch.float32)
        elif self.labels is not None:
            labels = there(torch.from_numpy(self.labels[rows]))
        moved = replace(
            draws,
            t=there(draws.t),
            eps=there(draws.eps),
            eta={m: there(noise) for m, noise in draws.eta.items()},
            drop={name: there(mask) for name, mask in draws.drop.items()},
        )
        return Batch(rows, latents, labels, moved)

    def stores(self) -> list[StoreReader]:
        """All that batches are gathered from."""
        return [*self.readers.values(), *([] if self.captions is None else [self.captions])]
