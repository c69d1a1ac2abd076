"""Checkpoints: the full training state, one new directory per step, whole or absent.

    checkpoints/step_00001500/  model.safetensors  ema.safetensors  optimizer.safetensors  state.json

Everything is written under a temporary name, flushed, and renamed; state.json holds the sha256 of the rest.
Loading never executes code: safetensors and JSON only.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim

from nestdiff_core.errors import IntegrityError
from nestdiff_core.files import (
    TEMPORARY,
    check_file,
    environment_faults,
    file_record,
    fsync_directory,
    fsync_tree,
    read_sealed_json,
    write_sealed_json,
)

STATE = "state.json"


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizer: optim.Optimizer,
    record: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write `folder/step_NNNNNNNN` and remove all but the newest `keep_last`; returns the new directory."""
    target = folder / f"step_{step:08d}"
    temporary = folder / f"{TEMPORARY}{uuid.uuid4().hex[:8]}"
    try:
        with environment_faults(target):
            temporary.mkdir(parents=True)
            save_file(_plain(model.state_dict()), temporary / "model.safetensors")
            save_file(_plain(ema), temporary / "ema.safetensors")
            tensors, scalars = _flatten_optimizer(optimizer)
            save_file(tensors, temporary / "optimizer.safetensors")
            files = {path.name: file_record(path) for path in sorted(temporary.iterdir())}
            write_sealed_json(temporary / STATE, {**record, "step": step, "optimizer": scalars, "files": files})
            fsync_tree(temporary)
            for damaged in list_checkpoints(folder):
                if damaged.name >= target.name:  # a resume fell back past it
                    shutil.rmtree(damaged)
            os.rename(temporary, target)
            fsync_directory(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first; none of them verified."""
    return sorted(folder.glob("step_*"))


def read_checkpoint(path: Path, *, level: int, expected: str | None = None) -> dict[str, Any]:
    """The record of a checkpoint; IntegrityError unless it and all files are whole and of the denoiser `expected`."""
    record = read_sealed_json(path / STATE, stage="denoiser")
    for name, file in record["files"].items():
        check_file(path / name, file, stage="denoiser", level=level)
    if expected is not None and record.get("fingerprint") != expected:
        raise IntegrityError(
            f"{path.name} is of another denoiser",
            stage="denoiser",
            level=level,
            path=path,
            key="fingerprint",
            expected=expected,
            found=record.get("fingerprint"),
            fix=f"Remove {path}.",
        )
    return record


def load_latest(
    folder: Path, *, warn: Callable[[str], object], level: int, expected: str | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose files are whole, and its record; None when there is none at all.

    expected: fingerprint of the denoiser whose it must be.

    A damaged one is passed over with a warning. Raises IntegrityError when every one is damaged.
    """
    damaged: IntegrityError | None = None
    for path in reversed(list_checkpoints(folder)):
        try:
            record = read_checkpoint(path, level=level, expected=expected)
            return path, record
        except IntegrityError as error:
            warn(f"Checkpoint {path.name} is passed over: {error}")
            damaged = error
    if damaged is not None:
        damaged.level = level
        damaged.fix = f"No checkpoint is whole. Remove {folder} to train from the beginning."
        raise damaged
    return None


def restore(
    path: Path, record: dict[str, Any], *, model: nn.Module, ema: dict[str, Tensor], optimizer: optim.Optimizer
) -> int:
    """Load a checkpoint found by `load_latest` into the three; returns its step."""
    model.load_state_dict(load_file(path / "model.safetensors"))
    for name, value in load_file(path / "ema.safetensors").items():
        ema[name].copy_(value)
    state: dict[int, dict[str, Any]] = {}
    for key, value in load_file(path / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": record["optimizer"]})
    return int(record["step"])


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def _flatten_optimizer(optimizer: optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state as flat tensors `index.name`, and its parameter groups as plain data."""
    plain = optimizer.state_dict()
    tensors = {f"{index}.{name}": value for index, slots in plain["state"].items() for name, value in slots.items()}
    return _plain(tensors), plain["param_groups"]
