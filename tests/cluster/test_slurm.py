"""Training through the Slurm launcher, from Dagster, on a real slurmctld and two slurmd."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import dagster as dg
import pytest
from clusters import Command, Level, Slurm
from processes import wait_for

from pipelines.definitions import build_definitions

RUNTIME = {"device": "cpu", "launcher": "slurm", "hosts": 2, "slurm_options": "--partition=p --mem=100"}
ENDLESS = {"levels.2.train": {"num_steps": 10**6, "checkpoint_every": 50}}


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assets.resources.POLL_SECONDS", 0.5)


def materialise(level: Level, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    job = build_definitions(level.x.config).resolve_job_def("train_level_2")
    return job.execute_in_process(instance=instance, raise_on_error=False)


@pytest.fixture
def dagster_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "dagster"
    home.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with dg.DagsterInstance.get() as instance:
        instance.get_runs()  # its tables are made once, by one process
    return home


def run(level: Level) -> Command:
    """`dagster job execute` in a process of its own."""
    words = ("dagster", "job", "execute", "-m", "pipelines.definitions", "-j", "train_level_2")
    return Command([sys.executable, "-m", *words], level.root, NESTDIFF_EXPERIMENT=str(level.file))


def test_two_nodes_train_to_the_bits_of_two_processes(
    level: Level, undisturbed: Level, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Dagster, with what the trainer reports in the run's log."""
    level.settings = {"runtime": RUNTIME}
    monkeypatch.setenv("NESTDIFF_HOME", str(level.root))
    with dg.DagsterInstance.ephemeral() as instance:
        assert materialise(level, instance).success
        said = [entry.user_message for entry in instance.all_logs(instance.get_runs()[0].run_id)]
    assert any("level 2: 400 of 400" in line for line in said)
    assert level.digest() == undisturbed.digest()


def test_a_job_outlives_its_run_is_found_again_and_is_stopped_with_grace(
    level: Level, slurm: Slurm, dagster_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second launch is refused while the first watches. After kill -9 of the run its job goes on, and the next
    run attaches to it; a killed worker comes back; stopping that run saves and ends its job; another resumes."""
    level.settings = {"runtime": RUNTIME, **ENDLESS}
    first = run(level)
    wait_for(level.steps, 120, "a first checkpoint")
    (job,) = slurm.jobs()
    monkeypatch.setenv("NESTDIFF_HOME", str(level.root))
    with dg.DagsterInstance.ephemeral() as instance:
        result = materialise(level, instance)
        assert not result.success
        (failed,) = (event for event in result.all_events if event.is_step_failure)
        assert "Another process is writing here" in str(failed.step_failure_data.user_failure_data.description)
    first.process.kill()
    first.process.wait()
    assert slurm.jobs() == {job: "RUNNING"}

    second = run(level)
    wait_for(lambda: f"Slurm job {job} is doing this already" in second.said, 60, "a run that found the job")
    os.kill(level.workers()[1], signal.SIGKILL)
    known = level.steps()[-1] + 50  # it may have been begun
    wait_for(lambda: level.steps()[-1] > known, 60, "a checkpoint after a worker was killed")
    assert slurm.jobs() == {job: "RUNNING"}
    second.process.send_signal(signal.SIGTERM)
    second.process.wait(timeout=90)
    assert not slurm.jobs()
    assert not level.workers()
    log = next((level.root / "slurm").glob("*/log.txt"))
    saved = level.steps()[-1]
    assert f"Stopped by a signal after step {saved}" in log.read_text()

    third = run(level)
    wait_for(lambda: level.steps()[-1] > saved, 120, "a checkpoint after the stop")
    third.process.send_signal(signal.SIGTERM)
    third.process.wait(timeout=90)
    assert not slurm.jobs()


def test_what_slurm_or_training_refuses_is_the_failure(
    level: Level, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure is the sentence, and no job stays."""
    monkeypatch.setenv("NESTDIFF_HOME", str(level.root))
    settings = {
        "Slurm does not take the job": {"runtime": {**RUNTIME, "slurm_options": "--partition=none"}},
        "runtime.slurm_options cannot be used": {"runtime": {**RUNTIME, "slurm_options": "--nodes=3"}},
        "The batch cannot be shared evenly": {"runtime": RUNTIME, "levels.2.train": {"batch_size": 15}},
    }
    for sentence, level.settings in settings.items():
        with dg.DagsterInstance.ephemeral() as instance:
            result = materialise(level, instance)
        assert not result.success
        (failed,) = (event for event in result.all_events if event.is_step_failure)
        assert sentence in str(failed.step_failure_data.user_failure_data.description)
        assert not slurm.jobs()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", ["node", "time"])
def test_slurm_starts_again_what_it_has_ended(level: Level, slurm: Slurm, dagster_home: Path, fault: str) -> None:
    """A node that is lost and comes back, and a time limit: the run keeps watching, and training goes on."""
    limit = " --time=3" if fault == "time" else ""
    level.settings = {"runtime": {**RUNTIME, "slurm_options": RUNTIME["slurm_options"] + limit}, **ENDLESS}
    watching = run(level)
    wait_for(level.steps, 120, "a first checkpoint")
    if fault == "node":
        slurm.lose("n2")
        wait_for(lambda: "PENDING" in slurm.jobs().values(), 120, "a job that was put back")
        known = level.steps()[-1]
        slurm.bring_back("n2")
    else:
        wait_for(lambda: "It goes on as another" in watching.said, 240, "the end of the time limit")
        known = level.steps()[-1]
        assert "SIGKILL" not in watching.said
    wait_for(lambda: level.steps()[-1] > known, 240, "a checkpoint of the job that was started again")
    assert watching.process.poll() is None
    watching.process.send_signal(signal.SIGTERM)
    watching.process.wait(timeout=90)
    assert not slurm.jobs()
