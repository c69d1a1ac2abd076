"""Starting a training job as processes of its own, and making sure that they end with whoever started them.

    launcher (an asset, a shell)  ->  this parent  ->  torchrun agent  ->  one worker per device

Each child asks the kernel for a SIGTERM when its parent dies, so a `kill -9` anywhere above lets the workers save
and end. The agent runs in a session of its own, so a Ctrl-C reaches the parent only, which passes it on.
torchrun turns every failure into exit code 1; the true code comes back through a small file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

EXIT_FILE = "NESTDIFF_EXIT_FILE"
DIE_WITH_PARENT = "NESTDIFF_DIE_WITH_PARENT"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel (Linux) to send this process a SIGTERM when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def report_exit(code: int, said: str | None = None) -> None:
    """Leave the exit code for the parent (called by the worker of rank 0, or by one that cannot go on).

    said: what the parent says as its last words, behind those of torchrun.
    """
    if path := os.environ.get(EXIT_FILE):
        Path(path).write_text(json.dumps({"code": code, "said": said}))


def has_reported() -> bool:
    """Whether some worker has left an exit code."""
    return EXIT_FILE in os.environ and Path(os.environ[EXIT_FILE]).is_file()


def run_torchrun(command: Sequence[str], *, num_processes: int) -> int:
    """Run `python -m nestdiff_core COMMAND` in `num_processes` workers under torchrun; returns the exit code of rank 0.

    SIGTERM and SIGINT are passed on to the workers, which save and end.
    """
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
                DIE_WITH_PARENT: "1",
                "OMP_NUM_THREADS": _threads(num_processes),
            },
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        before = {n: signal.signal(n, lambda *_: _ask_to_stop(agent.pid)) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            status = agent.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if exit_file.is_file():
            report = json.loads(exit_file.read_text())
            if report.get("said"):
                print(report["said"], file=sys.stderr, flush=True)
            return int(report["code"])
        return 1 if status else 0


def _threads(num_processes: int) -> str:
    """Threads per worker: torchrun would say 1, which leaves the other cores idle."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // num_processes))


def _ask_to_stop(agent: int) -> None:
    """SIGTERM to the agent's workers; to the agent itself while it has none yet."""
    try:
        workers = [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    except OSError:  # not Linux, or the agent has gone
        workers = []
    for pid in workers or [agent]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
