"""Opening what stages left: the index, readers, bases and denoisers of an experiment, ready to use in a notebook.

Every function raises IntegrityError when the artifact is missing, with the command that makes it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn

from nestdiff_core.artifacts import Artifact, ArtifactWriter
from nestdiff_core.autoencoders import Autoencoder, make_autoencoder
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.diffusion.cascade import micro_batches, sample_cascade
from nestdiff_core.encoders.weights import weights_digest
from nestdiff_core.errors import IntegrityError
from nestdiff_core.evaluation.samples import to_uint8, with_contrast
from nestdiff_core.evaluation.sweep import from_plain, with_settings
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import read_json
from nestdiff_core.images.index import ImageIndex
from nestdiff_core.latents.basis import Basis
from nestdiff_core.models.nested import NestedDenoiser, build_denoiser
from nestdiff_core.precision import autocast
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.training.checkpoint import read_checkpoint
from nestdiff_core.training.data import LatentBatches

FEATURES = Ref("features")
STORE = "store.zarr"
LATENT = "z"  # the array of a latent store, whose level is another one in another experiment
TOKENS, EMPTY_CAPTION = "tokens", "empty_caption.safetensors"
BASIS = "basis.safetensors"
EMA = "ema.safetensors"
CHECKPOINTS = "checkpoints"
CHOSEN = "chosen.json"  # of a sweep


def open_index(x: Experiment) -> ImageIndex:
    return ImageIndex(x.artifact(Ref("images")))


class SplitImages:
    """The real images of a split, as evaluation reads them: in order, one shard in memory at a time."""

    def __init__(self, index: ImageIndex, split: str) -> None:
        self.index, self.rows = index, index.rows(split)
        self._first_rows = np.array([shard.first_row for shard in index.shards])
        self._shard, self._images = -1, np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, num_images: int, seed: int) -> SplitImages:
        """A random subset, in order; everything when `num_images` is not smaller."""
        if num_images >= len(self):
            return self
        return self.of(np.sort(np.random.default_rng(seed).permutation(self.rows)[:num_images]))

    def of(self, rows: Int64[np.ndarray, " n"]) -> SplitImages:
        """The images `rows` of the index, in that order."""
        chosen = copy.copy(self)
        chosen.rows = rows
        return chosen

    def first(self, num_images: int) -> SplitImages:
        """The first images, at most so many."""
        chosen = copy.copy(self)
        chosen.rows = self.rows[:num_images]
        return chosen

    def __getitem__(self, i: int) -> np.ndarray:
        row = self.rows[i]
        shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        if shard != self._shard:
            self._shard, self._images = shard, self.index.read_shard(shard)
        return self._images[row - self._first_rows[shard]]


def open_array(artifact: Artifact | ArtifactWriter, array: str) -> StoreReader:
    """One array of an artifact's store."""
    return StoreReader(artifact.path / STORE, array, None if artifact.mirror is None else artifact.fetch)


def open_features(x: Experiment, array: str = "map", ref: Ref = FEATURES) -> StoreReader:
    """The stored encoder outputs, of exactly the images of the index.

    `map` (N, views, C, S, S) or `vector` (N, views, D) of `features`, `map` of a level's `crops`, or `tokens`
    (N, captions, T, W) of `text`; view 0 is the image, view 1 its mirror image.
    """
    artifact, images = x.artifact(ref), x.artifact(Ref("images"))
    if artifact.info["images"] != images.digest:
        raise IntegrityError(
            "The feature store does not cover the images of the index",
            stage=ref.stage,
            level=ref.level,
            path=artifact.path,
            expected=images.digest,
            found=artifact.info["images"],
            fix=f"Materialise `{ref.stage}` again: only new or changed shards are encoded.",
        )
    return open_array(artifact, array)


class VectorMaps:
    """A store of vectors (N, views, D) read as feature maps with one position (N, views, D, 1, 1)."""

    def __init__(self, vectors: StoreReader) -> None:
        self.vectors, self.path, self.rows_per_shard = vectors, vectors.path, vectors.rows_per_shard
        self.shape: tuple[int, ...] = (*vectors.shape, 1, 1)

    def read_shard(self, shard: int) -> np.ndarray:
        return self.vectors.read_shard(shard)[..., None, None]

    def iterate_shards(self, first: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        return ((shard, self.read_shard(shard)) for shard in range(first, len(self.rows_per_shard)))


def open_level_features(x: Experiment, level: int) -> StoreReader | VectorMaps:
    """The feature maps (N, views, C, S, S) that a level above 1 is pooled from: of the image, or of its crops.

    A single crop is the whole image, and its vector is already in the features.
    """
    ref = x.level_features(level)
    if x.config.level(level).source == "patch" and ref == FEATURES:
        return VectorMaps(open_features(x, "vector"))
    return open_features(x, "map", ref)


def open_basis(x: Experiment, level: int) -> Basis:
    return Basis.load(x.artifact(Ref("svd_basis", level)).path / BASIS)


def open_latents(x: Experiment, level: int) -> StoreReader:
    return open_array(x.artifact(Ref("latents", level)), LATENT)


def open_autoencoder(x: Experiment, *, device: str = "cpu") -> Autoencoder:
    """The experiment's autoencoder, with the weights that z_1 was made with."""
    found, made = weights_digest(x.config.autoencoder.weights), x.artifact(Ref("latents", 1))
    if found != made.info["weights_source"]:
        raise IntegrityError(
            "The autoencoder's weights are others than z_1 was made with",
            stage="latents",
            level=1,
            path=x.config.autoencoder.weights,
            key="autoencoder.weights",
            expected=made.info["weights_source"],
            found=found,
            fix="Put the weights back, or materialise `latents` of level 1 again and train it anew.",
        )
    return make_autoencoder(x.config.autoencoder, device=device)


def null_context(x: Experiment) -> Tensor | None:
    """Tokens (1, T, W) of the empty caption, where denoisers read captions."""
    if x.config.conditioning.labels != "text":
        return None
    return load_file(x.artifact(Ref("text")).path / EMPTY_CAPTION)[TOKENS]


def num_classes(config: ExperimentConfig, index: ImageIndex) -> int:
    """Classes that denoisers are told of: 0 for an unconditional experiment."""
    return index.num_classes if config.conditioning.labels == "class" else 0


def latent_batches(x: Experiment, level: int) -> LatentBatches:
    """Latents of a level and of its conditions, and labels or captions where denoisers read them."""
    index = open_index(x)
    readers = {m: open_latents(x, m) for m in (*x.config.levels_above(level), level)}
    captions = open_features(x, TOKENS, Ref("text")) if x.config.conditioning.labels == "text" else None
    return LatentBatches(readers, index.labels if num_classes(x.config, index) else None, captions)


def open_denoiser(
    x: Experiment, level: int, *, decay: float | None = None, weights: Path | None = None, device: str = "cpu"
) -> NestedDenoiser:
    """The trained denoiser of a level: an average of its weights, compared with their checksum, in eval mode.

    decay: of the average, one of the level's `kept_decays`; by default `train.ema_decay`. 0 is the weights as training
    left them, which are in its last checkpoint: IntegrityError on a machine that does not have it (unless 0 is one of
    `train.more_ema_decays`). weights: those of this file instead, of a checkpoint say.
    """
    weights = _weights(x, level, decay) if weights is None else weights
    model = build_denoiser(x.config, level, num_classes(x.config, open_index(x)))
    stored = load_file(weights)  # a checkpoint's further averages have their decay before the name
    model.load_state_dict({name: value for name, value in stored.items() if " " not in name})
    return model.to(device).eval()


def _weights(x: Experiment, level: int, decay: float | None) -> Path:
    artifact, train = x.artifact(Ref("denoiser", level)), x.config.level(level).train
    artifact.verify()
    if decay is None or decay == train.ema_decay:
        return artifact.path / EMA
    if decay in train.more_ema_decays:
        return artifact.path / average_file(decay)
    fix = "Copy the checkpoint from where it was trained, or sample an average of the weights instead."
    return _checkpoint(artifact.path, artifact.info["step"], level, fix) / "model.safetensors"


def average_file(decay: float) -> str:
    """Where in a denoiser's artifact a further average of its weights is (`train.more_ema_decays`)."""
    return f"ema_{decay}.safetensors"


def open_guide(x: Experiment, level: int, *, device: str = "cpu") -> NestedDenoiser:
    """What `levels.guide_step` contrasts with: the average of the level's weights as of that step.

    Raises IntegrityError where training has not come there, or its checkpoint is not on this machine.
    """
    fix = "Copy the checkpoint from where it was trained, or set levels.guide_step to one that was kept, or to 0."
    path = _checkpoint(x.path(Ref("denoiser", level)), x.config.level(level).guide_step, level, fix)
    return open_denoiser(x, level, weights=path / EMA, device=device)


def _checkpoint(denoiser: Path, step: int, level: int, fix: str) -> Path:
    """A denoiser's checkpoint of that step, its files compared with their checksums."""
    path = denoiser / CHECKPOINTS / f"step_{step:08d}"
    if not path.is_dir():
        raise IntegrityError(
            f"The weights as they were at step {step} are not on this machine",
            stage="denoiser",
            level=level,
            path=path,
            fix=fix,
        )
    read_checkpoint(path, level=level, expected=denoiser.name)
    return path


def sampled_config(x: Experiment) -> ExperimentConfig:
    """The configuration that is sampled with: the experiment's, or with what the stage `sweep` chose."""
    if x.config.sampling.chosen_by == "config":
        return x.config
    chosen = read_json(x.artifact(Ref("sweep")).path / CHOSEN, stage="sweep")
    return with_settings(x.config, from_plain(chosen))


class Cascade:
    """The experiment's denoisers and what tells them what to make, opened once to sample from often.

    config: the settings of sampling; by default `sampled_config`. levels: whose denoisers; all by default. denoisers:
    these by level instead, sampled as `x.config` says. The networks of `levels.guide_step` are opened where guidance
    asks for them. With `sampling.compile` each is compiled whole, once for each shape of batch that it gets (guidance
    doubles it), at its first call.
    """

    def __init__(
        self,
        x: Experiment,
        *,
        config: ExperimentConfig | None = None,
        levels: Iterable[int] | None = None,
        denoisers: Mapping[int, NestedDenoiser] | None = None,
        device: str = "cpu",
    ) -> None:
        self.x, self.device, self._index = x, device, open_index(x)
        if config is None:
            config = sampled_config(x) if denoisers is None else x.config
        self.config = config
        chosen = range(1, x.config.num_levels + 1) if levels is None else levels
        if denoisers is None:
            denoisers = {
                level: open_denoiser(x, level, decay=self.config.level(level).decay, device=device) for level in chosen
            }
        self.denoisers = dict(denoisers)
        self._guides: dict[int, NestedDenoiser] = {}
        for denoiser in self.denoisers.values():
            self._compile(denoiser)

    def _compile(self, denoiser: nn.Module) -> None:
        if self.x.config.sampling.compile:
            # All share one function, which is compiled for each of them: by default eight times at most.
            limit = 8 * 2 * len(self.denoisers)  # each may have a guide
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
            denoiser.forward = torch.compile(denoiser.forward, dynamic=False, fullgraph=True)

    def guides(self) -> dict[int, NestedDenoiser]:
        """The networks that guidance contrasts with, by level; opened once."""
        for level in self.denoisers:
            own = self.config.level(level)
            if own.guidance and own.guide_step and level not in self._guides:
                self._guides[level] = open_guide(self.x, level, device=self.device)
                self._compile(self._guides[level])
        return self._guides

    def under(self, config: ExperimentConfig) -> Cascade:
        """The same denoisers, of the same averages of their weights, sampled with other settings."""
        other = copy.copy(self)
        other.config = config
        return other

    @cached_property
    def autoencoder(self) -> Autoencoder:
        return open_autoencoder(self.x, device=self.device)

    def latents(
        self,
        image_indices: Iterable[int],
        *,
        seed: int,
        rows: Int64[np.ndarray, " N"] | None = None,
        given: dict[int, Tensor] | None = None,
        null_conditions: bool = False,
        lowest: int = 1,
        progress: Progress = silent,
    ) -> dict[int, Tensor]:
        """As `generate`, from the top to level `lowest`. rows: the images of the index whose labels or captions these
        are told."""
        indices = list(image_indices)
        return sample_cascade(
            self.denoisers,
            self.config,
            image_indices=indices,
            seed=seed,
            labels=self._labels(indices) if rows is None else self._labels_of(rows),
            given=given or {},
            guides={} if null_conditions else self.guides(),
            null_conditions=null_conditions,
            lowest=lowest,
            device=torch.device(self.device),
            progress=progress,
        )

    @torch.no_grad()
    def estimate_seconds(self, num_images: int | Mapping[int, int]) -> float:
        """What the networks will take to sample so many images (or of each level so many latents), from one call of
        each on a full batch (after another, which warms up, where it has to)."""
        config, seconds = self.config, 0.0
        device, size = torch.device(self.device), config.sampling.batch_size
        for level, denoiser in self.denoisers.items():
            guided = config.can_be_guided(level) and config.level(level).guidance > 0
            by_own = guided and config.level(level).guide_step > 0  # two networks of this size, one after the other
            start, inputs = 0.0, denoiser.example_inputs(2 * size if guided and not by_own else size, device)
            for _ in range(2 if device.type == "cuda" or config.sampling.compile else 1):
                start = time.monotonic()
                with autocast(config.sampling.precision, device):
                    denoiser(*(inputs if guided else inputs[:-1])).sum().item()  # waits for the device
            images = num_images if isinstance(num_images, int) else num_images[level]
            calls = config.num_evaluations(level) * -(-images // size) * (2 if by_own else 1)
            seconds += (time.monotonic() - start) * calls
        return seconds

    def without_conditions(
        self, image_indices: Iterable[int], *, seed: int, progress: Progress = silent
    ) -> Float[Tensor, "N C H W"]:
        """z_1 as the denoiser of level 1 alone makes it: what the levels above add is the difference."""
        config, indices = self.x.config, list(image_indices)
        unread = {m: torch.zeros(len(indices), *config.latent_shape(m)) for m in range(2, config.num_levels + 1)}
        return self.latents(indices, seed=seed, given=unread, null_conditions=True, progress=progress)[1]

    def images(self, image_indices: Iterable[int], z_1: Float[Tensor, "N C H W"]) -> UInt8[np.ndarray, "N h w c"]:
        """Images of latents of level 1, decoded as they were sampled: in batches of one size, each at its place."""
        indices = list(image_indices)
        channels, side = self.x.config.images.channels, self.x.config.images.resolution
        pictures = np.empty((len(indices), side, side, channels), np.uint8)
        for batch in micro_batches(indices, self.x.config.sampling.batch_size, torch.device("cpu")):
            decoded = self.autoencoder.decode(batch.spread(z_1.float()))[batch.rows]
            decoded = with_contrast(decoded, self.config.sampling.contrast)
            pictures[batch.places] = to_uint8(decoded, numbers=batch.images)
        return pictures

    def told(self, image_index: int) -> dict[str, Any]:
        """What image number `image_index` is told to be: its label or its caption, or nothing."""
        if num_classes(self.x.config, self._index):
            return {"label": int(self._class_of([image_index])[0])}
        if self.x.config.conditioning.labels != "text":
            return {}
        [row] = self._caption_rows([image_index]).tolist()
        return {"caption": self._index.captions(slice(row, row + 1))[0][0]}

    def _labels(self, indices: list[int]) -> Tensor | None:
        """Class (N,), or the first caption of held-out image i mod their number as tokens (N, T, W), or None."""
        if num_classes(self.x.config, self._index):
            return torch.from_numpy(self._class_of(indices))
        return self._labels_of(self._caption_rows(indices)) if self.x.config.conditioning.labels == "text" else None

    def _labels_of(self, rows: Int64[np.ndarray, " N"]) -> Tensor | None:
        """The class (N,) of each image `rows` of the index, or its first caption as tokens (N, T, W), or None."""
        if num_classes(self.x.config, self._index):
            return torch.from_numpy(self._index.labels[rows])
        if self.x.config.conditioning.labels != "text":
            return None
        return torch.from_numpy(open_features(self.x, TOKENS, Ref("text")).read(rows, np.zeros_like(rows))).float()

    def _class_of(self, indices: list[int]) -> Int64[np.ndarray, " N"]:
        """Class number i mod their number, of those that were trained on: labels may begin at 1 or leave some out."""
        seen = np.unique(self._index.labels[self._index.rows("train")])
        return seen[np.asarray(indices, np.int64) % len(seen)]

    def _caption_rows(self, indices: list[int]) -> np.ndarray:
        held_out = self._index.rows("held_out")
        return held_out[np.asarray(indices, np.int64) % len(held_out)]


def generate(
    x: Experiment,
    image_indices: Iterable[int],
    *,
    seed: int,
    given: dict[int, Tensor] | None = None,
    null_conditions: bool = False,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[int, Tensor]:
    """Latents z_l (N, C, H, W) of every level, sampled from the top down; see `diffusion.sample_cascade`.

    image_indices: which images; image i depends on (seed, i) only, what it is told to be included: class
    i mod their number, or the first caption of held-out image i mod their number. given: latents of levels that are not
    sampled. null_conditions: withhold every condition. Opens the denoisers every time; `Cascade` opens them once.
    """
    levels = [level for level in range(1, x.config.num_levels + 1) if level not in (given or {})]
    cascade = Cascade(x, levels=levels, device=device)
    return cascade.latents(image_indices, seed=seed, given=given, null_conditions=null_conditions, progress=progress)


def decode(x: Experiment, z_1: Tensor, *, device: str = "cpu") -> np.ndarray:
    """Images uint8 (N, H, W, C) of latents of level 1."""
    return to_uint8(open_autoencoder(x, device=device).decode(z_1.float()).cpu())
