"""The cascade against a plain loop as published samplers are written, and against the machine's matrix rate."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nestdiff_core.config import (
    ConditioningConfig,
    ExperimentConfig,
    ImagesConfig,
    LevelConfig,
    SamplingConfig,
    UViTConfig,
)
from nestdiff_core.diffusion import make_schedule, sample_cascade, time_grid
from nestdiff_core.models import build_denoiser, count_macs
from scripts.bench.measure import compare

CLASSES = 10


@dataclass(frozen=True)
class Machine:
    """What fits: 32-pixel images in patches of `patch_size`, a level of 4 x 4 above them, both guided."""

    device: str
    model: UViTConfig
    patch_size: int
    num_evaluations: int
    batch_size: int


CPU = Machine("cpu", UViTConfig(width=256, depth=4, num_heads=4), 4, 5, 16)
GPU = Machine("cuda", UViTConfig(width=512, depth=12, num_heads=8), 2, 50, 256)


def run() -> None:
    machine = GPU if torch.cuda.is_available() else CPU
    config, networks = _experiment(machine), {}
    for level in (2, 1):
        network = build_denoiser(config, level, CLASSES, generator=torch.Generator().manual_seed(level))
        networks[level] = network.to(machine.device).eval()
    labels = torch.arange(machine.batch_size) % CLASSES
    compiled = {level: torch.compile(network, dynamic=False, fullgraph=True) for level, network in networks.items()}

    def ours(denoisers: Any, config: ExperimentConfig) -> Callable[[], Any]:
        return lambda: sample_cascade(
            denoisers,
            config,
            image_indices=range(machine.batch_size),
            seed=0,
            labels=labels,
            device=machine.device,
        )

    calls = {"sample_cascade": ours(networks, config), "sample_cascade, compiled": ours(compiled, config)}
    if machine is GPU:
        mixed = replace(config, sampling=replace(config.sampling, precision="bfloat16"))
        calls["sample_cascade, bfloat16"] = ours(networks, mixed)
        calls["sample_cascade, compiled, bfloat16"] = ours(compiled, mixed)
    rates = {dtype: _matrix_rate(machine, dtype) for dtype in {torch.float32, *([torch.bfloat16] * (machine is GPU))}}
    operations = 2 * 2 * machine.num_evaluations * sum(count_macs(network) for network in networks.values())
    ceilings = {str(dtype).removeprefix("torch."): rate / operations for dtype, rate in rates.items()}
    print("\nceiling, images/s: " + ", ".join(f"{name} {ceiling:.3g}" for name, ceiling in sorted(ceilings.items())))
    model = machine.model
    compare(
        f"{machine.batch_size} images of two guided levels, U-ViT {model.width} x {model.depth}, "
        f"{machine.num_evaluations} evaluations each, on {_name(machine)}",
        ("a loop with two passes", lambda: plain_loop(networks, config, labels.to(machine.device), machine)),
        calls,
        clock=time.process_time if machine is CPU else _gpu_clock,
        rate=("images/s", lambda seconds: f"{machine.batch_size / seconds:.3g}"),
    )


def _experiment(machine: Machine) -> ExperimentConfig:
    levels = (
        LevelConfig(level=1, patch_size=machine.patch_size, guidance=1.0, model=machine.model),
        LevelConfig(level=2, grid=4, channels=64, guidance=1.0, condition_noise=0.5, model=machine.model),
    )
    return ExperimentConfig(
        images=ImagesConfig(source="folder", path="none", resolution=32, channels=3, labels=True),
        levels=levels,
        conditioning=ConditioningConfig(labels="class"),
        sampling=SamplingConfig(sampler="ddim", num_evaluations=machine.num_evaluations, batch_size=machine.batch_size),
    )


@torch.no_grad()
def plain_loop(networks: Any, config: ExperimentConfig, labels: Tensor, machine: Machine) -> dict[int, Tensor]:
    """DDIM level by level, one forward pass with the conditions and another without them at every time."""
    schedule, z = make_schedule(config.diffusion), {}
    times = time_grid(schedule, machine.num_evaluations).to(machine.device)
    for level in (2, 1):
        network, above = networks[level], {m: z[m] for m in config.levels_above(level)}
        x = torch.randn(len(labels), *config.latent_shape(level), device=machine.device)
        for t, s in itertools.pairwise(times):
            t_batch = torch.full((len(x),), float(t), device=machine.device)
            noisy = {m: v + config.level(m).condition_noise * torch.randn_like(v) for m, v in above.items()}
            cond = network(x, t_batch, noisy, labels)
            drop = torch.ones(len(x), dtype=torch.bool, device=machine.device)
            null = network(x, t_batch, noisy, labels, drop)
            eps = cond + config.level(level).guidance * (cond - null)
            alpha, sigma, alpha_s, sigma_s = (f(u).float() for u in (t, s) for f in (schedule.alpha, schedule.sigma))
            x = alpha_s * (x - sigma * eps) / alpha + sigma_s * eps
        z[level] = x.cpu().to(machine.device)
    return z


def _matrix_rate(machine: Machine, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the network's largest product, at its best of five."""
    width, tokens = machine.model.width, (32 // machine.patch_size) ** 2
    a = torch.randn(2 * machine.batch_size * tokens, width, device=machine.device, dtype=dtype)
    b = torch.randn(width, 4 * width, device=machine.device, dtype=dtype)
    clock, best = time.process_time if machine is CPU else _gpu_clock, float("inf")
    for _ in range(5):
        start = clock()
        for _ in range(5):
            torch.mm(a, b)
        best = min(best, (clock() - start) / 5)
    return 2 * a.shape[0] * width * 4 * width / best


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _name(machine: Machine) -> str:
    return "one CPU thread" if machine is CPU else torch.cuda.get_device_name()
