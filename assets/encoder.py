"""The frozen visual encoder."""

from typing import Any

import dagster as dg

from assets.report import picture, table
from assets.stage import stage_asset
from nestdiff_core.artifacts import Artifact
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment


def build(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    moco = experiment.encoder.kind == "moco"
    return stage_asset(
        experiment,
        "encoder",
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
        show=_show,
    )


def _show(context: dg.AssetExecutionContext, x: Experiment, artifact: Artifact) -> dict[str, Any]:
    from nestdiff_core.evaluation.figures import loss_curve

    info, knn = artifact.info, artifact.info["knn"]
    steps, losses = zip(*info["loss"], strict=True) if info["loss"] else ((), ())
    shown: dict[str, Any] = {}
    if info["loss"]:
        shown["loss"] = picture(loss_curve(steps, {"InfoNCE": losses}, title="MoCo v3 pre-training"))
    if knn:
        rows = [{"space": space, "kNN accuracy": knn[space]} for space in ("encoder", "pixels", "untrained")]
        shown |= {"knn": table(rows), "knn_accuracy": knn["encoder"]}
    return shown
