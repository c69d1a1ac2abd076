"""Distances between two sets of images in one feature space.

    fd         Frechet distance of two Gaussians fitted to the features (gaussian.py); `fid` with inception only
    fd_infinity   what it tends to with ever more samples; `fid_infinity` with inception
    precision  share of samples inside the reference's manifold: balls to each image's k-th neighbour (arXiv 1904.06991)
    recall     share of reference images inside the samples' manifold
    kd         kernel distance, unbiased, mean and deviation over subsets (arXiv 1801.01401); `kid` with inception only
    inception_score   of the samples alone (arXiv 1606.03498); with inception only
    class_entropy, num_classes_seen, confidence   of the samples alone, by a judge that tells classes apart (classes.py)

Each set passes through its extractor once (features.extract); torch-fidelity's own functions are given the features.
fd, fd_infinity and the score are of all images, the others of at most `MAX_KEPT` random ones of each set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nestdiff_core.errors import IntegrityError, NumericsError
from nestdiff_core.evaluation.classes import classes_of
from nestdiff_core.evaluation.extractors import Extractor
from nestdiff_core.evaluation.features import MAX_KEPT, SCORE_SEED, SCORE_SPLITS, FeatureSet, Images, extract
from nestdiff_core.evaluation.gaussian import LEAST_SIZES, PARTS, frechet_distance, limit, random_parts
from nestdiff_core.latents.moments import Moments

MAX_NEIGHBOUR_IMAGES = MAX_KEPT  # precision and recall compare all pairs
KERNEL_SUBSETS, MIN_KERNEL_SUBSET = 100, 50
MAX_KERNEL_SUBSET = 500  # the mean is unbiased at any size; torch-fidelity's 1000 takes four times as long
MIN_SCORE_IMAGES = 100


@dataclass(frozen=True)
class Numbers:
    """The metrics of one comparison: values by name (and their standard deviations over subsets, where they have
    one; of fd_infinity its standard error), what to know before believing them, and how they were computed: `settings`
    of all, `own` of each."""

    values: dict[str, float]
    deviations: dict[str, float]
    warnings: tuple[str, ...]
    settings: dict[str, Any]
    own: dict[str, dict[str, Any]]
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
    samples: FeatureSet,
    reference: FeatureSet,
    extractor: Extractor,
    *,
    num_neighbours: int = 3,
    seed: int = 0,
    infinity: bool = False,
) -> Numbers:
    """Every metric that the number of images allows; `warnings` names those left out and those to distrust.

    `seed` draws the subsets of precision, recall and kd. infinity: with fd_infinity, which takes about thirty times as
    long as fd. Raises IntegrityError for images of different shapes or features of different dimensions,
    NumericsError for a value that is not finite.
    """
    require_same_shape(samples.image_shape, reference.image_shape)
    if samples.gaussian.dimension != reference.gaussian.dimension:
        raise IntegrityError(
            "Samples and reference have features of different dimensions",
            stage="evaluation",
            key=extractor.kind,
            expected=reference.gaussian.dimension,
            found=samples.gaussian.dimension,
            fix="Take a reference that was made with the same extractor.",
        )
    name = extractor.metric_name
    parts = [
        _frechet(samples, reference, name("fd")),
        *([_infinity(samples, reference, name("fd_infinity"), seed)] if infinity else []),
        _neighbours(samples, reference, num_neighbours, seed),
        _kernel(samples, reference, name("kd"), seed),
        _score(samples) if extractor.kind == "inception" else _classes(samples),
    ]
    common = {"feature_dimension": samples.gaussian.dimension}
    values = {name(k): v for part in parts for k, v in part.values.items()}
    deviations = {name(k): v for part in parts for k, v in part.deviations.items()}
    for metric, value in [*values.items(), *deviations.items()]:
        if not math.isfinite(value):
            raise _not_finite(metric, value)
    settings = {"seed": seed, **common, **{k: v for part in parts for k, v in part.settings.items()}}
    own = {name(k): {**common, **part.settings} for part in parts for k in part.values}
    warnings = tuple(text for part in parts for text in part.warnings)
    return Numbers(values, deviations, warnings, settings, own, extractor, samples, reference)


def require_same_shape(samples: tuple[int, ...] | None, reference: tuple[int, ...] | None) -> None:
    """Refuse images (H, W, C) of another shape than the reference's, with an IntegrityError; None is not known."""
    if samples is not None and reference is not None and samples != reference:
        raise IntegrityError(
            "Samples and reference have different shapes",
            stage="evaluation",
            expected=reference,
            found=samples,
            fix="Compare images of one resolution and one number of channels, as the model was trained on.",
        )


@dataclass(frozen=True)
class _Part:
    """What one family of metrics contributes, by its name outside any space (`fd`, `kd`)."""

    values: dict[str, float] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def _frechet(samples: FeatureSet, reference: FeatureSet, name: str) -> _Part:
    try:
        value = frechet_distance(samples.gaussian, reference.gaussian)
    except (np.linalg.LinAlgError, NumericsError) as error:
        raise _not_finite(name, str(error)) from error
    n, dimension = _fewest(samples, reference), samples.gaussian.dimension
    warnings = []
    if n <= dimension:
        warnings.append(
            f"{name}: {n} images for {dimension} feature dimensions leave the covariance singular; "
            f"compare it only with the same metric at {n} images."
        )
    if reference.count is None:
        warnings.append(f"{name}: the reference does not say how many images it was made from.")
    return _Part({"fd": value}, warnings=tuple(warnings))


def _fewest(samples: FeatureSet, reference: FeatureSet) -> int:
    """Images of the smaller set, of those that say how many they are."""
    return min(features.count for features in (samples, reference) if features.count is not None)


def _infinity(samples: FeatureSet, reference: FeatureSet, name: str, seed: int) -> _Part:
    parts = samples.parts
    if not parts and len(samples.values) == len(samples):
        which = random_parts(len(samples), seed)
        parts = tuple(Moments.of(samples.values.numpy()[which == k]) for k in range(PARTS))
    found = limit(parts, reference.gaussian) if parts else None
    if found is None:
        needed = LEAST_SIZES * samples.gaussian.dimension
        warning = f"{name}: left out, needs about {needed:,} images and there are {len(samples):,}."
        return _Part(warnings=(warning,))
    return _Part(
        {"fd_infinity": found.value},
        {"fd_infinity": found.standard_error},
        {"part_images": list(found.sizes)},
    )


def _neighbours(samples: FeatureSet, reference: FeatureSet, k: int, seed: int) -> _Part:
    fake, real = (features.subset(MAX_NEIGHBOUR_IMAGES, seed) for features in (samples, reference))
    n = min(len(fake.values), len(real.values))
    if n <= k:
        return _Part(warnings=(f"precision and recall: left out, {k} neighbours need more than {n} images.",))
    from torch_fidelity.metric_prc import prc_features_to_metric  # with torchvision, which takes seconds to import

    found = prc_features_to_metric(
        fake.values, real.values, prc_neighborhood=k, prc_batch_size=1_000, save_cpu_ram=True, verbose=False
    )
    settings = {"seed": seed, "num_neighbours": k, "neighbour_images": [len(fake.values), len(real.values)]}
    return _Part({"precision": found["precision"], "recall": found["recall"]}, settings=settings)


def _kernel(samples: FeatureSet, reference: FeatureSet, name: str, seed: int) -> _Part:
    n = min(len(samples.values), len(reference.values))
    size = min(MAX_KERNEL_SUBSET, n // 2)
    if size < MIN_KERNEL_SUBSET:
        return _Part(warnings=(f"{name}: left out, needs {2 * MIN_KERNEL_SUBSET} images and there are {n}.",))
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = kid_features_to_metric(
        samples.values,
        reference.values,
        kid_subsets=KERNEL_SUBSETS,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    return _Part(
        {"kd": found["kernel_inception_distance_mean"]},
        {"kd": found["kernel_inception_distance_std"]},
        {"seed": seed, "kernel_subsets": KERNEL_SUBSETS, "kernel_subset_size": size},
    )


def _score(samples: FeatureSet) -> _Part:
    if samples.logits is None:
        return _Part()
    if len(samples) < MIN_SCORE_IMAGES:
        warning = f"inception_score: left out, needs {MIN_SCORE_IMAGES} images and there are {len(samples)}."
        return _Part(warnings=(warning,))
    if samples.score is None:
        from torch_fidelity.metric_isc import isc_features_to_metric

        found = isc_features_to_metric(samples.logits, SCORE_SPLITS, rng_seed=SCORE_SEED)
        mean, deviation = found["inception_score_mean"], found["inception_score_std"]
    else:
        mean, deviation = samples.score
    return _Part(
        {"inception_score": mean}, {"inception_score": deviation}, {"score_splits": SCORE_SPLITS, "seed": SCORE_SEED}
    )


def _classes(samples: FeatureSet) -> _Part:
    if samples.logits is None:
        return _Part()
    found = classes_of(samples.logits.softmax(dim=1).numpy())
    values = {"class_entropy": found.balance, "num_classes_seen": float(found.num_seen), "confidence": found.confidence}
    return _Part(values, settings={"class_images": len(samples.logits)})


def _not_finite(metric: str, found: object) -> NumericsError:
    return NumericsError(
        f"{metric} is not finite",
        stage="evaluation",
        key=metric,
        found=found,
        fix="Look at the samples, and at the range of the extractor's features.",
    )
