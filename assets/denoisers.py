"""One denoiser per level, each trained by torchrun in processes of its own."""

import dagster as dg

from assets.config import POOL, asset_spec, refusals, runtime_config, with_runtime
from assets.report import picture, result
from assets.resources import ArtifactRoot, Launcher
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Ref
from nestdiff_core.files import read_json


def build(experiment: ExperimentConfig, level: int) -> dg.AssetsDefinition:
    ref = Ref("denoiser", level)
    above = ", ".join(f"z_{m}" for m in experiment.levels_above(level))
    spec = asset_spec(
        experiment,
        ref,
        kinds={"pytorch"},
        description=(
            f"The U-ViT that generates z_{level}"
            + (f" given {above}" if above else ", the top of the hierarchy")
            + ": trained on true latents, "
            "exported as the moving average of its weights. Materialise it again to resume a stopped run; a "
            "finished one is only checked."
        ),
    )

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(name=f"denoiser_level_{level}", specs=[spec], pool=POOL)
    def denoiser(
        context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot, launcher: Launcher
    ) -> dg.MaterializeResult:
        from nestdiff_core.evaluation.figures import loss_curve, noise_level_curves
        from nestdiff_core.training.report import MEASURED

        x = artifacts.experiment(with_runtime(experiment, config))
        with refusals():
            for needed in x.inputs(ref):
                x.artifact(needed)
        launcher.train(context, x, level)
        with refusals():
            artifact = x.artifact(ref)
            history = read_json(artifact.path / "history.json")
        timings = {name: history[-1].get(name) for name in MEASURED}
        names = [name for name in ("loss", "held_out_loss", "held_out_loss_without_conditions") if name in history[-1]]
        curve = loss_curve(
            [line["step"] for line in history],
            {name: [line.get(name) for line in history] for name in names},
            title=f"Loss of level {level}",
        )
        quarters = noise_level_curves(history, title=f"Loss of level {level} by noise level")
        pictures = {"losses": picture(curve), "losses_by_noise_level": picture(quarters)}
        return result(artifact, spec.key, **pictures, **timings, **artifact.info)

    return denoiser
