"""Runs commands in children of one process that has imported everything, which makes hundreds of them cheap.

A script, started by harness.py. It reads one JSON object a line: {"start": {...}} forks a child, which becomes the
leader of a process group of its own and runs `nestdiff_core.cli.main`, and answers its process id; {"wait": id}
answers how it ended, as subprocess does (-9: by SIGKILL), and the most memory that it held (KiB, what it shares with
the parent included).

What can be done to a child:

    kill_at     SIGKILL before the k-th change that it makes to the disk: a file opened for writing, flushed, renamed
                or removed, a directory made or removed
    torn_at     killed in the middle of the first file that grows beyond so many bytes, which stays as it is then
    full_at     no file can be longer than so many bytes, as on a full disk
    memory      bytes that it may use beyond what it has when it starts
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import signal
import sys
import traceback
from typing import Any

import safetensors.torch  # noqa: F401
import timm  # noqa: F401

from nestdiff_core import loading, stages  # noqa: F401
from nestdiff_core.artifacts import code_version
from nestdiff_core.cli import main, run, verify  # noqa: F401

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def die_before_change(k: int, root: str) -> None:
    """SIGKILL before the k-th change below `root`; flushes count wherever they are. Threads share the counter."""
    counter = itertools.count(1)

    def change() -> None:
        if next(counter) == k:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(root):
                change()
        elif event in CHANGES:
            change()

    def fsync(handle: int, flush: Any = os.fsync) -> None:
        change()
        flush(handle)

    sys.addaudithook(hook)
    os.fsync = fsync


def hurt(faults: dict[str, int], root: str) -> None:
    """Arm what is to happen to this process."""
    if "kill_at" in faults:
        die_before_change(faults["kill_at"], root)
    for name, action in (("torn_at", signal.SIG_DFL), ("full_at", signal.SIG_IGN)):
        if name in faults:
            signal.signal(signal.SIGXFSZ, action)
            resource.setrlimit(resource.RLIMIT_FSIZE, (faults[name], faults[name]))
    if "memory" in faults:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + faults["memory"], used + faults["memory"]))


def child(order: dict[str, Any]) -> None:
    """Becomes the command; does not return."""
    os.setpgid(0, 0)
    output = os.open(order["output"], os.O_WRONLY)
    for handle in (1, 2):
        os.dup2(output, handle)
    os.environ.update(order["environment"])
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        hurt(order["faults"], order["environment"]["NESTDIFF_HOME"])
        code = main(order["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    code_version()  # remembered: a file of the checkout that is changed meanwhile does not make results differ
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: Any = os.fork()
            if answer == 0:
                child(request["start"])
            with contextlib.suppress(OSError):  # it may have done so, or ended: whoever kills the group finds it
                os.setpgid(answer, answer)
        else:
            _, status, used = os.wait4(request["wait"], 0)
            answer = [os.waitstatus_to_exitcode(status), used.ru_maxrss]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
