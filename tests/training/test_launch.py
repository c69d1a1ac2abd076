"""A training job as processes: stops well, resumes to the bit, leaves no orphan, and keeps a second one out."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import listening, parent, wait_for

from nestdiff_core.cli.digest import experiment_digests
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import load_experiment
from nestdiff_core.training import launch

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 300


@pytest.fixture
def long_run(toy_run: Any, tmp_path: Path) -> Experiment:
    """The toy experiment with a longer training of level 2, its latents made and nothing trained."""
    for stage in ("images", "encoder", "features", "moments", "svd_basis", "latents"):
        shutil.copytree(toy_run.root / stage, tmp_path / stage)
    return with_steps(tmp_path, STEPS)


def with_steps(root: Path, num_steps: int, optimizer: str = "adamw") -> Experiment:
    path = root / "long.yaml"
    path.write_text(
        "recipe: toy\n"
        f"levels.2.train: {{num_steps: {num_steps}, checkpoint_every: 50, log_every: 50, keep_last: 100, "
        f"optimizer: {optimizer}}}\n"
    )
    return Experiment(load_experiment(path), root)


def start(experiment: Experiment, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nestdiff_core", "train", str(experiment.root / "long.yaml"), "--level=2", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "NESTDIFF_HOME": str(experiment.root)},
        stderr=subprocess.PIPE,
        text=True,
    )


def checkpoints(experiment: Experiment) -> list[str]:
    return sorted(p.name for p in (experiment.path(Ref("denoiser", 2)) / "checkpoints").glob("step_*"))


def our_processes(experiment: Experiment) -> list[int]:
    """Live processes whose command line names this experiment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and str(experiment.root).encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def denoiser_digests(experiment: Experiment) -> dict[str, str | None]:
    return {
        name: value for name, value in experiment_digests(experiment).items() if name.startswith("denoiser_level_2")
    }


def test_stops_and_kills_do_not_change_the_result(
    long_run: Experiment, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """SIGTERM (exit 75), then kill -9 of the parent, then the rest: the same bits as one run, and no process left."""
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(long_run.root, whole, dirs_exist_ok=True)
    reference = Experiment(long_run.config, whole)
    assert start(reference).wait(timeout=120) == 0

    first = start(long_run)
    wait_for(lambda: checkpoints(long_run), 60, "a first checkpoint")
    first.send_signal(signal.SIGTERM)
    errors = first.communicate(timeout=30)[1]
    assert first.returncode == 75
    assert json.loads(errors.splitlines()[-1])["code"] == 75
    stopped_at = checkpoints(long_run)[-1]
    assert not our_processes(long_run)

    second = start(long_run)
    wait_for(lambda: checkpoints(long_run)[-1] > stopped_at, 60, "another checkpoint")
    second.kill()
    second.wait()
    wait_for(lambda: not our_processes(long_run), 20, "the end of every process after kill -9 of the parent")

    assert start(long_run).wait(timeout=120) == 0
    assert denoiser_digests(long_run) == denoiser_digests(reference)
    assert None not in denoiser_digests(long_run).values()


def test_nobody_else_is_listened_to(long_run: Experiment) -> None:
    """Two processes of one machine, and torchrun above them, accept connections from this machine only."""
    endless = with_steps(long_run.root, 1_000_000)
    both = start(endless, "--processes=2")
    try:
        wait_for(lambda: checkpoints(endless), 60, "a first checkpoint")
        addresses = listening(our_processes(endless))
        assert addresses and {address.split(":")[0] for address in addresses} == {"0100007F"}
    finally:
        both.send_signal(signal.SIGTERM)
        both.communicate(timeout=30)
    assert both.returncode == 75


def test_a_second_launch_is_refused_while_the_first_lives(long_run: Experiment) -> None:
    """Two trainings of one level cannot share its directory: the second says who holds it, with exit code 5."""
    endless = with_steps(long_run.root, 1_000_000)
    first = start(endless)
    try:
        wait_for(lambda: checkpoints(endless), 60, "a first checkpoint")
        second = start(endless)
        errors = second.communicate(timeout=60)[1]
        assert second.returncode == 5
        assert "locked by pid" in json.loads(errors.splitlines()[-1])["found"]
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=30)
    assert first.returncode == 75


def test_a_refusal_of_any_process_is_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What befalls the second of two alone is left for the parent to say, and the first, stopped by torchrun because of
    it, does not take it for a stop."""
    from nestdiff_core import devices, stages
    from nestdiff_core.cli import main
    from nestdiff_core.errors import IntegrityError, Interrupted

    def fail(*_: object, **__: object) -> None:
        if os.environ["RANK"] == "1":
            raise IntegrityError("Shard 3 is cut", fix="Make it again.")
        raise Interrupted("Stopped by a signal", fix="Run the same command again.")

    monkeypatch.setattr(stages, "train", fail)
    monkeypatch.setattr(devices, "process_group", lambda device, **_: contextlib.nullcontext(0))
    for name, value in {"EXIT_FILE": tmp_path / "exit.json", "HOME": tmp_path}.items():
        monkeypatch.setenv(f"NESTDIFF_{name}", str(value))
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["train", "toy", "--level=1", "--device=cpu"])
    monkeypatch.setenv("RANK", "0")
    main(["train", "toy", "--level=1", "--device=cpu"])
    report = json.loads((tmp_path / "exit.json").read_text())
    assert report["code"] == 4 and json.loads(report["said"].splitlines()[-1])["error"] == "Shard 3 is cut"


def test_other_children_of_the_caller_live_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch waits for the end of its own processes only, and kills none that a notebook or a test has started."""
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.5)
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            assert launch._run_agent(["false"], {}, stop_file=tmp_path / "stop") == 1
            assert other.poll() is None
        finally:
            other.kill()


def test_orphans_are_adopted_while_a_launch_lasts() -> None:
    """And no longer: a notebook would never reap them."""

    def orphan() -> int:
        shell = ["sh", "-c", "sleep 5 >/dev/null & echo $!"]
        return int(subprocess.run(shell, stdout=subprocess.PIPE, check=True).stdout)

    with launch._adopting():
        ours = orphan()
        assert parent(ours) == os.getpid()
        os.kill(ours, signal.SIGKILL)
        os.waitpid(ours, 0)
    other = orphan()
    assert parent(other) != os.getpid()
    os.kill(other, signal.SIGKILL)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_train_like_one(
    long_run: Experiment, optimizer: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same global batch on one and on two processes gives the same losses, to rounding (1e-4 after 50 steps), also
    where their number changes at every stop, in the middle of a log line's steps."""
    long_run = with_steps(long_run.root, STEPS, optimizer)
    other = tmp_path_factory.mktemp("two")
    shutil.copytree(long_run.root, other, dirs_exist_ok=True)
    two = Experiment(long_run.config, other)
    assert start(long_run, "--until-step=50").wait(timeout=120) == 0
    for step, processes in ((20, 1), (40, 2), (50, 1)):
        assert start(two, f"--until-step={step}", f"--processes={processes}").wait(timeout=120) == 0
    lines = [
        json.loads((x.path(Ref("denoiser", 2)) / "checkpoints" / "step_00000050" / "state.json").read_text())[
            "history"
        ][-1]
        for x in (long_run, two)
    ]
    for name in ("loss", "held_out_loss", "gradient_norm"):
        assert lines[1][name] == pytest.approx(lines[0][name], rel=1e-4)
