"""Decoder processes: the same bits as here, and an image can end its decoder but nothing else."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nestdiff_core.artifacts import writing
from nestdiff_core.config import ImagesConfig
from nestdiff_core.errors import ConfigError, IntegrityError
from nestdiff_core.images import decoding
from nestdiff_core.images.build import build_images
from nestdiff_core.images.decoding import Decoders, Failure, Picture, decode_one, decoders
from nestdiff_core.images.index import ImageIndex

HOSTILE = """
import os, signal, sys, time
from nestdiff_core.images import decoding
original = decoding.decode_one
def decode_one(data, *settings):
    if data.endswith(b"crash"): os.kill(os.getpid(), signal.SIGSEGV)
    if data.endswith(b"leave"): os._exit(3)
    if data.endswith(b"hang"): time.sleep(1000)
    if data.endswith(b"eat"): bytearray(2**33)
    return original(data, *settings)
decoding.decode_one = decode_one
decoding.serve()
"""


def jpeg(seed: int, side: int = 20) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Decoders]]:
    """Decoders that start their processes at once, and are closed at the end."""
    monkeypatch.setattr(decoding, "START_BYTES", 0)
    monkeypatch.setattr(decoding, "SMALL_BYTES", 0)
    kept: list[Decoders] = []

    def make(workers: int, program: str | None = None) -> Decoders:
        command = () if program is None else ((sys.executable, "-c", program),)
        kept.append(Decoders(workers, *command))
        return kept[-1]

    yield make
    for several in kept:
        several.close()


def children() -> set[int]:
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    ).stdout
    return {int(line.split()[0]) for line in found.splitlines() if "decoding" in line}


@pytest.mark.parametrize("want", ["check", "png", "pixels"])
def test_processes_decode_as_threads_do(made: Callable[..., Decoders], want: decoding.Want) -> None:
    """In order, whatever the number of processes; what is no image is told with its reason."""
    images = [jpeg(i) if i % 7 else b"nothing" for i in range(40)]
    expected = [decode_one(data, 8, 3, want) for data in images]
    assert sum(isinstance(found, Failure) for found in expected) == 6
    for workers in (0, 1, 2):
        assert list(made(workers).map(images, 8, 3, want)) == expected
    if want == "pixels":
        assert isinstance(expected[1], Picture) and len(expected[1].content) == 8 * 8 * 3


def test_an_image_ends_no_more_than_its_decoder(made: Callable[..., Decoders], monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash, an exit, a hang, and a demand for 8 GiB are reasons; the others are decoded."""
    monkeypatch.setattr(decoding, "IMAGE_SECONDS", 1)
    images = [jpeg(i) for i in range(20)]
    bad = {2: b"crash", 3: b"hang", 7: b"leave", 12: b"eat", 19: b"crash"}
    found = list(made(2, HOSTILE).map([data + bad.get(i, b"") for i, data in enumerate(images)], 8, 3, "pixels"))
    reasons = {i: f.reason for i, f in enumerate(found) if isinstance(f, Failure)}
    assert reasons.keys() == bad.keys()
    assert "SIGSEGV" in reasons[2] and "1 seconds" in reasons[3] and "exit code 3" in reasons[7]
    assert "more than 4 GiB" in reasons[12]
    for i in set(range(20)) - set(bad):
        assert found[i] == decode_one(images[i], 8, 3, "pixels")


def test_a_killed_decoder_is_replaced(made: Callable[..., Decoders]) -> None:
    """One that something else killed between two calls costs nothing but its image, if that."""
    several = made(1)
    images = [jpeg(i) for i in range(3)]
    before = list(several.map(images, 8, 3, "pixels"))
    (pid,) = children()
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    again = list(several.map(images, 8, 3, "pixels"))
    assert again[1:] == before[1:]


def test_no_process_stays(made: Callable[..., Decoders]) -> None:
    """Neither after `close`, nor when the process that started them is killed, nor for a few small images."""
    several = made(2)
    list(several.map([jpeg(i) for i in range(64)], 8, 3, "check"))
    assert children()
    several.close()
    assert not children()
    script = (
        "from nestdiff_core.images import decoding\n"
        "decoding.START_BYTES = decoding.SMALL_BYTES = 0\n"
        "import io, sys, time\n"
        "from PIL import Image\n"
        "b = io.BytesIO(); Image.new('RGB', (9, 9)).save(b, format='PNG')\n"
        "d = decoding.Decoders(2)\n"
        "list(d.map([b.getvalue()] * 64, 8, 3, 'check'))\n"
        "print(*[x._process.pid for x in [d._idle.get()]], flush=True)\n"
        "time.sleep(1000)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_few_images_start_no_process() -> None:
    """The threshold: below it starting a decoder would cost more than it saves."""
    several = Decoders(2)
    assert len(list(several.map([jpeg(i) for i in range(64)], 8, 3, "pixels"))) == 64
    assert several._idle.empty()
    several.close()


def test_the_number_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTDIFF_DECODERS", "3")
    decoders.cache_clear()
    assert decoders().workers == 3
    monkeypatch.setenv("NESTDIFF_DECODERS", "many")
    decoders.cache_clear()
    with pytest.raises(ConfigError, match="NESTDIFF_DECODERS"):
        decoders()
    monkeypatch.delenv("NESTDIFF_DECODERS")
    for cores, expected in ((1, 0), (2, 0), (4, 3), (64, 16)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        decoders.cache_clear()
        assert decoders().workers == expected
    decoders.cache_clear()


def test_an_image_that_ends_its_decoder_is_a_reject(
    made: Callable[..., Decoders], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the index as any other: read = kept + rejected. Later, when it could be decoded before, it is an error."""
    (tmp_path / "photos").mkdir()
    for i in range(6):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(jpeg(i) + (b"crash" if i == 4 else b""))
    monkeypatch.setattr("nestdiff_core.images.build.decoders", lambda: made(1, HOSTILE))
    config = ImagesConfig(source="folder", path=str(tmp_path / "photos"), resolution=8, max_bad_samples=1)
    header = {"stage": "images", "level": None, "fingerprint": "f", "config": {}, "inputs": [], "experiment": "e"}
    with writing(tmp_path / "root" / "images" / "f", header) as writer:
        artifact = writer.seal(**build_images(config, writer))
    index = ImageIndex(artifact)
    assert (artifact.info["read"], artifact.info["kept"], artifact.info["rejected"]) == (6, 5, 1)
    assert "SIGSEGV" in index.rejects(5)[0]["reason"] and index.rejects(5)[0]["key"] == "4%2Ejpg"
    assert index.read_shard(0).shape == (5, 8, 8, 3)
    always = "from nestdiff_core.images import decoding\ndecoding.decode_one = lambda *_: __import__('os')._exit(9)\n"
    monkeypatch.setattr("nestdiff_core.images.index.decoders", lambda: made(1, always + "decoding.serve()"))
    with pytest.raises(IntegrityError, match="exit code 9") as refused:
        index.read_shard(0)
    assert refused.value.key == "0%2Ejpg (row 0)"
