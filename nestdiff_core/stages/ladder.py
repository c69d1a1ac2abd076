"""The oracle ladder: from denoisers and true latents to which level loses the quality (evaluation/ladder.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact, ArtifactWriter
from nestdiff_core.evaluation.ladder import image_ladder, level_numbers
from nestdiff_core.evaluation.latent_metrics import averaged
from nestdiff_core.evaluation.samples import StoredSamples, save_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import write_json
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stages.common import logger, reuse
from nestdiff_core.stages.reference import extractors, open_statistics

MAX_TRAINING = 10_000  # training images whose latents are compared with
_BLOCK = 500  # training images whose latents are read together


def ladder(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """Each rung's images (and the latents it generated) in rung_K.npz, and all numbers in ladder.json.

    A rung is committed once it is whole: a stopped run goes on at the next.
    """
    ref = Ref("ladder")
    if (made := reuse(x, ref)) is not None:
        return made
    config, top = x.config, x.config.num_levels
    held_out, training = judges(x, config.ladder.num_images)
    true = {m: true_latents(x, m, held_out.rows) for m in range(1, top + 1)}
    with x.writing(ref, keep_parts=True) as writer:
        files = _rungs(x, writer, held_out.rows, true, device, progress)
        evaluation, spaces = config.evaluation, extractors(x, device=device)
        record = image_ladder(
            {k: StoredSamples(file, num_images=len(held_out)) for k, file in files.items()},
            held_out,
            open_statistics(x, "train", spaces),
            spaces,
            num_neighbours=evaluation.num_neighbours,
            resamples=config.ladder.resamples,
            seed=config.sampling.seed,
        )
        levels = {
            m: level_numbers(
                {
                    which: _generated(files[rung], m)
                    for which, rung in (
                        {"unconditional": top + 1} if m == top else {"conditional": m + 1, "ancestral": top + 1}
                    ).items()
                },
                averaged(true[m]),
                read_averaged(x, m, training.rows),
                name=f"z_{m}",
                num_neighbours=evaluation.num_neighbours,
                resamples=config.ladder.resamples,
                seed=config.sampling.seed,
            )
            for m in range(top, 0, -1)
        }
        record["warnings"] += [text for numbers in levels.values() for text in numbers.pop("warnings")]
        for warning in record["warnings"]:
            logger.warning(warning)
        channels = {str(m): numbers.pop("channels") for m, numbers in levels.items()}
        record |= {
            "levels": {str(m): numbers for m, numbers in levels.items()},
            "num_images": len(held_out),
            "num_training": len(training),
        }
        write_json(writer.path / "ladder.json", {**record, "channels": channels})
        return writer.seal(**record)


def _rungs(
    x: Experiment,
    writer: ArtifactWriter,
    rows: Int64[np.ndarray, " N"],
    true: dict[int, Tensor],
    device: str,
    progress: Progress,
) -> dict[int, Path]:
    """The file of each rung k = L + 1, ..., 1: images, and what of the latents numbers are made from (fp16)."""
    top, num = x.config.num_levels, len(rows)
    cascade: loading.Cascade | None = None
    files = {k: f"rung_{k}.npz" for k in range(top + 1, 0, -1)}
    for finished, (k, name) in enumerate(files.items()):
        if writer.part(f"rung_{k}") is not None:
            continue
        cascade = cascade or loading.Cascade(x, device=device)
        z = cascade.latents(
            range(num),
            seed=x.config.sampling.seed,
            rows=rows,
            given={m: z_m for m, z_m in true.items() if m >= k},
            progress=_beyond(progress, finished * num, len(files) * num),
        )
        kept = {f"z_{m}": z[m].half().numpy() for m in range(1, k) if k == top + 1 or m == k - 1}
        save_samples(writer.path / name, cascade.images(range(num), z[1]), also=kept)
        writer.commit_part(f"rung_{k}", [writer.path / name])
    return {k: writer.fetch(name) for k, name in files.items()}


def _beyond(progress: Progress, before: int, whole: int) -> Progress:
    """Tells of images of one rung as of all."""
    return lambda done, total, what, **numbers: progress(before + done, whole, what, **numbers)


def judges(x: Experiment, num_images: int) -> tuple[loading.SplitImages, loading.SplitImages]:
    """Held-out images, at most `num_images`, whose true latents are given; training ones to compare with."""
    index, seed = loading.open_index(x), x.config.sampling.seed
    held_out = loading.SplitImages(index, "held_out").subset(num_images, seed)
    return held_out, loading.SplitImages(index, "train").subset(MAX_TRAINING, seed)


def true_latents(x: Experiment, level: int, rows: Int64[np.ndarray, " N"]) -> Tensor:
    """True latents (N, C, H, W) of the images `rows`, not mirrored."""
    return torch.from_numpy(loading.open_latents(x, level).read(rows, np.zeros_like(rows))).float()


def read_averaged(x: Experiment, level: int, rows: Int64[np.ndarray, " N"]) -> Tensor:
    """True latents as they are compared (`averaged`), read in blocks: those of the images' own size may be many."""
    blocks = (rows[first : first + _BLOCK] for first in range(0, len(rows), _BLOCK))
    return torch.cat([averaged(true_latents(x, level, block)) for block in blocks])


def _generated(file: Path, level: int) -> Tensor:
    with np.load(file, allow_pickle=False) as arrays:
        return averaged(torch.from_numpy(arrays[f"z_{level}"]).float())
