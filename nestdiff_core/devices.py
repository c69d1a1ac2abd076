"""Which device a command runs on, and the processes of a torchrun group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from nestdiff_core.errors import ConfigError, EnvironmentFault
from nestdiff_core.training.launch import meeting_point


def choose_device(name: str) -> str:
    """`auto` is the GPU if there is one, else cpu; `cuda` is this process's own under torchrun. All are checked."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            "There is no such device",
            key="device",
            expected="auto, cpu, cuda or cuda:N",
            found=name,
            fix="Change --device.",
        ) from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise EnvironmentFault(
            "The GPU is not there",
            key="device",
            expected=name,
            found=f"{torch.cuda.device_count()} usable GPUs",
            fix="Choose --device cpu, or check nvidia-smi and the CUDA build of torch.",
        )
    return name


@contextmanager
def process_group(device: str, *, patience: timedelta | None = None) -> Iterator[int]:
    """Join the torchrun group this process belongs to, if any; yields the rank.

    patience: how long one may wait for another; default: torch's minutes. One that dies is noticed at once.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0
        return
    where = {
        "init_method": meeting_point(),
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=torch.device(device), timeout=patience, **where)
    else:
        dist.init_process_group("gloo", timeout=patience, **where)
    try:
        yield dist.get_rank()
    except BaseException:
        if not device.startswith("cuda"):  # NCCL would wait for the others, who may be waiting for this process
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
