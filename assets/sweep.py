"""The sweep: how the trained cascade is best sampled."""

from typing import Any

import dagster as dg

from assets.report import SHOWN, grid, picture, table
from assets.stage import stage_asset
from nestdiff_core.artifacts import Artifact
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment


def build(experiment: ExperimentConfig) -> list[dg.AssetsDefinition]:
    """Nothing, unless something is to be swept."""
    if not experiment.sweep.anything:
        return []
    asset = stage_asset(
        experiment,
        "sweep",
        kinds={"pytorch", "scikitlearn"},
        description=(
            "Guidance, gamma, network evaluations and average of the weights of each level, from the top: all settings "
            "by the Frechet distance of their latents, a short list by its images (sweep.json). What was chosen is in "
            "chosen.json, and is sampled with where sampling.chosen_by is `sweep`."
        ),
        show=_show,
        name="try_settings",  # the job is called sweep
    )
    return [asset]


def _show(context: dg.AssetExecutionContext, x: Experiment, artifact: Artifact) -> dict[str, Any]:
    from nestdiff_core.evaluation.samples import StoredSamples
    from nestdiff_core.evaluation.sweep import level_table, short_table, sweep_plots, verdict

    info = artifact.info
    chosen = info["short_list"][info["chosen"]]
    return {
        "verdict": verdict(info),
        "chosen": dg.MetadataValue.json(chosen["settings"]),
        "short_list": table(short_table(info)),
        "settings": table(level_table(info)),
        **{name: picture(png) for name, png in sweep_plots(info).items()},
        "samples": grid(StoredSamples(artifact.path / chosen["file"]).read(0, SHOWN)),
        **chosen["metrics"],
    }
