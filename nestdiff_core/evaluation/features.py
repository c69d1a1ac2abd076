"""Sets of images in feature spaces (extractors.py), each in one pass and in memory that does not grow with the set.

`extract` keeps moments of all images and features of some: a `FeatureSet`.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nestdiff_core.errors import InputError, NumericsError
from nestdiff_core.evaluation.extractors import Extractor
from nestdiff_core.evaluation.gaussian import PARTS, Gaussian, random_parts
from nestdiff_core.latents.moments import BLOCK_ROWS, Moments, merge
from nestdiff_core.progress import Progress, silent

MAX_KEPT = 10_000  # features of a set that are kept: what compares pairs of images needs them
SCORE_SPLITS, SCORE_SEED = 10, 0  # of the Inception score: parts of the shuffled images


@runtime_checkable
class Images(Protocol):
    """A set of images, read one at a time and in order: an ndarray uint8 (N, H, W, C), or anything like it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> UInt8[np.ndarray, "H W C"]: ...


@dataclass(frozen=True)
class FeatureSet:
    """What is known of a set of images in one space, in memory that does not grow with their number.

    values, logits: of all images, or of `MAX_KEPT` random ones, in order, float64. digest: sha256 of all pixels in
    order. image_shape: (H, W, C), or None where only statistics are known. fitted: the Gaussian of all images, where
    `values` are of some. parts: moments of random parts of the set, where they were taken (gaussian.limit). score: the
    Inception score of all images and its deviation, where `logits` are of some.
    """

    values: Float[Tensor, "n D"]
    logits: Float[Tensor, "n K"] | None
    digest: str
    image_shape: tuple[int, int, int] | None
    fitted: Gaussian | None = None
    parts: tuple[Moments, ...] = ()
    score: tuple[float, float] | None = None

    @property
    def count(self) -> int | None:
        """How many images there are; None where only statistics of an unknown number are known."""
        return len(self.values) if self.fitted is None else self.fitted.count

    def __len__(self) -> int:
        return self.count or 0

    @cached_property
    def gaussian(self) -> Gaussian:
        return self.fitted or Gaussian.of(Moments.of(self.values.numpy()))

    def subset(self, num_images: int, seed: int) -> FeatureSet:
        """A random subset of the kept images without replacement, in order; everything when `num_images` is not
        smaller than the whole set."""
        if num_images >= len(self):
            return self
        rows = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(self.values))[:num_images]))
        logits = None if self.logits is None else self.logits[rows]
        digest = f"{self.digest} ({len(rows)} of {len(self)}, seed {seed})"
        return FeatureSet(self.values[rows], logits, digest, self.image_shape)


def extract(images: Images, extractor: Extractor, *, batch_size: int = 256) -> FeatureSet:
    """`extract_all` in one space."""
    return extract_all(images, [extractor], batch_size=batch_size)[0]


@torch.no_grad()
def extract_all(
    images: Images,
    extractors: Sequence[Extractor],
    *,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress = silent,
    what: str = "features",
) -> list[FeatureSet]:
    """The set in each space, in one pass: images are read once, in order, a batch in memory at a time.

    seed: of which features are kept and of the random parts. The same bits whatever the batch size, as far as the
    network gives them: most round in another way in batches of another size.

    Raises InputError for images that are not uint8 HWC of one shape, that all are black (values from 0 to 1 that were
    cut to whole numbers) or fewer than two, NumericsError for features that are not finite.
    """
    if len(images) < 2:
        raise InputError(
            "A distribution needs at least two images",
            stage="evaluation",
            key=what,
            expected=">= 2",
            found=len(images),
            fix="Give more images: sampling.num_images and images.held_out_fraction say how many an experiment has.",
        )
    digest, brightest = PixelDigest(), 0
    running = [_Running(extractor, len(images), seed) for extractor in extractors]
    progress(0, len(images), what)
    for batch in batches(images, batch_size):
        digest.update(batch)
        brightest = max(brightest, int(batch.max()))
        for space in running:
            space.add(batch)
        progress(digest.count, len(images), what)
    if brightest <= 1:
        raise InputError(
            "All pixels of a set of images are 0 or 1",
            stage="evaluation",
            expected="values from 0 to 255",
            found=f"at most {brightest}",
            fix="Multiply images in [0, 1] by 255, or use to_uint8 for network outputs.",
        )
    return [space.finish(digest.hexdigest(), cast(tuple[int, int, int], digest.shape)) for space in running]


@torch.no_grad()
def estimate_seconds(images: Images, extractors: Sequence[Extractor], *, batch_size: int = 256) -> float:
    """What the networks of `extract_all` will take, from one batch (after a first, which warms up); reading comes on
    top."""
    batch = next(batches(images, batch_size))
    start = 0.0
    for _ in range(2):
        start = time.monotonic()
        for extractor in extractors:
            extractor.embed(batch)[0].sum().item()  # waits for the device
    return (time.monotonic() - start) / len(batch) * len(images)


class PixelDigest:
    """sha256 of the pixels of a set in order, its number and shape included; refuses images of several shapes."""

    def __init__(self) -> None:
        self._pixels, self.count = hashlib.sha256(), 0
        self.shape: tuple[int, ...] | None = None

    def update(self, batch: UInt8[np.ndarray, "B H W C"]) -> None:
        self.shape = self.shape or batch.shape[1:]
        if batch.shape[1:] != self.shape:
            raise InputError(
                "Images of one set differ in shape",
                stage="evaluation",
                expected=self.shape,
                found=batch.shape[1:],
                fix="Resize them to one resolution.",
            )
        self._pixels.update(batch.tobytes())
        self.count += len(batch)

    def hexdigest(self) -> str:
        whole = self._pixels.copy()
        whole.update(repr((self.count, *(self.shape or ()))).encode())
        return whole.hexdigest()


class _Running:
    """A set in one space while its images come: features of blocks of fixed size become moments of random parts.

    What is kept has its place from the first batch on: small pieces between large ones that go would hold on to memory.
    """

    def __init__(self, extractor: Extractor, num_images: int, seed: int) -> None:
        self.extractor, self.num_images = extractor, num_images
        self.part = random_parts(num_images, seed)
        self.kept = np.zeros(num_images, bool)
        self.kept[np.random.default_rng([seed, 1]).permutation(num_images)[:MAX_KEPT]] = True
        self.moments: list[Moments] = []
        self.values: Tensor | None = None
        self.logits: Tensor | None = None
        self.score: _Score | None = None
        self._block = np.empty((0, 0))
        self._in_block = self._seen = self._num_kept = 0

    def add(self, batch: UInt8[np.ndarray, "B H W C"]) -> None:
        feature, logit = self.extractor.embed(batch)
        feature = feature.double().cpu()
        rows = slice(self._seen, self._seen + len(feature))
        broken = (~feature.isfinite()).any(dim=1).nonzero()
        if len(broken):
            raise NumericsError(
                "Features are not finite",
                stage="evaluation",
                key=f"{self.extractor.kind} feature of image {rows.start + int(broken[0])}",
                found=f"{len(broken)} of {len(feature)} images of its batch",
                fix="Check the extractor's weights.",
            )
        self.values = self._keep(self.values, feature, rows)
        if logit is not None:
            logit = logit.double().cpu()
            self.logits = self._keep(self.logits, logit, rows)
            if self.num_images > MAX_KEPT and self.extractor.kind == "inception":
                self.score = self.score or _Score(self.num_images, logit.shape[1])
                self.score.add(logit, rows)
        self._num_kept += int(self.kept[rows].sum())
        self._add_to_block(feature.numpy())
        self._seen = rows.stop

    def _keep(self, places: Tensor | None, values: Tensor, rows: slice) -> Tensor:
        if places is None:
            places = torch.empty(int(self.kept.sum()), values.shape[1], dtype=values.dtype)
        chosen = torch.from_numpy(self.kept[rows])
        places[self._num_kept : self._num_kept + int(chosen.sum())] = values[chosen]
        return places

    def _add_to_block(self, rows: Float[np.ndarray, "n D"]) -> None:
        """Blocks are of BLOCK_ROWS images whatever the batches are, so that moments have the same bits."""
        if not self._block.size:
            self._block = np.empty((min(BLOCK_ROWS, self.num_images), rows.shape[1]))
        while len(rows):
            some, rows = np.split(rows, [len(self._block) - self._in_block])
            self._block[self._in_block : self._in_block + len(some)] = some
            self._in_block += len(some)
            if self._in_block == len(self._block):
                self._flush()

    def _flush(self) -> None:
        block, done = self._block[: self._in_block], sum(moments.count for moments in self.moments)
        part = self.part[done : done + len(block)]
        new = [Moments.of(block[part == k]) for k in range(PARTS)]
        self.moments = [merge(a, b) for a, b in zip(self.moments, new, strict=True)] if self.moments else new
        self._in_block = 0

    def finish(self, digest: str, shape: tuple[int, int, int]) -> FeatureSet:
        self._flush()
        assert self.values is not None
        return FeatureSet(
            self.values,
            self.logits,
            digest,
            shape,
            fitted=Gaussian.of(functools.reduce(merge, self.moments)),
            parts=tuple(self.moments),
            score=self.score.value() if self.score else None,
        )


class _Score:
    """The Inception score of many images, from sums over each of torch-fidelity's shuffled splits."""

    def __init__(self, num_images: int, num_classes: int) -> None:
        order = np.random.RandomState(SCORE_SEED).permutation(num_images)
        self.split = np.empty(num_images, np.int64)
        for k in range(SCORE_SPLITS):
            self.split[order[k * num_images // SCORE_SPLITS : (k + 1) * num_images // SCORE_SPLITS]] = k
        self.probability = torch.zeros(SCORE_SPLITS, num_classes, dtype=torch.float64)
        self.negative_entropy = torch.zeros(SCORE_SPLITS, dtype=torch.float64)

    def add(self, logits: Float[Tensor, "B K"], rows: slice) -> None:
        split = torch.from_numpy(self.split[rows])
        log_p = logits.log_softmax(dim=1)
        self.probability.index_add_(0, split, log_p.exp())
        self.negative_entropy.index_add_(0, split, (log_p.exp() * log_p).sum(dim=1))

    def value(self) -> tuple[float, float]:
        """Mean and deviation over the splits of exp(mean_i sum p_i log p_i - sum q log q), q being the mean of p_i."""
        counts = torch.from_numpy(np.bincount(self.split, minlength=SCORE_SPLITS)).double()
        q = self.probability / counts[:, None]
        scores = (self.negative_entropy / counts - torch.special.xlogy(q, q).sum(dim=1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


def batches(images: Images, batch_size: int) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
    """Consecutive images, stacked and checked."""
    for start in range(0, len(images), batch_size):
        group = [np.asarray(images[i]) for i in range(start, min(start + batch_size, len(images)))]
        for offset, image in enumerate(group):
            good = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] in (1, 3)
            if not good or image.shape != group[0].shape:
                raise InputError(
                    f"Image {start + offset} cannot be compared with the others",
                    stage="evaluation",
                    expected="uint8 (H, W, 1 or 3), one shape",
                    found=f"{image.dtype} {image.shape}",
                    fix="Use to_uint8 for network outputs, and one resolution.",
                )
        yield np.stack(group)
