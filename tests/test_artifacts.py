"""Artifacts: committed or absent, damage is found and named, one writer at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nestdiff_core.artifacts import Artifact, open_artifact, writing
from nestdiff_core.errors import EnvironmentFault, IntegrityError
from nestdiff_core.files import DirectoryLock, fingerprint, is_sealed, replacing

HEADER = {"stage": "features", "level": None, "fingerprint": "f", "config": {"a": 1}, "inputs": []}


def make(path: Path) -> Artifact:
    with writing(path, HEADER) as writer:
        (path / "data").mkdir()
        (path / "data" / "x.bin").write_bytes(b"0123456789")
        (path / "y.bin").write_bytes(b"abc")
        return writer.seal(rows=10)


def test_an_artifact_exists_when_sealed(tmp_path: Path) -> None:
    """Before the seal there is nothing to open; after it the manifest tells what is there."""
    with pytest.raises(IntegrityError):
        open_artifact(tmp_path / "a", stage="features")
    made = make(tmp_path / "a")
    opened = open_artifact(tmp_path / "a", stage="features")
    assert opened.manifest == made.manifest and opened.info == {"rows": 10}
    assert opened.verify() == 13


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    """The same files at another place have the same digest; one changed byte gives another."""
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert first.digest == second.digest
    with writing(tmp_path / "c", HEADER) as writer:
        (tmp_path / "c" / "y.bin").write_bytes(b"abd")
        assert writer.seal().digest != first.digest


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        os.unlink,
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(p.read_bytes() + b"0"),
    ],
    ids=["flip", "delete", "empty", "cut", "append"],
)
@pytest.mark.parametrize("name", ["data/x.bin", "y.bin"])
def test_every_damage_is_found_and_named(tmp_path: Path, name: str, damage: object) -> None:
    """Whatever happens to a file, verify says which file."""
    artifact = make(tmp_path / "a")
    damage(artifact.path / name)  # pyright: ignore[reportCallIssue]
    with pytest.raises(IntegrityError) as caught:
        artifact.verify()
    assert caught.value.path == str(artifact.path / name)


def test_damaged_manifest_is_refused(tmp_path: Path) -> None:
    """A manifest that is not JSON, or of another version, is an IntegrityError."""
    artifact = make(tmp_path / "a")
    manifest = artifact.path / "manifest.json"
    record = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**record, "schema_version": 99}))
    with pytest.raises(IntegrityError, match="99"):
        open_artifact(artifact.path, stage="features")
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(IntegrityError, match="damaged"):
        open_artifact(artifact.path, stage="features")


def test_parts_survive_a_stop(tmp_path: Path) -> None:
    """A committed part is there for the next attempt; one whose file changed is not; the rest starts anew."""
    path = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt), writing(path, HEADER, keep_parts=True) as writer:
        for name in ("0", "1"):
            (path / name).write_text(name)
            writer.commit_part(name, [path / name], rows=1)
        (path / ".tmp-litter").write_text("half")
        raise KeyboardInterrupt
    assert not is_sealed(path)
    flip(path / "1")
    with writing(path, HEADER, keep_parts=True) as writer:
        assert writer.part("0")["rows"] == 1
        assert writer.part("1") is None
        assert not (path / ".tmp-litter").exists()
    with writing(path, HEADER) as writer:
        assert writer.part("0") is None


def test_a_failed_attempt_leaves_what_was_sealed(tmp_path: Path) -> None:
    """Making an artifact again and failing brings the old one back, whole and sealed; nothing else stays."""
    before = make(tmp_path / "a")
    with pytest.raises(RuntimeError), writing(tmp_path / "a", HEADER):
        (tmp_path / "a" / "half").mkdir()
        (tmp_path / "a" / "y.bin").write_bytes(b"other")
        raise RuntimeError
    after = open_artifact(tmp_path / "a", stage="features")
    assert after.manifest == before.manifest
    assert after.verify() == 13
    assert {p.name for p in after.path.iterdir()} == {".lock", "manifest.json", "data", "y.bin"}


def test_a_failure_while_sealing_leaves_what_was_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up at the manifest; and what a killed writer left is no obstacle."""
    before = make(tmp_path / "a")
    (tmp_path / "a" / ".tmp-previous").mkdir()
    (tmp_path / "a" / ".tmp-previous" / "data").write_bytes(b"of nobody")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("nestdiff_core.artifacts.write_sealed_json", full)
        with pytest.raises(EnvironmentFault), writing(tmp_path / "a", HEADER) as writer:
            (tmp_path / "a" / "y.bin").write_bytes(b"other")
            writer.seal()
    after = open_artifact(tmp_path / "a", stage="features")
    assert after.manifest == before.manifest and after.verify() == 13
    assert {p.name for p in after.path.iterdir()} == {".lock", "manifest.json", "data", "y.bin"}
    again = make(tmp_path / "a")
    assert again.digest == before.digest
    assert {p.name for p in again.path.iterdir()} == {".lock", "manifest.json", "data", "y.bin"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """replacing() is all or nothing, and leaves no litter."""
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    """The lock names its holder, and a killed holder frees it."""
    code = (
        "import sys, time, pathlib\nfrom nestdiff_core.files import DirectoryLock\n"
        "with DirectoryLock(pathlib.Path(sys.argv[1])): print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
        with pytest.raises(EnvironmentFault, match=f"pid {holder.pid}") as caught, DirectoryLock(tmp_path):
            pass
        assert caught.value.code == 5
    finally:
        holder.kill()
        holder.wait()
    with DirectoryLock(tmp_path):
        pass


def test_full_disk_is_named(tmp_path: Path) -> None:
    """Running out of room is an EnvironmentFault with the cure, and nothing half-written stays."""
    code = (
        "import resource, signal, sys, pathlib\n"
        "from nestdiff_core.files import write_bytes\n"
        "from nestdiff_core.errors import EnvironmentFault\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_bytes(pathlib.Path(sys.argv[1]) / 'x', b'0' * 5000)\n"
        "except EnvironmentFault as e: print(e.to_json())"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    record = json.loads(out)
    assert record["code"] == 5 and "ulimit" in record["fix"]
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_ignores_order_only() -> None:
    """Key order does not matter; every value does."""
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert len({fingerprint(x) for x in ({"a": 1}, {"a": 2}, {"a": 1.5}, {"b": 1}, {"a": [1]}, {"a": "1"})}) == 6
