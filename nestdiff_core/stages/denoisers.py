"""From latents to trained denoisers."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact, ArtifactWriter, code_version
from nestdiff_core.encoders.weights import weights_digest
from nestdiff_core.errors import IntegrityError
from nestdiff_core.experiment import Experiment, Ref, differences
from nestdiff_core.files import is_sealed, read_sealed_json, write_json
from nestdiff_core.loading import CHECKPOINTS
from nestdiff_core.models import count_macs, count_parameters
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stages.common import logger, reuse
from nestdiff_core.stores.page_cache import shuffled_reads
from nestdiff_core.training import group
from nestdiff_core.training.checkpoint import STATE, list_checkpoints
from nestdiff_core.training.events import EventFiles
from nestdiff_core.training.loop import Trainer, ignore
from nestdiff_core.training.signals import stop_on_signals

EVENTS = "tensorboard"
HISTORY = "history.json"
TOLD = ("loss", "held_out_loss", "held_out_loss_without_conditions", "gradient_norm", "lr", "skipped_steps")


def train(
    x: Experiment, level: int, *, device: str = "cpu", progress: Progress = silent, until_step: int | None = None
) -> Artifact | None:
    """Train the denoiser of `level` and export its EMA; the same call resumes.

    Runs in each process of a torchrun group, on one host or on several. Every host reads the latents; the first
    process alone writes, and checkpoints may lie on the disk of one host only.

    Returns the sealed artifact in the first process (None in the others, and where `until_step` ended it early).
    Raises Interrupted after saving when a SIGTERM or SIGINT came to any of them; IntegrityError where hosts see
    different code, settings or latents.
    """
    x.config.level(level)  # a wrong number is refused before anything is read
    ref = Ref("denoiser", level)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with group.together():
        made = reuse(x, ref)
        path, header = x.path(ref), x.header(ref)
    seen = {"code": code_version(), "torch": torch.__version__, **{k: header[k] for k in ("config", "inputs")}}
    group.require_same("denoiser", level, seen)
    started = weights_digest(x.config.level(level).train.start_from)
    if any(group.gather(made is not None)):
        if made is not None and started not in (None, made.info.get("started_from", started)):
            logger.warning("%s was started from other weights than levels.train.start_from now holds; it is kept.", ref)
        return made
    with contextlib.ExitStack() as stack:
        writer = None
        with group.together():
            batches, index = loading.latent_batches(x, level), loading.open_index(x)
            begins = not list_checkpoints(path / CHECKPOINTS) and not x.config.level(level).train.fork_from
            if rank == 0 and begins:
                _tell_of_others(x, ref, path)
            if rank == 0:
                writer = stack.enter_context(x.writing(ref, keep_parts=True))
        stop = stack.enter_context(stop_on_signals())
        stack.enter_context(shuffled_reads(batches.stores(), bring_in=os.environ.get("LOCAL_RANK", "0") == "0"))
        trainer = Trainer(
            x.config,
            level,
            batches,
            train_rows=index.rows("train"),
            held_out_rows=index.rows("held_out"),
            num_classes=loading.num_classes(x.config, index),
            null_context=loading.null_context(x),
            folder=path / CHECKPOINTS,
            device=torch.device(device),
            record={k: header[k] for k in ("experiment", "level", "fingerprint", "config", "inputs")},
            name=index.name,
            warn=logger.warning,
        )
        events = EventFiles(path / EVENTS, level=level, after=trainer.step) if rank == 0 else None
        log = ignore if events is None else stack.enter_context(events)
        trainer.run(progress=progress, stop=stop, until_step=until_step, log=log)
        if writer is None or trainer.step < trainer.train.num_steps:
            return None
        return _export(x, trainer, writer, started)


def _tell_of_others(x: Experiment, ref: Ref, path: Path) -> None:
    """Say so where this level has been trained for a while with other settings: who changed one may not know that
    training begins anew."""
    for folder in sorted(path.parent.glob(f"*/{CHECKPOINTS}")):
        if folder.parent != path and not is_sealed(folder.parent) and (steps := list_checkpoints(folder)):
            with contextlib.suppress(IntegrityError):  # not what is to be trained now
                _tell_of_other(x, ref, steps[-1], read_sealed_json(steps[-1] / STATE, stage=ref.stage))


def _tell_of_other(x: Experiment, ref: Ref, checkpoint: Path, state: dict[str, Any]) -> None:
    if (state.get("experiment"), state.get("level")) != (x.config.name, ref.level):
        return
    changed = differences(state["config"], x.stage_config(ref)) or {"inputs": ("others", "these")}
    logger.warning(
        "%s was trained to step %d with other settings (%s). This one begins anew; to go on from there instead, set "
        "levels.%d.train.fork_from: %s",
        ref,
        state["step"],
        ", ".join(f"{name}: {theirs} -> {ours}" for name, (theirs, ours) in changed.items()),
        ref.level,
        checkpoint,
    )


def _export(x: Experiment, trainer: Trainer, writer: ArtifactWriter, started: str | None) -> Artifact:
    """What everyone else reads: the averages of the weights, how to build the network, the history of the run."""
    shapes = [list(shape) for _, shape in sorted(trainer.batches.shapes().items(), reverse=True)]
    for decay, average in trainer.averages.items():
        file = loading.EMA if average is trainer.ema else loading.average_file(decay)
        save_file({name: value.cpu().contiguous() for name, value in average.items()}, writer.path / file)
    # Nothing here may depend on what else an experiment says: the denoiser is others' too, by its digest.
    architecture = {"level_config": writer.header["config"], "shapes": shapes}
    write_json(writer.path / "config.json", architecture)
    write_json(writer.path / HISTORY, trainer.history)
    last = {name: value for name in TOLD if (value := trainer.history[-1].get(name)) is not None}
    return writer.seal(
        beside=(CHECKPOINTS, EVENTS, HISTORY),
        step=trainer.step,
        parameters=count_parameters(trainer.model),
        macs=count_macs(trainer.model),
        **({} if started is None else {"started_from": started}),
        **last,
    )
