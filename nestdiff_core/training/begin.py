"""What training may begin with instead of fresh weights: published ones, or another denoiser's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nestdiff_core.encoders.weights import read_weights
from nestdiff_core.errors import ConfigError
from nestdiff_core.training.checkpoint import STATE, read_checkpoint, shapes


def published_weights(path: Path, *, level: int) -> dict[str, Tensor]:
    """Those of `levels.train.start_from`, by name."""
    if not path.is_file():
        raise ConfigError(
            "levels.train.start_from is not a file",
            stage="denoiser",
            level=level,
            key="levels.train.start_from",
            path=path,
            fix="Correct the path, or leave it out.",
        )
    return read_weights(path, where="denoiser")


def forked_checkpoint(
    path: Path,
    *,
    level: int,
    num_steps: int,
    weights: Mapping[str, tuple[int, ...]],
    diffusion: Mapping[str, Any],
    optimizer: str,
) -> tuple[Path, dict[str, Any]]:
    """That of `levels.train.fork_from`, as `load_latest` returns one, but with no history yet.

    num_steps, weights (shapes by name), diffusion, optimizer: of the denoiser that is to go on from it. Raises
    ConfigError where they do not fit, IntegrityError where it is damaged.
    """
    if not (path / STATE).is_file():
        raise ConfigError(
            "levels.train.fork_from is not a checkpoint",
            stage="denoiser",
            level=level,
            key="levels.train.fork_from",
            path=path,
            expected="a folder step_NNNNNNNN",
            fix="Correct the path, or leave it out.",
        )
    state = read_checkpoint(path, level=level)
    ours = {**weights, "diffusion": diffusion, "optimizer": optimizer}
    slots = shapes(path, "optimizer")
    theirs = {
        **shapes(path),
        "diffusion": state["config"]["diffusion"],
        "optimizer": "muon" if any(name.endswith("momentum_buffer") for name in slots) else "adamw",
    }
    if state["step"] >= num_steps:
        ours, theirs = {"step": f"below num_steps = {num_steps}"}, {"step": state["step"]}
    if differing := sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name)):
        name = differing[0]
        raise ConfigError(
            "This checkpoint cannot be gone on from",
            stage="denoiser",
            level=level,
            key="levels.train.fork_from",
            path=path,
            expected={name: ours.get(name)},
            found={name: theirs.get(name)},
            fix="Name a checkpoint of a denoiser with the same network, diffusion process and optimizer, from before "
            "levels.train.num_steps.",
        )
    return path, {"step": state["step"], "history": []}
