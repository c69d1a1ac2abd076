"""The nearest training images of samples, level by level (evaluation/neighbours.py)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import safe_open
from torch import Tensor

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact
from nestdiff_core.encoders import load_encoder
from nestdiff_core.evaluation.extractors import Extractor, encoder_extractor
from nestdiff_core.evaluation.features import Images, batches
from nestdiff_core.evaluation.figures import neighbour_grid
from nestdiff_core.evaluation.latent_metrics import averaged
from nestdiff_core.evaluation.neighbours import Block, block_size, copy_numbers, nearest, verdicts
from nestdiff_core.evaluation.samples import StoredSamples, write_npz
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import write_json
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stages.common import logger, reuse

ENCODER = "encoder"
FOUND = "neighbours.npz"
_BATCH = 256  # images that are encoded together
_ROWS_SHOWN = 6


@dataclass(frozen=True)
class _Space:
    """Where images are compared: the vectors (flattened) of samples and held-out images, and those of training images
    by their rows."""

    samples: Float[np.ndarray, "N D"]
    held_out: Float[np.ndarray, "H D"]
    training: Callable[[Int64[np.ndarray, " B"]], Float[np.ndarray, "B V D"]]


def neighbours(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """All numbers in neighbours.json; of each sample the nearest training images in neighbours.npz: rows_SPACE and
    distances_SPACE (N, k) for the samples 0, ..., N - 1, SPACE being z_1, ..., z_L or `encoder`."""
    ref, config = Ref("neighbours"), x.config.neighbours
    if (made := reuse(x, ref)) is not None:
        return made
    sampled, index = x.artifact(Ref("samples")), loading.open_index(x)
    pictures = StoredSamples(sampled.path / "samples.npz", num_images=x.config.sampling.num_images)
    num = min(config.num_images, len(pictures))
    training, held_out = (loading.SplitImages(index, split) for split in ("train", "held_out"))
    rng = np.random.default_rng(x.config.sampling.seed)
    held_out = held_out.of(rng.permutation(held_out.rows)[: config.num_images])
    some = rng.permutation(training.rows)[:num]
    names = [*(f"z_{level}" for level in range(x.config.num_levels, 0, -1)), ENCODER]
    images = _First(pictures, num)
    encoder = encoder_extractor(load_encoder(x.artifact(Ref("encoder")), device=device))
    record, arrays = {"spaces": {}, "quantile": config.quantile, "num_training": len(training)}, {}
    with x.writing(ref) as writer:
        for place, name in enumerate(names):
            if name == ENCODER:
                space = _encoder_space(x, encoder, images, held_out, training)
            else:
                space = _latent_space(x, int(name.removeprefix("z_")), sampled.path, images, held_out.rows, device)
            queries = np.concatenate([space.samples, space.held_out])
            report = partial(_report, progress, place * len(training), len(names) * len(training))
            blocks = _blocks(space, training.rows, block_size(len(queries)), report)
            found = nearest(queries, blocks, min(config.num_shown, len(training)))
            of_samples, of_held_out = found.part(slice(num)), found.part(slice(num, None))
            record["spaces"][name] = copy_numbers(
                space.samples,
                space.held_out,
                space.training(some)[:, 0],
                of_samples,
                of_held_out,
                quantile=config.quantile,
                num_neighbours=x.config.evaluation.num_neighbours,
            )
            arrays |= {f"rows_{name}": of_samples.rows, f"distances_{name}": of_samples.distances}
        record["verdicts"] = verdicts(record)
        for text in record["verdicts"][1:]:
            logger.warning(text)
        write_npz(writer.path / FOUND, arrays)
        write_json(writer.path / "neighbours.json", record)
        return writer.seal(**record)


def _blocks(space: _Space, rows: Int64[np.ndarray, " M"], size: int, report: Callable[[int], None]) -> Iterator[Block]:
    for first in range(0, len(rows), size):
        block = rows[first : first + size]
        yield block, space.training(block)
        report(first + len(block))


def _report(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total, "neighbours")


def neighbour_pictures(x: Experiment) -> dict[str, bytes]:
    """Pictures by name: of each space the samples that look most like copies and their nearest training images, and as
    `encoder_and_z_1` what the encoder holds for near beside what pixels (or the autoencoder's code) do."""
    artifact, index = x.artifact(Ref("neighbours")), loading.open_index(x)
    pictures = StoredSamples(x.artifact(Ref("samples")).path / "samples.npz")
    training = loading.SplitImages(index, "train")
    with np.load(artifact.path / FOUND, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}

    likest, both = {}, range(min(_ROWS_SHOWN // 2, len(pictures)))
    for space in artifact.info["spaces"]:
        first, second = found[f"distances_{space}"][:, :2].T
        order = np.argsort(first**2 / np.maximum(second, 1e-300), kind="stable")
        likest[space] = order[:_ROWS_SHOWN].tolist()
    shown = [*((s, i) for s, samples in likest.items() for i in samples), *itertools.product((ENCODER, "z_1"), both)]
    needed = training.of(np.unique([found[f"rows_{space}"][sample] for space, sample in shown]))  # each shard once
    near = {int(row): needed[i] for i, row in enumerate(needed.rows)}

    def row(space: str, sample: int) -> np.ndarray:
        return np.stack([pictures[sample], *(near[int(i)] for i in found[f"rows_{space}"][sample])])

    drawn = {}
    for space, numbers in artifact.info["spaces"].items():
        distances = found[f"distances_{space}"]
        drawn[space] = neighbour_grid(
            [(f"sample {i}: {distances[i, 0]:.3g}", row(space, i)) for i in likest[space]],
            title=f"Nearest training images by {space}",
            xlabel=f"samples most like copies, at what distance; unseen images: {numbers['distance']['held_out']:.3g}",
        )
    drawn["encoder_and_z_1"] = neighbour_grid(
        [(f"sample {i} by {space}", row(space, i)) for i in both for space in (ENCODER, "z_1")],
        title="Nearest training images by encoder and by code",
        xlabel="z_1: the autoencoder's code of an image, or its pixels",
    )
    return drawn


@dataclass(frozen=True)
class _First:
    """The first images of a set."""

    images: Images
    num: int

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]


@dataclass(frozen=True)
class _Mirrored:
    """The mirror images of a set."""

    images: Images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index][:, ::-1]


def _latent_space(
    x: Experiment, level: int, samples: Path, images: Images, held_out: Int64[np.ndarray, " H"], device: str
) -> _Space:
    """z_l; of a sample z_1 is the code of its image, as that of a training image is."""
    reader = loading.open_latents(x, level)
    if level == 1:
        autoencoder, codes, first = loading.open_autoencoder(x, device=device), [], 0
        for batch in batches(images, _BATCH):
            codes.append(averaged(autoencoder.encode(batch, rows=range(first, first + len(batch))).cpu()))
            first += len(batch)
        generated = torch.cat(codes)
    else:
        with safe_open(samples / "latents.safetensors", "pt") as file:
            generated = averaged(file.get_slice(f"z_{level}")[: len(images)].float())

    def training(rows: Int64[np.ndarray, " B"]) -> Float[np.ndarray, "B V D"]:
        """All views, few images at a time: latents may be as large as images."""
        parts = [torch.from_numpy(reader.read(rows[i : i + _BATCH])).float() for i in range(0, len(rows), _BATCH)]
        return np.concatenate([_flat(averaged(z.flatten(0, 1))).reshape(len(z), z.shape[1], -1) for z in parts])

    return _Space(_flat(generated), training(held_out)[:, 0], training)


def _encoder_space(
    x: Experiment, encoder: Extractor, images: Images, held_out: loading.SplitImages, training: loading.SplitImages
) -> _Space:
    """The encoder's vectors: stored ones of training images where features are kept, else encoded now."""
    if x.config.features.keep:
        reader = loading.open_features(x, "vector")

        def read(rows: Int64[np.ndarray, " B"]) -> Float[np.ndarray, "B V D"]:
            return reader.read(rows).astype(np.float32)
    else:

        def read(rows: Int64[np.ndarray, " B"]) -> Float[np.ndarray, "B V D"]:
            """As a store has them: mirror images too, with `features.flip`. In the order of shards, each read once."""
            order = np.argsort(rows)
            found = training.of(rows[order])
            views = (found, _Mirrored(found)) if x.config.features.flip else (found,)
            return np.stack([_vectors(encoder, view) for view in views], axis=1)[np.argsort(order)]

    return _Space(_vectors(encoder, images), read(held_out.rows)[:, 0], read)


def _vectors(encoder: Extractor, images: Images) -> Float[np.ndarray, "N D"]:
    return np.concatenate([encoder.embed(batch)[0].float().cpu().numpy() for batch in batches(images, _BATCH)])


def _flat(z: Float[Tensor, "N C H W"]) -> Float[np.ndarray, "N D"]:
    return z.flatten(1).numpy()
