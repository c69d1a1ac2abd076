"""Sampling that is killed, told to use what does not belong, or meets what is no number (faults F48, F49, F50)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import (
    KILLED,
    REPOSITORY,
    TORN,
    Forks,
    Outcome,
    Pipeline,
    assert_recovered,
    committed,
    contents,
    write_pipeline,
)
from processes import wait_for
from safetensors.torch import load_file, save_file

from nestdiff_core import stages
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import MANIFEST, PARTS, SELF, file_record, fingerprint, read_json, write_sealed_json
from nestdiff_core.loading import EMA
from nestdiff_core.recipes import load_experiment

KILLS = int(os.environ.get("NESTDIFF_STORM_KILLS", "50"))
SAMPLING = {"num_images": 150, "batch_size": 16, "num_evaluations": 2}
SET = "--num-images=90 --seed=5 --shard-size=16 --format=webdataset"

# What is killed: the verb, its stages or further arguments. The folder of the verb `sample` lies within the root, where
# changes of the disk are counted.
Command = Callable[[Pipeline], dict[str, Any]]
COMMANDS: dict[str, Command] = {
    "stage": lambda _: {"stages": ["samples"]},
    "folder": lambda p: {"verb": "sample", "also": [*SET.split(), f"--out={p.home}/sets/made"]},
    "npz": lambda p: {"verb": "sample", "also": ["--num-images=90", "--shard-size=16", f"--out={p.home}/sets/x.npz"]},
}
every_command = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture(scope="session")
def trained(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Two trained levels and nothing sampled; only to be read."""
    pipeline = write_pipeline(forks, tmp_path_factory.mktemp("trained"), sampling=SAMPLING)
    assert pipeline.run().code == 0
    for level in (1, 2):
        stages.train(pipeline.x, level)
    return pipeline


@pytest.fixture(scope="session")
def undisturbed_samples(trained: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    """By command: what it makes when nothing happens to it."""
    made = {name: copied(trained, tmp_path_factory.mktemp(name)) for name in COMMANDS}
    for name, pipeline in made.items():
        assert run(pipeline, name).code == 0
    return made


@pytest.fixture
def pipeline(trained: Pipeline, tmp_path: Path) -> Pipeline:
    """A copy of the trained levels, to sample from."""
    return copied(trained, tmp_path)


def copied(pipeline: Pipeline, folder: Path) -> Pipeline:
    shutil.copytree(pipeline.home, folder / "home")
    return pipeline.at(folder / "home")


def run(pipeline: Pipeline, command: str, **faults: int) -> Outcome:
    order = COMMANDS[command](pipeline)
    return pipeline.run(*order.pop("stages", ()), **order, **faults)


def refusal(outcome: Outcome, code: int, **expected: Any) -> dict[str, Any]:
    """The refusal of an outcome with this exit code, these fields, a cure, and no traceback."""
    assert outcome.code == code and "Traceback" not in outcome.said, outcome.said
    said = outcome.refusal
    assert {name: said[name] for name in expected} == expected
    assert said["fix"]
    return said


# --- F49: killed and run again ------------------------------------------------------------------------------------


def killed_then_finished(pipeline: Pipeline, undisturbed: Pipeline, command: str, **fault: int) -> int:
    """How the run ended that the fault befell, after a second one has made good for it."""
    ended = run(pipeline, command, **fault).code
    kept = sampled_parts(pipeline)
    again = run(pipeline, command)
    assert again.code == 0, again.said
    assert_recovered(pipeline, undisturbed, {})
    if command != "npz":  # whose shards go when it is whole
        now = sampled_parts(pipeline)
        assert {name for name, inode in kept.items() if name in now and now[name] != inode} == set()
    return ended


def sampled_parts(pipeline: Pipeline) -> dict[Path, tuple[int, int]]:
    """The shards that are committed, with inode and time: not to be made again."""
    return {file: inode for file, inode in committed(pipeline.home).items() if file.suffix in (".npz", ".tar")}


def committed_parts(pipeline: Pipeline) -> list[Path]:
    return [p for place in ("samples", "sets") for p in pipeline.home.glob(f"{place}/*/{PARTS}/[0-9]*.json")]


@every_command
@pytest.mark.parametrize("change", [5, 22, 60])
def test_a_kill_before_some_changes_of_the_disk(
    pipeline: Pipeline, undisturbed_samples: dict[str, Pipeline], command: str, change: int
) -> None:
    """The same command then ends with the same bytes, no image twice and none missing; committed shards are kept."""
    assert killed_then_finished(pipeline, undisturbed_samples[command], command, kill_at=change) in (KILLED, 0)


@every_command
def test_a_kill_within_a_write(pipeline: Pipeline, undisturbed_samples: dict[str, Pipeline], command: str) -> None:
    """Killed within the first file that is longer than 3,000 bytes, which stays behind torn."""
    assert killed_then_finished(pipeline, undisturbed_samples[command], command, torn_at=3000) == TORN


@pytest.mark.slow
@every_command
def test_a_kill_before_every_change_of_the_disk(
    trained: Pipeline, undisturbed_samples: dict[str, Pipeline], tmp_path: Path, command: str
) -> None:
    """All of them, from the first to the one behind the last."""
    change, ended = 0, KILLED
    while ended == KILLED:
        change += 1
        pipeline = copied(trained, tmp_path / str(change))
        ended = killed_then_finished(pipeline, undisturbed_samples[command], command, kill_at=change)
        shutil.rmtree(tmp_path / str(change))
    print(f"{change - 1} kills")
    assert ended == 0 and change > 60


@pytest.mark.slow
@every_command
def test_a_storm_of_kills(
    trained: Pipeline, undisturbed_samples: dict[str, Pipeline], tmp_path: Path, command: str
) -> None:
    """Fifty kills at random times; every time it has got to its end it starts from nothing."""
    rng, kills, rounds = random.Random(command), 0, 0
    while kills < KILLS:
        pipeline, ended = copied(trained, tmp_path / str(rounds)), KILLED
        while ended == KILLED:
            order = COMMANDS[command](pipeline)
            child = pipeline.start(*order.pop("stages", ()), **order)
            time.sleep(rng.uniform(0, 0.6))
            child.kill()
            ended = child.wait().code
            kills += ended == KILLED
        assert ended == 0
        assert_recovered(pipeline, undisturbed_samples[command], {})
        shutil.rmtree(tmp_path / str(rounds))
        rounds += 1
    print(f"{kills} kills in {rounds} rounds")


@pytest.mark.parametrize("command", ["stage", "folder"])
def test_two_processes_killed_and_one_that_finishes(
    pipeline: Pipeline, undisturbed_samples: dict[str, Pipeline], command: str
) -> None:
    """`--processes 2` loses its parent to kill -9 once a part is committed: its processes end, and one process makes
    the rest, to the bytes of an undisturbed run."""
    order = COMMANDS[command](pipeline)
    words = [order.get("verb", "run"), str(pipeline.experiment), *order.get("also", ["--stage=samples"])]
    parent = subprocess.Popen(
        [sys.executable, "-m", "nestdiff_core", *words, "--processes=2"],
        cwd=REPOSITORY,
        env={**os.environ, "NESTDIFF_HOME": str(pipeline.home)},
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: bool(committed_parts(pipeline)), 60)
    parent.kill()
    parent.wait()
    wait_for(lambda: not our_processes(pipeline), 20)
    assert run(pipeline, command).code == 0
    assert_recovered(pipeline, undisturbed_samples[command], {})


def our_processes(pipeline: Pipeline) -> list[str]:
    """Processes that have the experiment's file, or the folder that it samples into, in their command line, and run
    under torchrun."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            line = (folder / "cmdline").read_bytes().decode() if folder.name.isdigit() else ""
            home = (folder / "environ").read_bytes().decode() if "nestdiff_core" in line else ""
        except OSError:
            continue
        if f"NESTDIFF_HOME={pipeline.home}\0" in home and "forks" not in line:
            found.append(line)
    return found


def test_a_terminated_run_can_be_resumed(pipeline: Pipeline, undisturbed_samples: dict[str, Pipeline]) -> None:
    """SIGTERM once a part is committed: exit code 75, and the same command finishes, to the same bytes."""
    child = pipeline.start(verb="sample", also=COMMANDS["folder"](pipeline)["also"])
    wait_for(lambda: bool(committed_parts(pipeline)))
    child.kill(signal.SIGTERM)
    refusal(child.wait(), 75)
    assert run(pipeline, "folder").code == 0
    assert_recovered(pipeline, undisturbed_samples["folder"], {})


# --- F48: a denoiser that does not belong -------------------------------------------------------------------------


def other_weights(x: Experiment, level: int) -> None:
    """Weights of the right shapes that another training could have left."""
    path = x.path(Ref("denoiser", level)) / EMA
    save_file({name: value + 0.01 for name, value in load_file(path).items()}, path)


@every_command
@pytest.mark.parametrize("level", [1, 2])
def test_weights_that_were_exchanged_are_refused(pipeline: Pipeline, command: str, level: int) -> None:
    """Exit code 4 names level and file, and nothing is sampled."""
    other_weights(pipeline.x, level)
    path = pipeline.x.path(Ref("denoiser", level)) / EMA
    refusal(run(pipeline, command), 4, stage="denoiser", level=level, path=str(path))
    assert committed_parts(pipeline) == []


@pytest.mark.parametrize(
    ("settings", "stage", "differs"),
    [
        ({"diffusion": {"schedule": "vp"}}, "denoiser", {"config.diffusion.schedule": "vp"}),
        ({"levels": {2: {"channels": 3}}}, "svd_basis", {"config.channels": 3}),
        ({"levels": {2: {"grid": 1}}}, "moments", {"config.grid": 1}),
    ],
    ids=["schedule", "basis", "level"],
)
def test_a_denoiser_of_something_else_is_refused(
    pipeline: Pipeline, settings: dict[str, Any], stage: str, differs: dict[str, Any]
) -> None:
    """A schedule, a basis or a level that was changed after training: exit code 4 with the setting that differs."""
    changed = with_settings(pipeline, **settings)
    for outcome in (changed.run("samples"), changed.run(verb="sample", also=[f"--out={pipeline.home}/x.npz"])):
        assert refusal(outcome, 4, stage=stage)["expected"] == differs


def with_settings(pipeline: Pipeline, **settings: Any) -> Pipeline:
    plain = json.loads(pipeline.experiment.read_text())
    plain["images"]["path"] = str(pipeline.experiment.parent / "photos")
    file = pipeline.home.with_name("changed.yaml")
    file.write_text(json.dumps({**plain, "name": "small", **settings}))
    return Pipeline(pipeline.forks, file, pipeline.home)


def test_a_checkpoint_put_in_the_place_of_another_is_refused(pipeline: Pipeline) -> None:
    """The whole directory of a denoiser of another schedule, moved to where this experiment's belongs: exit code 4."""
    other = with_settings(pipeline, diffusion={"schedule": "vp"})
    stages.train(Experiment(load_experiment(other.experiment), pipeline.home), 2)
    mine, its = pipeline.x.path(Ref("denoiser", 2)), other.x.path(Ref("denoiser", 2))
    assert mine != its
    shutil.rmtree(mine)
    shutil.copytree(its, mine)
    for command in COMMANDS:
        refusal(run(pipeline, command), 4, stage="denoiser", path=str(mine), expected=mine.name, found=its.name)


def test_a_folder_of_another_training_is_not_gone_on_with(
    pipeline: Pipeline, undisturbed_samples: dict[str, Pipeline]
) -> None:
    """Denoisers were trained again between two runs into one folder: exit code 4 says which differ; nothing changes."""
    assert run(pipeline, "folder").code == 0
    before = contents(pipeline.home / "sets")
    other_weights(pipeline.x, 1)
    reseal(pipeline.x, 1)
    said = refusal(run(pipeline, "folder"), 4, path=f"{pipeline.home}/sets/made")
    assert list(said["expected"]) == ["inputs[0].identity"]
    assert contents(pipeline.home / "sets") == before


# --- F50: what is no number ---------------------------------------------------------------------------------------


def reseal(x: Experiment, level: int) -> None:
    """Make the manifest agree with what is there now, as if training had left it."""
    path = x.path(Ref("denoiser", level))
    manifest = read_json(path / MANIFEST)
    manifest.pop(SELF)
    manifest["files"][EMA] = file_record(path / EMA)
    manifest["digest"] = fingerprint({name: record["sha256"] for name, record in manifest["files"].items()})
    write_sealed_json(path / MANIFEST, manifest)


def without_numbers(x: Experiment, level: int) -> None:
    path = x.path(Ref("denoiser", level)) / EMA
    weights = load_file(path)
    weights["norm.weight"][0] = torch.nan
    save_file(weights, path)
    reseal(x, level)


@every_command
@pytest.mark.parametrize("level", [1, 2])
def test_a_sample_that_is_no_number_is_named(pipeline: Pipeline, command: str, level: int) -> None:
    """Exit code 6 with level and image, and no image of it is left."""
    without_numbers(pipeline.x, level)
    refusal(run(pipeline, command), 6, stage="samples", level=level, key="image 0")
    assert committed_parts(pipeline) == [] and not list(pipeline.home.glob("sets/*.npz"))


def test_one_of_two_processes_meets_it(pipeline: Pipeline) -> None:
    """The exit code of two processes is 6 as well, and the refusal is the last thing that is said."""
    without_numbers(pipeline.x, 2)
    ended = subprocess.run(
        [sys.executable, "-m", "nestdiff_core", "run", str(pipeline.experiment), "--stage=samples", "--processes=2"],
        cwd=REPOSITORY,
        env={**os.environ, "NESTDIFF_HOME": str(pipeline.home)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 6, ended.stderr
    said = json.loads(ended.stderr.splitlines()[-1])
    assert said["level"] == 2 and said["key"] in ("image 0", "image 64")


def test_pixels_stay_what_they_are(undisturbed_samples: dict[str, Pipeline]) -> None:
    """What the tests above compare with is not one flat tone."""
    path = undisturbed_samples["stage"].x.artifact(Ref("samples")).path / "samples.npz"
    with np.load(path) as arrays:
        assert arrays["arr_0"].shape == (150, 8, 8, 3) and arrays["arr_0"].std(axis=(1, 2, 3)).min() > 0
