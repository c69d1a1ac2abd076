"""Samples of the cascade, and the numbers that judge them."""

from typing import Any, cast

import dagster as dg

from assets.config import asset_key
from assets.report import SHOWN, grid, picture, table
from assets.stage import stage_asset
from nestdiff_core.artifacts import Artifact
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.tables import floor_name

CARDS = "metric_cards"


def build_samples(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    return stage_asset(
        experiment,
        "samples",
        kinds={"pytorch", "numpy"},
        description=(
            "Images of the whole cascade, z_L first: samples.npz (arr_0, uint8 NHWC, as other evaluators read "
            "it), the generated latents, "
            "and what level 1 makes when its conditions are withheld."
        ),
        show=_show_samples,
        shared=True,
    )


def _show_samples(context: dg.AssetExecutionContext, x: Experiment, artifact: Artifact) -> dict[str, Any]:
    from nestdiff_core.evaluation.samples import StoredSamples

    files = {name: artifact.path / f"{name}.npz" for name in ("samples", "without_conditions")}
    grids = {name: grid(StoredSamples(file).read(0, SHOWN)) for name, file in files.items() if file.is_file()}
    return {**grids, **artifact.info}


def build_reference(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    return stage_asset(
        experiment,
        "reference",
        kinds={"pytorch", "numpy"},
        description=(
            "What samples are compared with: mean, covariance and some of the features of the real images of each "
            "split, in every feature space (SPLIT.SPACE.npz, with mu and sigma as ADM's evaluator names them). Of the "
            "same images, crop and resize as training."
        ),
        show=_show_reference,
    )


def _show_reference(context: dg.AssetExecutionContext, x: Experiment, artifact: Artifact) -> dict[str, Any]:
    images = artifact.info["images"]
    rows = [
        {"space": space, **{split: counts[space] for split, counts in images.items()}, **identity}
        for space, identity in artifact.info["extractors"].items()
    ]
    return {"spaces": table(rows)}


def build_evaluation(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    return stage_asset(
        experiment,
        "evaluation",
        kinds={"pytorch", "scikitlearn"},
        description=(
            "Frechet distance, precision and recall of the samples against real images, each named for "
            "the feature space it was "
            "measured in and beside the same number for other real images. Every number carries its metric "
            "card (metrics.json); what the cards differ in from those of the materialisation before is shown."
        ),
        show=_show_evaluation,
    )


def _show_evaluation(context: dg.AssetExecutionContext, x: Experiment, artifact: Artifact) -> dict[str, Any]:
    from nestdiff_core.evaluation.card import compare

    info, real = artifact.info, floor_name(x.config)
    rows = [
        {
            "number": name,
            "samples": n["value"],
            f"samples, as many as {real}": n["value_at_floor"],
            f"real, {real}": n["floor"],
            **n["others"],
        }
        for name, n in info["metrics"].items()
    ]
    cards = {name: {"value": n["value"], "card": n["card"]} for name, n in info["metrics"].items()}
    before = context.instance.get_latest_materialization_event(asset_key(x.config, Ref("evaluation")))
    earlier = before.asset_materialization.metadata.get(CARDS) if before and before.asset_materialization else None
    differing = compare(cards, cast(dict, earlier.value)) if isinstance(earlier, dg.JsonMetadataValue) else []
    probe = info["probe"]
    judged = {**{who: probe[who] for who in ("samples", "held_out")}, **probe["others"]} if probe else {}
    seen = [{"images": who, **{k: v for k, v in told.items() if k != "class_share"}} for who, told in judged.items()]
    return {
        "numbers": table(rows),
        "probe": table(seen) if seen else None,
        CARDS: dg.MetadataValue.json(cards),
        "compared_with_the_last": table(differing) if differing else None,
        "warnings": "\n".join(info["warnings"]) or None,
        **{name: n["value"] for name, n in info["metrics"].items()},
    }


def build_neighbours(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    return stage_asset(
        experiment,
        "neighbours",
        kinds={"scikitlearn"},
        description=(
            "Whether samples are copies: their nearest training images, by the latent of each level and by the "
            "encoder's vector, beside those of held-out images (neighbours.json, neighbours.npz)."
        ),
        show=_show_neighbours,
    )


def _show_neighbours(context: dg.AssetExecutionContext, x: Experiment, artifact: Artifact) -> dict[str, Any]:
    from nestdiff_core import stages
    from nestdiff_core.evaluation.neighbours import neighbour_table, verdicts

    return {
        "verdict": "\n".join(verdicts(artifact.info)),
        "numbers": table(neighbour_table(artifact.info)),
        **{f"neighbours_{name}": picture(png) for name, png in stages.neighbour_pictures(x).items()},
        **{f"copies_{name}": found["copies"]["samples"] for name, found in artifact.info["spaces"].items()},
    }


def build_ladder(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    return stage_asset(
        experiment,
        "ladder",
        kinds={"pytorch", "scikitlearn"},
        description=(
            "Which level loses the quality: images from true latents of held-out images down to each level, generated "
            "below it, against the training images; and each level's generated latents against true ones, beside "
            "what held-out latents and a Gaussian score (ladder.json)."
        ),
        show=_show_ladder,
        shared=True,
    )


def _show_ladder(context: dg.AssetExecutionContext, x: Experiment, artifact: Artifact) -> dict[str, Any]:
    from nestdiff_core.evaluation.figures import ladder_plot
    from nestdiff_core.evaluation.ladder import ladder_table, level_table, verdicts

    info = artifact.info
    plots = {
        f"ladder_{name}": picture(
            ladder_plot(
                {int(k): value for k, value in numbers["rungs"].items()},
                title="What each level costs",
                xlabel=f"{name}, {info['num_images']:,} images",
                floor=("held-out images", numbers["held_out"]),
            )
        )
        for name, numbers in info["metrics"].items()
        if name in info["costs"]
    }
    return {
        "verdict": "\n".join(verdicts(info)),
        "rungs": table(ladder_table(info)),
        "levels": table(level_table(info)),
        **plots,
        **{f"costliest_level_{name}": cost["costliest"] for name, cost in info["costs"].items()},
    }
