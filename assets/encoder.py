"""The frozen visual encoder."""

import dagster as dg

from assets.config import POOL, asset_spec, log_progress, refusals, runtime_config
from assets.report import picture, result, table
from assets.resources import ArtifactRoot
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Ref


def build(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    moco = experiment.encoder.kind == "moco"
    spec = asset_spec(
        experiment,
        Ref("encoder"),
        kinds={"pytorch", "timm"},
        description=(
            "The frozen encoder whose features the hierarchy is cut from: "
            + (
                "a timm vision transformer pre-trained by MoCo v3 on the training images."
                if moco
                else f"timm's {experiment.encoder.name}."
            )
            + " Its kNN accuracy on held-out labels stands beside that of raw pixels and of the untrained network."
        ),
    )

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(name="encoder", specs=[spec], pool=POOL)
    def encoder(context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot) -> dg.MaterializeResult:
        from nestdiff_core import stages
        from nestdiff_core.devices import choose_device
        from nestdiff_core.evaluation.figures import loss_curve

        with refusals():
            artifact = stages.encoder(
                artifacts.experiment(experiment), device=choose_device(config.device), progress=log_progress(context)
            )
        info, knn = artifact.info, artifact.info["knn"]
        steps, losses = zip(*info["loss"], strict=True) if info["loss"] else ((), ())
        return result(
            artifact,
            spec.key,
            loss=picture(loss_curve(steps, {"InfoNCE": losses}, title="MoCo v3 pre-training"))
            if info["loss"]
            else None,
            knn=table([{"space": space, "kNN accuracy": knn[space]} for space in ("encoder", "pixels", "untrained")])
            if knn
            else None,
            knn_accuracy=knn["encoder"] if knn else None,
        )

    return encoder
