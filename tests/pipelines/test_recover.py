"""Dead runs: a killed job is marked as failed, its slot is freed, and the next job runs."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from processes import wait_for

from nestdiff_core.recipes import toy
from pipelines.definitions import build_definitions
from pipelines.recover import PROCESS, is_dead, recover, this_machine, this_process

REPOSITORY = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def execute(job: str, folder: Path, experiment: str, *, asset: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """`dagster job execute`, which does not outlive the block; asset: alone, each step in a process, as the web UI's
    button Materialize does."""
    words = ("asset", "materialize", "--select", asset) if asset else ("job", "execute", "-j", job)
    process = subprocess.Popen(
        [sys.executable, "-m", "dagster", *words, "-m", "pipelines.definitions"],
        cwd=REPOSITORY,
        env={**os.environ, "NESTDIFF_HOME": str(folder / "artifacts"), "NESTDIFF_EXPERIMENT": experiment},
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster.yaml").write_text((REPOSITORY / "pipelines" / "dagster.yaml").read_text())
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with dg.DagsterInstance.get() as instance:
        instance.get_runs()  # the tables are made once, by one process
        yield instance


@pytest.mark.parametrize(
    ("stop", "job", "asset"),
    [
        (signal.SIGINT, "train_level_2", ""),
        (signal.SIGTERM, "train_level_2", ""),
        (signal.SIGTERM, "__ASSET_JOB", "toy/denoiser_level_2"),
    ],
)
def test_a_run_that_waits_for_a_slot_idles_and_can_be_stopped(
    instance: dg.DagsterInstance, tmp_path: Path, stop: signal.Signals, job: str, asset: str
) -> None:
    """Another run has the only one, and keeps it."""
    storage, holder = instance.event_log_storage, taken(instance)
    with execute(job, tmp_path, "toy", asset=asset) as process:
        run_id = waits(instance, job)
        time.sleep(1)  # it has said so, and begins to wait
        before = processor_seconds(process.pid)
        time.sleep(5)
        assert processor_seconds(process.pid) - before < 1
        process.send_signal(stop)
        process.wait(timeout=60)
    assert get_run(instance, run_id).is_finished
    assert storage.get_concurrency_run_ids() == {holder}


def test_a_run_that_dies_while_it_waits_does_not_block_the_next(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    """Its turn would have come first, and the next one is waiting already."""
    storage, holder = instance.event_log_storage, taken(instance)
    with execute("train_level_2", tmp_path, "toy") as first:
        dead = waits(instance, "train_level_2")
        with execute("train_level_1", tmp_path, "toy") as second:
            alive = waits(instance, "train_level_1")
            first.kill()
            first.wait()
            instance.report_run_failed(get_run(instance, holder))
            storage.free_concurrency_slots_for_run(holder)
            assert second.wait(timeout=60) == 1  # it trains, but has nothing to train on
        assert get_run(instance, dead).status is dg.DagsterRunStatus.FAILURE
        assert any("Started execution of step" in event.user_message for event in instance.all_logs(alive))


def taken(instance: dg.DagsterInstance) -> str:
    """The run that has the only slot, and keeps it."""
    holder = instance.add_run(dg.DagsterRun("quickstart", status=dg.DagsterRunStatus.STARTED))
    instance.event_log_storage.set_concurrency_slots("gpu", 1)
    assert instance.event_log_storage.claim_concurrency_slot("gpu", holder.run_id, "step").is_claimed
    return holder.run_id


def waits(instance: dg.DagsterInstance, job: str) -> str:
    """The run of a job, once it waits for a slot."""
    (run,) = wait_for(lambda: instance.get_runs(dg.RunsFilter(job_name=job)), 120, f"a run of {job}")
    wait_for(lambda: any("blocked" in e.user_message for e in instance.all_logs(run.run_id)), 120, f"a wait of {job}")
    return run.run_id


def get_run(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRun:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run


def processor_seconds(pid: int) -> float:
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def test_a_killed_job_does_not_block_the_next(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    """After kill -9 of `dagster job execute` within a pooled step, the sensor ends the run and its slot can be had."""
    experiment = tmp_path / "slow.yaml"
    experiment.write_text("recipe: toy\nencoder.moco.num_steps: 1000000\n")
    storage = instance.event_log_storage
    with execute("build_latents", tmp_path, str(experiment)):
        wait_for(storage.get_concurrency_run_ids, 120, "a step in the pool")
        assert recover(instance) == []  # it lives
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
