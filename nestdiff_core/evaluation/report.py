"""All numbers of a sample set: each with its floor, what to know before believing it, and its metric card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int

from nestdiff_core.evaluation.bootstrap import deviation, frechet_resamples
from nestdiff_core.evaluation.card import MetricCard, SampleOrigin
from nestdiff_core.evaluation.extractors import Extractor
from nestdiff_core.evaluation.features import FeatureSet, Images, extract_all
from nestdiff_core.evaluation.image_metrics import Numbers, feature_metrics
from nestdiff_core.evaluation.reference import Space
from nestdiff_core.progress import Progress, silent


@dataclass(frozen=True)
class Labelled:
    """Real images with their classes, for the probe."""

    images: Images
    labels: Int[np.ndarray, " N"]


def evaluate(
    samples: Images,
    spaces: Sequence[Space],
    *,
    origin: SampleOrigin | None,
    others: Mapping[str, Images] | None = None,
    probe: tuple[Labelled, Labelled] | None = None,
    num_neighbours: int = 3,
    resamples: int = 0,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare `samples`, and real held-out images, with the reference of each space.

    Samples are uint8 HWC images of the reference's shape. origin: how they were made, where that is known. `others`
    are further sample sets by name (an ablation), measured likewise. probe: the images to train it on, and held-out
    ones. resamples: draws for the bootstrap error of each Frechet distance, which is then its deviation. Returns plain
    JSON data:

        metrics   {name: {value, deviation, value_at_floor, floor, floor_images, others: {set: value}, card}}
                  value is that of all samples (deviation over subsets or resamples, where there are any); floor that of
                  `floor_images` held-out images, and value_at_floor that of as many samples, so those two compare. A
                  Frechet distance clearly below its floor means samples closer to the training images than unseen
                  images are: copies. An fd_infinity is one of no number of images: its floor compares with the value
        probe     {held_out_accuracy, held_out: judge(...), samples: judge(...), others: {set: judge(...)}}, or None
        warnings  sentences, each naming its metric
    """
    others = others or {}
    extractors = [space.extractor for space in spaces]
    features = partial(extract_all, extractors=extractors, batch_size=batch_size, progress=progress)
    found = features(samples, what="samples")
    bare = {name: features(images, what=name) for name, images in others.items()}
    metrics: dict[str, Any] = {}
    warnings: list[str] = []
    for i, space in enumerate(spaces):
        against_real = partial(
            feature_metrics,
            reference=space.reference,
            extractor=space.extractor,
            num_neighbours=num_neighbours,
            seed=seed,
        )
        rest = {name: sets[i] for name, sets in bare.items()}
        numbers, records, said = _with_floor(found[i], space.held_out, rest, against_real, seed)
        if resamples:
            drawn = frechet_resamples({"": found[i].values}, space.reference.gaussian, resamples=resamples, seed=seed)
            records[space.extractor.metric_name("fd")]["deviation"] = deviation(drawn[""])
        for name, record in records.items():
            metrics[name] = {**record, "card": metric_card(name, numbers, origin, space.resize_filter).to_dict()}
        warnings += said
    judged = None
    if probe is not None:
        from nestdiff_core.evaluation.probe import accuracy, fit_probe, judge  # scikit-learn takes a second to import

        known, held_out = probe
        classifier = fit_probe(known.images, known.labels, seed=seed)
        judged = {
            "held_out_accuracy": accuracy(classifier, held_out.images, held_out.labels),
            "held_out": judge(classifier, held_out.images),
            "samples": judge(classifier, samples),
            "others": {name: judge(classifier, images) for name, images in others.items()},
        }
    return {"metrics": metrics, "probe": judged, "warnings": warnings}


def measured_spaces(
    extractors: Sequence[Extractor], reference: Images, held_out: Images, *, batch_size: int = 256
) -> list[Space]:
    """The spaces of an evaluation from the images themselves; the stage `reference` keeps what it makes of them."""
    sets = (extract_all(images, extractors, batch_size=batch_size) for images in (reference, held_out))
    return [Space(*three) for three in zip(extractors, *sets, strict=True)]


def _with_floor(
    samples: FeatureSet,
    held_out: FeatureSet | None,
    others: Mapping[str, FeatureSet],
    against_real: Callable[..., Numbers],
    seed: int,
) -> tuple[Numbers, dict[str, dict[str, Any]], list[str]]:
    """The metrics of the samples; each beside that of as many held-out images and those of the other sets; warnings."""
    whole = against_real(samples, infinity=True)
    rest = {name: against_real(features, infinity=True).values for name, features in others.items()}
    num, floors, matched, said = 0, {}, {}, list(whole.warnings)
    if held_out is not None:
        num = min(len(samples), len(held_out.values))
        num = num if num == len(samples) else min(num, len(samples.values))
        low = against_real(held_out.subset(num, seed), infinity=True)
        floors = low.values
        matched = whole.values if num == len(samples) else against_real(samples.subset(num, seed)).values
        new = (text for text in low.warnings if text not in whole.warnings)
        said += [f"Floor: {text}" for text in new if "infinity" not in text.split(":")[0]]
    records = {
        name: {
            "value": value,
            "deviation": whole.deviations.get(name),
            "value_at_floor": matched.get(name),
            "floor": floors.get(name),
            "floor_images": num,
            "others": {other: values.get(name) for other, values in rest.items()},
        }
        for name, value in whole.values.items()
    }
    return whole, records, said


def metric_card(metric: str, numbers: Numbers, origin: SampleOrigin | None, resize_filter: str) -> MetricCard:
    """The card of one of the numbers. resize_filter: how the reference's images came to their size."""
    return MetricCard(
        metric=metric,
        extractor=numbers.extractor.kind,
        weights_sha256=numbers.extractor.weights_sha256,
        preprocessing=numbers.extractor.preprocessing,
        reference_digest=numbers.reference.digest,
        num_reference=numbers.reference.count,
        samples_digest=numbers.samples.digest,
        num_samples=len(numbers.samples),
        resize_filter=resize_filter,
        settings=numbers.own[metric],
        origin=origin,
    )
