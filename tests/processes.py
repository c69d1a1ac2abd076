"""What tests ask of processes other than their own."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def wait_for(condition: Callable[[], Any], seconds: float = 30.0, what: str = "what is waited for") -> Any:
    """The first true value of `condition`; fails after `seconds`.

    Most of the time is left to what is waited for: a question that is costly to answer is asked less often.
    """
    asked = time.monotonic()
    end = asked + seconds
    while not (value := condition()):
        answered = time.monotonic()
        assert answered < end, f"{what} did not happen within {seconds} s"
        time.sleep(max(0.002, 4 * (answered - asked)))
        asked = time.monotonic()
    return value


def free_port() -> int:
    """One on which nothing listens, below those that the kernel lends to clients: whoever keeps asking one of these
    whether it answers yet may be connected to itself, and then holds it."""
    lent = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, lent)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def listening(pids: Iterable[int]) -> set[str]:
    """Addresses, in hexadecimal, on which these processes accept connections."""
    sockets = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(os.readlink(handle))
            except OSError:
                continue
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}
