"""What training a level will take, measured on a few steps with numbers of the right shapes in place of latents."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from nestdiff_core.config import ExperimentConfig
from nestdiff_core.models.nested import count_macs, count_parameters
from nestdiff_core.precision import matrix_precision
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.training.data import LatentBatches
from nestdiff_core.training.loop import Trainer
from nestdiff_core.training.report import peak_memory

ROWS = 1024


@dataclass(frozen=True)
class Estimate:
    """parameters, and MACs of one forward pass for one image; seconds of one step; most memory of a process so far.

    memory: bytes; on a GPU of its allocator, else resident, with the libraries.
    """

    parameters: int
    macs: int
    seconds_per_step: float
    memory: int


class _Noise(StoreReader):
    """A store that is not there, whose every row is the same noise."""

    def __init__(self, row: tuple[int, ...]) -> None:
        self.shape = (ROWS, 1, *row)
        self._values = np.random.default_rng(0).standard_normal(row, np.float32)

    def read(self, rows: np.ndarray, pick: np.ndarray | None = None) -> np.ndarray:
        return np.broadcast_to(self._values, (len(rows), *self._values.shape)).copy()


def estimate(
    config: ExperimentConfig,
    level: int,
    *,
    device: torch.device,
    processes: int = 1,
    num_classes: int = 0,
    num_steps: int = 5,
) -> Estimate:
    """Train `level` for `num_steps` steps after a warm-up of two, as one of `processes` would.

    num_classes: 0 unless labels condition the denoisers. Nothing is read and nothing stays on the disk.
    """
    own = config.level(level)
    train = replace(own.train, batch_size=max(1, own.train.batch_size // processes), start_from="", fork_from="")
    levels = tuple(replace(x, train=train) if x.level == level else x for x in config.levels)
    needed = (*config.levels_above(level), level)
    readers: dict[int, StoreReader] = {m: _Noise(config.latent_shape(m)) for m in needed}
    text, context, captions = config.conditioning.text, None, None
    if config.conditioning.labels == "text":
        context, captions = torch.zeros(1, text.length, text.width), _Noise((text.length, text.width))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            replace(config, levels=levels),
            level,
            LatentBatches(readers, np.zeros(ROWS, np.int64) if num_classes else None, captions),
            train_rows=np.arange(ROWS),
            held_out_rows=np.arange(1),
            num_classes=num_classes,
            null_context=context,
            folder=Path(folder),
            device=device,
            record={},
        )
        with matrix_precision(own.train.precision):
            for _ in range(2):
                trainer.train_step(trainer.batch(trainer.step)).read()  # waits for the device
            start = time.monotonic()
            reports = [trainer.train_step(trainer.batch(trainer.step)) for _ in range(num_steps)]
            reports[-1].read()
            seconds = (time.monotonic() - start) / num_steps
        trainer.order.close()
    return Estimate(count_parameters(trainer.model), count_macs(trainer.model), seconds, peak_memory(device))
