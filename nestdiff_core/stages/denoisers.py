"""From latents to trained denoisers."""

from __future__ import annotations

import contextlib
import os

import torch
from safetensors.torch import save_file

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact, ArtifactWriter
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import write_json
from nestdiff_core.models import count_macs, count_parameters
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stages.common import logger, reuse
from nestdiff_core.stores.page_cache import shuffled_reads
from nestdiff_core.training.loop import TIMINGS, Trainer, stop_on_signals

CHECKPOINTS = "checkpoints"


def train(
    x: Experiment, level: int, *, device: str = "cpu", progress: Progress = silent, until_step: int | None = None
) -> Artifact | None:
    """Train the denoiser of `level` and export its EMA; the same call resumes.

    Runs in each process of a torchrun group.

    Returns the sealed artifact in the first process (None in the others, and where `until_step` ended it early).
    Raises Interrupted after saving when a SIGTERM or SIGINT came.
    """
    x.config.level(level)  # a wrong number is refused before anything is read
    ref = Ref("denoiser", level)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if (made := reuse(x, ref)) is not None:
        return made
    batches, index = loading.latent_batches(x, level), loading.open_index(x)
    path, header = x.path(ref), x.header(ref)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(x.writing(ref, keep_parts=True)) if rank == 0 else None
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
            record={k: header[k] for k in ("fingerprint", "config", "inputs")},
            name=index.name,
            warn=logger.warning,
        )
        trainer.run(progress=progress, stop=stop, until_step=until_step)
        if writer is None or trainer.step < trainer.train.num_steps:
            return None
        return _export(x, trainer, writer)


def _export(x: Experiment, trainer: Trainer, writer: ArtifactWriter) -> Artifact:
    """What everyone else reads: the EMA weights, how to build the network, the history of the run."""
    shapes = [list(shape) for _, shape in sorted(trainer.batches.shapes().items(), reverse=True)]
    save_file({name: value.cpu().contiguous() for name, value in trainer.ema.items()}, writer.path / loading.EMA)
    # Nothing here may depend on what else an experiment says: the denoiser is others' too, by its digest.
    architecture = {"level_config": writer.header["config"], "shapes": shapes}
    write_json(writer.path / "config.json", architecture)
    write_json(writer.path / "history.json", trainer.history)
    last = {k: v for k, v in trainer.history[-1].items() if k not in ("step", *TIMINGS)}
    return writer.seal(
        beside=(CHECKPOINTS, "history.json"),
        step=trainer.step,
        parameters=count_parameters(trainer.model),
        macs=count_macs(trainer.model),
        **last,
    )
