"""Dead runs: a killed job is marked as failed, its slot is freed, and the next job runs."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from pipelines.recover import is_alive, recover

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_killed_job_does_not_block_the_next(toy_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After kill -9 of `dagster job execute` within a pooled step, recover() ends the run and its slot can be had."""
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
        assert recover(instance) == [run.run_id]
        assert instance.get_runs()[0].status is dg.DagsterRunStatus.FAILURE
        assert storage.get_concurrency_run_ids() == set()


def test_a_process_is_known_by_its_number_and_its_time() -> None:
    """Whatever a program is called it lives until it ends; one that began later only has the number of the dead one."""
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        assert is_alive(sleeper.pid, time.time())
        assert not is_alive(sleeper.pid, time.time() - 1000)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert not is_alive(sleeper.pid, time.time())
