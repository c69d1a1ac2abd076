"""Training steps, against a plain loop in the style of the published U-ViT; how long a checkpoint holds them up."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from nestdiff_core.config import ExperimentConfig, ImagesConfig, LevelConfig, TrainConfig, UViTConfig
from nestdiff_core.diffusion.schedule import DiscreteSchedule
from nestdiff_core.models.nested import count_macs
from nestdiff_core.models.uvit import UViT
from nestdiff_core.precision import matrix_precision
from nestdiff_core.recipes.depth import CIFAR10_16PX
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.stores.writer import create_store, write_shard
from nestdiff_core.training.ahead import Ahead
from nestdiff_core.training.data import Batch, LatentBatches
from nestdiff_core.training.loop import Trainer
from scripts.bench.measure import table

IMAGES, ROUNDS = 512, 5


@dataclass(frozen=True)
class Case:
    """A network, the latents that it denoises, and the batches and steps of a round."""

    name: str
    model: UViTConfig
    batch: int
    steps: int
    shape: tuple[int, int, int] = (4, 32, 32)
    patch: int = 2


SMALL, MEDIUM, LARGE = (
    UViTConfig(width=512, depth=12, num_heads=8),
    UViTConfig(width=768, depth=16, num_heads=12),
    UViTConfig(width=1024, depth=20, num_heads=16),
)
ON_CPU = (
    Case("U-ViT-S/2", SMALL, 4, 1),
    Case("CIFAR-10's L = 1", CIFAR10_16PX.one, 32, 2, (3, 16, 16), CIFAR10_16PX.patch_size),
)
ON_GPU = (Case("U-ViT-S/2", SMALL, 256, 20), Case("U-ViT-M/2", MEDIUM, 256, 10), Case("U-ViT-L/2", LARGE, 128, 10))


def run() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in ON_CPU if device.type == "cpu" else ON_GPU:
        with tempfile.TemporaryDirectory() as folder:
            latents = np.random.default_rng(0).standard_normal((IMAGES, *case.shape), np.float32)
            store = Path(folder) / "z_1.zarr"
            create_store(store, {"z_1": (1, *case.shape)}, "float32", [IMAGES], 32, {})
            write_shard(store, 0, {"z_1": latents[:, None]})
            _measure(case, latents, StoreReader(store, "z_1"), device, Path(folder))


def _measure(case: Case, latents: np.ndarray, reader: StoreReader, device: torch.device, folder: Path) -> None:
    on_gpu, batch, steps = device.type == "cuda", case.batch, case.steps
    plain = _Plain(case, latents, device)
    calls: dict[str, Callable[[], Any]] = {"plain loop": plain.step, "plain loop, again": plain.step}
    mixed = {"precision": "bfloat16"}
    trainers = {"ours, bfloat16": mixed, "ours, bfloat16, compiled": {**mixed, "compile": True}}
    if not on_gpu:
        trainers = {"ours": {}, "ours, compiled": {"compile": True}, **trainers}
    trained = {}
    batches: dict[str, Ahead[Batch]] = {}
    for name, knobs in trainers.items():
        trained[name] = _trainer(case, knobs, reader, device, folder / name.replace(" ", ""))
        batches[name] = Ahead(trained[name].batch)
        calls[name] = partial(_step, trained[name], batches[name])
    side = 8192 if on_gpu else 1536
    a, b = (torch.randn(side, side, dtype=torch.bfloat16 if on_gpu else torch.float32, device=device) for _ in range(2))
    calls["a large matrix product"] = lambda: a @ b
    flops = dict.fromkeys(calls, 6.0 * count_macs(plain.model) * batch) | {"a large matrix product": 2.0 * side**3}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    passed = dict.fromkeys(batches, 0.0)
    clock = time.perf_counter if on_gpu else time.process_time
    for counted in range(-2, ROUNDS):
        for name, call in calls.items():
            if counted == 0 and name in batches:
                batches[name].waited = 0.0
            start, began = clock(), time.monotonic()
            for _ in range(steps):
                call()
            if on_gpu:
                torch.cuda.synchronize()
            if counted >= 0:
                seconds[name].append(clock() - start)
                if name in batches:
                    passed[name] += time.monotonic() - began
    rates = {name: flops[name] * steps / median(times) for name, times in seconds.items()}
    rows = [
        [
            name,
            "" if name == "a large matrix product" else f"{rate / flops[name] * batch:.2f}",
            f"{rate / rates['plain loop']:.3g}",
            f"{rate / 1e12:.3f}",
            f"{100 * rate / rates['a large matrix product']:.1f} %",
            f"{100 * batches[name].waited / passed[name]:.2f} %" if name in batches else "",
        ]
        for name, rate in rates.items()
    ]
    unit = "images/s" if on_gpu else "images a CPU second"
    head = ["", unit, "ratio", "TFLOP/s", "of the matrix product", "of its time waiting for batches"]
    table(f"{case.name} on {case.shape} latents, batch {batch}", head, rows)
    for name, made in batches.items():
        made.close()
        trained[name].order.close()
    _checkpoint(next(iter(trained.values())))


def _step(trainer: Trainer, batches: Ahead[Batch]) -> None:
    with matrix_precision(trainer.train.precision):
        trainer.train_step(batches(trainer.step))


def _checkpoint(trainer: Trainer) -> None:
    pauses, writes = [], []
    for _ in range(4):
        start = time.monotonic()
        trainer.save()
        pauses.append(time.monotonic() - start)
        trainer.checkpoints.wait()
        writes.append(time.monotonic() - start)
        trainer.step += 1
    state = sum(v.nbytes for v in trainer.weights.values()) * 4 / 2**20  # model, moving average, two moments
    table(
        f"A checkpoint of {state:.0f} MiB",
        ["", "seconds"],
        [
            ["steps wait, the first time", f"{pauses[0]:.2f}"],
            ["steps wait, later", f"{median(pauses[1:]):.2f}"],
            ["until it is on the disk, hashed", f"{median(writes[1:]):.2f}"],
        ],
    )


def _trainer(case: Case, knobs: dict[str, Any], reader: StoreReader, device: torch.device, folder: Path) -> Trainer:
    train = TrainConfig(batch_size=case.batch, beta1=0.99, beta2=0.99, warmup_steps=10, **knobs)
    config = ExperimentConfig(
        images=ImagesConfig(source="digits", resolution=case.shape[1], channels=3),
        levels=(LevelConfig(patch_size=case.patch, model=case.model, train=train),),
    )
    own = _FourChannels if case.shape[0] == 4 else ExperimentConfig
    return Trainer(
        own(**{f: getattr(config, f) for f in config.__dataclass_fields__}),
        1,
        LatentBatches({1: reader}),
        train_rows=np.arange(IMAGES),
        held_out_rows=np.arange(8),
        num_classes=0,
        folder=folder,
        device=device,
        record={},
    )


class _FourChannels(ExperimentConfig):
    """An experiment whose z_1 is as Stable Diffusion's autoencoder makes it, without one."""

    def latent_shape(self, number: int) -> tuple[int, int, int]:
        del number
        return (4, self.images.resolution, self.images.resolution)


class _Plain:
    """What the published training script does: autocast in float16 on a GPU, AdamW as it comes, a moving average
    parameter by parameter, the loss read at every step."""

    def __init__(self, case: Case, latents: np.ndarray, device: torch.device) -> None:
        self.latents, self.batch, self.device = latents, case.batch, device
        self.model = UViT(case.shape, case.patch, case.model).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=2e-4, weight_decay=0.03, betas=(0.99, 0.99), foreach=False
        )
        self.scaler = torch.amp.GradScaler(enabled=device.type == "cuda")
        schedule = DiscreteSchedule()
        t = torch.arange(1, 1001) / 1000
        self.alpha, self.sigma = (f(t).float().to(device) for f in (schedule.alpha, schedule.sigma))

    def step(self) -> float:
        rows = np.random.default_rng().integers(0, len(self.latents), self.batch)
        z = torch.stack([torch.from_numpy(self.latents[row]) for row in rows]).to(self.device)
        n = torch.randint(1, 1001, (self.batch,), device=self.device)
        eps = torch.randn_like(z)
        alpha, sigma = (c[n - 1].view(-1, 1, 1, 1) for c in (self.alpha, self.sigma))
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            output = self.model(alpha * z + sigma * eps, n.float())
        loss = nn.functional.mse_loss(output.float(), eps)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for average, value in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                average.mul_(0.9999).add_(value, alpha=1 - 0.9999)
        return loss.item()
