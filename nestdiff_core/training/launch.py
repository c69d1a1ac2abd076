"""Starting a training job as processes of its own, and making sure that they end with whoever started them.

    launcher (an asset, a shell)  ->  this parent  ->  torchrun agent  ->  one worker per device

Each child asks the kernel for a SIGTERM when its parent dies, so a `kill -9` anywhere above lets the workers save
and end. Who cannot end (a worker that waits for another in the middle of a collective) ends all the same, GRACE_SECONDS
later. The parent adopts the workers of an agent that was killed and returns when none is left, so that whoever starts
again finds the directory free. The agent runs in a session of its own, so a Ctrl-C reaches the parent only, which
passes it on. torchrun turns every failure into exit code 1; the true code comes back through a small file.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from nestdiff_core.errors import EnvironmentFault, Interrupted

EXIT_FILE = "NESTDIFF_EXIT_FILE"
DIE_WITH_PARENT = "NESTDIFF_DIE_WITH_PARENT"
GRACE_SECONDS = 35.0  # a trainer saves within 15, torchrun ends its workers after 30, Dagster waits 45
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_parent(with_signal: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel (Linux) to send this process a signal when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, with_signal)


def end_with_parent() -> None:
    """As `die_with_parent`, and for good GRACE_SECONDS after it.

    Ends at once where the parent has died before it could be asked for: the one whose number DIE_WITH_PARENT holds,
    or, within a worker, the torchrun agent.
    """
    parent = os.getppid()
    die_with_parent()
    if under_torchrun():
        orphaned = b"torch.distributed.run" not in _command_line(parent)
    else:
        orphaned = os.environ.get(DIE_WITH_PARENT, "").isdigit() and parent != int(os.environ[DIE_WITH_PARENT])
    if orphaned:
        os._exit(Interrupted.code)
    threading.Thread(target=_outlive, args=(parent,), daemon=True, name="end with parent").start()


def _outlive(parent: int) -> None:
    """End this process GRACE_SECONDS after its parent, however it may hang: threads run while a collective waits."""
    while os.getppid() == parent:
        time.sleep(1.0)
    if sys.platform != "linux":
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(Interrupted.code)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _command_line(pid: int) -> bytes:
    """With its arguments; where there is no /proc, as if it were a torchrun agent's."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b"" if sys.platform == "linux" else b"torch.distributed.run"


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def report_exit(code: int) -> None:
    """Leave the exit code for the parent (called by the worker of rank 0)."""
    if path := os.environ.get(EXIT_FILE):
        Path(path).write_text(json.dumps({"code": code}))


def run_torchrun(command: Sequence[str], *, num_processes: int) -> int:
    """Run `python -m nestdiff_core COMMAND` in `num_processes` workers under torchrun; returns the exit code of rank 0.

    SIGTERM and SIGINT are passed on to the workers, which save and end. None of them lives when this returns.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # before the agent is: its children become ours when it is killed
    asked: list[float] = []

    def stop(*_: object) -> None:
        asked.append(time.monotonic())
        _ask_to_stop(agent.pid)

    with tempfile.TemporaryDirectory(prefix="nestdiff-") as folder:
        exit_file = Path(folder) / "exit.json"
        agent = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={num_processes}",
                "-m",
                "nestdiff_core",
                *command,
            ],
            env={
                **os.environ,
                EXIT_FILE: str(exit_file),
                DIE_WITH_PARENT: str(os.getpid()),
                "OMP_NUM_THREADS": _threads(num_processes),
            },
            start_new_session=True,
            preexec_fn=functools.partial(_begin_agent, os.getpid()),
        )
        before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            while (status := agent.poll()) is None:
                time.sleep(0.05)
                if asked and time.monotonic() - asked[0] > GRACE_SECONDS:
                    agent.kill()
            _end_orphans(give_up=0.0 if asked and status == -signal.SIGKILL else GRACE_SECONDS)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if exit_file.is_file():
            return int(json.loads(exit_file.read_text())["code"])
        if asked:
            raise Interrupted(
                "Stopped by signals before it could save",
                stage="denoiser",
                fix="Run the same command again: it resumes from the last checkpoint.",
            )
        if status < 0:
            raise EnvironmentFault(
                f"torchrun was killed by signal {-status}",
                stage="denoiser",
                fix="See who did it (dmesg, if the memory ran out), and run the same command again: it resumes.",
            )
        return 1 if status else 0


def _begin_agent(parent: int) -> None:
    """Within the new process, before it becomes torchrun."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(Interrupted.code)


def _end_orphans(give_up: float) -> None:
    """Wait until no child is left: the workers of a killed agent, which save and end; after `give_up` s kill them."""
    end = time.monotonic() + give_up
    while children := _children(os.getpid()):
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if time.monotonic() >= end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _threads(num_processes: int) -> str:
    """Threads per worker: torchrun would say 1, which leaves the other cores idle."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // num_processes))


def _ask_to_stop(agent: int) -> None:
    """SIGTERM to the agent's workers; to the agent itself while it has none yet."""
    for pid in _children(agent) or [agent]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _children(pid: int) -> list[int]:
    """Children of the main thread of a process; none where there is no /proc, or the process has gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
