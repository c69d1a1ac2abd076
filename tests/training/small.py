"""A trainer of little networks and few images, for the tests of training."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import torch

from nestdiff_core.config import ConditioningConfig, ExperimentConfig
from nestdiff_core.config_io import deciding
from nestdiff_core.recipes import toy
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.stores.writer import create_store, write_shard
from nestdiff_core.training.data import LatentBatches
from nestdiff_core.training.loop import Trainer
from nestdiff_core.training.report import MEASURED

NUM_IMAGES = 48


def config_with(level: int = 1, **train: object) -> ExperimentConfig:
    base = toy()
    level_config = dataclasses.replace(base.level(level), train=dataclasses.replace(base.level(level).train, **train))  # pyright: ignore[reportArgumentType]
    levels = tuple(level_config if entry.level == level else entry for entry in base.levels)
    return dataclasses.replace(base, levels=levels, conditioning=ConditioningConfig(labels="class"))


def make_batches(folder: Path, num_images: int) -> LatentBatches:
    """Correlated random latents of the toy experiment's two levels, in real stores."""
    rng, readers = np.random.default_rng(0), {}
    top = rng.standard_normal((num_images, 4, 2, 2)).astype(np.float32)
    image = np.tanh(np.repeat(np.repeat(top[:, :1], 4, 2), 4, 3))
    for level, clean in {1: image, 2: top}.items():
        z = np.stack([clean, clean[..., ::-1]], axis=1)  # two views
        create_store(folder / f"{level}.zarr", {f"z_{level}": z.shape[1:]}, "float16", [num_images], 16, {})
        write_shard(folder / f"{level}.zarr", 0, {f"z_{level}": z})
        readers[level] = StoreReader(folder / f"{level}.zarr", f"z_{level}")
    return LatentBatches(readers, np.arange(num_images) % 10)


def trainer(
    batches: LatentBatches,
    folder: Path,
    config: ExperimentConfig | None = None,
    warnings: list[str] | None = None,
    num_held_out: int = 8,
    device: str = "cpu",
) -> Trainer:
    assert batches.labels is not None
    rows, config = np.arange(len(batches.labels)), config or config_with()
    return Trainer(
        config,
        1,
        batches,
        train_rows=rows[:-num_held_out],
        held_out_rows=rows[-num_held_out:],
        num_classes=10,
        folder=folder,
        device=torch.device(device),
        record={"config": {"diffusion": deciding(config.diffusion)}},
        warn=(warnings or []).append,
    )


def state_hash(t: Trainer) -> str:
    """One hash over model, EMA, optimiser, step and losses."""
    total = hashlib.sha256()
    state = t.optimizer.state_dict()["state"]
    slots = [value for index in sorted(state) for _, value in sorted(state[index].items())]
    for tensor in [*t.model.state_dict().values(), *t.ema.values(), *slots]:
        total.update(tensor.numpy().tobytes())
    history = [sorted((k, v) for k, v in line.items() if k not in MEASURED) for line in t.history]
    total.update(repr((t.step, history, t.window.state())).encode())
    return total.hexdigest()


def optimizer_slots(t: Trainer) -> list[torch.Tensor]:
    return [value for p in t.model.parameters() for _, value in sorted(t.optimizer.state[p].items())]
