"""Feature spaces in which sets of images are compared: images -> one vector each.

    encoder     the class vector of the experiment's own frozen encoder. The hierarchy is cut from this network's
                feature map, so it is a judge that the denoisers were conditioned on.
    pixels      the image in [0, 1], averaged over at most 8x8 areas: no network, and nothing was conditioned on it.
    inception   torch-fidelity's port of the FID network (2048 features), the one that published numbers use.
    any other   the vector of an encoder foreign to the experiment (`evaluation.judges`), such as DINOv2.

An extractor carries the sha256 of its weights and its preprocessing: numbers of two extractors that bear one name
are told apart by them (card.py). Which distance is computed on the features is image_metrics.py's business.

`extract` keeps little of a set of any size (`FeatureSet`): moments of all images, features of some.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from nestdiff_core.errors import ConfigError, EnvironmentFault, InputError, IntegrityError, NumericsError
from nestdiff_core.evaluation.gaussian import PARTS, Gaussian, random_parts
from nestdiff_core.files import environment_faults, sha256_file
from nestdiff_core.latents.moments import BLOCK_ROWS, Moments, merge
from nestdiff_core.progress import Progress, silent

PIXEL_GRID = 8
MAX_KEPT = 10_000  # features of a set that are kept: what compares pairs of images needs them
SCORE_SPLITS, SCORE_SEED = 10, 0  # of the Inception score: parts of the shuffled images


@runtime_checkable
class Images(Protocol):
    """A set of images, read one at a time and in order: an ndarray uint8 (N, H, W, C), or anything like it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> UInt8[np.ndarray, "H W C"]: ...


@runtime_checkable
class Encoder(Protocol):
    """What evaluation needs of an encoder, which is also an nn.Module (encoders/base.py)."""

    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def encode(self, images: UInt8[np.ndarray, "B H W C"]) -> tuple[Float[Tensor, "B C S S"], Float[Tensor, "B D"]]: ...

    def state_dict(self) -> dict[str, Any]: ...


@runtime_checkable
class Classifier(Encoder, Protocol):
    """An encoder with a trained head."""

    def classify(self, images: UInt8[np.ndarray, "B H W C"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B K"]]: ...


@dataclass(frozen=True)
class Extractor:
    """A feature space. `embed` maps a batch of uint8 images to features, and to class logits where it has them."""

    kind: str  # encoder, pixels, inception or a judge's name: what a number is called follows from it
    weights_sha256: str  # "none" where there are no weights
    preprocessing: dict[str, Any]  # how an image enters: recorded, since it moves numbers as weights do
    embed: Callable[[UInt8[np.ndarray, "B H W C"]], tuple[Float[Tensor, "B D"], Float[Tensor, "B K"] | None]]

    def metric_name(self, metric: str) -> str:
        """What a metric is called here. Only inception's Frechet and kernel distances are `fid` and `kid`."""
        if self.kind == "inception":
            return {"fd": "fid", "kd": "kid", "fd_infinity": "fid_infinity"}.get(metric, metric)
        return f"{metric}_{self.kind}"


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


# --- the spaces ---------------------------------------------------------------------------------------------------


def build_extractor(
    kind: str,
    *,
    encoder: Encoder | None = None,
    inception_weights: str = "",
    judges: Mapping[str, Encoder] | None = None,
    device: torch.device | str = "cpu",
) -> Extractor:
    """The extractor of that name in `EvaluationConfig.spaces`. judges: the independent encoders by name."""
    if judges is not None and kind in judges:
        return encoder_extractor(judges[kind], kind=kind)
    match kind:
        case "encoder":
            if encoder is None:
                raise ConfigError(
                    "The encoder's feature space needs the encoder",
                    key="evaluation.extractors",
                    found="no encoder",
                    fix="Pass `encoder`, or take `encoder` out of evaluation.extractors.",
                )
            return encoder_extractor(encoder)
        case "pixels":
            return pixel_extractor()
        case "inception":
            return inception_extractor(inception_weights, device=device)
    raise ConfigError(
        "There is no such feature space",
        key="evaluation.extractors",
        expected=["encoder", "pixels", "inception", *(judges or ())],
        found=kind,
        fix="Name one of those.",
    )


def encoder_extractor(encoder: Encoder, *, kind: str = "encoder") -> Extractor:
    """The encoder's class vector: one vector an image, and not the pooled map from which the latents are cut; of a
    classifier the logits of its head too.

    Runs where the encoder's weights are; the encoder does its own resizing and repeats grey images as it was trained.
    """

    def embed(images: UInt8[np.ndarray, "B H W C"]) -> tuple[Tensor, Tensor | None]:
        return encoder.classify(images) if isinstance(encoder, Classifier) else (encoder.encode(images)[1], None)

    preprocessing = {"input_size": encoder.input_size, "mean": list(encoder.mean), "std": list(encoder.std)}
    return Extractor(kind, weights_sha256(encoder.state_dict()), preprocessing, embed)


def pixel_extractor() -> Extractor:
    """Pixels in [0, 1] over a grid of at most 8x8 areas: 64 numbers for a grey image, 192 for RGB."""

    def embed(images: UInt8[np.ndarray, "B H W C"]) -> tuple[Tensor, None]:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255.0
        return area_resize(x, PIXEL_GRID).flatten(1), None

    return Extractor("pixels", "none", {"grid": PIXEL_GRID, "resize": "area"}, embed)


def inception_extractor(weights: str, *, device: torch.device | str = "cpu") -> Extractor:
    """torch-fidelity's inception-v3-compat from a local .pth, or from its own address when `weights` is `download`."""
    path = _download_inception() if weights == "download" else Path(weights).expanduser()
    network = _load_inception(path).to(device)

    def embed(images: UInt8[np.ndarray, "B H W C"]) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
        features, logits = network(x.expand(-1, 3, -1, -1))  # grey is repeated, RGB stays
        return features, logits

    preprocessing = {"input_size": FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE, "resize": "bilinear, as TensorFlow 1"}
    return Extractor("inception", sha256_file(path), preprocessing, embed)


def _load_inception(path: Path) -> nn.Module:
    try:  # torch-fidelity unpickles without restriction: let only a file pass that holds nothing but tensors
        torch.load(path, map_location="cpu", weights_only=True)
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    except FileNotFoundError:
        raise IntegrityError(
            "The inception weights are missing",
            stage="evaluation",
            path=path,
            key="evaluation.inception_weights",
            fix="Put torch-fidelity's weights-inception-2015-12-05-6726825d.pth there, or set it to `download`.",
        ) from None
    except Exception as error:  # torch.load and load_state_dict raise half a dozen kinds
        raise IntegrityError(
            f"The inception weights cannot be read ({type(error).__name__})",
            stage="evaluation",
            path=path,
            key="evaluation.inception_weights",
            fix="Fetch the file again, about 96 MB.",
        ) from error


def _download_inception() -> Path:
    """Where torch-fidelity itself keeps the file; fetched when it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if not path.is_file():
        try:
            with environment_faults(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), progress=False)
        except EnvironmentFault:
            raise
        except OSError as error:  # urllib's URLError is one
            raise EnvironmentFault(
                f"The inception weights could not be fetched ({error})",
                stage="evaluation",
                path=path,
                fix=f"Fetch {URL_INCEPTION_V3} elsewhere and name it in evaluation.inception_weights.",
            ) from error
    return path


# --- images to features -------------------------------------------------------------------------------------------


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


def area_resize(images: Float[Tensor, "B C H W"], side: int) -> Float[Tensor, "B C h w"]:
    """Average over areas down to at most side x side; an image that is smaller stays as it is."""
    return F.adaptive_avg_pool2d(images, (min(side, images.shape[2]), min(side, images.shape[3])))


def weights_sha256(state: dict[str, Any]) -> str:
    """sha256 over a state dict's names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
