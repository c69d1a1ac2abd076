"""Feature spaces in which sets of images are compared: images -> one vector each.

    encoder     the class vector of the experiment's own frozen encoder. The hierarchy is cut from this network's
                feature map, so it is a judge that the denoisers were conditioned on.
    pixels      the image in [0, 1], averaged over at most 8x8 areas: no network, and nothing was conditioned on it.
    inception   torch-fidelity's port of the FID network (2048 features), the one that published numbers use.

An extractor carries the sha256 of its weights and its preprocessing: numbers of two extractors that bear one name
are told apart by them (card.py). Which distance is computed on the features is image_metrics.py's business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from nestdiff_core.errors import ConfigError, EnvironmentFault, InputError, IntegrityError, NumericsError
from nestdiff_core.files import environment_faults, sha256_file

PIXEL_GRID = 8


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


@dataclass(frozen=True)
class Extractor:
    """A feature space. `embed` maps a batch of uint8 images to features, and to class logits where it has them."""

    kind: str  # encoder, pixels or inception: what a number is called follows from it
    weights_sha256: str  # "none" where there are no weights
    preprocessing: dict[str, Any]  # how an image enters: recorded, since it moves numbers as weights do
    embed: Callable[[UInt8[np.ndarray, "B H W C"]], tuple[Float[Tensor, "B D"], Float[Tensor, "B K"] | None]]

    def metric_name(self, metric: str) -> str:
        """What a metric is called here. Only inception's Frechet and kernel distances are `fid` and `kid`."""
        if self.kind == "inception":
            return {"fd": "fid", "kd": "kid"}.get(metric, metric)
        return f"{metric}_{self.kind}"


@dataclass(frozen=True)
class FeatureSet:
    """Features of a set of images. `digest` is the sha256 of their pixels in order."""

    values: Float[Tensor, "N D"]
    logits: Float[Tensor, "N K"] | None
    digest: str
    image_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.values)

    def subset(self, num_images: int, seed: int) -> FeatureSet:
        """A random subset without replacement, in order; everything when `num_images` is not smaller."""
        if num_images >= len(self):
            return self
        rows = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(self))[:num_images]))
        logits = None if self.logits is None else self.logits[rows]
        return FeatureSet(
            self.values[rows], logits, f"{self.digest} ({num_images} of {len(self)}, seed {seed})", self.image_shape
        )


# --- the spaces ---------------------------------------------------------------------------------------------------


def build_extractor(
    kind: str, *, encoder: Encoder | None = None, inception_weights: str = "", device: torch.device | str = "cpu"
) -> Extractor:
    """The extractor of that name in `EvaluationConfig.extractors`."""
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
        expected=["encoder", "pixels", "inception"],
        found=kind,
        fix="Name one of those.",
    )


def encoder_extractor(encoder: Encoder) -> Extractor:
    """The encoder's class vector: one vector an image, and not the pooled map from which the latents are cut.

    Runs where the encoder's weights are; the encoder does its own resizing and repeats grey images as it was trained.
    """

    def embed(images: UInt8[np.ndarray, "B H W C"]) -> tuple[Tensor, None]:
        return encoder.encode(images)[1], None

    preprocessing = {"input_size": encoder.input_size, "mean": list(encoder.mean), "std": list(encoder.std)}
    return Extractor("encoder", weights_sha256(encoder.state_dict()), preprocessing, embed)


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


@torch.no_grad()
def extract(images: Images, extractor: Extractor, *, batch_size: int = 256) -> FeatureSet:
    """Features of every image, in order, as float64 on the CPU. Images are streamed; only features are kept.

    Raises InputError for images that are not uint8 HWC of one shape or fewer than two, NumericsError for features
    that are not finite.
    """
    if len(images) < 2:
        raise InputError(
            "A distribution needs at least two images",
            stage="evaluation",
            expected=">= 2",
            found=len(images),
            fix="Raise sampling.num_images, or give more images.",
        )
    values, logits, digest = [], [], hashlib.sha256()
    shape: tuple[int, int, int] | None = None
    for batch in batches(images, batch_size):
        shape = shape or batch.shape[1:]
        if batch.shape[1:] != shape:
            raise InputError(
                "Images of one set differ in shape",
                stage="evaluation",
                expected=shape,
                found=batch.shape[1:],
                fix="Resize them to one resolution.",
            )
        digest.update(batch.tobytes())
        feature, logit = extractor.embed(batch)
        values.append(feature.double().cpu())
        if logit is not None:
            logits.append(logit.double().cpu())
    features = torch.cat(values)
    broken = (~features.isfinite()).any(dim=1).nonzero()
    if len(broken):
        raise NumericsError(
            "Features are not finite",
            stage="evaluation",
            key=f"{extractor.kind} feature of image {int(broken[0])}",
            found=f"{len(broken)} of {len(features)} images",
            fix="Check the extractor's weights.",
        )
    digest.update(repr((len(images), *cast(tuple, shape))).encode())
    return FeatureSet(
        features, torch.cat(logits) if logits else None, digest.hexdigest(), cast(tuple[int, int, int], shape)
    )


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
