"""The newest weights under Dagster: the job, its check, its sensor, its schedule and how fresh its numbers are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.freshness import TimeWindowFreshnessPolicy

from nestdiff_core import stages
from nestdiff_core.config import WatchConfig
from nestdiff_core.experiment import Experiment
from nestdiff_core.recipes import toy
from pipelines.definitions import build_definitions

DATA = ("images", "encoder", "features", "moments", "svd_basis", "latents")
WATCH, REPORT = dg.AssetKey(["toy", "watch"]), dg.AssetKey(["toy", "report"])


@pytest.fixture
def x(toy_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """The toy with latents, whose level 2 may be trained for a while."""
    for stage in DATA:
        shutil.copytree(toy_run.root / stage, tmp_path / stage)
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path))
    train = replace(toy().level(2).train, num_steps=400, lr=3e-3, ema_decay=0.9, checkpoint_every=50)
    levels = (toy().level(1), replace(toy().level(2), train=train))
    return Experiment(replace(toy(), levels=levels, watch=WatchConfig(num_images=20, resamples=50)), tmp_path)


def test_the_check_turns_red_for_shuffled_weights_and_stays_green_otherwise(
    x: Experiment, shuffle_newest: Callable[[Experiment, int], None]
) -> None:
    """Nothing to judge; a level in training; the same weights again; trained on; then its weights in disorder."""
    job = build_definitions(x.config).resolve_job_def("watch")
    with dg.DagsterInstance.ephemeral() as instance:

        def run() -> dict[str, bool]:
            done = job.execute_in_process(instance=instance)
            assert done.success
            return {e.check_name: e.passed for e in done.get_asset_check_evaluations()}

        assert run() == {} and instance.get_latest_materialization_event(WATCH) is None
        stages.train(x, 2, until_step=150)
        green = {"level_1_no_worse": True, "level_2_no_worse": True, "images_no_worse": True}
        assert run() == green
        first = numbers(instance)
        assert first["step_level_2"] == 150 and first["fd_z_2"] > 0 and first["fd_z_2_error"] > 0
        assert "fd_z_1" not in first and instance.get_latest_materialization_event(REPORT) is not None
        assert run() == green and numbers(instance) == first
        stages.train(x, 2, until_step=399)
        assert run() == green and numbers(instance)["fd_z_2"] < first["fd_z_2"]
        shuffle_newest(x, 2)
        assert run() == {**green, "level_2_no_worse": False}
        assert run()["level_2_no_worse"] is False  # until it is better again
        evaluated = instance.event_log_storage.get_asset_check_execution_history(
            dg.AssetCheckKey(WATCH, "level_2_no_worse"), limit=1
        )
        evaluation = evaluated[0].event.dagster_event.asset_check_evaluation_data  # pyright: ignore[reportOptionalMemberAccess]
        assert evaluation.severity is dg.AssetCheckSeverity.ERROR and not evaluation.blocking
        assert len(instance.fetch_materializations(WATCH, limit=9).records) == 5  # points of the plot


def numbers(instance: dg.DagsterInstance) -> dict[str, Any]:
    event = instance.get_latest_materialization_event(WATCH)
    assert event is not None and event.asset_materialization is not None
    return {
        name: value.value
        for name, value in event.asset_materialization.metadata.items()
        if isinstance(value, (dg.FloatMetadataValue, dg.IntMetadataValue))
    }


def test_the_sensor_asks_for_new_weights_once_and_one_run_at_a_time(x: Experiment) -> None:
    """It waits for weights, asks, is quiet until there are newer ones, and does not ask while a run is queued."""
    sensor = build_definitions(x.config).get_repository_def().get_sensor_def("new_checkpoints")
    assert sensor.default_status is dg.DefaultSensorStatus.STOPPED

    with dg.DagsterInstance.ephemeral() as instance, dg.build_sensor_context(instance=instance) as context:
        waits = sensor(context)
        assert isinstance(waits, dg.SkipReason) and "any weights" in str(waits.skip_message)
        stages.train(x, 2, until_step=10)
        asks = sensor(context)
        assert isinstance(asks, dg.RunRequest)
        quiet = sensor(context)
        assert isinstance(quiet, dg.SkipReason) and "level 2 at step 10" in str(quiet.skip_message)
        run = instance.add_run(dg.DagsterRun("watch", status=dg.DagsterRunStatus.NOT_STARTED))
        stages.train(x, 2, until_step=20)
        assert isinstance(sensor(context), dg.SkipReason)
        stages.train(x, 1, until_step=10)
        instance.report_run_canceled(run)
        again = sensor(context)  # one run for both
        assert isinstance(again, dg.RunRequest) and again.run_key != asks.run_key
        assert isinstance(sensor(context), dg.SkipReason)


def test_a_night_without_numbers_is_seen_and_training_is_not_waited_for() -> None:
    """The schedule runs the job; a freshness policy of days; no step is in a pool, since training holds the only slot
    of its own."""
    definitions = build_definitions(toy())
    repository = definitions.get_repository_def()
    assert repository.get_schedule_def("nightly_evaluation").job_name == "watch"
    policy = definitions.resolve_asset_graph().get(WATCH).freshness_policy
    assert isinstance(policy, TimeWindowFreshnessPolicy)
    assert policy.fail_window.to_timedelta() == timedelta(hours=50)
    pools = {step.name: getattr(step, "pool", None) for step in definitions.resolve_job_def("watch").all_node_defs}
    assert {"watch_newest", "report"} <= pools.keys() and set(pools.values()) == {None}
    assert definitions.resolve_assets_def(dg.AssetKey(["toy", "denoiser_level_1"])).op.pool == "gpu"
