"""What people look at: pictures of what each level decides, and the report of the whole experiment."""

from typing import Any

import dagster as dg

from assets.config import asset_key, asset_spec, log_progress, refusals
from assets.report import picture, result
from assets.resources import ArtifactRoot
from assets.stage import stage_asset
from nestdiff_core.artifacts import Artifact
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, Ref

READ = ("denoiser", "samples", "evaluation", "ladder", "neighbours", "pictures", "watch")  # what a report is made after


def build_pictures(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    return stage_asset(
        experiment,
        "pictures",
        kinds={"pytorch"},
        description=(
            "What each level decides: samples that share the latents from some level up, with the levels below "
            "generated anew, and walks from one real image to another at each level."
        ),
        show=_show_pictures,
    )


def _show_pictures(context: dg.AssetExecutionContext, x: Experiment, artifact: Artifact) -> dict[str, Any]:
    files = [figure["file"] for figure in artifact.info["figures"]]
    return {file.rpartition(".")[0]: picture((artifact.path / file).read_bytes()) for file in files}


def build_report(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    x = Experiment(experiment)
    spec = asset_spec(
        experiment,
        Ref("report"),
        kinds={"html"},
        description=(
            "One HTML page of the whole experiment, to keep and to send: samples, levels, what each decides and costs, "
            "numbers with their cards, losses, spectra. Opens from disk, loads nothing. Made of what there is, and "
            "again when any of that has changed."
        ),
    )
    shown = [ref for ref in (*x.refs(), Ref("watch")) if ref.stage in READ]
    spec = spec.replace_attributes(deps=[asset_key(experiment, ref) for ref in shown])

    @dg.multi_asset(name="report", specs=[spec])
    def report(context: dg.AssetExecutionContext, artifacts: ArtifactRoot) -> dg.MaterializeResult:
        from nestdiff_core import stages
        from nestdiff_core.stages.report import PAGE

        with refusals():
            artifact = stages.report(artifacts.experiment(experiment), progress=log_progress(context))
        missing = [name for name, digest in artifact.info["parts"].items() if digest is None]
        return result(
            artifact,
            spec.key,
            page=dg.MetadataValue.path(str(artifact.path / PAGE)),
            megabytes=artifact.info["bytes"] / 1e6,
            not_made_yet=", ".join(missing) or None,
        )

    return report
