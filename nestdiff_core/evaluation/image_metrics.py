"""Distances between two sets of images in one feature space, computed by torch-fidelity.

    fd         Frechet distance of two Gaussians fitted to the features (arXiv 1706.08500); `fid` with inception only
    precision  share of samples inside the reference's manifold: balls to each image's k-th neighbour (arXiv 1904.06991)
    recall     share of reference images inside the samples' manifold
    kd         kernel distance, unbiased, mean and deviation over subsets (arXiv 1801.01401); `kid` with inception only
    inception_score   of the samples alone (arXiv 1606.03498); with inception only

Each set passes through its extractor once (extractors.extract) and torch-fidelity is given the features. Its named
cache is not used: it returns the old number for new data of the same name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch_fidelity
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from nestdiff_core.errors import IntegrityError, NumericsError
from nestdiff_core.evaluation.extractors import Extractor, FeatureSet, Images, extract

MAX_NEIGHBOUR_IMAGES = 10_000  # precision and recall compare all pairs
KERNEL_SUBSETS, MIN_KERNEL_SUBSET = 100, 50
MAX_KERNEL_SUBSET = 500  # the mean is unbiased at any size; torch-fidelity's 1000 takes four times as long
SCORE_SPLITS, MIN_SCORE_IMAGES = 10, 100


@dataclass(frozen=True)
class Numbers:
    """The metrics of one comparison: values by name (and their standard deviations over subsets, where they have
    one), what to know before believing them, and how they were computed."""

    values: dict[str, float]
    deviations: dict[str, float]
    warnings: tuple[str, ...]
    settings: dict[str, Any]
    extractor: Extractor
    samples: FeatureSet
    reference: FeatureSet


def image_metrics(
    samples: Images,
    reference: Images,
    extractor: Extractor,
    *,
    num_neighbours: int = 3,
    seed: int = 0,
    batch_size: int = 256,
) -> Numbers:
    """Compare two sets of uint8 HWC images. Raises what `extract` and `feature_metrics` raise."""
    found, real = (extract(images, extractor, batch_size=batch_size) for images in (samples, reference))
    return feature_metrics(found, real, extractor, num_neighbours=num_neighbours, seed=seed)


def floor(
    held_out: Images,
    reference: Images,
    extractor: Extractor,
    *,
    num_neighbours: int = 3,
    seed: int = 0,
    batch_size: int = 256,
) -> Numbers:
    """The same metrics of real images that no model has seen: what a perfect model would score at their number.

    The Frechet distance of N images shrinks as N grows, so compare it with samples of the same N.
    """
    return image_metrics(
        held_out, reference, extractor, num_neighbours=num_neighbours, seed=seed, batch_size=batch_size
    )


def feature_metrics(
    samples: FeatureSet, reference: FeatureSet, extractor: Extractor, *, num_neighbours: int = 3, seed: int = 0
) -> Numbers:
    """Every metric that the number of images allows; `warnings` names those left out and those to distrust.

    `seed` draws the subsets of precision, recall and kd. Raises IntegrityError for images of different shapes,
    NumericsError for a value that is not finite.
    """
    if samples.image_shape != reference.image_shape:
        raise IntegrityError(
            "Samples and reference have different shapes",
            stage="evaluation",
            expected=reference.image_shape,
            found=samples.image_shape,
            fix="Take the reference from the images that the model was trained on.",
        )
    name = extractor.metric_name
    parts = [
        _frechet(samples, reference, name("fd"), seed),
        _neighbours(samples, reference, num_neighbours, seed),
        _kernel(samples, reference, name("kd"), seed),
        _score(samples, seed),
    ]
    values = {name(k): v for part in parts for k, v in part.values.items()}
    deviations = {name(k): v for part in parts for k, v in part.deviations.items()}
    for metric, value in [*values.items(), *deviations.items()]:
        if not math.isfinite(value):
            raise _not_finite(metric, value)
    settings = {"seed": seed, "feature_dimension": samples.values.shape[1]}
    settings |= {k: v for part in parts for k, v in part.settings.items()}
    warnings = tuple(text for part in parts for text in part.warnings)
    return Numbers(values, deviations, warnings, settings, extractor, samples, reference)


@dataclass(frozen=True)
class _Part:
    """What one family of metrics contributes, by its name outside any space (`fd`, `kd`)."""

    values: dict[str, float] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def _frechet(samples: FeatureSet, reference: FeatureSet, name: str, seed: int) -> _Part:
    try:
        found = _fidelity(samples.values, reference.values, seed, fid=True)
    except np.linalg.LinAlgError as error:
        raise _not_finite(name, str(error)) from error
    n, dimension = min(len(samples), len(reference)), samples.values.shape[1]
    warning = (
        f"{name}: {n} images for {dimension} feature dimensions leave the covariance singular; "
        f"compare it only with the same metric at {n} images."
    )
    return _Part({"fd": found["frechet_inception_distance"]}, warnings=(warning,) if n <= dimension else ())


def _neighbours(samples: FeatureSet, reference: FeatureSet, k: int, seed: int) -> _Part:
    n = min(len(samples), len(reference))
    if n <= k:
        return _Part(warnings=(f"precision and recall: left out, {k} neighbours need more than {n} images.",))
    fake, real = (features.subset(MAX_NEIGHBOUR_IMAGES, seed) for features in (samples, reference))
    found = _fidelity(fake.values, real.values, seed, prc=True, prc_neighborhood=k, prc_batch_size=1_000)
    settings = {"num_neighbours": k, "neighbour_images": [len(fake), len(real)]}
    return _Part({"precision": found["precision"], "recall": found["recall"]}, settings=settings)


def _kernel(samples: FeatureSet, reference: FeatureSet, name: str, seed: int) -> _Part:
    n = min(len(samples), len(reference))
    size = min(MAX_KERNEL_SUBSET, n // 2)
    if size < MIN_KERNEL_SUBSET:
        return _Part(warnings=(f"{name}: left out, needs {2 * MIN_KERNEL_SUBSET} images and there are {n}.",))
    found = _fidelity(
        samples.values, reference.values, seed, kid=True, kid_subsets=KERNEL_SUBSETS, kid_subset_size=size
    )
    return _Part(
        {"kd": found["kernel_inception_distance_mean"]},
        {"kd": found["kernel_inception_distance_std"]},
        {"kernel_subsets": KERNEL_SUBSETS, "kernel_subset_size": size},
    )


def _score(samples: FeatureSet, seed: int) -> _Part:
    if samples.logits is None:
        return _Part()
    if len(samples) < MIN_SCORE_IMAGES:
        warning = f"inception_score: left out, needs {MIN_SCORE_IMAGES} images and there are {len(samples)}."
        return _Part(warnings=(warning,))
    found = _fidelity(samples.logits, None, seed, isc=True, isc_splits=SCORE_SPLITS)
    return _Part(
        {"inception_score": found["inception_score_mean"]},
        {"inception_score": found["inception_score_std"]},
        {"score_splits": SCORE_SPLITS},
    )


def _not_finite(metric: str, found: object) -> NumericsError:
    return NumericsError(
        f"{metric} is not finite",
        stage="evaluation",
        key=metric,
        found=found,
        fix="Look at the samples, and at the range of the extractor's features.",
    )


# --- torch-fidelity, fed with features ----------------------------------------------------------------------------


class _Whole(Dataset[Tensor]):
    """Features as a torch-fidelity input: one item that holds all rows, since a loader of single rows is slow."""

    def __init__(self, values: Float[Tensor, "N D"]) -> None:
        self.values = values

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Float[Tensor, "N D"]:
        return self.values


class _Given(torch_fidelity.FeatureExtractorBase):
    """The extractor that hands on the features it is given."""

    NAME = "nestdiff-given-features"

    def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("given",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "given"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, input: Float[Tensor, "1 N D"]) -> tuple[Float[Tensor, "N D"]]:
        return (input[0],)


def _fidelity(
    samples: Float[Tensor, "N D"], reference: Float[Tensor, "M D"] | None, seed: int, **metrics: Any
) -> dict[str, float]:
    """torch_fidelity.calculate_metrics on features: no cache, no download, no worker processes, no output."""
    if _Given.NAME not in FEATURE_EXTRACTORS_REGISTRY:  # registering a name twice raises
        torch_fidelity.register_feature_extractor(_Given.NAME, _Given)
    return torch_fidelity.calculate_metrics(
        input1=_Whole(samples),
        input2=None if reference is None else _Whole(reference),
        feature_extractor=_Given.NAME,
        cuda=False,
        cache=False,
        datasets_download=False,
        save_cpu_ram=True,
        verbose=False,
        rng_seed=seed,
        **metrics,
    )
