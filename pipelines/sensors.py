"""Work when there is something new: weights to judge, denoisers to evaluate, images to encode; and an end to runs that
have died."""

import hashlib
import json

import dagster as dg
from dagster._core.definitions.data_version import CODE_VERSION_TAG, DATA_VERSION_TAG
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from assets.config import asset_key
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, Ref
from pipelines.jobs import ENCODE
from pipelines.recover import recover

WEIGHTS = "nestdiff/weights"  # tag of a run: the denoisers that it evaluates
SOURCE = "nestdiff/source"  # tag of a run: the images that it encodes
ATTEMPTS = 3
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
]


def build_sensors(
    config: ExperimentConfig,
    *,
    evaluate: UnresolvedAssetJobDefinition,
    encode: UnresolvedAssetJobDefinition,
    watch: UnresolvedAssetJobDefinition,
) -> list[dg.SensorDefinition]:
    """evaluate, encode, watch: the jobs that finished denoisers, new images and new checkpoints ask for."""
    return [
        _new_denoiser_evaluation(config, evaluate),
        _new_images(config, encode),
        _new_checkpoints(config, watch),
        _dead_runs(),
    ]


def _failures(instance: dg.DagsterInstance, tag: str, value: str) -> int:
    return instance.get_runs_count(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], tags={tag: value}))


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
            "Indexes and encodes when files of the source have come, gone or changed, or are indexed and not encoded "
            "yet: new image shards become new partitions, and only these are encoded. Bases and denoisers are not "
            "refitted by themselves. A failed run is tried again twice. Off until switched on."
        ),
    )
    def new_images(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        from nestdiff_core.images.build import source_listing

        x = Experiment(config)
        indexed = x.find(Ref("images"))
        if indexed is None:
            return dg.SkipReason("The images have not been indexed yet")
        listing = source_listing(config.images)
        made = [x.find(ref) for ref in x.refs() if ref.stage in ENCODE]
        encoded = all(a is not None and a.info.get("images", indexed.digest) == indexed.digest for a in made)
        if encoded and listing == indexed.info["source_listing"]:
            return dg.SkipReason("The source is as it was")
        if context.instance.get_runs(dg.RunsFilter(job_name=encode.name, statuses=UNFINISHED), limit=1):
            return dg.SkipReason("Images are being encoded")
        # No run key, which is used once: a source may come back to what it was.
        source = hashlib.sha256(f"{indexed.digest} {listing}".encode()).hexdigest()
        if _failures(context.instance, SOURCE, source) >= ATTEMPTS:
            return dg.SkipReason(f"Encoding these images has failed {ATTEMPTS} times")
        return dg.RunRequest(tags={SOURCE: source})

    return new_images


def _new_checkpoints(config: ExperimentConfig, watch: UnresolvedAssetJobDefinition) -> dg.SensorDefinition:
    @dg.sensor(
        name="new_checkpoints",
        job=watch,
        minimum_interval_seconds=120,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description=(
            "Judges the newest weights of each level when there are new ones, while training goes on: one run at a "
            "time, which takes the newest there are by then. Off until switched on."
        ),
    )
    def new_checkpoints(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        from nestdiff_core.newest import newest_weights

        found = [newest_weights(Experiment(config), level.level) for level in config.levels]
        weights = {str(w.level): [w.step, w.denoiser, w.digest] for w in found if w is not None}
        if not weights:
            return dg.SkipReason("No level has any weights yet")
        steps = ", ".join(f"level {level} at step {step}" for level, (step, *_) in weights.items())
        newest = json.dumps(weights, sort_keys=True)
        if context.cursor == newest:
            return dg.SkipReason(f"Nothing is newer than {steps}")
        if context.instance.get_runs(dg.RunsFilter(job_name=watch.name, statuses=UNFINISHED), limit=1):
            return dg.SkipReason("The numbers of earlier weights are still being made")
        context.update_cursor(newest)
        return dg.RunRequest(run_key=hashlib.sha256(newest.encode()).hexdigest())

    return new_checkpoints


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
        attempt = _failures(context.instance, WEIGHTS, weights) + 1
        if attempt > ATTEMPTS:
            return dg.SkipReason(f"The evaluation of these weights has failed {ATTEMPTS} times")
        # A run key is used once, so the same set of weights is evaluated once.
        return dg.RunRequest(run_key=f"{weights}-{attempt}", tags={WEIGHTS: weights})

    return new_denoiser_evaluation
