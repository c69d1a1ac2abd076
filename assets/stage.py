"""An asset that is one stage, made in one call and shown by its metadata."""

from collections.abc import Callable
from typing import Any

import dagster as dg

from assets.config import POOL, asset_spec, elsewhere, log_progress, refusals, runtime_config, with_runtime
from assets.report import result
from assets.resources import ArtifactRoot, Launcher
from nestdiff_core.artifacts import Artifact
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, Ref


def stage_asset(
    experiment: ExperimentConfig,
    stage: str,
    *,
    description: str,
    kinds: set[str],
    show: Callable[[dg.AssetExecutionContext, Experiment, Artifact], dict[str, Any]],
    name: str | None = None,
    shared: bool = False,
) -> dg.AssetsDefinition:
    """The asset of the stage that `nestdiff_core.stages` makes under this name.

    show: the metadata of what was made. name: of its step, where a job bears the stage's. shared: whether several
    processes make it, where there are (`runtime.processes`, `runtime.launcher`).
    """
    spec = asset_spec(experiment, Ref(stage), kinds=kinds, description=description)

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(name=name or stage, specs=[spec], pool=POOL)
    def made(
        context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot, launcher: Launcher
    ) -> dg.MaterializeResult:
        from nestdiff_core import stages
        from nestdiff_core.devices import choose_device

        x = artifacts.experiment(with_runtime(experiment, config))
        if shared and elsewhere(x.config.runtime):
            launcher.sample(context, x, stage)
        with refusals():  # what the launcher's processes made is only checked
            device = choose_device(config.device)
            artifact = getattr(stages, stage)(x, device=device, progress=log_progress(context))
            metadata = show(context, x, artifact)
        return result(artifact, spec.key, **metadata)

    return made
