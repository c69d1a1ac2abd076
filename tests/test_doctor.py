"""`doctor`: what a machine lacks is said, and what it cannot be relied on for is refused."""

import fcntl
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nestdiff_core.cli import main
from nestdiff_core.cli.doctor import trainers
from nestdiff_core.files import MANIFEST, DirectoryLock


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path))
    monkeypatch.delenv("NESTDIFF_REMOTE", raising=False)
    return tmp_path


def test_a_sound_machine(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, both self-tests, free space; nothing stays behind in the artifact root."""
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "a missing shard is refused: yes" in said and "keeps a second process out: yes" in said
    assert "GiB free" in said and list(root.iterdir()) == []


def test_what_may_go_wrong_is_said(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few file handles, no folder for temporary files, a clock that went back, a stopped run and what it left."""
    monkeypatch.setenv("TMPDIR", "/nowhere/at/all")
    artifact, begun = root / "features" / "a", root / "denoiser" / "b"
    for folder in (artifact, begun):
        with DirectoryLock(folder):
            (folder / ".tmp-x").touch()
    (artifact / MANIFEST).touch()
    os.utime(artifact / MANIFEST, (time.time() + 86400,) * 2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    try:
        assert main(["doctor"]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    said = capsys.readouterr().out
    for words in (
        "ulimit -n",
        "! TMPDIR /nowhere/at/all",
        "24.0 hours in the future",
        "denoiser/b: unfinished",
        "2 temporary files",
    ):
        assert words in said, said


def test_a_training_that_was_left_behind_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The outermost process of a training, with its number; where its launcher has died, as left behind."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    fake = [sys.executable, "-c", "import time; time.sleep(60)", "-m", "nestdiff_core", "train", "toy", "--level=1"]
    outer = subprocess.Popen([*fake[:2], f"import subprocess; subprocess.run({fake!r})", *fake[3:]])
    try:
        time.sleep(1)
        mine = [trainer for trainer in trainers() if trainer.parent == os.getpid()]
        assert [trainer.pid for trainer in mine] == [outer.pid] and mine[0].command.endswith("toy --level=1")
        (inner,) = map(int, Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split())
    finally:
        outer.kill()
        outer.wait()
    try:
        assert inner in [trainer.pid for trainer in trainers()]
        assert main(["doctor"]) == 0
        assert f", pid {inner}:" in capsys.readouterr().out
    finally:
        os.kill(inner, 9)


def test_locks_that_do_not_lock_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file system where flock does nothing: exit code 5."""
    monkeypatch.setattr(fcntl, "flock", lambda handle, operation: None)
    assert main(["doctor"]) == 5
    assert "Two processes can hold the same lock" in capsys.readouterr().err


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One that can be made to run code by a file of weights."""
    monkeypatch.setattr("torch.__version__", "2.9.1")
    assert main(["doctor"]) == 5
    assert ">= 2.10" in capsys.readouterr().err
