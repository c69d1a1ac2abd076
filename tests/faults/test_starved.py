"""No room on the disk or in memory: exit code 5 saying so, nothing half-made counts, and with room it ends the same."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Outcome, Pipeline, assert_recovered, committed, contents, make_first

from nestdiff_core.files import is_sealed

# The stage that meets a file which cannot be written in full, and the stage that writes it, as the refusal names it.
STAGES = {
    "images": ("images", 9_000),
    "encoder": ("encoder", 9_000),
    "features": ("features", 5_000),
    "moments": ("bases", 2_000),
    "svd_basis": ("bases", 800),
    "latents": ("latents", 2_060),
}


def assert_refused(outcome: Outcome, pipeline: Pipeline, stage: str) -> None:
    """Exit code 5 with stage, place, free space and cure; no traceback; the stage is not sealed."""
    assert outcome.code == 5 and "Traceback" not in outcome.said, outcome.said
    refusal = outcome.refusal
    assert refusal["code"] == 5 and refusal["stage"] == stage
    assert Path(refusal["path"]).is_relative_to(pipeline.home)
    assert "MiB free" in refusal["found"] and "run the same command again" in refusal["fix"]
    assert not all(is_sealed(folder) for folder in pipeline.home.glob(f"{stage}/*"))


def refused_then_finished(pipeline: Pipeline, undisturbed: Pipeline, stage: str, size: int) -> None:
    """One stage under a limit for the size of a file, then all of them without."""
    command = STAGES[stage][0]
    make_first(pipeline, undisturbed, stage)
    assert_refused(pipeline.run(command, full_at=size), pipeline, stage)
    kept = committed(pipeline.home)
    assert pipeline.run().code == 0
    assert_recovered(pipeline, undisturbed, kept)


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_that_cannot_be_written_in_full(pipeline: Pipeline, undisturbed: Pipeline, stage: str) -> None:
    """Images, weights, features, moments, bases, latents: a write that fails is found, whichever library writes."""
    refused_then_finished(pipeline, undisturbed, stage, STAGES[stage][1])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_no_file_can_be_written_in_full(undisturbed: Pipeline, tmp_path: Path, stage: str) -> None:
    """The same for every size that a file of the stage has, one byte less."""
    sizes = {file.stat().st_size for file in (undisturbed.home / stage).rglob("*") if file.is_file()}
    for size in sorted(sizes):
        refused_then_finished(undisturbed.at(tmp_path / str(size)), undisturbed, stage, size - 1)


# --- a small file system ------------------------------------------------------------------------------------------

Resize = Callable[[int], None]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Resize]]:
    """A file system of its own, and what sets its size in KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> bool:
        return subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", disk], capture_output=True).returncode == 0

    if os.geteuid() != 0 or shutil.which("mount") is None or not mount("-o", "size=1m"):
        pytest.skip("mounting a small file system needs root")
    try:
        yield disk, lambda kib: subprocess.run(["mount", "-o", f"remount,size={kib}k", disk], check=True) and None
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def fill_up(undisturbed: Pipeline, disk: Path, resize: Resize, share: float) -> None:
    """The run on a disk with room for a share of it, and then for all."""
    pipeline = undisturbed.at(disk / "home")
    pages = sum(-(-len(data) // 4096) for data in contents(undisturbed.home).values())
    resize(int(4 * pages * share))
    outcome = pipeline.run()
    assert outcome.code == 5 and "No space left on device" in outcome.said, outcome.said
    assert_refused(outcome, pipeline, outcome.refusal["stage"])
    kept = committed(pipeline.home)
    resize(10_000)
    assert pipeline.run().code == 0
    assert_recovered(pipeline, undisturbed, kept)
    shutil.rmtree(pipeline.home)


def test_a_full_disk(undisturbed: Pipeline, small_disk: tuple[Path, Resize]) -> None:
    """No space left on the device in the middle of the run."""
    fill_up(undisturbed, *small_disk, share=0.6)


@pytest.mark.slow
def test_disks_of_many_sizes(undisturbed: Pipeline, small_disk: tuple[Path, Resize]) -> None:
    """The same with room for 5 % to 95 % of the run."""
    for percent in range(5, 100, 5):
        fill_up(undisturbed, *small_disk, share=percent / 100)


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mebibytes", [0, 200, pytest.param(600, marks=pytest.mark.slow)])
def test_too_little_memory(pipeline: Pipeline, undisturbed: Pipeline, mebibytes: int) -> None:
    """pyarrow, threads or torch get no memory: refused with a cure; with enough of it the run ends the same."""
    outcome = pipeline.run(memory=mebibytes * 2**20)
    assert outcome.code == 5 and "Traceback" not in outcome.said, outcome.said
    assert "memory" in outcome.refusal["error"] and "batch_size" in outcome.refusal["fix"]
    kept = committed(pipeline.home)
    assert pipeline.run().code == 0
    assert_recovered(pipeline, undisturbed, kept)
