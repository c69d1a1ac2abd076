"""Work as a job of a Slurm cluster: written as a batch script, submitted, watched until it ends, stopped with grace.

    HOME/slurm/NAME/   job.json   which job it is       job.sh   what was submitted       log.txt   what it says

HOME lies on storage that the cluster's nodes share. One process at a time watches a job (a lock). The job does not end
with that process: whoever watches next finds it by job.json, and submits another only when it is no more.
Everything about the site (partition, account, time limit, GPUs) is said in sbatch's own words, `runtime.slurm_options`,
or in its environment variables (SBATCH_PARTITION, ...).
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nestdiff_core.config import RuntimeConfig
from nestdiff_core.errors import ConfigError, EnvironmentFault, IntegrityError, Interrupted, NestdiffError
from nestdiff_core.files import DirectoryLock, read_json, write_bytes, write_json

OURS = ("nodes", "ntasks", "ntasks-per-node", "output", "error", "array", "wait", "parsable", "wrap")
WARNING_SECONDS = 90  # before the time limit, in which training saves
PATIENCE_SECONDS = 600  # between the ends of two hosts: the first may have to put its result into object storage
LEAST_SECONDS = 60  # a job that its time limit stops earlier makes no way, and is not submitted again
STOP_SECONDS = 60.0  # Slurm kills what is left after its KillWait, 30 s by default
UNREACHABLE_SECONDS = 600.0
LOST = ("NODE_FAIL", "PREEMPTED", "BOOT_FAIL")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "REVOKED", *LOST)

SCRIPT = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={hosts}
#SBATCH --ntasks-per-node=1
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@{warning}
{setup}
{exports}
${{SLURM_CPUS_PER_TASK:+export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK}}
{meeting}
# exec: the shell would die of the signal that lets training save. All hosts end with the same code within moments of
# each other, and Slurm must not end one with another: the job's code is what says whether it is to go on.
exec srun --kill-on-bad-exit=0 --wait={patience} {command}
"""
# The port depends on the job, as two jobs may have the same first node.
MEETING = """HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ADDRESS=$(scontrol show node "$HEAD" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')"""
RENDEZVOUS = ' --hosts={hosts} "--rendezvous=$ADDRESS:$((20000 + SLURM_JOB_ID % 10000))"'


@dataclass(frozen=True)
class State:
    """Of a job, as Slurm says it: PENDING, RUNNING, ...; code: its exit code; seconds: that it ran; reason: why not."""

    name: str
    code: int
    seconds: int
    reason: str

    @property
    def ended(self) -> bool:
        return self.name in ENDED


@dataclass(frozen=True)
class Job:
    """What is to be done, and where its job's files are.

    arguments: of `python -m nestdiff_core`, without those about hosts. several_hosts: whether hosts can share the work.
    """

    folder: Path
    arguments: Sequence[str]
    runtime: RuntimeConfig
    several_hosts: bool = True

    def lock(self) -> DirectoryLock:
        """The right to watch this job, and to read what it leaves; raises LockHeld where another process has it."""
        return DirectoryLock(self.folder)

    def run(
        self,
        environment: Mapping[str, str],
        *,
        log: Callable[[str], object],
        said: Callable[[str], object],
        poll_seconds: float = 5.0,
    ) -> None:
        """Submit the job, or find the one that was submitted before, and wait for its end; to be called under `lock`.

        environment: variables that it needs beside those that sbatch passes on; no secrets, as they are written down.
        log: is told what becomes of the job. said: gets every line that it prints.

        A job that its time limit has stopped is submitted again, and resumes; one whose node was lost or that was
        preempted Slurm starts again itself. An interruption of this process (not its death) cancels the job, and
        returns when it has saved and ended. Raises EnvironmentFault for a job that did not do its work.
        """
        job, position = self._alive(), 0
        if job is not None:
            log(f"Slurm job {job} is doing this already: attached to it.")
            position = self._log.stat().st_size if self._log.is_file() else 0
        while True:
            if job is None:
                job, position = self._submit(environment), 0
                log(f"Submitted as Slurm job {job}, which prints to {self._log}.")
            try:
                state, position = self._watch(job, log, said, position, poll_seconds)
            except NestdiffError:
                raise
            except BaseException:
                log(f"Stopping Slurm job {job}.")
                self._stop(job, poll_seconds)
                raise
            if not self._goes_on(job, state):
                return
            log(f"Slurm job {job} was stopped by its time limit after {state.seconds} s. It goes on as another.")
            job = None

    @property
    def _log(self) -> Path:
        return self.folder / "log.txt"

    def _alive(self) -> str | None:
        """Number of the job that was submitted before and has not ended."""
        with contextlib.suppress(IntegrityError):
            job = str(read_json(self.folder / "job.json")["job"])
            state = job_state(job)
            return job if state is not None and not state.ended else None
        return None  # there was none

    def _submit(self, environment: Mapping[str, str]) -> str:
        self._log.unlink(missing_ok=True)
        write_bytes(self.folder / "job.sh", self.script(environment).encode())
        options = shlex.split(self.runtime.slurm_options)
        for option in options:
            if option.lstrip("-").split("=")[0] in OURS or not option.startswith("-"):
                raise ConfigError(
                    "runtime.slurm_options cannot be used",
                    key="runtime.slurm_options",
                    expected="sbatch's options as --name=value, but for " + ", ".join(OURS),
                    found=option,
                    fix="Change it; runtime.hosts and runtime.processes say on how much the work runs.",
                )
        done = _slurm("sbatch", "--parsable", *options, str(self.folder / "job.sh"))
        if done.returncode:
            raise EnvironmentFault(
                "Slurm does not take the job",
                key="runtime.slurm_options",
                found=done.stderr.strip(),
                fix="Change runtime.slurm_options, or the site's SBATCH_ variables.",
            )
        job = done.stdout.strip().split(";")[0]
        write_json(self.folder / "job.json", {"job": job})
        return job

    def script(self, environment: Mapping[str, str]) -> str:
        """The batch script."""
        runtime, hosts = self.runtime, self.runtime.hosts if self.several_hosts else 1
        command = shlex.join([sys.executable, "-m", "nestdiff_core", *self.arguments])
        return SCRIPT.format(
            name=self.folder.name,
            hosts=hosts,
            log=self._log,
            warning=WARNING_SECONDS,
            patience=PATIENCE_SECONDS,
            setup=runtime.slurm_setup,
            exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
            meeting=MEETING if hosts > 1 else "",
            command=command + (RENDEZVOUS.format(hosts=hosts) if hosts > 1 else ""),
        )

    def _watch(
        self, job: str, log: Callable[[str], object], said: Callable[[str], object], position: int, poll_seconds: float
    ) -> tuple[State, int]:
        """Wait for the end of a job; returns it, and how far its log has been read."""
        shown, reached = "", time.monotonic()
        while True:
            position = self._tell(said, position)
            try:
                state = job_state(job)
                reached = time.monotonic()
            except EnvironmentFault:
                if time.monotonic() - reached > UNREACHABLE_SECONDS:
                    raise
                time.sleep(poll_seconds)
                continue
            if state is None:
                raise EnvironmentFault(
                    f"Slurm has forgotten job {job}",
                    path=self._log,
                    fix="Run it again: it resumes, or finds that the work is done.",
                )
            if (now := f"{state.name} {state.reason}".strip()) != shown:
                shown = now
                log(f"Slurm job {job}: {now}")
            if state.ended:
                return state, self._tell(said, position)
            time.sleep(poll_seconds)

    def _tell(self, said: Callable[[str], object], position: int) -> int:
        """Pass on whole lines of the log from `position` on; returns the next position."""
        with contextlib.suppress(FileNotFoundError), self._log.open("rb") as file:
            file.seek(position)
            lines = file.read().splitlines(keepends=True)
            for line in lines:
                if line.endswith(b"\n"):
                    position += len(line)
                    said(line.decode(errors="replace").rstrip("\n"))
        return position

    def _goes_on(self, job: str, state: State) -> bool:
        """Whether a job that has ended is to be submitted again; raises what it ended with, if with an error."""
        match state.name:
            case "COMPLETED":
                return False
            case "FAILED" if state.code == Interrupted.code and state.seconds >= LEAST_SECONDS:
                return True
            case name if name in LOST:
                raise EnvironmentFault(
                    f"Slurm job {job} has lost its nodes ({name}) and was not started again",
                    path=self._log,
                    fix="Run it again: it resumes.",
                )
        words = self._log.read_text(errors="replace").splitlines()[-20:] if self._log.is_file() else []
        raise EnvironmentFault(
            f"Slurm job {job} has ended as {state.name} with exit code {state.code}",
            path=self._log,
            found="\n".join(words),
            fix="Run it again to resume, once what it says is mended.",
        )

    def _stop(self, job: str, poll_seconds: float) -> None:
        _slurm("scancel", job)
        end = time.monotonic() + STOP_SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(EnvironmentFault):
                state = job_state(job)
                if state is None or state.ended:
                    return
            time.sleep(min(1.0, poll_seconds))


def job_state(job: str) -> State | None:
    """What Slurm says of a job; None where it does not know it (any more)."""
    done = _slurm("scontrol", "show", "job", "--oneliner", job)
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return None
        raise EnvironmentFault(
            "Slurm does not answer", found=done.stderr.strip(), fix="Check `scontrol ping`, then run it again."
        )
    said = dict(re.findall(r"(JobState|ExitCode|RunTime|Reason)=(\S+)", done.stdout))
    code, _, number = said["ExitCode"].partition(":")
    days, _, clock = said["RunTime"].rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return State(
        name=said["JobState"],
        code=int(code) or (128 + int(number) if int(number) else 0),
        seconds=int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds,
        reason="" if said["Reason"] == "None" else said["Reason"],
    )


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFault(
            f"Slurm's {command[0]} cannot be used ({error})",
            key="runtime.launcher",
            fix="Run this on a machine from which jobs can be submitted, or set runtime.launcher: local.",
        ) from None
