"""Numbers of the newest weights, over time."""

from collections.abc import Iterator
from datetime import timedelta

import dagster as dg

from assets.config import asset_key, asset_spec, log_progress, refusals, runtime_config
from assets.report import picture, result, table
from assets.resources import ArtifactRoot
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, Ref

# Of a nightly evaluation: a missed night is a warning, two are a failure. Unknown until there are numbers at all.
FRESHNESS = dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=50), warn_window=timedelta(hours=26))


def build(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    x = Experiment(experiment)
    ref, denoisers = Ref("watch"), [r for r in x.refs() if r.stage == "denoiser"]
    spec = asset_spec(
        experiment,
        ref,
        kinds={"pytorch", "scikitlearn"},
        description=(
            "Numbers of the newest weights of each level, finished or still in training: the Frechet distance of its "
            "latents at fixed seeds, given true latents above (fd_z_1, ...), with bootstrap errors, and of the whole "
            "cascade's images once every level has weights. Plots shows them over time. Training is only read from."
        ),
    )
    # The denoisers are read, whatever state they are in: shown in the graph, but no input that must be finished.
    deps = [*spec.deps, *(dg.AssetDep(asset_key(experiment, r)) for r in denoisers)]
    spec = spec.replace_attributes(deps=deps, freshness_policy=FRESHNESS, skippable=True)

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    # In no pool: with one GPU it would wait for the training that it is to look at.
    @dg.multi_asset(name="watch_newest", specs=[spec])  # `watch` is the job
    def watch(
        context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot
    ) -> Iterator[dg.MaterializeResult]:
        from nestdiff_core import stages
        from nestdiff_core.devices import choose_device
        from nestdiff_core.evaluation.figures import history_plot
        from nestdiff_core.stages.watch import IMAGES, from_the_top, history

        x = artifacts.experiment(experiment)
        with refusals():
            artifact = stages.watch(x, device=choose_device(config.device), progress=log_progress(context))
        if artifact is None:
            context.log.info("No level has any weights yet.")
            return
        for level in artifact.info["missing"]:
            context.log.info(f"Level {level} is left out: it has no weights yet.")
        newest, numbers = {what: artifact.info["newest"][what] for what in from_the_top(artifact.info["newest"])}, {}
        for what, record in newest.items():
            name = record["name"] if what == IMAGES else f"fd_z_{what}"
            numbers |= {name: record["fd"], f"{name}_error": record["error"]}
            if what != IMAGES:
                numbers[f"step_level_{what}"] = record["step"]
        levels = [what for what in newest if what != IMAGES]
        plot = history_plot(
            {int(what): [(r["step"], r["fd"], r["error"]) for r in history(x, what)] for what in levels},
            {int(what): newest[what]["floor"] for what in levels},
            title="Latents of each level, given true ones above",
            ylabel="Frechet distance",
        )
        yield result(
            artifact,
            spec.key,
            distances=picture(plot),
            newest=table(
                [
                    {
                        "what": f"z_{what}" if what != IMAGES else f"images ({record['name']})",
                        "step": record["step"] if what != IMAGES else "-",
                        "distance": record["fd"],
                        "± bootstrap error": record["error"],
                        "held out": record["floor"],
                        "images": record["num_images"],
                    }
                    for what, record in newest.items()
                ]
            ),
            **numbers,
        )

    return watch
