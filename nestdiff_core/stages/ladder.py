"""The oracle ladder: from denoisers and true latents to which level loses the quality (evaluation/ladder.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact, ArtifactWriter
from nestdiff_core.evaluation.ladder import image_ladder, level_numbers
from nestdiff_core.evaluation.latent_metrics import averaged
from nestdiff_core.evaluation.samples import Blocks, StoredSamples, save_samples, write_npz
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import write_json
from nestdiff_core.progress import Progress, silent
from nestdiff_core.sampling.parts import (
    WHOLE,
    Part,
    in_parts,
    make_parts,
    part_file,
    part_size,
    read_parts,
    remove_parts,
)
from nestdiff_core.stages.common import decoder_weights, logger, reuse, writing_together
from nestdiff_core.stages.reference import extractors, open_statistics

MAX_TRAINING = 10_000  # training images whose latents are compared with
IMAGES = "images"  # array of a part
_BLOCK = 500  # training images whose latents are read together


def ladder(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """Each rung's images (and the latents it generated) in rung_K.npz, and all numbers in ladder.json.

    Runs in each process of a torchrun group: the rungs' images are made and committed in parts, as those of `samples`
    are, and the first process judges them. A stopped run goes on where it was.
    """
    ref, weights = Ref("ladder"), decoder_weights(x)
    if (made := reuse(x, ref, weights=weights)) is not None:
        return made
    held_out, training = judges(x, x.config.ladder.num_images)
    true = {m: true_latents(x, m, held_out.rows) for m in range(1, x.config.num_levels + 1)}
    with writing_together(x, ref, weights=weights) as (shards, writer):
        rungs = _Rungs(x, shards, held_out.rows, true)
        if shards.part(WHOLE) is None:
            make_parts(
                shards,
                rungs.parts,
                partial(loading.Cascade, x, device=device),
                rungs.make,
                what="ladder",
                estimate=rungs.estimate,
                progress=progress,
            )
            if writer is not None:
                rungs.join()
        if writer is not None:
            record = _judge(x, rungs.files, held_out, training, true, device)
            write_json(writer.path / "ladder.json", record)
            remove_parts(shards, rungs.parts)
            del record["channels"]
            writer.seal(weights_source=weights, **record)
    return x.artifact(ref)


def _judge(
    x: Experiment,
    files: Mapping[int, Path],
    held_out: loading.SplitImages,
    training: loading.SplitImages,
    true: Mapping[int, Tensor],
    device: str,
) -> dict[str, Any]:
    """All numbers: of the rungs' images, and of the latents that they generated."""
    config, top = x.config, x.config.num_levels
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
    return record | {
        "levels": {str(m): numbers for m, numbers in levels.items()},
        "num_images": len(held_out),
        "num_training": len(training),
        "channels": channels,
    }


class _Rungs:
    """The images of each rung k = L + 1, ..., 1, and what of the latents numbers are made from (fp16): the lowest that
    are generated, and all where nothing is given.

    rows (N,): of the held-out images. true: their latents by level, of which a rung is given those from k up.
    """

    def __init__(
        self, x: Experiment, shards: ArtifactWriter, rows: Int64[np.ndarray, " N"], true: Mapping[int, Tensor]
    ) -> None:
        self.x, self.shards, self.rows, self.true, top = x, shards, rows, true, x.config.num_levels
        self.of = {k: f"rung_{k}_" for k in range(top + 1, 0, -1)}
        size = part_size(x.config.sampling.batch_size)
        self.rung = {part: k for k, of in self.of.items() for part in in_parts(len(rows), size, of=of)}
        self.parts = list(self.rung)
        self.kept = {k: range(1, k) if k == top + 1 else range(max(1, k - 1), k) for k in self.of}
        self.files = {k: shards.path / f"rung_{k}.npz" for k in self.of}

    def make(self, cascade: loading.Cascade, part: Part, report: Callable[[int], None]) -> list[Path]:
        k, some = self.rung[part], slice(part.first, part.first + part.num_images)
        given = {m: z_m[some] for m, z_m in self.true.items() if m >= k}
        z = cascade.latents(part.indices, seed=self.x.config.sampling.seed, rows=self.rows[some], given=given)
        arrays = {IMAGES: cascade.images(part.indices, z[1])}
        arrays |= {f"z_{m}": z[m].half().numpy() for m in self.kept[k]}
        write_npz(part_file(self.shards, part), arrays)
        return [part_file(self.shards, part)]

    def estimate(self, cascade: loading.Cascade, parts: Sequence[Part]) -> float:
        return cascade.estimate_seconds(
            {m: sum(part.num_images for part in parts if self.rung[part] > m) for m in self.true}
        )

    def join(self) -> None:
        """The finished files from the parts, one part in memory at a time."""
        count, side, channels = len(self.rows), self.x.config.images.resolution, self.x.config.images.channels
        for k, file in self.files.items():
            parts = [part for part in self.parts if self.rung[part] == k]
            blocks = partial(read_parts, self.shards, parts)
            latents = {
                f"z_{m}": Blocks((count, *self.true[m].shape[1:]), np.dtype(np.float16), blocks(f"z_{m}"))
                for m in self.kept[k]
            }
            pictures = Blocks((count, side, side, channels), np.dtype(np.uint8), blocks(IMAGES))
            save_samples(file, pictures, also=latents)
        self.shards.commit_part(WHOLE, self.files.values())


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
