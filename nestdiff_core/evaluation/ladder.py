"""Which level loses the quality: true latents from some level up, generated ones below.

Rung k has true latents z_k, ..., z_L of real held-out images, and everything below generated: rung L + 1 is the whole
cascade, rung 1 decodes true z_1. D_k is the distance of its images to the training images. All rungs have the same
images' labels and noise, so that

    cost of level l = D_{l+1} - D_l

is what generating z_l instead of knowing it adds, 0 for a perfect denoiser. D_1 less that of the held-out images
themselves is the autoencoder's (with `sampling.contrast`, also that of the contrast that every rung is given).

The reverse, generated latents above true ones, changes no image: with true z_1 there is nothing left to generate. What
generated conditions do to the level below them is `ancestral` beside `conditional`.

Beside it, each level's latents against as many training ones: `conditional` (given true latents of held-out images
above; at the top, with nothing above, `unconditional`), `ancestral` (given generated ones), and what to expect:

    held_out    true latents of the held-out images: what a perfect model scores; clearly less means copies
    resampled   other training latents: the same without the difference between the splits
    gaussian    a Gaussian with the training latents' mean and covariance: what knowing no more scores

Against the held-out latents, conditional ones would look better than perfect: each is made from what is above one of
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestdiff_core.evaluation.bootstrap import RESAMPLES, deviation, frechet_resamples
from nestdiff_core.evaluation.extractors import Extractor
from nestdiff_core.evaluation.features import FeatureSet, Images, extract
from nestdiff_core.evaluation.gaussian import Gaussian
from nestdiff_core.evaluation.image_metrics import feature_metrics
from nestdiff_core.evaluation.latent_metrics import averaged, gaussian_like, latent_metrics
from nestdiff_core.latents.moments import Moments


def image_ladder(
    rungs: Mapping[int, Images],
    held_out: Images,
    training: Mapping[str, FeatureSet],
    extractors: Sequence[Extractor],
    *,
    num_neighbours: int = 3,
    resamples: int = RESAMPLES,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Score every rung k = 1, ..., L + 1, which all have the images of one list, uint8 HWC; that list is `held_out`.

    training: what is known of the training images in each space, by its extractor's kind.
    Returns plain JSON data:

        metrics    {name: {rungs: {k: value}, held_out: value}}
        costs      {Frechet distance: {levels: {l: D_{l+1} - D_l}, errors: {l: e}, autoencoder, costliest: l,
                   halves: [l, l]}}
                   errors: each cost's deviation over `resamples` draws of the images, which all rungs share (bootstrap)
                   halves: which level costs most judged by every second image; where they disagree, noise decides
        warnings   sentences, each naming its metric
    """
    metrics: dict[str, Any] = {}
    costs: dict[str, Any] = {}
    warnings: dict[str, None] = {}
    for extractor in extractors:
        real = training[extractor.kind]
        score = partial(feature_metrics, reference=real, extractor=extractor, num_neighbours=num_neighbours, seed=seed)
        features = {k: extract(images, extractor, batch_size=batch_size) for k, images in rungs.items()}
        numbers = {k: score(values) for k, values in features.items()}
        low = score(extract(held_out, extractor, batch_size=batch_size))
        for name, floor in low.values.items():
            metrics[name] = {"rungs": {str(k): n.values[name] for k, n in numbers.items()}, "held_out": floor}
        warnings |= dict.fromkeys(text for n in (*numbers.values(), low) for text in n.warnings)
        name = extractor.metric_name("fd")
        levels = level_costs({k: n.values[name] for k, n in numbers.items()})
        halves = []
        for half in (0, 1) if len(held_out) >= 4 else ():
            distances = {k: score(_every_second(values, half)).values[name] for k, values in features.items()}
            halves.append(costliest(level_costs(distances)))
        drawn = frechet_resamples(
            {k: values.values for k, values in features.items()}, real.gaussian, resamples=resamples, seed=seed
        )
        costs[name] = {
            "levels": {str(level): cost for level, cost in levels.items()},
            "errors": {str(level): deviation(drawn[level + 1] - drawn[level]) for level in levels},
            "autoencoder": numbers[1].values[name] - low.values[name],
            "costliest": costliest(levels),
            "halves": halves,
        }
    return {"metrics": metrics, "costs": costs, "warnings": list(warnings)}


def level_costs(distances: Mapping[int, float]) -> dict[int, float]:
    """D_{l+1} - D_l of each level, from the top; distances: D_1, ..., D_{L+1}."""
    return {level: distances[level + 1] - distances[level] for level in sorted(distances, reverse=True)[1:]}


def costliest(costs: Mapping[int, float]) -> int:
    """The level that costs most; the upper of equal ones."""
    return max(costs, key=lambda level: (costs[level], level))


def level_numbers(
    generated: Mapping[str, Tensor],
    held_out: Tensor,
    training: Tensor,
    *,
    name: str,
    num_neighbours: int = 3,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Latents (N, C, H, W) of one level by set (`conditional`, ...) against as many training ones, beside the floors.

    All are `averaged` where they are large. training: M latents. N is lowered to M; `resampled` needs M >= 2 N and is
    left out with a warning else.
    Returns plain JSON data: numbers {set: {metric: value}}, errors {set: bootstrap error of fd}, channels {set:
    {mean_error, std_ratio: a number each}}, settings, warnings.
    """
    num = min(len(held_out), len(training))
    shuffled = training[torch.from_numpy(np.random.default_rng(seed).permutation(len(training)))]
    real = shuffled[:num]
    fitted = Gaussian.of(Moments.of(_flat(real).double().numpy()))
    sets = {which: z[:num] for which, z in generated.items()}
    sets |= {"held_out": held_out[:num], "resampled": shuffled[num : 2 * num]}
    sets["gaussian"] = gaussian_like(training, num, seed=seed)
    numbers, errors, channels, settings, warnings = {}, {}, {}, {}, {}
    for which, z in sets.items():
        if len(z) < num:
            warnings[f"{name}: {which} is left out, {len(training)} training images are too few for {num}."] = None
            continue
        found = latent_metrics(z, real, name=name, num_neighbours=num_neighbours, seed=seed)
        numbers[which], channels[which], settings = found.values, found.channels, found.settings
        drawn = frechet_resamples({which: _flat(z)}, fitted, resamples=resamples, seed=seed)
        errors[which] = deviation(drawn[which])
        warnings |= dict.fromkeys(found.warnings)
    return {
        "numbers": numbers,
        "errors": errors,
        "channels": channels,
        "settings": {**settings, "resamples": resamples},
        "warnings": list(warnings),
    }


def ladder_table(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per rung from the top, and one for the held-out images themselves: their numbers, and what the level (or
    autoencoder) that is generated at this rung, but not at the next, adds to each Frechet distance, with the cost's
    bootstrap error."""
    metrics, costs = record["metrics"], record["costs"]
    top = max(map(int, next(iter(metrics.values()))["rungs"]))
    rows = []
    for k in range(top, 0, -1):
        level = k - 1
        added = {}
        for name, cost in costs.items():
            added[f"cost in {name}"] = cost["levels"][str(level)] if level else cost["autoencoder"]
            added[f"± {name}"] = cost["errors"].get(str(level))
        rows.append(
            {
                "true latents": "none" if k == top else f"z_{k}" + (" up" if k < top - 1 else ""),
                **{name: n["rungs"][str(k)] for name, n in metrics.items()},
                "adds": f"level {level}" if level else "autoencoder",
                **added,
            }
        )
    real = {name: n["held_out"] for name, n in metrics.items()}
    return [*rows, {**dict.fromkeys(rows[0]), "true latents": "images", **real, "adds": "-"}]


def level_table(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per level and number from the top: generated latents, then the floors; None where a set is left out.

    conditional: of the top level the unconditional ones. `fd ±` is the bootstrap error of fd.
    """
    sets = ("conditional", "ancestral", "held_out", "resampled", "gaussian")
    rows = []
    for level, record_l in sorted(record["levels"].items(), key=lambda item: -int(item[0])):
        found = {which: dict(numbers) for which, numbers in record_l["numbers"].items()}
        for which, numbers in found.items():
            found[which] = {"fd": numbers.pop("fd"), "fd ±": record_l["errors"][which], **numbers}
        found = {"conditional": found.get("unconditional", {}), **found}
        for name in found["conditional"]:
            cells = {which: found.get(which, {}).get(name) for which in sets}
            rows.append({"latent": f"z_{level}", "number": name, **cells})
    return rows


def verdicts(record: Mapping[str, Any]) -> list[str]:
    """A sentence for each Frechet distance: which level costs most, how sure its cost is (two bootstrap errors), and
    whether both halves of the images say so."""
    said = []
    for name, cost in record["costs"].items():
        level, halves = cost["costliest"], set(cost["halves"])
        agree = "each half of the images says so" if halves == {level} else "the halves of the images disagree: noise"
        value, error = cost["levels"][str(level)], cost["errors"][str(level)]
        said.append(f"{name}: level {level} costs most ({value:.3g} ± {2 * error:.2g}); {agree}.")
    return said


def _flat(z: Tensor) -> Tensor:
    return averaged(z).flatten(1)


def _every_second(features: FeatureSet, first: int) -> FeatureSet:
    logits = None if features.logits is None else features.logits[first::2]
    return FeatureSet(features.values[first::2], logits, features.digest, features.image_shape)
