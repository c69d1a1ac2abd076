"""Training killed, starved, damaged and lied to: the same denoiser in the end, or a refusal that says why."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import KILLED, REPOSITORY, Forks, Pipeline, write_pipeline
from processes import wait_for

from nestdiff_core.cli.digest import experiment_digests
from nestdiff_core.experiment import Ref

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
STEPS = {"num_steps": 12, "checkpoint_every": 4, "log_every": 2, "keep_last": 2}


@pytest.fixture(scope="module")
def latents(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """22 images up to their latents; only to be read."""
    pipeline = write_pipeline(forks, tmp_path_factory.mktemp("latents"), **{"levels.2.train": STEPS})
    assert pipeline.run().code == 0
    return pipeline


@pytest.fixture(scope="module")
def expected(latents: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Digests of a training that nothing befell."""
    pipeline = copy(latents, tmp_path_factory.mktemp("undisturbed"))
    outcome = pipeline.train()
    assert outcome.code == 0, outcome.said
    return denoiser(pipeline)


def copy(latents: Pipeline, folder: Path) -> Pipeline:
    shutil.copytree(latents.home, folder / "home")
    return latents.at(folder / "home")


@pytest.fixture
def pipeline(latents: Pipeline, tmp_path: Path) -> Pipeline:
    return copy(latents, tmp_path)


def denoiser(pipeline: Pipeline) -> dict[str, str | None]:
    """Model, EMA, optimiser and losses, and that no temporary file is left."""
    assert [path for path in pipeline.home.rglob("*") if path.name.startswith(".tmp-")] == []
    digests = experiment_digests(pipeline.x)
    return {name: value for name, value in digests.items() if name.startswith("denoiser_level_2")}


def checkpoints(pipeline: Pipeline) -> list[Path]:
    return sorted((pipeline.x.path(Ref("denoiser", 2)) / "checkpoints").glob("step_*"))


def killed_then_finished(pipeline: Pipeline, expected: dict[str, str | None], **fault: int) -> int:
    ended = pipeline.train(**fault).code
    outcome = pipeline.train()
    assert outcome.code == 0, outcome.said
    assert denoiser(pipeline) == expected
    return ended


@pytest.mark.parametrize("change", [12, 25, 40, 55])
def test_a_kill_before_some_changes_of_the_disk(
    pipeline: Pipeline, expected: dict[str, str | None], change: int
) -> None:
    """Within and between checkpoints: model, EMA, optimiser and losses are the same bits, and no file is left over."""
    assert killed_then_finished(pipeline, expected, kill_at=change) == KILLED


@pytest.mark.slow
def test_a_kill_before_every_change_of_the_disk(
    latents: Pipeline, expected: dict[str, str | None], tmp_path: Path
) -> None:
    """All of them, from the first to the one behind the last."""
    change, ended = 0, KILLED
    while ended == KILLED:
        change += 1
        pipeline = copy(latents, tmp_path / str(change))
        ended = killed_then_finished(pipeline, expected, kill_at=change)
        shutil.rmtree(pipeline.home)
    print(f"{change - 1} kills")
    assert ended == 0 and change > 55


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    match kind:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "flipped":
            path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])


DAMAGES = [(file, kind) for file in FILES for kind in ("missing", "cut", "flipped")]
SOME = {("model.safetensors", "cut"), ("optimizer.safetensors", "missing"), ("state.json", "flipped")}


@pytest.mark.parametrize(
    ("file", "kind"), [pytest.param(*d, marks=[pytest.mark.slow] * (d not in SOME)) for d in DAMAGES]
)
def test_a_damaged_newest_checkpoint(pipeline: Pipeline, expected: dict[str, str | None], file: str, kind: str) -> None:
    """The one before it is used, said aloud with the file's name, and the same denoiser comes out."""
    assert pipeline.train(kill_at=55).code == KILLED
    older, newest = checkpoints(pipeline)[-2:]
    damage(newest / file, kind)
    outcome = pipeline.train()
    assert outcome.code == 0
    assert f"Checkpoint {newest.name} is passed over" in outcome.said and file in outcome.said
    assert older.name < newest.name and denoiser(pipeline) == expected


def test_no_whole_checkpoint_is_a_refusal(pipeline: Pipeline) -> None:
    """Exit code 4 and what to remove: training does not silently begin again."""
    assert pipeline.train(kill_at=55).code == KILLED
    for path in checkpoints(pipeline):
        for file in path.iterdir():
            damage(file, "cut")
    outcome = pipeline.train()
    assert outcome.code == 4 and outcome.refusal["stage"] == "denoiser" and outcome.refusal["level"] == 2
    assert "No checkpoint is whole. Remove" in outcome.refusal["fix"]


@pytest.mark.parametrize("size", [3_000, 30_000])
def test_no_room_for_a_checkpoint(pipeline: Pipeline, expected: dict[str, str | None], size: int) -> None:
    """Exit code 5 with free space and cure; older checkpoints stay, the stump goes; with room it ends the same."""
    assert pipeline.train(kill_at=40).code == KILLED
    kept = {file: file.read_bytes() for path in checkpoints(pipeline) for file in path.iterdir()}
    assert kept
    outcome = pipeline.train(full_at=size)
    assert outcome.code == 5 and "Traceback" not in outcome.said, outcome.said
    assert "MiB free" in outcome.refusal["found"] and "run the same command again" in outcome.refusal["fix"]
    assert {file: file.read_bytes() for file in kept} == kept
    assert [path for path in pipeline.home.rglob("*") if path.name.startswith(".tmp-")] == []
    assert pipeline.train().code == 0 and denoiser(pipeline) == expected


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("vector", ["checkpoint", "weights", "experiment", "sealed"])
def test_nothing_that_is_read_is_run(forks: Forks, pipeline: Pipeline, tmp_path: Path, vector: str) -> None:
    """A pickle in place of a checkpoint's tensors, as published weights or as a sealed denoiser, and YAML that
    constructs objects: refused, and what they would have run has not run."""
    canary = tmp_path / "canary"
    poison = pickle.dumps(Canary(canary))
    if vector == "experiment":
        text = f"!!python/object/apply:os.mkdir ['{canary}']"
        experiment = tmp_path / "evil.yaml"
        experiment.write_text(f"recipe: toy\nname: {text}\n")
        outcome = Pipeline(forks, experiment, pipeline.home).run("images")
        assert outcome.code == 2 and "Traceback" not in outcome.said, outcome.said
    elif vector == "weights":
        weights, experiment = tmp_path / "evil.pt", tmp_path / "evil.yaml"
        weights.write_bytes(poison)
        plain = json.loads(pipeline.experiment.read_text())
        plain["images"]["path"] = str(pipeline.experiment.parent / "photos")
        experiment.write_text(json.dumps({**plain, "levels.2.train": {**STEPS, "start_from": str(weights)}}))
        outcome = Pipeline(forks, experiment, pipeline.home).train()
        assert outcome.code in (2, 4) and "Traceback" not in outcome.said, outcome.said
    elif vector == "checkpoint":
        assert pipeline.train(kill_at=55).code == KILLED
        for path in checkpoints(pipeline):
            (path / "optimizer.safetensors").write_bytes(poison)
        assert pipeline.train().code == 4
    else:
        assert pipeline.train().code == 0
        (pipeline.x.path(Ref("denoiser", 2)) / "ema.safetensors").write_bytes(poison)
        assert pipeline.run(verb="verify").code == 4
    assert not canary.exists()
    pickle.loads(poison)
    assert canary.is_dir()  # it would have


def with_settings(pipeline: Pipeline, folder: Path, **settings: Any) -> Pipeline:
    """The same pipeline, with other settings of level 2's training."""
    plain = json.loads(pipeline.experiment.read_text())
    plain["images"]["path"] = str(pipeline.experiment.parent / "photos")
    experiment = folder / "other.yaml"
    experiment.write_text(json.dumps({**plain, "levels.2.train": {**STEPS, **settings}}))
    return Pipeline(pipeline.forks, experiment, pipeline.home)


def test_a_loss_that_explodes(pipeline: Pipeline, tmp_path: Path) -> None:
    """Exit code 6 with level, step and cure, and the checkpoints from before stay."""
    hot = {"num_steps": 400, "lr": 1e9, "warmup_steps": 300, "grad_clip": 0}
    outcome = with_settings(pipeline, tmp_path, **hot).train()
    assert outcome.code == 6 and "Traceback" not in outcome.said, outcome.said
    assert outcome.refusal["level"] == 2 and "levels.train.lr" in outcome.refusal["fix"]


def test_a_batch_that_does_not_fit_into_memory(pipeline: Pipeline, tmp_path: Path) -> None:
    """Exit code 5 with the level, the number of images and cures that change no result; the first of them works."""
    large = {"num_steps": 1, "batch_size": 2**15}
    outcome = with_settings(pipeline, tmp_path, **large).train(memory=1_200 * 2**20)
    assert outcome.code == 5 and "Traceback" not in outcome.said, outcome.said
    refusal = outcome.refusal
    assert refusal["level"] == 2 and "memory" in refusal["error"]
    assert refusal["found"] == "32768 images at once in each process"
    assert "levels.train.accumulation_steps (now 1)" in refusal["fix"]
    outcome = with_settings(pipeline, tmp_path, **large, accumulation_steps=512).train(memory=1_200 * 2**20)
    assert outcome.code == 0, outcome.said


# --- the command itself -------------------------------------------------------------------------------------------


def command(pipeline: Pipeline, *arguments: str, before: tuple[str, ...] = (), **environment: str) -> list[Any]:
    words = [*before, sys.executable, "-m", "nestdiff_core", *arguments]
    return [words, {**os.environ, "PYTHONPATH": str(REPOSITORY), "NESTDIFF_HOME": str(pipeline.home), **environment}]


def train(pipeline: Pipeline, *, before: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    words, variables = command(pipeline, "train", str(pipeline.experiment), "--level=2", before=before, **environment)
    return subprocess.run(words, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("signals", [(signal.SIGINT,), (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)])
def test_stopped_by_other_signals(
    forks: Forks, pipeline: Pipeline, tmp_path: Path, signals: tuple[signal.Signals, ...]
) -> None:
    """Ctrl-C of the terminal, or both signals and one again: exit code 75 within 15 s, nobody left, a checkpoint."""
    plain = json.loads(pipeline.experiment.read_text())
    plain["images"]["path"] = str(pipeline.experiment.parent / "photos")
    experiment = tmp_path / "long.yaml"
    experiment.write_text(json.dumps({**plain, "levels.2.train": {**STEPS, "num_steps": 10**6}}))
    endless = Pipeline(forks, experiment, pipeline.home)
    words, variables = command(endless, "train", str(experiment), "--level=2")
    parent = subprocess.Popen(
        words, cwd=REPOSITORY, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: len(checkpoints(endless)) > 0, 60)
    began = time.monotonic()
    for number in signals:
        os.killpg(parent.pid, number)
    errors = parent.communicate(timeout=30)[1]
    assert parent.returncode == 75 and time.monotonic() - began < 15
    assert json.loads(errors.splitlines()[-1])["code"] == 75
    here = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(experiment).encode() in reading(p)]
    assert here == [] and checkpoints(endless)


def reading(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_another_time_and_zone(pipeline: Pipeline, expected: dict[str, str | None]) -> None:
    """Half a training now, the rest as if it were yesterday and elsewhere, on files of 1970: neither result nor order
    depends on the clock."""
    if shutil.which("faketime") is None:
        pytest.skip("needs the program faketime")
    assert pipeline.train(kill_at=40).code == KILLED
    for path in pipeline.home.rglob("*"):
        os.utime(path, (0, 0))
    done = train(pipeline, before=("faketime", "-f", "-1d"), TZ="Pacific/Kiritimati")
    assert done.returncode == 0, done.stderr
    assert denoiser(pipeline) == expected


def test_an_unusual_place(forks: Forks, tmp_path: Path, expected: dict[str, str | None]) -> None:
    """Spaces, letters of other scripts, 200 characters, a relative root, umask 077, images that cannot be written:
    the same denoiser."""
    folder = tmp_path / "Größe 素晴らしい ' $HOME" / ("long " * 40).strip()
    written = write_pipeline(forks, folder, **{"levels.2.train": STEPS})
    for path in (*(folder / "photos").iterdir(), folder / "photos"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    here = Pipeline(forks, written.experiment, folder / "home")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NESTDIFF_HOME": "home"}
    stages = [word for stage in ("images", "encoder", "features", "bases", "latents") for word in ("--stage", stage)]
    for arguments in (["run", "small.yaml", *stages], ["train", "small.yaml", "--level=2"]):
        done = subprocess.run(
            [sys.executable, "-m", "nestdiff_core", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            umask=0o077,
        )
        assert done.returncode == 0, done.stderr
    assert denoiser(here) == expected


@pytest.mark.parametrize("starved", ["handles", pytest.param("temporary", marks=pytest.mark.slow), "shared"])
def test_little_else(pipeline: Pipeline, expected: dict[str, str | None], starved: str) -> None:
    """64 file handles, no folder for temporary files, or no shared memory: works, or exit code 5; no hang."""
    match starved:
        case "handles":
            done = train(pipeline, before=("bash", "-c", 'ulimit -n 64; exec "$@"', "-"))
        case "temporary":
            done = train(pipeline, TMPDIR="/nowhere/at/all")
        case _:
            if os.geteuid() != 0 or shutil.which("unshare") is None:
                pytest.skip("filling /dev/shm for one command needs root")
            full = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/x; exec "$@"'
            done = train(pipeline, before=("unshare", "--mount", "bash", "-c", full, "-"))
    assert done.returncode in (0, 5) and "Traceback" not in done.stderr, done.stderr
    if done.returncode == 0:
        assert denoiser(pipeline) == expected
