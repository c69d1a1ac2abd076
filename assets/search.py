"""The search for one level's condition noise: an asset for each candidate, and the table that compares them."""

import dagster as dg

from assets.config import POOL, asset_key, elsewhere, log_progress, refusals, runtime_config, with_runtime
from assets.report import SHOWN, grid, result, table
from assets.resources import ArtifactRoot, Launcher
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.search import candidate, levels_to_train, search_table

GROUP = "sigma_search"


def search_keys(experiment: ExperimentConfig) -> list[dg.AssetKey]:
    """The candidates, such as `digits/sigma_search/level_2_sigma_0_5`, and the table `digits/sigma_search/level_2`."""
    if not experiment.search.level:
        return []
    return [*(_key(experiment, sigma) for sigma in experiment.search.sigmas), _key(experiment)]


def needed_denoisers(experiment: ExperimentConfig) -> list[dg.AssetKey]:
    """Denoisers that all candidates share."""
    own = levels_to_train(experiment)
    shared = (level.level for level in experiment.levels if level.level not in own)
    return [asset_key(experiment, Ref("denoiser", level)) for level in shared]


def build(experiment: ExperimentConfig) -> list[dg.AssetsDefinition]:
    """Nothing, unless `search.level` names a level."""
    if not experiment.search.level:
        return []
    return [*(_candidate(experiment, sigma) for sigma in experiment.search.sigmas), _table(experiment)]


def _key(experiment: ExperimentConfig, sigma: float | None = None) -> dg.AssetKey:
    tried = "" if sigma is None else f"_sigma_{sigma:g}".replace(".", "_").replace("-", "_")
    return dg.AssetKey([experiment.name, GROUP, f"level_{experiment.search.level}{tried}"])


def _candidate(experiment: ExperimentConfig, sigma: float) -> dg.AssetsDefinition:
    variant, key = candidate(experiment, sigma), _key(experiment, sigma)
    spec = dg.AssetSpec(
        key,
        deps=[
            *(asset_key(experiment, Ref("latents", level.level)) for level in experiment.levels),
            *needed_denoisers(experiment),
        ],
        description=(
            f"The experiment with sigma_{experiment.search.level} = {sigma:g}: the denoisers that read this level "
            "trained with it, then sampled and evaluated. Everything else is shared."
        ),
        group_name=GROUP,
        code_version=Experiment(variant).config_hash(Ref("evaluation")),
        kinds={"pytorch"},
    )

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(name=key.path[-1], specs=[spec], pool=POOL)
    def train_and_evaluate(
        context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot, launcher: Launcher
    ) -> dg.MaterializeResult:
        from nestdiff_core import stages
        from nestdiff_core.devices import choose_device
        from nestdiff_core.evaluation.samples import StoredSamples

        x = artifacts.experiment(with_runtime(variant, config))
        for level in reversed(variant.levels):
            if x.find(Ref("denoiser", level.level)) is None:
                launcher.train(context, x, level.level)
        if elsewhere(x.config.runtime):
            launcher.sample(context, x)
        with refusals():
            device, progress = choose_device(config.device), log_progress(context)
            stages.reference(x, device=device, progress=progress)
            if variant.sampling.chosen_by == "sweep":
                stages.sweep(x, device=device, progress=progress)
            samples = stages.samples(x, device=device, progress=progress)
            evaluation = stages.evaluation(x, device=device, progress=progress)
            pictures = grid(StoredSamples(samples.path / "samples.npz").read(0, SHOWN))
        numbers = {name: n["value"] for name, n in evaluation.info["metrics"].items()}
        return result(evaluation, key, samples=pictures, **numbers)

    return train_and_evaluate


def _table(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    search = experiment.search
    spec = dg.AssetSpec(
        _key(experiment),
        deps=[_key(experiment, sigma) for sigma in search.sigmas],
        description=f"The candidates for sigma_{search.level} side by side; the least {search.metric} is marked.",
        group_name=GROUP,
        code_version=",".join(
            Experiment(candidate(experiment, sigma)).config_hash(Ref("evaluation")) for sigma in search.sigmas
        ),
        kinds={"table"},
    )

    @dg.multi_asset(name=spec.key.path[-1], specs=[spec])
    def compare(context: dg.AssetExecutionContext, artifacts: ArtifactRoot) -> dg.MaterializeResult:
        with refusals():
            rows = search_table(artifacts.experiment(experiment))
        best = next((row["sigma"] for row in rows if row["best"]), None)
        return dg.MaterializeResult(asset_key=spec.key, metadata={"candidates": table(rows), "best_sigma": best})

    return compare
