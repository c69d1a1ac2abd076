"""What the processes of a torchrun group agree on: that all go on, that all see the same, whose checkpoint is newest.

Alone, a process agrees with itself; nothing here then takes any time.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nestdiff_core.errors import IntegrityError, Interrupted, NestdiffError, from_record
from nestdiff_core.training import launch

T = TypeVar("T")


def first_here() -> bool:
    """Whether this is the first of its host's processes."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def gather(mine: T) -> list[T]:
    """What each process says, by rank."""
    if not dist.is_initialized():
        return [mine]
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, mine)
    return said


@contextmanager
def together() -> Iterator[None]:
    """What one process refuses within the block, all refuse at its end. Nobody may wait for another within it."""
    refusal: NestdiffError | None = None
    try:
        yield
    except NestdiffError as error:
        refusal = error
    mine = None if refusal is None else json.loads(refusal.to_json())
    said = gather({"host": socket.gethostname(), "refusal": mine})
    first = next((one for one in said if one["refusal"] is not None), None)
    if first is None:
        return
    if refusal is None:
        refusal = from_record(first["refusal"])
        refusal.what = f"Another process has refused, on {first['host']}: {refusal.what}"
    refusal.shared = True
    raise refusal


def begin() -> None:
    """The first thing that workers do together. Raises what ended the workers that they replace, in all of them."""
    with together():
        if launch.stop_was_asked():
            raise Interrupted("Stopped by a signal", fix="Run the same command again: it resumes.")
        if (report := launch.last_report()) is not None:
            raise from_record(json.loads(report["said"].splitlines()[-1]))


def require_same(stage: str, level: int, mine: dict[str, Any]) -> None:
    """Refuse, in all processes, where one sees something else than the first; mine: plain data."""
    said = gather({"host": socket.gethostname(), "sees": mine})
    other = next((one for one in said if one["sees"] != said[0]["sees"]), None)
    if other is None:
        return
    key = next(key for key in mine if other["sees"][key] != said[0]["sees"][key])
    refusal = IntegrityError(
        f"The hosts {said[0]['host']} and {other['host']} do not see the same",
        stage=stage,
        level=level,
        key=key,
        expected=said[0]["sees"][key],
        found=other["sees"][key],
        fix="Give every host the same code, experiment and artifacts: one folder that all share, or NESTDIFF_REMOTE.",
    )
    refusal.shared = True
    raise refusal


def from_newest(step: int, state: T | None) -> tuple[int, T | None]:
    """The first rank with the highest `step`, and its `state`; step: -1 where there is nothing."""
    steps = gather(step)
    source = steps.index(max(steps))
    if len(steps) == 1:
        return source, state
    held = [state]
    dist.broadcast_object_list(held, src=source)
    return source, held[0]


def tensors_of(source: int, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The named tensors of rank `source`, in every process on its CPU; sent by way of `device`."""
    if not dist.is_initialized():
        return tensors
    mine = dist.get_rank() == source
    held: list[Any] = [[(name, value.shape, value.dtype) for name, value in tensors.items()]]
    dist.broadcast_object_list(held, src=source)
    received = {}
    for name, shape, dtype in held[0]:
        value = tensors[name].to(device) if mine else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(value, src=source)
        received[name] = tensors[name] if mine else value.cpu()
    return received
