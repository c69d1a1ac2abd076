"""The pipeline, stage by stage: what Dagster's assets, the command line and a notebook call.

Each function takes an `Experiment`, makes its artifact(s) and returns them. What is there already and whole is
checked and returned, never made again; what is there but damaged is made again, and says so. An input that is
missing is an IntegrityError with the command that makes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact, ArtifactWriter, fingerprint, is_sealed, open_artifact, write_json, writing
from nestdiff_core.autoencoders import Autoencoder, make_autoencoder
from nestdiff_core.config import LevelConfig
from nestdiff_core.encoders import (
    build_encoder,
    encode_captions,
    encoding_precision,
    extract_crops,
    extract_features,
    feature_shapes,
    load_encoder,
)
from nestdiff_core.encoders.text import build_text_tower
from nestdiff_core.encoders.weights import weights_digest
from nestdiff_core.errors import ConfigError, InputError, IntegrityError
from nestdiff_core.evaluation.card import SampleOrigin
from nestdiff_core.evaluation.report import evaluate
from nestdiff_core.evaluation.samples import load_samples, save_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.images import ImageIndex, build_images, source_listing
from nestdiff_core.latents.basis import fit_basis
from nestdiff_core.latents.design import propose
from nestdiff_core.latents.hierarchy import encode_levels, level_moments
from nestdiff_core.latents.moments import Moments
from nestdiff_core.models import count_macs, count_parameters
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.stores.writer import create_store, write_shard
from nestdiff_core.training.loop import Trainer, stop_on_signals

logger = logging.getLogger("nestdiff")

T = TypeVar("T")

CHECKPOINTS = "checkpoints"
STATISTICS_BYTES = 2**28  # float64 numbers of latents that are held at once


# --- data ---------------------------------------------------------------------------------------------------------


def images(x: Experiment, *, progress: Progress = silent) -> Artifact:
    """Validate the source and write the image index (and shards, for sources that have none).

    A folder or shards whose files have changed since are read again.
    """
    ref, listing = Ref("images"), source_listing(x.config.images)
    if (made := _reuse(x, ref)) is not None and made.info["source_listing"] == listing:
        return made
    with writing(x.path(ref), x.header(ref)) as writer:
        info = build_images(x.config.images, writer, progress=progress)
        return writer.seal(source_listing=listing, **info)


def encoder(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """Pre-train or load the frozen encoder and measure it (kNN accuracy where there are labels)."""
    ref, weights = Ref("encoder"), weights_digest(x.config.encoder.weights)
    if x.config.encoder.kind == "autoencoder":
        weights = weights_digest(x.config.autoencoder.weights)
    if (sealed := _reuse(x, ref, weights=weights)) is not None:
        return sealed
    index = loading.open_index(x)
    with writing(x.path(ref), x.header(ref)) as writer:
        made = build_encoder(
            x.config.encoder, index, writer, autoencoder=x.config.autoencoder, device=device, progress=progress
        )
        for level in x.config.levels[1:]:
            shape = made["map"] if level.source == "pooled" else (*made["vector"], level.grid)
            _require_features(level, "encoder", channels=shape[0], side=shape[1])
        return writer.seal(weights_source=weights, **made)


def _require_features(level: LevelConfig, stage: str, *, channels: int, side: int) -> None:
    """Refuse a level that asks for more than the encoder gives, before anything is encoded for it."""
    for name, found, limit in (("grid", level.grid, side), ("channels", level.channels, channels)):
        if found > limit:
            raise ConfigError(
                f"Level {level.level} asks more than the encoder's features have",
                stage=stage,
                level=level.level,
                key=f"levels.{name}",
                expected=f"at most {limit}",
                found=found,
                fix="Lower it, or use another encoder.",
            )


def features(
    x: Experiment, *, shards: Sequence[str] | None = None, device: str = "cpu", progress: Progress = silent
) -> tuple[Artifact | None, dict[str, dict[str, Any]]]:
    """Encode image shards (all, or those named) into the feature store, one committed part a shard.

    Arrays: `map` (N, views, C, S, S) and `vector` (N, views, D); view 0 is the image, view 1 its mirror image.

    Returns the sealed artifact, or None while shards are still missing, and the record of each shard asked for.
    A shard whose part is whole and was made from the same image shard is not encoded again.
    """
    config = x.config.features
    views = 1 + config.flip

    def start(index: ImageIndex, _: Path) -> _Encoding:
        frozen = load_encoder(x.artifact(Ref("encoder")), device=device)
        shapes = {name: (views, *shape) for name, shape in feature_shapes(frozen).items()}

        def encode(pixels: np.ndarray, k: int) -> dict[str, np.ndarray]:
            row = index.shards[k].first_row
            with encoding_precision(config.precision, device):
                feature_map, vector = extract_features(
                    frozen, pixels, config.batch_size, config.dtype, first_row=row, flip=config.flip
                )
            return {"map": feature_map, "vector": vector}

        return _Encoding(shapes, index.read_shard, encode)

    return _by_shard(x, Ref("features"), start, shards, progress)


def crops(
    x: Experiment, level: int, *, shards: Sequence[str] | None = None, device: str = "cpu", progress: Progress = silent
) -> tuple[Artifact | None, dict[str, dict[str, Any]]]:
    """Encode the grid x grid crops of every image to one vector each, for a level whose source is `patch`.

    Array: `map` (N, views, D, grid, grid). Otherwise as `features`.
    """
    config, grid = x.config.features, x.config.level(level).grid

    def start(index: ImageIndex, _: Path) -> _Encoding:
        frozen = load_encoder(x.artifact(Ref("encoder")), device=device)

        def encode(pixels: np.ndarray, k: int) -> dict[str, np.ndarray]:
            row = index.shards[k].first_row
            with encoding_precision(config.precision, device):
                maps = extract_crops(
                    frozen, pixels, grid, config.batch_size, config.dtype, first_row=row, flip=config.flip
                )
            return {"map": maps}

        return _Encoding({"map": (1 + config.flip, frozen.vector_channels, grid, grid)}, index.read_shard, encode)

    return _by_shard(x, Ref("crops", level), start, shards, progress)


def text(
    x: Experiment, *, shards: Sequence[str] | None = None, device: str = "cpu", progress: Progress = silent
) -> tuple[Artifact | None, dict[str, dict[str, Any]]]:
    """Encode the captions with the frozen text tower: array `tokens` (N, captions, T, W), and the empty caption.

    An image with fewer captions than `captions_per_image` repeats them; one without any is an InputError. Otherwise
    as `features`.
    """
    config, dtype = x.config.conditioning.text, x.config.features.dtype

    count = config.captions_per_image

    def start(index: ImageIndex, folder: Path) -> _Encoding:
        tower = build_text_tower(config, device=device)
        save_file({loading.TOKENS: tower.encode([""]).cpu().contiguous()}, folder / loading.EMPTY_CAPTION)

        def encode(captions: list[list[str]], k: int) -> dict[str, np.ndarray]:
            chosen = [c for several in captions for c in itertools.islice(itertools.cycle(several), count)]
            tokens = encode_captions(tower.encode, chosen, config.batch_size, dtype)
            return {loading.TOKENS: tokens.reshape(-1, count, *tokens.shape[1:])}

        shapes = {loading.TOKENS: (count, config.length, config.width)}
        return _Encoding(shapes, lambda k: _captions(index, k), encode)

    return _by_shard(x, Ref("text"), start, shards, progress, weights=weights_digest(config.weights))


class _Encoding(NamedTuple):
    """How a store is filled: shapes of its rows, what of a shard is read, what becomes of that."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[int], Any]
    encode: Callable[[Any, int], dict[str, np.ndarray]]


def _by_shard(
    x: Experiment,
    ref: Ref,
    start: Callable[[ImageIndex, Path], _Encoding],
    shards: Sequence[str] | None,
    progress: Progress,
    *,
    weights: str | None = None,
) -> tuple[Artifact | None, dict[str, dict[str, Any]]]:
    """Fill a store shard by shard, each committed by itself; see `features`.

    start: called once there is something to do, with the artifact's folder. The next shard is read and decoded while
    one is encoded.
    """
    config, index = x.config.features, loading.open_index(x)
    names = [shard.name for shard in index.shards]
    asked = names if shards is None else list(shards)
    if unknown := sorted(set(asked) - set(names)):
        raise ConfigError(
            "The image index has no such shard",
            stage=ref.stage,
            key=unknown[0],
            expected=names,
            found=unknown,
            fix="Materialise `images` again if the source has grown.",
        )
    digest = x.artifact(Ref("images")).digest
    if (made := _reuse(x, ref, weights=weights)) is not None and made.info["images"] == digest:
        return made, {name: made.info["parts"][name] for name in asked}
    with writing(x.path(ref), x.header(ref), keep_parts=True) as writer:
        shapes, read, encode = start(index, writer.path)
        store, counts = writer.path / loading.STORE, [shard.count for shard in index.shards]
        attributes = {"fingerprint": writer.header["fingerprint"]}
        if ref.stage != "text":
            attributes["preprocessing"] = x.artifact(Ref("encoder")).info["preprocessing"]
        create_store(store, shapes, config.dtype, counts, config.chunk_rows, attributes)
        places = [names.index(name) for name in asked]
        sources = {k: [index.shards[k].sha256, weights] for k in places}
        whole = [k for k in places if (part := writer.part(names[k])) is not None and part["source"] == sources[k]]
        progress(len(whole), len(asked), ref.stage)
        for done, (k, loaded) in enumerate(_read_ahead(read, [k for k in places if k not in whole]), len(whole) + 1):
            files = write_shard(store, k, encode(loaded, k))
            writer.commit_part(names[k], files, rows=counts[k], source=sources[k])
            progress(done, len(asked), ref.stage)
        parts = {
            shard.name: {"rows": shard.count, "digest": fingerprint(part["files"])}
            for shard in index.shards
            if (part := writer.part(shard.name)) is not None and part["source"] == [shard.sha256, weights]
        }
        records = {name: parts[name] for name in asked}
        if len(parts) < len(names):
            return None, records
        info = {"images": digest, "rows": index.num_images, "parts": parts, "arrays": shapes}
        return writer.seal(weights_source=weights, **info), records


def _read_ahead(read: Callable[[int], T], places: Sequence[int]) -> Iterator[tuple[int, T]]:
    """(place, what `read` gives for it) in order; the next one is being read meanwhile."""
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, places[0]) if places else None
        for k, following in itertools.zip_longest(places, places[1:]):
            assert ahead is not None
            loaded = ahead.result()
            ahead = None if following is None else reader.submit(read, following)
            yield k, loaded


def _captions(index: ImageIndex, shard: int) -> list[list[str]]:
    rows = index.shards[shard].rows
    captions = index.captions(rows)
    bare = [i for i, several in enumerate(captions) if not several]
    if bare:
        raise InputError(
            f"{len(bare)} images have no caption",
            stage="text",
            path=index.shards[shard].path,
            key=index.keys[rows][bare[0]],
            fix="Add a .txt (or .json with `captions`) member for each, or set conditioning.labels to none.",
        )
    return captions


# --- hierarchy ----------------------------------------------------------------------------------------------------


def bases(x: Experiment, levels: Sequence[int] | None = None, *, progress: Progress = silent) -> dict[int, Artifact]:
    """Fit and persist the SVD basis of each level (default: 2..L), all from one read of the features."""
    levels = range(2, x.config.num_levels + 1) if levels is None else levels
    _moments(x, [level for level in levels if _reuse(x, Ref("moments", level)) is None], progress)
    made = {}
    for level in levels:
        ref = Ref("svd_basis", level)
        artifact = _reuse(x, ref)
        if artifact is None:
            moments = Moments.load(x.artifact(Ref("moments", level)).path / "moments.npz")
            basis = fit_basis(moments, x.config.level(level).channels, level)
            with writing(x.path(ref), x.header(ref)) as writer:
                basis.save(writer.path / loading.BASIS)
                artifact = writer.seal(**basis.summary())
        made[level] = artifact
    return made


def _moments(x: Experiment, levels: Sequence[int], progress: Progress) -> None:
    if not levels:
        return
    index = loading.open_index(x)
    by_store: dict[Ref, list[int]] = {}
    for level in levels:
        by_store.setdefault(x.level_features(level), []).append(level)
    for several in by_store.values():
        reader = loading.open_level_features(x, several[0])
        channels, side = reader.shape[2:4]
        for level in several:
            _require_features(x.config.level(level), "svd_basis", channels=channels, side=side)
        grids = {x.config.level(level).grid: level for level in several}  # levels with one grid share their moments
        by_grid = level_moments(reader, sorted(grids), index.rows("train"), progress=progress)
        for grid, level in grids.items():
            ref = Ref("moments", level)
            with writing(x.path(ref), x.header(ref)) as writer:
                by_grid[grid].save(writer.path / "moments.npz")
                writer.seal(tokens=by_grid[grid].count)


def design(x: Experiment, *, progress: Progress = silent) -> Artifact:
    """Measure the spectrum of the feature map pooled to each grid, and propose levels from it (latents/design.py).

    info: `proposals`, a row per level from the top, and `eigenvalues` by grid.
    """
    ref, config = Ref("design"), x.config.design
    if (made := _reuse(x, ref)) is not None:
        return made
    index, reader = loading.open_index(x), loading.open_features(x)
    side = reader.shape[-1]
    grids = config.grids or [2**power for power in range(side.bit_length()) if 2**power < side or side == 1]
    if max(grids) > side:
        raise ConfigError(
            "A grid is finer than the encoder's feature map",
            stage="design",
            key="design.grids",
            expected=f"at most {side}",
            found=max(grids),
            fix="Leave it out.",
        )
    moments = level_moments(reader, sorted(grids), index.rows("train"), progress=progress)
    spectra = {grid: fit_basis(m, 1, level=0).eigenvalues for grid, m in moments.items()}
    proposals = propose(spectra, nats=config.nats, growth=config.growth, variance=config.variance)
    with writing(x.path(ref), x.header(ref)) as writer:
        rows = [dataclasses.asdict(p) for p in proposals]
        return writer.seal(proposals=rows, eigenvalues={str(grid): e.tolist() for grid, e in spectra.items()})


def latents(
    x: Experiment, levels: Sequence[int] | None = None, *, device: str = "cpu", progress: Progress = silent
) -> dict[int, Artifact]:
    """Materialise z_l (N, views, C, H, W) of the given levels (default: all); one read of a store serves its levels."""
    levels = range(1, x.config.num_levels + 1) if levels is None else levels
    weights = weights_digest(x.config.autoencoder.weights)
    made = {
        level: artifact
        for level in levels
        if (artifact := _reuse(x, Ref("latents", level), weights=weights if level == 1 else None)) is not None
    }
    todo = [level for level in levels if level not in made]
    if not todo:
        return made
    index, config = loading.open_index(x), x.config.features
    autoencoder, views = make_autoencoder(x.config.autoencoder, device=device), 1 + config.flip
    level_bases = {level: loading.open_basis(x, level) for level in todo if level > 1}
    readers = {level: loading.open_level_features(x, level) for level in level_bases}
    with contextlib.ExitStack() as stack:
        writers: dict[int, ArtifactWriter] = {}
        for level in todo:
            ref = Ref("latents", level)
            writer = writers[level] = stack.enter_context(writing(x.path(ref), x.header(ref), keep_parts=True))
            create_store(
                writer.path / loading.STORE,
                {loading.LATENT: (views, *x.config.latent_shape(level))},
                config.dtype,
                [shard.count for shard in index.shards],
                config.chunk_rows,
                {"fingerprint": writer.header["fingerprint"]},
            )
        for k, shard in enumerate(index.shards):
            sources = {level: weights if level == 1 else None for level in todo}
            missing = [
                level
                for level in todo
                if (part := writers[level].part(shard.name)) is None or part["source"] != sources[level]
            ]
            z: dict[int, np.ndarray] = {}
            if 1 in missing:
                z[1] = _codes(autoencoder, index, k, views)
            by_store: dict[Ref, list[int]] = {}
            for level in missing:
                if level > 1:
                    by_store.setdefault(x.level_features(level), []).append(level)
            for levels_of_store in by_store.values():
                maps = readers[levels_of_store[0]].read_shard(k)
                wanted = {level: (x.config.level(level).grid, level_bases[level]) for level in levels_of_store}
                encoded = encode_levels(maps.reshape(-1, *maps.shape[2:]), wanted)
                z |= {level: z_l.reshape(-1, views, *z_l.shape[1:]) for level, z_l in encoded.items()}
            for level, z_l in z.items():
                files = write_shard(writers[level].path / loading.STORE, k, {loading.LATENT: z_l})
                writers[level].commit_part(shard.name, files, rows=shard.count, source=sources[level])
            progress(k + 1, len(index.shards), "latents")
        for level, writer in writers.items():
            reader_l = StoreReader(writer.path / loading.STORE, loading.LATENT)
            mean, std = _channel_statistics(reader_l, index.rows("train"))
            made[level] = writer.seal(
                rows=index.num_images,
                shape=x.config.latent_shape(level),
                mean=mean.tolist(),
                std=std.tolist(),
                weights_source=weights if level == 1 else None,
            )
    return made


def _codes(autoencoder: Autoencoder, index: ImageIndex, k: int, views: int) -> np.ndarray:
    """z_1 (n, views, C, H, W) of a shard's images, and of their mirror images with two views."""
    images, shard = index.read_shard(k), index.shards[k]
    rows = np.arange(shard.first_row, shard.first_row + shard.count)
    codes = [autoencoder.encode(images, rows=rows).numpy()]
    if views == 2:
        codes.append(autoencoder.encode(images[:, :, ::-1].copy(), rows=rows + index.num_images).numpy())
    return np.stack(codes, axis=1)


def _channel_statistics(reader: StoreReader, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel over images, views and positions, in float64, two passes."""
    _, views, channels, height, width = reader.shape
    block = max(1, STATISTICS_BYTES // (8 * views * channels * height * width))
    blocks = [rows[start : start + block] for start in range(0, len(rows), block)]
    count, mean, variance = len(rows) * views * height * width, np.zeros(channels), np.zeros(channels)
    for b in blocks:
        mean += reader.read(b).sum(axis=(0, 1, 3, 4), dtype=np.float64) / count
    for b in blocks:
        variance += ((reader.read(b) - mean[:, None, None]) ** 2).sum(axis=(0, 1, 3, 4)) / count
    return mean, np.sqrt(variance)


# --- denoisers ----------------------------------------------------------------------------------------------------


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
    if (made := _reuse(x, ref)) is not None:
        return made
    batches, index = loading.latent_batches(x, level), loading.open_index(x)
    path, header = x.path(ref), x.header(ref)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(writing(path, header, keep_parts=True)) if rank == 0 else None
        stop = stack.enter_context(stop_on_signals())
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
    last = {k: v for k, v in trainer.history[-1].items() if k not in ("step", "images_per_second")}
    return writer.seal(
        beside=(CHECKPOINTS, "history.json"),
        step=trainer.step,
        parameters=count_parameters(trainer.model),
        macs=count_macs(trainer.model),
        **last,
    )


# --- samples and numbers ------------------------------------------------------------------------------------------


def samples(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """Sample the cascade: samples.npz, the latents of the levels above, and what level 1 makes without conditions."""
    ref, config = Ref("samples"), x.config.sampling
    if (made := _reuse(x, ref)) is not None:
        return made
    indices = range(config.num_images)
    with writing(x.path(ref), x.header(ref)) as writer:
        z = loading.generate(x, indices, seed=config.seed, device=device, progress=progress)
        pictures = loading.decode(x, z[1], device=device)
        save_samples(writer.path / "samples.npz", pictures)
        if x.config.num_levels > 1:
            save_file(
                {f"z_{m}": z[m].half().cpu().contiguous() for m in z if m > 1}, writer.path / "latents.safetensors"
            )
            bare = loading.generate_without_conditions(x, indices, seed=config.seed, device=device, progress=progress)
            save_samples(writer.path / "without_conditions.npz", loading.decode(x, bare, device=device))
        return writer.seal(images=len(pictures), minimum=int(pictures.min()), maximum=int(pictures.max()))


def evaluation(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """The numbers of the sample set against the training images, each with its metric card, in metrics.json."""
    ref = Ref("evaluation")
    if (made := _reuse(x, ref)) is not None:
        return made
    index, sampled = loading.open_index(x), x.artifact(Ref("samples"))
    splits = ("train", "held_out") if x.config.evaluation.reference == "train" else ("held_out", "train")
    reference, held_out = (loading.SplitImages(index, split) for split in splits)
    bare = sampled.path / "without_conditions.npz"
    checkpoints = {level.level: x.artifact(Ref("denoiser", level.level)).digest for level in x.config.levels}
    label_sampling = {
        "none": "none",
        "class": "image index modulo number of classes",
        "text": "first caption of the held-out image of this index, modulo their number",
    }[x.config.conditioning.labels]
    with writing(x.path(ref), x.header(ref)) as writer:
        record = evaluate(
            load_samples(sampled.path / "samples.npz", num_images=x.config.sampling.num_images),
            reference,
            held_out,
            x.config.evaluation,
            origin=SampleOrigin.of(x.config, checkpoints, label_sampling=label_sampling),
            encoder=load_encoder(x.artifact(Ref("encoder")), device=device),
            others={"without_conditions": load_samples(bare)} if bare.is_file() else {},
            reference_labels=index.labels[reference.rows] if index.num_classes else None,
            held_out_labels=index.labels[held_out.rows] if index.num_classes else None,
            device=device,
        )
        for warning in record["warnings"]:
            logger.warning(warning)
        write_json(writer.path / "metrics.json", record)
        return writer.seal(**record)


# --- what is there already ----------------------------------------------------------------------------------------


def _reuse(x: Experiment, ref: Ref, *, weights: str | None = None) -> Artifact | None:
    """The sealed artifact if every file is as its manifest says.

    weights: hash of the file or folder of weights that it is made with; None where there is none, or none any more.
    Returns None when it has to be made (again); its inputs have then been checked, file by file.
    """
    path = x.path(ref)
    if is_sealed(path):
        try:
            artifact = open_artifact(path, stage=ref.stage, expected=path.name)
            artifact.verify()
            if weights is None or artifact.info.get("weights_source") == weights:
                return artifact
            logger.warning("The weights of %s are others than it was made with. It is made again.", ref)
        except IntegrityError as error:
            logger.warning("%s It is made again.", error)
    for needed in x.inputs(ref):
        x.artifact(needed).verify()
    return None
