"""From denoisers to samples and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact, ArtifactWriter
from nestdiff_core.evaluation.card import MetricCard, SampleOrigin
from nestdiff_core.evaluation.features import estimate_seconds
from nestdiff_core.evaluation.reference import BICUBIC
from nestdiff_core.evaluation.report import Labelled, evaluate
from nestdiff_core.evaluation.samples import Blocks, StoredSamples, save_samples, write_npz, write_safetensors
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import write_json
from nestdiff_core.images.index import ImageIndex
from nestdiff_core.progress import Progress, duration, silent
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
from nestdiff_core.stages.reference import open_spaces

IMAGES, BARE = "images", "without_conditions"


def samples(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """Sample the cascade: samples.npz, the latents of the levels above, and, where `sampling.without_conditions`
    says so, what level 1 makes without any.

    Runs in each process of a torchrun group. Images are made and committed in parts, of which the files are put
    together at the end: one part is in memory, and a stopped run goes on where it was.
    """
    ref, config, weights = Ref("samples"), x.config.sampling, decoder_weights(x)
    if (made := reuse(x, ref, weights=weights)) is not None:
        return made
    parts = in_parts(config.num_images, part_size(config.batch_size))
    with writing_together(x, ref, weights=weights) as (shards, writer):
        if shards.part(WHOLE) is None:
            make_parts(shards, parts, partial(loading.Cascade, x, device=device), _maker(x, shards), progress=progress)
            if writer is not None:
                _join(x, shards, parts)
        if writer is not None:
            whole = shards.part(WHOLE)
            assert whole is not None
            remove_parts(shards, parts)
            extremes = {name: whole[name] for name in ("minimum", "maximum")}
            writer.seal(images=config.num_images, weights_source=weights, **extremes)
    return x.artifact(ref)


def _maker(
    x: Experiment, shards: ArtifactWriter
) -> Callable[[loading.Cascade, Part, Callable[[int], None]], list[Path]]:
    """What a part holds: images, the latents above level 1, and images without conditions where they are wanted."""
    seed = x.config.sampling.seed

    def make(cascade: loading.Cascade, part: Part, report: Callable[[int], None]) -> list[Path]:
        z = cascade.latents(part.indices, seed=seed)
        arrays = {IMAGES: cascade.images(part.indices, z[1])}
        arrays |= {f"z_{m}": z_m.half().numpy() for m, z_m in z.items() if m > 1}
        if _has_bare(x):
            arrays[BARE] = cascade.images(part.indices, cascade.without_conditions(part.indices, seed=seed))
        write_npz(part_file(shards, part), arrays)
        return [part_file(shards, part)]

    return make


def _has_bare(x: Experiment) -> bool:
    return x.config.num_levels > 1 and x.config.sampling.without_conditions


def _join(x: Experiment, shards: ArtifactWriter, parts: list[Part]) -> None:
    """The finished files from the parts, one part in memory at a time."""
    path, count, extremes = shards.path, x.config.sampling.num_images, [255, 0]
    blocks = partial(read_parts, shards, parts)

    def pictures(name: str) -> Blocks:
        side, channels = x.config.images.resolution, x.config.images.channels
        return Blocks((count, side, side, channels), np.dtype(np.uint8), blocks(name))

    def watched(images: Blocks) -> Blocks:
        def look() -> Iterator[np.ndarray]:
            for block in images.blocks:
                extremes[:] = min(extremes[0], int(block.min())), max(extremes[1], int(block.max()))
                yield block

        return images._replace(blocks=look())

    save_samples(path / "samples.npz", watched(pictures(IMAGES)))
    files = [path / "samples.npz"]
    if x.config.num_levels > 1:
        above = range(2, x.config.num_levels + 1)
        half = np.dtype(np.float16)
        latents = {f"z_{m}": Blocks((count, *x.config.latent_shape(m)), half, blocks(f"z_{m}")) for m in above}
        write_safetensors(path / "latents.safetensors", latents)
        files.append(path / "latents.safetensors")
    if _has_bare(x):
        save_samples(path / f"{BARE}.npz", pictures(BARE))
        files.append(path / f"{BARE}.npz")
    shards.commit_part(WHOLE, files, minimum=extremes[0], maximum=extremes[1])


def evaluation(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """The numbers of the sample set against the reference statistics, each with its metric card, in metrics.json."""
    ref = Ref("evaluation")
    if (made := reuse(x, ref)) is not None:
        return made
    config, index, sampled = x.config.evaluation, loading.open_index(x), x.artifact(Ref("samples"))
    num, bare = x.config.sampling.num_images, sampled.path / f"{BARE}.npz"
    pictures = StoredSamples(sampled.path / "samples.npz", num_images=num)
    others = {BARE: StoredSamples(bare, num_images=num)} if bare.is_file() else {}
    checkpoints = {level.level: x.artifact(Ref("denoiser", level.level)).digest for level in x.config.levels}
    label_sampling = {
        "none": "none",
        "class": "image index modulo number of classes",
        "text": "first caption of the held-out image of this index, modulo their number",
    }[x.config.conditioning.labels]
    origin = SampleOrigin.of(loading.sampled_config(x), checkpoints, label_sampling=label_sampling)
    with x.writing(ref) as writer:
        spaces = open_spaces(x, device=device)
        seconds = estimate_seconds(pictures, [space.extractor for space in spaces]) * (1 + len(others))
        logger.info("evaluation: %s images, %s", f"{num * (1 + len(others)):,}", duration(seconds))
        record = evaluate(
            pictures,
            spaces,
            origin=origin,
            others=others,
            probe=(_labelled(index, "train"), _labelled(index, "held_out")) if config.probe else None,
            num_neighbours=config.num_neighbours,
            resamples=config.resamples,
            progress=progress,
        )
        if config.clip_score:
            scored = _clip_score(x, pictures, index, origin, device, progress)
            record["metrics"]["clip_score"] = {**scored, "others": dict.fromkeys(others)}  # which were told nothing
            if x.config.conditioning.text.weights == "random":
                record["warnings"].append("clip_score: the CLIP has random weights, so it says nothing.")
        for warning in record["warnings"]:
            logger.warning(warning)
        write_json(writer.path / "metrics.json", record)
        return writer.seal(**record)


def _clip_score(
    x: Experiment, pictures: StoredSamples, index: ImageIndex, origin: SampleOrigin, device: str, progress: Progress
) -> dict[str, Any]:
    """The score of the samples with the captions that they were told; the floor is that of the real images of these."""
    from nestdiff_core.evaluation.clip_score import build_clip, clip_score  # open_clip takes a second to import

    clip, config = build_clip(x.config.conditioning.text, device=device), x.config.conditioning.text
    held_out = loading.SplitImages(index, "held_out")
    captions = index.captions()
    told = [captions[row][0] for row in held_out.rows[np.arange(len(pictures)) % len(held_out)]]
    found = clip_score(pictures, told, clip, progress=progress)
    shown = held_out.first(len(pictures))
    real = clip_score(shown, told[: len(shown)], clip, progress=progress)
    card = MetricCard(
        metric="clip_score",
        extractor=f"open_clip {config.name}",
        weights_sha256=clip.weights_sha256,
        preprocessing=clip.preprocessing,
        reference_digest=found.captions_digest,
        num_reference=found.count,
        samples_digest=found.digest,
        num_samples=found.count,
        resize_filter=BICUBIC,
        settings={},
        origin=origin,
    )
    return {
        "value": found.value,
        "deviation": found.standard_error,
        "value_at_floor": found.value if real.count == found.count else None,
        "floor": real.value,
        "floor_images": real.count,
        "card": card.to_dict(),
    }


def _labelled(index: ImageIndex, split: str) -> Labelled:
    images = loading.SplitImages(index, split)
    return Labelled(images, index.labels[images.rows])
