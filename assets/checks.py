"""Asset checks: what must hold before the next stage is worth its time."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import dagster as dg

from assets.config import asset_key, refusals
from assets.resources import ArtifactRoot
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, Ref

LEAST_CONFIDENCE = 0.75  # of the classifier's on real held-out images; on noise it has about half of that
LARGEST_MEAN, LARGEST_STD_ERROR = 0.01, 0.01  # of standardised latents; fp16 storage rounds to about 0.0005


def build(experiment: ExperimentConfig) -> list[dg.AssetChecksDefinition]:
    """All checks of an experiment."""
    levels = range(1, experiment.num_levels + 1)
    checks = [
        _check(
            experiment,
            Ref("images"),
            "index_complete",
            "Every image of the index stands in its shard, with its checksum.",
            _index_complete,
        ),
        *(
            _check(
                experiment,
                Ref("features"),
                "features_finite",
                "No stored feature is missing or not finite.",
                _features_finite,
            )
            for _ in range(experiment.features.keep)
        ),
        *(
            _check(
                experiment,
                Ref("latents", level),
                "standardised",
                f"Each channel of z_{level} has mean 0 and deviation 1 on the training split.",
                _standardised,
            )
            for level in levels
            if level > 1
        ),
        *(
            _check(
                experiment,
                Ref("denoiser", level),
                "checkpoint_loads",
                f"The exported weights of level {level} load and give finite output.",
                _checkpoint_loads,
            )
            for level in levels
        ),
        _check(
            experiment,
            Ref("samples"),
            "samples_finite_and_in_range",
            "Every sampled latent is finite, and the images are not one flat tone.",
            _samples_in_range,
        ),
    ]
    checks += [
        _check(
            experiment,
            Ref("watch"),
            f"{name}_no_worse",
            f"The Frechet distance of {what} is not above the best that the same settings have had by more than two "
            "combined bootstrap errors: 2 sqrt(error^2 + error of the best^2).",
            partial(_no_worse, key=key),
            blocking=False,
            severity=dg.AssetCheckSeverity.ERROR,
        )
        for key, name, what in (
            *((str(level), f"level_{level}", f"z_{level}") for level in levels),
            ("images", "images", "the images"),
        )
    ]
    if experiment.evaluation.probe:
        checks.append(
            _check(
                experiment,
                Ref("evaluation"),
                "recognised",
                (
                    "A classifier trained on the real images sees every class among the samples, with at least "
                    f"{LEAST_CONFIDENCE:.0%} of its confidence on real held-out images; that on samples made without "
                    "conditions stands beside."
                ),
                _recognised,
                blocking=False,
            )
        )
    return checks


def _check(
    experiment: ExperimentConfig,
    ref: Ref,
    name: str,
    description: str,
    judge: Callable[[Experiment, Ref], tuple[bool, dict[str, Any]]],
    *,
    blocking: bool = True,
    severity: dg.AssetCheckSeverity | None = None,
) -> dg.AssetChecksDefinition:
    """severity: of a failure; by default an error where it blocks, else a warning."""
    severity = severity or (dg.AssetCheckSeverity.ERROR if blocking else dg.AssetCheckSeverity.WARN)

    @dg.asset_check(asset=asset_key(experiment, ref), name=name, description=description, blocking=blocking)
    def check(artifacts: ArtifactRoot) -> dg.AssetCheckResult:
        with refusals():
            passed, metadata = judge(artifacts.experiment(experiment), ref)
        return dg.AssetCheckResult(passed=passed, metadata=metadata, severity=severity)

    return check


def _index_complete(x: Experiment, ref: Ref) -> tuple[bool, dict[str, Any]]:
    from nestdiff_core import loading

    index = loading.open_index(x)
    read = sum(len(index.read_shard(k)) for k in range(len(index.shards)))
    return read == index.num_images, {"indexed": index.num_images, "read": read}


def _features_finite(x: Experiment, ref: Ref) -> tuple[bool, dict[str, Any]]:
    import numpy as np

    from nestdiff_core import loading

    rows, bad = 0, 0
    for array in ("map", "vector"):
        for _, block in loading.open_features(x, array).iterate_shards():
            bad += int((~np.isfinite(block)).sum())
            rows += len(block) if array == "map" else 0
    return bad == 0 and rows == loading.open_index(x).num_images, {"rows": rows, "not_finite": bad}


def _standardised(x: Experiment, ref: Ref) -> tuple[bool, dict[str, Any]]:
    info = x.artifact(ref).info
    mean, error = max(map(abs, info["mean"])), max(abs(s - 1.0) for s in info["std"])
    return mean <= LARGEST_MEAN and error <= LARGEST_STD_ERROR, {"largest_mean": mean, "largest_std_error": error}


def _checkpoint_loads(x: Experiment, ref: Ref) -> tuple[bool, dict[str, Any]]:
    import torch

    from nestdiff_core import loading

    model = loading.open_denoiser(x, cast(int, ref.level))
    with torch.no_grad():
        output = model(*model.example_inputs(2, "cpu"))
    return bool(torch.isfinite(output).all()), {"output_std": float(output.std())}


def _samples_in_range(x: Experiment, ref: Ref) -> tuple[bool, dict[str, Any]]:
    from nestdiff_core.evaluation.samples import StoredSamples

    artifact = x.artifact(ref)
    pictures = StoredSamples(artifact.path / "samples.npz")
    spread = min(float(picture.std()) for picture in pictures)
    complete = len(pictures) == x.config.sampling.num_images
    return complete and spread > 0, {
        "images": len(pictures),
        "smallest_contrast": spread,
        "minimum": artifact.info["minimum"],
        "maximum": artifact.info["maximum"],
    }


def _recognised(x: Experiment, ref: Ref) -> tuple[bool, dict[str, Any]]:
    from nestdiff_core import loading

    probe = x.artifact(ref).info["probe"]
    sets = {"samples": probe["samples"], "held_out": probe["held_out"], **probe["others"]}
    metadata = {f"confidence_on_{name}": seen["confidence"] for name, seen in sets.items()}
    seen = probe["samples"]["num_classes_seen"]
    convinced = probe["samples"]["confidence"] >= LEAST_CONFIDENCE * probe["held_out"]["confidence"]
    return seen == loading.open_index(x).num_classes and convinced, {
        "classes_seen": seen,
        "samples": probe["samples"]["num_images"],
        "held_out_accuracy": probe["held_out_accuracy"],
        **metadata,
    }


def _no_worse(x: Experiment, ref: Ref, *, key: str) -> tuple[bool, dict[str, Any]]:
    from nestdiff_core.stages.watch import best, history, is_worse

    current = x.artifact(ref).info["newest"].get(key)
    if current is None:
        return True, {"left_out": "there are no weights yet"}
    before = best(history(x, key), current)
    return not is_worse(current, before), {
        "distance": current["fd"],
        "error": current["error"],
        "step": current["step"],
        "best": before["fd"],
        "error_of_best": before["error"],
        "step_of_best": before["step"],
    }
