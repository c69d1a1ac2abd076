"""All numbers of a sample set: each with its floor, what to know before believing it, and its metric card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from nestdiff_core.config import EvaluationConfig
from nestdiff_core.errors import ConfigError
from nestdiff_core.evaluation.card import MetricCard, SampleOrigin
from nestdiff_core.evaluation.extractors import Encoder, FeatureSet, Images, build_extractor, extract
from nestdiff_core.evaluation.image_metrics import Numbers, feature_metrics


def evaluate(
    samples: Images,
    reference: Images,
    held_out: Images,
    config: EvaluationConfig,
    *,
    origin: SampleOrigin,
    encoder: Encoder | None = None,
    others: Mapping[str, Images] | None = None,
    reference_labels: Int[np.ndarray, " N"] | None = None,
    held_out_labels: Int[np.ndarray, " M"] | None = None,
    resize_filter: str = "bicubic",
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare `samples` with the training images `reference`, and real `held_out` images with them too.

    All are uint8 HWC images of one shape. `others` are further sample sets by name (an ablation), measured likewise.
    encoder: for the extractor `encoder`. Labels: for the probe. Returns plain JSON data:

        metrics   {name: {value, deviation, value_at_floor, floor, floor_images, others: {set: value}, card}}
                  value is that of all samples (deviation over subsets, where the metric has one); floor that of
                  `floor_images` held-out images, and value_at_floor that of as many samples, so those two compare. A
                  Frechet distance clearly below its floor means samples closer to the training images than unseen
                  images are: copies
        probe     {held_out_accuracy, held_out: judge(...), samples: judge(...), others: {set: judge(...)}}, or None
        warnings  sentences, each naming its metric
    """
    if config.probe and (reference_labels is None or held_out_labels is None):
        raise ConfigError(
            "The probe needs labels",
            key="evaluation.probe",
            found="no labels",
            fix="Give the labels of reference and held-out images, or set evaluation.probe to false.",
        )
    others = others or {}
    metrics: dict[str, Any] = {}
    warnings: list[str] = []
    for kind in config.extractors:
        extractor = build_extractor(kind, encoder=encoder, inception_weights=config.inception_weights, device=device)
        features = partial(extract, extractor=extractor, batch_size=batch_size)
        real = features(reference)
        against_real = partial(
            feature_metrics, reference=real, extractor=extractor, num_neighbours=config.num_neighbours, seed=seed
        )
        bare = {name: features(images) for name, images in others.items()}
        numbers, records, said = _with_floor(features(samples), features(held_out), bare, against_real, seed)
        for name, record in records.items():
            metrics[name] = {**record, "card": _card(name, numbers, origin, resize_filter).to_dict()}
        warnings += said
    judged = None
    if config.probe and reference_labels is not None and held_out_labels is not None:
        from nestdiff_core.evaluation.probe import accuracy, fit_probe, judge  # scikit-learn takes a second to import

        probe = fit_probe(reference, reference_labels, seed=seed)
        judged = {
            "held_out_accuracy": accuracy(probe, held_out, held_out_labels),
            "held_out": judge(probe, held_out),
            "samples": judge(probe, samples),
            "others": {name: judge(probe, images) for name, images in others.items()},
        }
    return {"metrics": metrics, "probe": judged, "warnings": warnings}


def _with_floor(
    samples: FeatureSet,
    held_out: FeatureSet,
    others: Mapping[str, FeatureSet],
    against_real: Callable[[FeatureSet], Numbers],
    seed: int,
) -> tuple[Numbers, dict[str, dict[str, Any]], list[str]]:
    """The metrics of the samples; each beside that of as many held-out images and those of the other sets; warnings."""
    num = min(len(samples), len(held_out))
    whole = against_real(samples)
    low = against_real(held_out.subset(num, seed))
    matched = whole if num == len(samples) else against_real(samples.subset(num, seed))
    rest = {name: against_real(features).values for name, features in others.items()}
    records = {
        name: {
            "value": value,
            "deviation": whole.deviations.get(name),
            "value_at_floor": matched.values.get(name),
            "floor": low.values.get(name),
            "floor_images": num,
            "others": {other: values.get(name) for other, values in rest.items()},
        }
        for name, value in whole.values.items()
    }
    said = [*whole.warnings, *(f"Floor: {text}" for text in low.warnings if text not in whole.warnings)]
    return whole, records, said


def _card(metric: str, numbers: Numbers, origin: SampleOrigin, resize_filter: str) -> MetricCard:
    return MetricCard(
        metric=metric,
        extractor=numbers.extractor.kind,
        weights_sha256=numbers.extractor.weights_sha256,
        preprocessing=numbers.extractor.preprocessing,
        reference_digest=numbers.reference.digest,
        num_reference=len(numbers.reference),
        samples_digest=numbers.samples.digest,
        num_samples=len(numbers.samples),
        resize_filter=resize_filter,
        settings=numbers.settings,
        origin=origin,
    )
