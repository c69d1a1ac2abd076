"""Evaluation when there is something new."""

import hashlib

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from assets.config import asset_key
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Ref


def build_sensors(config: ExperimentConfig, evaluate: UnresolvedAssetJobDefinition) -> list[dg.SensorDefinition]:
    denoisers = [asset_key(config, Ref("denoiser", level)) for level in range(1, config.num_levels + 1)]

    @dg.sensor(
        name="new_denoiser_evaluation",
        job=evaluate,
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Evaluates when a denoiser has a new checkpoint and every level has one. Off until switched on.",
    )
    def new_denoiser_evaluation(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        versions = []
        for key in denoisers:
            event = context.instance.get_latest_materialization_event(key)
            if event is None or event.asset_materialization is None:
                return dg.SkipReason(f"{key.to_user_string()} has not been trained yet")
            versions.append((event.asset_materialization.tags or {}).get("dagster/data_version", event.run_id))
        # A run key is used once, so the same set of weights is evaluated once.
        return dg.RunRequest(run_key=hashlib.sha256(" ".join(versions).encode()).hexdigest())

    return [new_denoiser_evaluation]
