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
import fcntl
import functools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestdiff_core.errors import ConfigError, EnvironmentFault, Interrupted

EXIT_FILE = "NESTDIFF_EXIT_FILE"
DIE_WITH_PARENT = "NESTDIFF_DIE_WITH_PARENT"
MEETING = "NESTDIFF_MEETING"
GRACE_SECONDS = 35.0  # a trainer saves within 15, torchrun ends its workers after 30, Dagster waits 45
LOOK_SECONDS = 60.0  # how long an agent looks for the meeting point before its parent starts it again
STOP = "stop"  # file beside the exit file: this host was asked to stop
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


def report_exit(code: int, said: str | None = None) -> None:
    """Leave the exit code for the parent (called by the worker of rank 0, or by one that cannot go on).

    said: what the parent says as its last words, behind those of torchrun.
    """
    if path := os.environ.get(EXIT_FILE):
        Path(path).write_text(json.dumps({"code": code, "said": said}))


def has_reported() -> bool:
    """Whether some worker has left an exit code."""
    return EXIT_FILE in os.environ and Path(os.environ[EXIT_FILE]).is_file()


def stop_was_asked() -> bool:
    """Whether the parent has been asked to stop; a worker that starts after that has not got the signal."""
    return EXIT_FILE in os.environ and Path(os.environ[EXIT_FILE]).with_name(STOP).is_file()


def last_report() -> dict[str, Any] | None:
    """What a worker of this host left before torchrun started them all again: {"code": ..., "said": ...}."""
    return json.loads(Path(os.environ[EXIT_FILE]).read_text()) if has_reported() else None


def run_torchrun(command: Sequence[str], *, num_processes: int, hosts: Hosts | None = None, restarts: int = 0) -> int:
    """Run `python -m nestdiff_core COMMAND` in `num_processes` workers under torchrun; returns the exit code that one
    of this host's workers reported.

    hosts: for workers on several machines, each of which runs the same command. restarts: how often workers are all
    started again after one died.

    SIGTERM and SIGINT are passed on to the workers, which save and end. None of them lives when this returns. Raises
    EnvironmentFault where the hosts do not meet.
    """
    # Before the agent is: its children become ours when it is killed.
    with _adopting(), tempfile.TemporaryDirectory(prefix="nestdiff-") as folder:
        exit_file, lost_file = Path(folder) / "exit.json", Path(folder) / "agent.json"
        meeting, environment = _one_host(Path(folder)) if hosts is None else hosts.options()
        agent = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *meeting,
            f"--nproc-per-node={num_processes}",
            f"--max-restarts={restarts}",
            f"--log-dir={folder}/logs",  # else a directory in /tmp that stays
            *("-m", "nestdiff_core", *command),
        ]
        environment |= {
            EXIT_FILE: str(exit_file),
            DIE_WITH_PARENT: str(os.getpid()),
            "OMP_NUM_THREADS": _threads(num_processes),
            # A store of their own each time workers start. In the agent's, which torch shares with them by default,
            # they may find the addresses of those that died, and a host that comes back never finds rank 0's.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "TORCHELASTIC_ERROR_FILE": str(lost_file),
        }
        alone_since = time.monotonic()
        while True:
            began = time.monotonic()
            status = _run_agent(agent, environment, stop_file=Path(folder) / STOP)
            if exit_file.is_file():
                report = json.loads(exit_file.read_text())
                if report.get("said"):
                    print(report["said"], file=sys.stderr, flush=True)
                return int(report["code"])
            if (Path(folder) / STOP).is_file():
                raise Interrupted("Stopped before it could save", fix="Run the same command again: it resumes.")
            if status < 0:
                raise EnvironmentFault(
                    f"torchrun was killed by signal {-status}",
                    fix="See who did it (dmesg, if the memory ran out), and run the same command again: it resumes.",
                )
            if hosts is None or not status or (lost := _lost(lost_file)) is None:
                return 1 if status else 0
            if time.monotonic() - began > LOOK_SECONDS + 30.0:  # it had met the others
                alone_since = time.monotonic()
            if time.monotonic() - alone_since > hosts.join_seconds:
                raise EnvironmentFault(
                    f"The {hosts.count} hosts do not meet",
                    key="--rendezvous",
                    expected=f"every host at {hosts.rendezvous} within {hosts.join_seconds:g} s",
                    found=lost,
                    fix="Run the same command on every host; check that each reaches that address and port.",
                )
            print(f"The host of the meeting point is gone or not there yet ({lost}). Joining again.", file=sys.stderr)
            lost_file.unlink()
            time.sleep(1.0)


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Within the block, a descendant whose parent dies becomes a child of this process (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _one_host(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Options of torchrun, and its environment, for processes of this machine only.

    They meet in files of a folder that is this user's own. torch's network stores (as of --standalone) would listen on
    every interface, and unpickle what anybody sends them.
    """
    options = ["--rdzv-backend=c10d", f"--rdzv-endpoint={folder / 'agent'}", "--rdzv-conf=store_type=file"]
    loopback = {name: os.environ.get(name) or "lo" for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return [*options, "--rdzv-id=one-host"], {MEETING: str(folder), **(loopback if sys.platform == "linux" else {})}


def meeting_point() -> str | None:
    """For torch.distributed.init_process_group: the file in which processes of one host meet; None: by torchrun's
    address. Another one each time that torchrun starts them again."""
    if MEETING not in os.environ:
        return None
    return f"file://{os.environ[MEETING]}/workers-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


@dataclass(frozen=True)
class Hosts:
    """Machines that work together, and where they meet.

    rendezvous: HOST:PORT, the same on all; HOST is an address of one of them, which keeps the list of who is there.
    name: what they do together, so that others at the same address are not mixed up with them. join_seconds: how long
    they wait for one another, at the start and for one that was lost.
    """

    count: int
    rendezvous: str
    name: str
    join_seconds: float = 600.0

    def options(self) -> tuple[list[str], dict[str, str]]:
        """Options of torchrun, and its environment."""
        host, _, port = self.rendezvous.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(
                "The meeting point cannot be used",
                key="--rendezvous",
                expected="HOST:PORT, an address of one of the hosts and a free port there",
                found=self.rendezvous,
                fix="Give the same one on every host.",
            )
        mine = _address_towards(host, int(port))
        meeting = {
            "join_timeout": round(self.join_seconds),
            "read_timeout": round(LOOK_SECONDS),
            "last_call_timeout": 2,
            "keep_alive_interval": 2,
            "keep_alive_max_attempt": 5,
        }
        # torch recognises itself by its host name, which need not be what the others call it. Several "hosts" on one
        # machine's loopback find out for themselves who was first.
        if not mine.startswith("127."):
            meeting["is_host"] = int(_is_here(host))
        options = [
            f"--nnodes={self.count}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.rendezvous}",
            f"--rdzv-id={self.name}",
            "--rdzv-conf=" + ",".join(f"{name}={value}" for name, value in meeting.items()),
            f"--local-addr={mine}",
        ]
        interface = os.environ.get("GLOO_SOCKET_IFNAME") or _interface(mine)  # else that of this machine's own name
        return options, {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the way to `host`."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as way:
            way.connect(address)  # sends nothing
            return str(way.getsockname()[0])
    except OSError as error:
        raise EnvironmentFault(
            f"There is no way to the meeting point ({error.strerror or error})",
            key="--rendezvous",
            found=f"{host}:{port}",
            fix="Correct the address, or this machine's network.",
        ) from None


def _is_here(host: str) -> bool:
    """Whether an address is one of this machine's."""
    family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def _interface(address: str) -> str | None:
    """Name of the network interface with an IPv4 address; None where that cannot be found out."""
    get_address = 0x8915  # SIOCGIFADDR
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, contextlib.suppress(OSError):
            record = fcntl.ioctl(any_socket, get_address, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(record[20:24]) == address:
                return name
    return None


def _lost(lost_file: Path) -> str | None:
    """Why the agent ended, where that was for the meeting point and not for a worker."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        said = str(json.loads(lost_file.read_text())["message"]["message"])
        if said.startswith(("Rendezvous", "Dist")):
            return said.split("\n", 1)[0]
    return None


def _run_agent(command: Sequence[str], environment: dict[str, str], *, stop_file: Path) -> int:
    """Run torchrun until it and all that it started have ended; returns its status."""
    asked: list[float] = []

    def stop(*_: object) -> None:
        asked.append(time.monotonic())
        stop_file.touch()
        _ask_to_stop(agent.pid)

    others = _children(os.getpid())  # those of a notebook, say
    agent = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        start_new_session=True,
        preexec_fn=functools.partial(_begin_agent, os.getpid()),
    )
    before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        while (status := agent.poll()) is None:
            time.sleep(0.05)
            if asked and time.monotonic() - asked[0] > GRACE_SECONDS:
                agent.kill()
        _end_orphans(others, give_up=0.0 if asked and status == -signal.SIGKILL else GRACE_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status


def _begin_agent(parent: int) -> None:
    """Within the new process, before it becomes torchrun."""
    die_with_parent()
    if os.getppid() != parent:
        os._exit(Interrupted.code)


def _end_orphans(others: Sequence[int], give_up: float) -> None:
    """Wait until no child is left but `others`: the workers of a killed agent, which save and end; after `give_up` s
    kill them."""
    end = time.monotonic() + give_up
    while orphans := set(_children(os.getpid())).difference(others):
        for pid in orphans:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if time.monotonic() >= end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _threads(num_processes: int) -> str:
    """Threads per worker: torchrun would say 1, which leaves the other cores idle."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // num_processes))


def _cores() -> int:
    """Those that this process may use: within a Slurm job or a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


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
