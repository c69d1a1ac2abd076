"""What cluster tests share: a level to train, and hosts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import wait_for

from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import load_experiment

REPOSITORY = Path(__file__).resolve().parents[2]


class Command:
    """A command that is running; what it says goes to a file, as a pipe that nobody reads would stop it."""

    def __init__(self, command: list[str], home: Path, **environment: str) -> None:
        self._said = home / f"said-{uuid.uuid4().hex[:6]}.txt"
        with self._said.open("w") as said:
            environment = {**os.environ, "NESTDIFF_HOME": str(home), **environment}
            self.process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=said, stderr=said)

    @property
    def said(self) -> str:
        return self._said.read_text()

    def ends(self, code: int, seconds: float = 120.0) -> str:
        """Wait for its end, which must be with this exit code; returns what it said."""
        found = self.process.wait(timeout=seconds)
        assert found == code, self.said
        return self.said

    def refuses(self, code: int, seconds: float = 120.0) -> dict[str, Any]:
        """The JSON object of its last line."""
        return json.loads(self.ends(code, seconds).splitlines()[-1])


@dataclass
class Level:
    """Level 2 of the toy experiment, to be trained below `root`, whose inputs are there; `settings` of its file."""

    root: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        path = self.root / "long.yaml"
        train = {"num_steps": 400, "checkpoint_every": 50, "log_every": 50, "keep_last": 100}
        written = path.with_suffix(".new")
        written.write_text(json.dumps({"recipe": "toy", "levels.2.train": train, **self.settings}))
        return written.replace(path)  # whole at any time: commands that were started read it

    @property
    def x(self) -> Experiment:
        return Experiment(load_experiment(self.file), self.root)

    def at(self, root: Path) -> Level:
        """The same on another disk."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Level(root, self.settings)

    def start(self, *arguments: str, inside: tuple[str, ...] = ()) -> Command:
        """`train` this level; inside: the command that it is started with."""
        train = [sys.executable, "-m", "nestdiff_core", "train", str(self.file), "--level=2", "--device=cpu"]
        return Command([*inside, *train, *arguments], self.root)

    def steps(self) -> list[int]:
        """Of its checkpoints."""
        found = self.root.glob("denoiser/*/checkpoints/step_*")
        return sorted(int(path.name.removeprefix("step_")) for path in found)

    def digest(self) -> str | None:
        """Of the trained denoiser's content."""
        made = self.x.find(Ref("denoiser", 2))
        return None if made is None else made.digest

    def processes(self) -> list[int]:
        """Live processes whose command line names this level's file."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and str(self.root).encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return found

    def workers(self) -> list[int]:
        """Of its processes those that train, by rank."""
        ranks = {}
        for pid in self.processes():
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                ranks |= {int(v[5:]): pid for v in variables if v.startswith(b"RANK=")}
        return [ranks[rank] for rank in sorted(ranks)]


# --- hosts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """A network namespace with one address."""

    namespace: str
    address: str

    @property
    def inside(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)

    def cut_power(self) -> None:
        """End all of its processes at once, whatever they do; returns when they are gone."""
        while pids := ip("netns", "pids", self.namespace).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


# --- Slurm --------------------------------------------------------------------------------------------------------


class Slurm:
    """The daemons of a cluster that was set up in `conf`."""

    def __init__(self, conf: Path) -> None:
        self.conf, self._daemons = conf, {}

    def start(self, name: str, command: list[str]) -> None:
        with (self.conf.parent / f"{name}.out").open("a") as out:
            self._daemons[name] = command, subprocess.Popen(command, stdout=out, stderr=out, env=self._environment)

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self._environment, capture_output=True, text=True).stdout.strip()

    def jobs(self) -> dict[str, str]:
        """State of every job that has not ended, by number."""
        return dict(line.split() for line in self.ask("squeue", "-h", "-o", "%i %T").splitlines())

    def cancel_all(self) -> None:
        """End every job at once; returns when the nodes are free."""
        self.ask("scancel", "--signal=KILL", "--full", "--user=root")
        self.ask("scancel", "--user=root")
        wait_for(lambda: not self.jobs(), 60, "the end of every job")

    def lose(self, node: str) -> None:
        """A node goes, with all that runs on it."""
        self._daemons[node][1].kill()
        self._daemons[node][1].wait()
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and f"SLURMD_NODENAME={node}\0".encode() in (folder / "environ").read_bytes():
                    parent = Path("/proc") / (folder / "stat").read_text().rpartition(")")[2].split()[1]
                    if (parent / "comm").read_text().startswith("slurmstepd"):
                        os.kill(int(parent.name), signal.SIGKILL)
                    os.kill(int(folder.name), signal.SIGKILL)

    def bring_back(self, node: str) -> None:
        self.start(node, self._daemons[node][0])

    def stop(self) -> None:
        for _, daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
