"""Work when there is something new: weights to evaluate, images to encode; and an end to runs that have died."""

import hashlib

import dagster as dg
from dagster._core.definitions.data_version import CODE_VERSION_TAG, DATA_VERSION_TAG
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from assets.config import asset_key
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, Ref
from pipelines.recover import recover

WEIGHTS = "nestdiff/weights"  # tag of a run: the denoisers that it evaluates
ATTEMPTS = 3
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
]


def build_sensors(
    config: ExperimentConfig, evaluate: UnresolvedAssetJobDefinition, encode: UnresolvedAssetJobDefinition
) -> list[dg.SensorDefinition]:
    """evaluate, encode: the jobs that new weights and new images ask for."""
    return [_new_denoiser_evaluation(config, evaluate), _new_images(config, encode), _dead_runs()]


def _dead_runs() -> dg.SensorDefinition:
    @dg.sensor(
        name="dead_runs",
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Marks runs whose process has died as failed and frees their pool slots. On from the start.",
    )
    def dead_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        ended = recover(context.instance)
        return dg.SkipReason(f"Marked as failed: {', '.join(ended)}" if ended else "Every run's process lives")

    return dead_runs


def _new_images(config: ExperimentConfig, encode: UnresolvedAssetJobDefinition) -> dg.SensorDefinition:
    @dg.sensor(
        name="new_images",
        job=encode,
        minimum_interval_seconds=300,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description=(
            "Indexes and encodes when files of the source have come, gone or changed: new image shards become new "
            "partitions, and only these are encoded. Bases and denoisers are not refitted by themselves. Off until "
            "switched on."
        ),
    )
    def new_images(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        from nestdiff_core.images.build import source_listing

        made = Experiment(config).find(Ref("images"))
        if made is None:
            return dg.SkipReason("The images have not been indexed yet")
        listing = source_listing(config.images)
        if listing == made.info["source_listing"]:
            return dg.SkipReason("The source is as it was")
        return dg.RunRequest(run_key=listing)

    return new_images


def _new_denoiser_evaluation(config: ExperimentConfig, evaluate: UnresolvedAssetJobDefinition) -> dg.SensorDefinition:
    x = Experiment(config)
    denoisers = {ref: asset_key(config, ref) for ref in x.refs() if ref.stage == "denoiser"}

    @dg.sensor(
        name="new_denoiser_evaluation",
        job=evaluate,
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description=(
            "Evaluates when a denoiser has new weights, every level has some of this configuration, and nothing is "
            "being trained; a failed evaluation is tried again twice. Off until switched on."
        ),
    )
    def new_denoiser_evaluation(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        versions = []
        for ref, key in denoisers.items():
            event = context.instance.get_latest_materialization_event(key)
            if event is None or event.asset_materialization is None:
                return dg.SkipReason(f"{key.to_user_string()} has not been trained yet")
            tags = event.asset_materialization.tags or {}
            if tags.get(CODE_VERSION_TAG) != x.config_hash(ref):
                return dg.SkipReason(f"{key.to_user_string()} was trained with other settings")
            versions.append(tags.get(DATA_VERSION_TAG, event.run_id))
        running = context.instance.get_runs(dg.RunsFilter(statuses=UNFINISHED))
        if busy := [run.job_name for run in running if run.job_name.startswith(("train_", "quickstart", "search_"))]:
            return dg.SkipReason(f"{busy[0]} is running")
        weights = hashlib.sha256(" ".join(versions).encode()).hexdigest()
        failed = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], tags={WEIGHTS: weights})
        attempt = context.instance.get_runs_count(failed) + 1
        if attempt > ATTEMPTS:
            return dg.SkipReason(f"The evaluation of these weights has failed {ATTEMPTS} times")
        # A run key is used once, so the same set of weights is evaluated once.
        return dg.RunRequest(run_key=f"{weights}-{attempt}", tags={WEIGHTS: weights})

    return new_denoiser_evaluation
