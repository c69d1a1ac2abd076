"""Samples of the cascade, and the numbers that judge them."""

import dagster as dg

from assets.config import POOL, asset_spec, elsewhere, log_progress, refusals, runtime_config, with_runtime
from assets.report import SHOWN, grid, picture, result, table
from assets.resources import ArtifactRoot, Launcher
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Ref


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


def build_evaluation(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    spec = asset_spec(
        experiment,
        Ref("evaluation"),
        kinds={"pytorch", "scikitlearn"},
        description=(
            "Frechet distance, precision and recall of the samples against the training images, each named for "
            "the feature space it was "
            "measured in and beside the same number for real held-out images. Every number carries its metric "
            "card (metrics.json)."
        ),
    )

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(name="evaluation", specs=[spec], pool=POOL)
    def evaluation(context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot) -> dg.MaterializeResult:
        from nestdiff_core import stages
        from nestdiff_core.devices import choose_device

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
            **{name: n["value"] for name, n in info["metrics"].items()},
        )

    return evaluation


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
