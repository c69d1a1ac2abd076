"""From a source of images to stores of features: images, encoder, features, crops, text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from safetensors.torch import save_file

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact
from nestdiff_core.encoders import (
    build_encoder,
    encode_captions,
    extract_crops,
    extract_features,
    feature_shapes,
    load_encoder,
)
from nestdiff_core.encoders.weights import weights_digest
from nestdiff_core.errors import ConfigError, InputError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import fingerprint
from nestdiff_core.images.build import build_images, source_listing
from nestdiff_core.images.index import ImageIndex
from nestdiff_core.latents.hierarchy import FeatureMaps
from nestdiff_core.precision import autocast
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stages.common import require_features, reuse
from nestdiff_core.stores.writer import create_store, write_shard

T = TypeVar("T")


def images(x: Experiment, *, progress: Progress = silent) -> Artifact:
    """Validate the source and write the image index (and shards, for sources that have none).

    A folder or shards whose files have changed since are read again.
    """
    ref, listing = Ref("images"), source_listing(x.config.images)
    if (made := reuse(x, ref)) is not None and made.info["source_listing"] == listing:
        return made
    with x.writing(ref) as writer:
        info = build_images(x.config.images, writer, progress=progress)
        return writer.seal(source_listing=listing, **info)


def encoder(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """Pre-train or load the frozen encoder and measure it (kNN accuracy where there are labels)."""
    ref, weights = Ref("encoder"), weights_digest(x.config.encoder.weights)
    if x.config.encoder.kind == "autoencoder":
        weights = weights_digest(x.config.autoencoder.weights)
    if (sealed := reuse(x, ref, weights=weights)) is not None:
        return sealed
    index = loading.open_index(x)
    with x.writing(ref) as writer:
        made = build_encoder(
            x.config.encoder, index, writer, autoencoder=x.config.autoencoder, device=device, progress=progress
        )
        for level in x.config.levels[1:]:
            shape = made["map"] if level.source == "pooled" else (*made["vector"], level.grid)
            require_features(level, "encoder", channels=shape[0], side=shape[1])
        return writer.seal(weights_source=weights, **made)


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
        frozen = load_encoder(x.artifact(Ref("encoder")), device=device, compiled=config.compile)
        shapes = {name: (views, *shape) for name, shape in feature_shapes(frozen).items()}

        def encode(pixels: np.ndarray, k: int) -> dict[str, np.ndarray]:
            with autocast(config.precision, device):
                feature_map, vector = extract_features(
                    frozen, pixels, config.batch_size, config.dtype, name=index.namer(k), flip=config.flip
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
        frozen = load_encoder(x.artifact(Ref("encoder")), device=device, compiled=config.compile)

        def encode(pixels: np.ndarray, k: int) -> dict[str, np.ndarray]:
            with autocast(config.precision, device):
                maps = extract_crops(
                    frozen, pixels, grid, config.batch_size, config.dtype, name=index.namer(k), flip=config.flip
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
        from nestdiff_core.encoders.text import build_text_tower  # open_clip takes seconds to import

        tower = build_text_tower(config, device=device)
        save_file({loading.TOKENS: tower.encode([""]).cpu().contiguous()}, folder / loading.EMPTY_CAPTION)

        def encode(captions: list[list[str]], k: int) -> dict[str, np.ndarray]:
            chosen = [c for several in captions for c in itertools.islice(itertools.cycle(several), count)]
            name = index.namer(k)
            tokens = encode_captions(tower.encode, chosen, config.batch_size, dtype, name=lambda i: name(i // count))
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
    if (made := reuse(x, ref, weights=weights)) is not None and made.info["images"] == digest:
        return made, {name: made.info["parts"][name] for name in asked}
    with x.writing(ref, keep_parts=True) as writer:
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
        for done, (k, loaded) in enumerate(read_ahead(read, [k for k in places if k not in whole]), len(whole) + 1):
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


def read_ahead(read: Callable[[int], T], places: Sequence[int]) -> Iterator[tuple[int, T]]:
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


class EncodedMaps:
    """A level's feature maps (N, views, C, S, S), encoded a shard at a time as they are asked for, and kept nowhere.

    The same numbers as `features` or `crops` would store. level: whose; None for the whole image's map.
    """

    def __init__(self, x: Experiment, level: int | None, device: str) -> None:
        artifact = x.artifact(Ref("encoder"))
        self.config, self.path = x.config.features, artifact.path
        self.index, self.device = loading.open_index(x), device
        self.encoder = load_encoder(artifact, device=device, compiled=self.config.compile)
        own = None if level is None else x.config.level(level)
        self.grid = own.grid if own is not None and own.source == "patch" else None
        row = feature_shapes(self.encoder)["map"]
        if self.grid is not None:
            row = (self.encoder.vector_channels, self.grid, self.grid)
        self.rows_per_shard = tuple(shard.count for shard in self.index.shards)
        self.shape: tuple[int, ...] = (self.index.num_images, 1 + self.config.flip, *row)

    def read_shard(self, shard: int) -> np.ndarray:
        return self._encode(self.index.read_shard(shard), shard)

    def iterate_shards(self, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        for shard, pixels in read_ahead(self.index.read_shard, range(first, len(self.rows_per_shard))):
            yield shard, self._encode(pixels, shard)

    def _encode(self, pixels: np.ndarray, shard: int) -> np.ndarray:
        batch, dtype, flip = self.config.batch_size, self.config.dtype, self.config.flip
        name = self.index.namer(shard)
        with autocast(self.config.precision, self.device):
            if self.grid is None or self.grid == 1:
                both = extract_features(self.encoder, pixels, batch, dtype, name=name, flip=flip)
                return both[0] if self.grid is None else both[1][..., None, None]
            return extract_crops(self.encoder, pixels, self.grid, batch, dtype, name=name, flip=flip)


def open_maps(x: Experiment, level: int | None, device: str) -> FeatureMaps:
    """The feature maps that a level above 1 is pooled from (None: those of whole images), stored or encoded anew."""
    if not x.config.features.keep:
        return EncodedMaps(x, level, device)
    return loading.open_features(x) if level is None else loading.open_level_features(x, level)
