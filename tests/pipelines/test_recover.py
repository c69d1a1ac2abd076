"""Dead runs: a killed job is marked as failed, its slot is freed, and the next job runs."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from nestdiff_core.recipes import toy
from pipelines.definitions import build_definitions
from pipelines.recover import PROCESS, is_dead, recover, this_machine, this_process

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_killed_job_does_not_block_the_next(toy_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After kill -9 of `dagster job execute` within a pooled step, the sensor ends the run and its slot can be had."""
    (tmp_path / "dagster.yaml").write_text((REPOSITORY / "pipelines" / "dagster.yaml").read_text())
    experiment = tmp_path / "slow.yaml"
    experiment.write_text("recipe: toy\nencoder.moco.num_steps: 1000000\n")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    environment = {**os.environ, "NESTDIFF_HOME": str(tmp_path / "artifacts"), "NESTDIFF_EXPERIMENT": str(experiment)}
    with dg.DagsterInstance.get() as instance:
        instance.get_runs()  # the tables are made once, by one process
        job = subprocess.Popen(
            [sys.executable, "-m", "dagster", "job", "execute", "-m", "pipelines.definitions", "-j", "build_latents"],
            cwd=REPOSITORY,
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        storage, end = instance.event_log_storage, time.monotonic() + 120
        while not storage.get_concurrency_run_ids() and time.monotonic() < end:
            time.sleep(0.2)
        assert recover(instance) == []  # it lives
        job.kill()
        job.wait()
        (run,) = instance.get_runs()
        assert run.status is dg.DagsterRunStatus.STARTED
        assert storage.get_concurrency_run_ids() == {run.run_id}
        sensor = build_definitions(toy()).get_repository_def().get_sensor_def("dead_runs")
        assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
        with dg.build_sensor_context(instance=instance) as context:
            skipped = sensor(context)
        assert isinstance(skipped, dg.SkipReason) and run.run_id in str(skipped.skip_message)
        assert instance.get_runs()[0].status is dg.DagsterRunStatus.FAILURE
        assert storage.get_concurrency_run_ids() == set()


@pytest.mark.parametrize(
    ("change", "dead"),
    [
        ({}, False),  # it lives
        ({"process": "1 0"}, True),  # the number is another's now
        ({"process": f"{2**22 + 1} 5"}, True),  # nobody has it
        ({"boot": "another"}, True),  # this machine was started again since
        ({"machine": "another", "process": "1 0"}, False),  # another machine's: it cannot be known from here
        ({"numbers": "another", "process": "1 0"}, False),  # another container's
    ],
)
def test_a_run_is_known_by_machine_number_and_time(change: dict[str, str], dead: bool) -> None:
    """A run is dead where this machine knows that its process has ended, whatever the clock says."""
    machine, boot, numbers = this_machine().split()
    process = this_process().partition(" pid ")[2]
    said = {"machine": machine, "boot": boot, "numbers": numbers, "process": process, **change}
    run = dg.DagsterRun("train_level_1", tags={PROCESS: "{machine} {boot} {numbers} pid {process}".format(**said)})
    assert is_dead(run) is dead


def test_a_run_that_nobody_noted_is_left_alone() -> None:
    """Of another project in the same instance."""
    assert not is_dead(dg.DagsterRun("theirs", status=dg.DagsterRunStatus.STARTED))
