"""The sweep: how the trained cascade is best sampled."""

import dagster as dg

from assets.config import POOL, asset_spec, log_progress, refusals, runtime_config
from assets.report import SHOWN, grid, picture, result, table
from assets.resources import ArtifactRoot
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Ref


def build(experiment: ExperimentConfig) -> list[dg.AssetsDefinition]:
    """Nothing, unless something is to be swept."""
    if not experiment.sweep.anything:
        return []
    spec = asset_spec(
        experiment,
        Ref("sweep"),
        kinds={"pytorch", "scikitlearn"},
        description=(
            "Guidance, gamma, network evaluations and average of the weights of each level, from the top: all settings "
            "by the Frechet distance of their latents, a short list by its images (sweep.json). What was chosen is in "
            "chosen.json, and is sampled with where sampling.chosen_by is `sweep`."
        ),
    )

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(name="try_settings", specs=[spec], pool=POOL)  # the job is called sweep
    def sweep(context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot) -> dg.MaterializeResult:
        from nestdiff_core import stages
        from nestdiff_core.devices import choose_device
        from nestdiff_core.evaluation.samples import StoredSamples
        from nestdiff_core.evaluation.sweep import level_table, short_table, sweep_plots, verdict

        with refusals():
            artifact = stages.sweep(
                artifacts.experiment(experiment), device=choose_device(config.device), progress=log_progress(context)
            )
            info = artifact.info
            chosen = info["short_list"][info["chosen"]]
            pictures = grid(StoredSamples(artifact.path / chosen["file"]).read(0, SHOWN))
        return result(
            artifact,
            spec.key,
            verdict=verdict(info),
            chosen=dg.MetadataValue.json(chosen["settings"]),
            short_list=table(short_table(info)),
            settings=table(level_table(info)),
            **{name: picture(png) for name, png in sweep_plots(info).items()},
            samples=pictures,
            **{name: value for name, value in chosen["metrics"].items()},
        )

    return [sweep]
