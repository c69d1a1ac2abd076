"""Samples of the cascade, and the numbers that judge them."""

from typing import cast

import dagster as dg

from assets.config import POOL, asset_spec, elsewhere, log_progress, refusals, runtime_config, with_runtime
from assets.report import SHOWN, grid, picture, result, table
from assets.resources import ArtifactRoot, Launcher
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Ref

CARDS = "metric_cards"


def build_samples(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    spec = asset_spec(
        experiment,
        Ref("samples"),
        kinds={"pytorch", "numpy"},
        description=(
            "Images of the whole cascade, z_L first: samples.npz (arr_0, uint8 NHWC, as other evaluators read "
            "it), the generated latents, "
            "and what level 1 makes when its conditions are withheld."
        ),
    )

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(name="samples", specs=[spec], pool=POOL)
    def samples(
        context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot, launcher: Launcher
    ) -> dg.MaterializeResult:
        from nestdiff_core import stages
        from nestdiff_core.devices import choose_device
        from nestdiff_core.evaluation.samples import StoredSamples

        x = artifacts.experiment(with_runtime(experiment, config))
        if elsewhere(x.config.runtime):
            launcher.sample(context, x)
        with refusals():  # what the launcher's processes made is only checked
            artifact = stages.samples(x, device=choose_device(config.device), progress=log_progress(context))
            grids = {
                name: grid(StoredSamples(artifact.path / f"{name}.npz").read(0, SHOWN))
                for name in ("samples", "without_conditions")
                if (artifact.path / f"{name}.npz").is_file()
            }
        return result(artifact, spec.key, **grids, **artifact.info)

    return samples


def build_reference(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    spec = asset_spec(
        experiment,
        Ref("reference"),
        kinds={"pytorch", "numpy"},
        description=(
            "What samples are compared with: mean, covariance and some of the features of the real images of each "
            "split, in every feature space (SPLIT.SPACE.npz, with mu and sigma as ADM's evaluator names them). Of the "
            "same images, crop and resize as training."
        ),
    )

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(name="reference", specs=[spec], pool=POOL)
    def reference(context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot) -> dg.MaterializeResult:
        from nestdiff_core import stages
        from nestdiff_core.devices import choose_device

        with refusals():
            artifact = stages.reference(
                artifacts.experiment(experiment), device=choose_device(config.device), progress=log_progress(context)
            )
        rows = [
            {"space": space, **{split: counts[space] for split, counts in artifact.info["images"].items()}, **identity}
            for space, identity in artifact.info["extractors"].items()
        ]
        return result(artifact, spec.key, spaces=table(rows))

    return reference


def build_evaluation(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    spec = asset_spec(
        experiment,
        Ref("evaluation"),
        kinds={"pytorch", "scikitlearn"},
        description=(
            "Frechet distance, precision and recall of the samples against the training images, each named for "
            "the feature space it was "
            "measured in and beside the same number for real held-out images. Every number carries its metric "
            "card (metrics.json); what the cards differ in from those of the materialisation before is shown."
        ),
    )

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(name="evaluation", specs=[spec], pool=POOL)
    def evaluation(context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot) -> dg.MaterializeResult:
        from nestdiff_core import stages
        from nestdiff_core.devices import choose_device
        from nestdiff_core.evaluation.card import compare

        with refusals():
            artifact = stages.evaluation(
                artifacts.experiment(experiment), device=choose_device(config.device), progress=log_progress(context)
            )
        info = artifact.info
        rows = [
            {
                "number": name,
                "samples": n["value"],
                "samples, as many as held out": n["value_at_floor"],
                "real held-out": n["floor"],
                **n["others"],
            }
            for name, n in info["metrics"].items()
        ]
        cards = {name: {"value": n["value"], "card": n["card"]} for name, n in info["metrics"].items()}
        before = context.instance.get_latest_materialization_event(spec.key)
        earlier = before.asset_materialization.metadata.get(CARDS) if before and before.asset_materialization else None
        differing = compare(cards, cast(dict, earlier.value)) if isinstance(earlier, dg.JsonMetadataValue) else []
        judged = (
            info["probe"] and {who: info["probe"][who] for who in ("samples", "held_out")} | info["probe"]["others"]
        )
        return result(
            artifact,
            spec.key,
            numbers=table(rows),
            probe=table(
                [
                    {"images": who, **{k: v for k, v in seen.items() if k != "class_share"}}
                    for who, seen in judged.items()
                ]
            )
            if judged
            else None,
            **{CARDS: dg.MetadataValue.json(cards)},
            compared_with_the_last=table(differing) if differing else None,
            warnings="\n".join(info["warnings"]) or None,
            **{name: n["value"] for name, n in info["metrics"].items()},
        )

    return evaluation


def build_neighbours(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    spec = asset_spec(
        experiment,
        Ref("neighbours"),
        kinds={"scikitlearn"},
        description=(
            "Whether samples are copies: their nearest training images, by the latent of each level and by the "
            "encoder's vector, beside those of held-out images (neighbours.json, neighbours.npz)."
        ),
    )

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(name="neighbours", specs=[spec], pool=POOL)
    def neighbours(context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot) -> dg.MaterializeResult:
        from nestdiff_core import stages
        from nestdiff_core.devices import choose_device
        from nestdiff_core.evaluation.neighbours import neighbour_table, verdicts

        x = artifacts.experiment(experiment)
        with refusals():
            artifact = stages.neighbours(x, device=choose_device(config.device), progress=log_progress(context))
            drawn = stages.neighbour_pictures(x)
        return result(
            artifact,
            spec.key,
            verdict="\n".join(verdicts(artifact.info)),
            numbers=table(neighbour_table(artifact.info)),
            **{f"neighbours_{name}": picture(png) for name, png in drawn.items()},
            **{f"copies_{name}": found["copies"]["samples"] for name, found in artifact.info["spaces"].items()},
        )

    return neighbours


def build_ladder(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    spec = asset_spec(
        experiment,
        Ref("ladder"),
        kinds={"pytorch", "scikitlearn"},
        description=(
            "Which level loses the quality: images from true latents of held-out images down to each level, generated "
            "below it, against the training images; and each level's generated latents against true ones, beside "
            "what held-out latents and a Gaussian score (ladder.json)."
        ),
    )

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(name="ladder", specs=[spec], pool=POOL)
    def ladder(context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot) -> dg.MaterializeResult:
        from nestdiff_core import stages
        from nestdiff_core.devices import choose_device
        from nestdiff_core.evaluation.figures import ladder_plot
        from nestdiff_core.evaluation.ladder import ladder_table, level_table, verdicts

        with refusals():
            artifact = stages.ladder(
                artifacts.experiment(experiment), device=choose_device(config.device), progress=log_progress(context)
            )
        info, plots, costliest = artifact.info, {}, {}
        for name, cost in info["costs"].items():
            numbers = info["metrics"][name]
            plots[f"ladder_{name}"] = picture(
                ladder_plot(
                    {int(k): value for k, value in numbers["rungs"].items()},
                    title="What each level costs",
                    xlabel=f"{name}, {info['num_images']:,} images",
                    floor=("held-out images", numbers["held_out"]),
                )
            )
            costliest[f"costliest_level_{name}"] = cost["costliest"]
        return result(
            artifact,
            spec.key,
            verdict="\n".join(verdicts(info)),
            rungs=table(ladder_table(info)),
            levels=table(level_table(info)),
            **plots,
            **costliest,
        )

    return ladder
