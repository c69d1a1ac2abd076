"""What the fault tests share: a small pipeline that can be killed, starved or stopped, and what must hold then."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from nestdiff_core.cleaning import find_litter
from nestdiff_core.experiment import Experiment
from nestdiff_core.files import LOCK, MANIFEST, PARTS, TEMPORARY
from nestdiff_core.recipes import load_experiment

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ("images", "encoder", "features", "bases", "latents")  # the data side, from images to latents
KILLED = -signal.SIGKILL
TORN = -signal.SIGXFSZ

Inode = tuple[int, int]  # inode and time of change: a file that was written again has others


class Outcome(NamedTuple):
    """How a command ended (as in subprocess: -9 is SIGKILL), all that it said, the most memory that it held in MiB."""

    code: int
    said: str
    peak: float

    @property
    def refusal(self) -> dict[str, Any]:
        """The JSON object of the last line, as every refusal leaves it."""
        return json.loads(self.said.splitlines()[-1])


class Child:
    """A command that is running, in a process group of its own."""

    def __init__(self, forks: Forks, pid: int, output: int) -> None:
        self.pid, self._forks, self._output = pid, forks, output

    def kill(self, with_signal: int = signal.SIGKILL) -> None:
        os.killpg(self.pid, with_signal)

    def wait(self) -> Outcome:
        code, kibibytes = self._forks.ask({"wait": self.pid})
        with os.fdopen(self._output) as output:
            return Outcome(code, output.read(), kibibytes / 1024)


class Forks:
    """The process of forks.py, which has imported everything."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, itertools.count()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forks.py"))],
            cwd=REPOSITORY,
            # PYTHONUNBUFFERED would set what is printed before what stderr says, which is the command's own task
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def pipe(self) -> tuple[Path, int]:
        """A named pipe for what a child says, and the handle to read it: no disk is needed, however full it is."""
        path = self._folder / str(next(self._number))
        os.mkfifo(path)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(handle, fcntl.F_SETPIPE_SZ, 2**20)
        return path, handle

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Pipeline:
    """An experiment in a file and the root of its artifacts."""

    def __init__(self, forks: Forks, experiment: Path, home: Path) -> None:
        self.forks, self.experiment, self.home = forks, experiment, home

    @property
    def x(self) -> Experiment:
        return Experiment(load_experiment(self.experiment), self.home)

    def start(self, *stages: str, verb: str = "run", also: Sequence[str] = (), **faults: int) -> Child:
        """Begin these stages (default: all of the data side). also: further arguments. faults: those of forks.py.

        verb `train` is a worker of level 2 as torchrun starts it: what it would have the command exit with is in the
        file `exit.json` beside the experiment.
        """
        output, said = self.forks.pipe()
        named = [word for stage in stages or STAGES for word in ("--stage", stage)] if verb == "run" else []
        worker = {}
        if verb == "train":
            named, worker = ["--level=2"], dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | {"WORLD_SIZE": "1"}
            worker |= {"TORCHELASTIC_RUN_ID": "test", "NESTDIFF_EXIT_FILE": str(self.exit_file)}
            self.exit_file.unlink(missing_ok=True)
        order = {
            "arguments": [verb, str(self.experiment), *named, *also],
            "environment": {"NESTDIFF_HOME": str(self.home), **worker},
            "faults": faults,
            "output": str(output),
        }
        return Child(self.forks, self.forks.ask({"start": order}), said)

    @property
    def exit_file(self) -> Path:
        return self.experiment.parent / "exit.json"

    def train(self, **faults: int) -> Outcome:
        """A training of level 2: what the command would have exited with, and its last words."""
        outcome = self.start(verb="train", **faults).wait()
        if not self.exit_file.is_file():
            return outcome
        report = json.loads(self.exit_file.read_text())
        return outcome._replace(
            code=outcome.code or report["code"], said=outcome.said + (report.get("said") or "").rstrip()
        )

    def run(self, *stages: str, verb: str = "run", also: Sequence[str] = (), **faults: int) -> Outcome:
        return self.start(*stages, verb=verb, also=also, **faults).wait()

    def at(self, home: Path) -> Pipeline:
        """The same experiment with its artifacts elsewhere."""
        return Pipeline(self.forks, self.experiment, home)


def write_pipeline(forks: Forks, folder: Path, *, num_images: int = 22, shard: int = 8, **settings: Any) -> Pipeline:
    """A folder of random 8x8 images in shards of `shard`, a tiny untrained encoder, two levels: half a second of work.

    settings: further ones of the experiment's file.
    """
    photos = folder / "photos"
    photos.mkdir(parents=True, exist_ok=True)
    for i in range(num_images):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(photos / f"{i:04d}.png")
    images = {"source": "folder", "path": "photos", "labels": False, "images_per_shard": shard}
    plain = {"recipe": "toy", "images": images, "conditioning": {"labels": "none"}, "evaluation": {"probe": False}}
    experiment = folder / "small.yaml"
    experiment.write_text(json.dumps({**plain, **settings}))  # JSON is YAML
    return Pipeline(forks, experiment, folder / "home")


def make_first(pipeline: Pipeline, source: Pipeline, stage: str) -> None:
    """All that `stage` (a folder of the artifact root, or `bases`) reads, copied from another run."""
    made = ("images", "encoder", "features", "moments", "svd_basis", "latents")
    for name in made[: made.index("moments" if stage == "bases" else stage)]:
        shutil.copytree(source.home / name, pipeline.home / name)


# --- what must hold -----------------------------------------------------------------------------------------------


def contents(home: Path) -> dict[str, bytes]:
    """Every file below an artifact root, byte by byte, but for the locks, which name processes."""
    return {str(p.relative_to(home)): p.read_bytes() for p in sorted(home.rglob("*")) if p.is_file() and p.name != LOCK}


def committed(home: Path) -> dict[Path, Inode]:
    """The files that sealed artifacts and committed parts vouch for, as they are now; to be kept by any later run."""
    files: dict[Path, Inode] = {}
    parts = (part for part in home.glob(f"*/*/{PARTS}/*.json") if not part.name.startswith(TEMPORARY))
    for record in [*parts, *home.glob(f"*/*/{MANIFEST}")]:
        artifact = record.parent.parent if record.parent.name == PARTS else record.parent
        for file in (record, *(artifact / name for name in json.loads(record.read_text())["files"])):
            status = file.stat()
            files[file] = (status.st_ino, status.st_mtime_ns)
    return files


def assert_recovered(pipeline: Pipeline, undisturbed: Pipeline, kept: dict[Path, Inode]) -> None:
    """The artifacts are those of an undisturbed run, byte for byte and file for file; nothing of `kept` was redone."""
    found, expected = contents(pipeline.home), contents(undisturbed.home)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    now = committed(pipeline.home)
    assert [file for file, inode in kept.items() if now.get(file) != inode] == []
    assert list(find_litter(pipeline.home, [pipeline.x])) == []


@contextmanager
def a_process(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that prints `ready` and is ended behind the block."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
