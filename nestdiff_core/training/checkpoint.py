"""Checkpoints: the full training state, one new directory per step, whole or absent.

    checkpoints/step_00001500/  model.safetensors  ema.safetensors  optimizer.safetensors  state.json

Everything is written under a temporary name, flushed, and renamed; state.json holds the sha256 of the rest.
Loading never executes code: safetensors and JSON only.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
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
logger = logging.getLogger("nestdiff")


class CheckpointWriter:
    """Writes checkpoints below `folder` in a thread, one at a time, while training goes on.

    Training pauses for as long as it takes to copy the state to the host; the copy is kept for the next time. Of what
    is there, the newest `keep_last` stay, and those of every `keep_every` steps (0: none).

    Use as a context: at its end everything has been written, or the error is raised that kept it from being.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_every: int = 0) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self._host: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(
        self,
        *,
        step: int,
        model: nn.Module,
        ema: Mapping[str, Tensor],
        optimizer: optim.Optimizer,
        record: Mapping[str, Any],
    ) -> None:
        """Begin to write `folder/step_NNNNNNNN`, as soon as the one before has been written."""
        self.wait()
        slots = {
            f"{index}.{name}": value
            for index, own in optimizer.state_dict()["state"].items()
            for name, value in own.items()
        }
        files = {
            "model.safetensors": self._copy("model", model.state_dict()),
            "ema.safetensors": self._copy("ema", ema),
            "optimizer.safetensors": self._copy("optimizer", slots),
        }
        # As text, since what it holds changes while it is written.
        state = json.dumps({**record, "step": step}, allow_nan=True)
        for device in {value.device for value in ema.values() if value.is_cuda}:
            torch.cuda.synchronize(device)  # the copies
        self._writing = self._pool.submit(self._write, step, files, state)

    def wait(self) -> None:
        """Until the checkpoint that was begun last is on the disk; raises what kept it from getting there."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def check(self) -> None:
        """Raise what kept the last checkpoint from the disk, if that is known by now."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if error is None:
            self.wait()
            return
        try:
            self.wait()
        except Exception as unwritten:
            logger.warning("The last checkpoint could not be written, either: %s", unwritten)

    def _copy(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {}
        for name, tensor in tensors.items():
            key = f"{part} {name}"
            if key not in self._host:
                # Contiguous, as a file holds it, whatever the layout of the tensor.
                self._host[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = self._host[key].copy_(tensor.detach(), non_blocking=True)
        return copies

    def _write(self, step: int, files: dict[str, dict[str, Tensor]], state: str) -> Path:
        target = self.folder / f"step_{step:08d}"
        temporary = self.folder / f"{TEMPORARY}{uuid.uuid4().hex[:8]}"
        try:
            with environment_faults(target):
                temporary.mkdir(parents=True)
                for name, tensors in files.items():
                    save_file(tensors, temporary / name)
                hashes = {path.name: file_record(path) for path in sorted(temporary.iterdir())}
                write_sealed_json(temporary / STATE, {**json.loads(state), "files": hashes})
                fsync_tree(temporary)
                for damaged in list_checkpoints(self.folder):
                    if damaged.name >= target.name:  # a resume fell back past it
                        shutil.rmtree(damaged)
                os.rename(temporary, target)
                fsync_directory(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in list_checkpoints(self.folder)[: -self.keep_last]:
            if not (self.keep_every and checkpoint_step(old) % self.keep_every == 0):
                shutil.rmtree(old)
        return target


def checkpoint_step(path: Path) -> int:
    """The step that a checkpoint's directory is named for."""
    return int(path.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first; none of them verified."""
    return sorted(folder.glob("step_" + "[0-9]" * 8))


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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: `model NAME`, `ema NAME`, `optimizer INDEX.NAME`."""
    return {
        f"{part} {name}": value
        for part in ("model", "ema", "optimizer")
        for name, value in load_file(path / f"{part}.safetensors").items()
    }


def shapes(path: Path, part: str = "model") -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's weights by name, without reading them. part: `model`, `ema` or `optimizer`."""
    with safe_open(path / f"{part}.safetensors", framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no mapping


def restore(
    tensors: Mapping[str, Tensor], *, model: nn.Module, ema: dict[str, Tensor], optimizer: optim.Optimizer
) -> None:
    """Load what `read_tensors` read into the three. Settings of the optimizer stay its own.

    An average that the checkpoint does not have (another denoiser's, which is forked) begins with its weights.
    """
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    for key, value in tensors.items():
        part, name = key.split(" ", 1)
        parts[part][name] = value
    model.load_state_dict(parts["model"])
    for name, average in ema.items():
        average.copy_(parts["ema"].get(name, parts["model"][name.split(" ")[-1]]))
    state: dict[int, dict[str, Any]] = {}
    for key, value in parts["optimizer"].items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
