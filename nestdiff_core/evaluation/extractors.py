"""Feature spaces in which sets of images are compared: images -> one vector each.

    encoder     the class vector of the experiment's own frozen encoder. The hierarchy is cut from this network's
                feature map, so it is a judge that the denoisers were conditioned on.
    pixels      the image in [0, 1], averaged over at most 8x8 areas: no network, and nothing was conditioned on it.
    inception   torch-fidelity's port of the FID network (2048 features), the one that published numbers use.
    any other   the vector of an encoder foreign to the experiment (`evaluation.judges`), such as DINOv2.

An extractor carries the sha256 of its weights and its preprocessing: numbers of two extractors that bear one name
are told apart by them (card.py). features.py puts sets of images through; which distance is computed on the features is
image_metrics.py's business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from nestdiff_core.errors import ConfigError, EnvironmentFault, IntegrityError
from nestdiff_core.files import environment_faults, sha256_file

PIXEL_GRID = 8


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


def build_extractor(
    kind: str,
    *,
    encoder: Encoder | None = None,
    inception_weights: str = "",
    judges: Mapping[str, Encoder] | None = None,
    unit_length: Collection[str] = (),
    device: torch.device | str = "cpu",
) -> Extractor:
    """The extractor of that name in `EvaluationConfig.spaces`. judges: the independent encoders by name. unit_length:
    those of them whose vectors are scaled to length 1."""
    if judges is not None and kind in judges:
        return encoder_extractor(judges[kind], kind=kind, unit_length=kind in unit_length)
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


def encoder_extractor(encoder: Encoder, *, kind: str = "encoder", unit_length: bool = False) -> Extractor:
    """The encoder's class vector: one vector an image, and not the pooled map from which the latents are cut; of a
    classifier the logits of its head too. unit_length: scaled to length 1.

    Runs where the encoder's weights are; the encoder does its own resizing and repeats grey images as it was trained.
    """

    def embed(images: UInt8[np.ndarray, "B H W C"]) -> tuple[Tensor, Tensor | None]:
        known = encoder.classify(images) if isinstance(encoder, Classifier) else (encoder.encode(images)[1], None)
        return (F.normalize(known[0], dim=1), known[1]) if unit_length else known

    preprocessing = {"input_size": encoder.input_size, "mean": list(encoder.mean), "std": list(encoder.std)}
    if unit_length:
        preprocessing["unit_length"] = True
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

    preprocessing = {"input_size": network.INPUT_IMAGE_SIZE, "resize": "bilinear, as TensorFlow 1"}
    return Extractor("inception", sha256_file(path), preprocessing, embed)


def _load_inception(path: Path) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # takes seconds

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
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

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
