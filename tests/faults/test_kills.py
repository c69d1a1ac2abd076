"""kill -9 at any moment: the same command then finishes, to the same bytes, and redoes nothing that was committed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import (
    KILLED,
    REPOSITORY,
    STAGES,
    TORN,
    Child,
    Forks,
    Pipeline,
    assert_recovered,
    committed,
    make_first,
    write_pipeline,
)
from processes import wait_for

KILLS = int(os.environ.get("NESTDIFF_STORM_KILLS", "50"))  # of each stage
SOME = range(20, 380, 60)  # of some 350 changes that the run makes to the disk
ARTIFACT = {"features": "features", "bases": "moments", "latents": "latents"}  # what a stage writes first


def killed_then_finished(pipeline: Pipeline, undisturbed: Pipeline, **fault: int) -> int:
    """How the run ended that the fault befell, after a second one has made good for it."""
    ended = pipeline.run(**fault).code
    kept = committed(pipeline.home)
    again = pipeline.run()
    assert again.code == 0, again.said
    assert_recovered(pipeline, undisturbed, kept)
    return ended


@pytest.mark.parametrize("change", SOME)
def test_a_kill_before_some_changes_of_the_disk(pipeline: Pipeline, undisturbed: Pipeline, change: int) -> None:
    """Images to latents, killed between two changes of the disk: files opened, flushed, renamed, removed, folders."""
    assert killed_then_finished(pipeline, undisturbed, kill_at=change) in (KILLED, 0)


@pytest.mark.slow
def test_a_kill_before_every_change_of_the_disk(undisturbed: Pipeline, tmp_path: Path) -> None:
    """All of them, from the first to the one behind the last."""
    change, ended = 0, KILLED
    while ended == KILLED:
        change += 1
        home = tmp_path / str(change)
        ended = killed_then_finished(undisturbed.at(home), undisturbed, kill_at=change)
        shutil.rmtree(home)
    print(f"{change - 1} kills")
    assert ended == 0 and change > SOME[-2]


@pytest.mark.parametrize("size", [200, 4000])
def test_a_kill_within_a_write(pipeline: Pipeline, undisturbed: Pipeline, size: int) -> None:
    """Killed in the middle of the first file that is longer than `size` bytes, which stays behind torn."""
    assert killed_then_finished(pipeline, undisturbed, torn_at=size) == TORN


@pytest.mark.slow
def test_a_kill_within_every_file(undisturbed: Pipeline, tmp_path: Path) -> None:
    """The same for every size that a file of the run has, one byte less."""
    sizes = {file.stat().st_size for file in undisturbed.home.rglob("*") if file.is_file()}
    for size in sorted(sizes):
        ended = killed_then_finished(undisturbed.at(tmp_path / str(size)), undisturbed, torn_at=size - 1)
        assert ended == TORN


def test_killed_again_and_again(pipeline: Pipeline, undisturbed: Pipeline) -> None:
    """A run that lives only for 60 changes of the disk at a time gets there all the same."""
    ended, runs = KILLED, 0
    while ended == KILLED:
        kept, runs = committed(pipeline.home), runs + 1
        ended = pipeline.run(kill_at=60).code
        assert runs < 20
    assert ended == 0
    assert_recovered(pipeline, undisturbed, kept)


# --- at random times ----------------------------------------------------------------------------------------------


def at_work(pipeline: Pipeline, stage: str) -> Child:
    """A run of a stage that has begun to write (or has ended: all was there)."""

    def locks() -> list[int]:
        return [path.stat().st_mtime_ns for path in pipeline.home.glob(f"{ARTIFACT[stage]}/*/.lock")]

    before, child = locks(), pipeline.start(stage)
    wait_for(lambda: locks() != before or not alive(child.pid))
    return child


def kill_at_random(pipeline: Pipeline, stage: str, seconds: float, rng: random.Random) -> bool:
    """Run a stage and kill it within `seconds` after it began to write; whether it was still running."""
    child = at_work(pipeline, stage)
    time.sleep(rng.uniform(0, seconds))
    child.kill()
    outcome = child.wait()
    assert outcome.code in (KILLED, 0), outcome.said
    return outcome.code == KILLED


def alive(pid: int) -> bool:
    """Whether a process runs that nobody has waited for."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("stage", ["features", "bases", "latents"])
def test_a_kill_at_a_random_time(pipeline: Pipeline, undisturbed: Pipeline, stage: str) -> None:
    """One kill of the stage while it writes, then the same command."""
    make_first(pipeline, undisturbed, stage)
    kill_at_random(pipeline, stage, 0.15, random.Random(stage))
    kept = committed(pipeline.home)
    assert pipeline.run(stage).code == 0
    assert pipeline.run().code == 0
    assert_recovered(pipeline, undisturbed, kept)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["features", "bases", "latents"])
def test_a_storm_of_kills(forks: Forks, tmp_path: Path, stage: str) -> None:
    """Fifty kills of a stage with 40 shards; every time it has got to its end it starts from nothing."""
    undisturbed = write_pipeline(forks, tmp_path, num_images=320)
    assert undisturbed.run().code == 0
    timed = undisturbed.at(tmp_path / "timed")
    make_first(timed, undisturbed, stage)
    child, started = at_work(timed, stage), time.monotonic()
    assert child.wait().code == 0
    seconds, rng, kills, rounds = time.monotonic() - started, random.Random(stage), 0, 0
    while kills < KILLS:
        pipeline = undisturbed.at(tmp_path / f"round_{rounds}")
        make_first(pipeline, undisturbed, stage)
        kept = {}
        while kill_at_random(pipeline, stage, seconds, rng):
            now = committed(pipeline.home)
            assert [file for file, inode in kept.items() if now.get(file) != inode] == []
            kept, kills = now, kills + 1
        assert pipeline.run().code == 0
        assert_recovered(pipeline, undisturbed, kept)
        shutil.rmtree(pipeline.home)
        rounds += 1
    print(f"{kills} kills in {rounds} rounds")


def test_the_command_line_killed(pipeline: Pipeline, undisturbed: Pipeline) -> None:
    """`python -m nestdiff_core run` itself, with its process group, once the first shard of features is committed."""
    command = [sys.executable, "-m", "nestdiff_core", "run", str(pipeline.experiment)]
    command += [word for stage in STAGES for word in ("--stage", stage)]
    environment = {**os.environ, "NESTDIFF_HOME": str(pipeline.home)}
    run = subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    wait_for(lambda: any(pipeline.home.glob("features/*/_parts/00000.json")))
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    kept = committed(pipeline.home)
    assert kept
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert_recovered(pipeline, undisturbed, kept)
