"""The newest weights of a level, finished or still in training. Reads records only: a sensor asks every minute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nestdiff_core.errors import IntegrityError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import read_json, read_sealed_json

CHECKPOINTS, STATE, EMA, HISTORY = "checkpoints", "state.json", "ema.safetensors", "history.json"


class Weights(NamedTuple):
    """The averaged weights of one denoiser at one step.

    file: size and sha256 that it must have. denoiser: fingerprint of what they are weights of. finished: whether they
    are the exported ones.
    """

    level: int
    step: int
    path: Path
    file: dict[str, Any]
    denoiser: str
    finished: bool

    @property
    def digest(self) -> str:
        return self.file["sha256"]

    def history(self) -> list[dict[str, int | float]]:
        """The lines of the training's log up to here."""
        if self.finished:
            return read_json(self.path.parent / HISTORY, stage="denoiser")
        return read_sealed_json(self.path.parent / STATE, stage="denoiser")["history"]


def all_weights(x: Experiment, level: int) -> Iterator[Weights]:
    """Those of the finished denoiser, else of its checkpoints, newest first; nothing where its latents are missing.

    A trainer may remove any of its checkpoints meanwhile, and then the next is the newest that can be read.
    """
    ref = Ref("denoiser", level)
    with contextlib.suppress(IntegrityError):  # its inputs have not been made
        path = x.path(ref)
        if (made := x.find(ref)) is not None:
            yield Weights(level, made.info["step"], path / EMA, made.manifest["files"][EMA], path.name, True)
            return
        for state in sorted((path / CHECKPOINTS).glob(f"step_*/{STATE}"), reverse=True):
            with contextlib.suppress(IntegrityError):  # damaged, or just removed
                record = read_sealed_json(state, stage="denoiser")
                if record.get("fingerprint") == path.name:
                    yield Weights(level, record["step"], state.parent / EMA, record["files"][EMA], path.name, False)


def newest_weights(x: Experiment, level: int) -> Weights | None:
    return next(all_weights(x, level), None)
