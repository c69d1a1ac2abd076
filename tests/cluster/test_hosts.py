"""Training on several hosts: the losses of one, whatever dies or hangs on the way, and a word where hosts differ."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from clusters import Command, Host, Level
from processes import wait_for

PORT = 29512
TOGETHER = ("--hosts=2", "--processes=1")


def start_on(host: Host, level: Level, meeting: Host, *arguments: str) -> Command:
    return level.start(*TOGETHER, f"--rendezvous={meeting.address}:{PORT}", *arguments, inside=host.inside)


def test_hosts_that_lose_power_one_after_the_other_train_to_the_same_bits(
    level: Level, undisturbed: Level, two_hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """Without a common disk: first the second host is cut and comes back, then the one where they meet, which also
    writes the checkpoints. The result is that of two undisturbed processes on one machine."""
    a, b = two_hosts
    level.settings = {"runtime.join_seconds": 120}
    second = level.at(tmp_path / "second")
    on_a, on_b = start_on(a, level, a), start_on(b, second, a)
    wait_for(level.steps, 100, "a first checkpoint")
    b.cut_power()
    on_b.ends(-signal.SIGKILL)
    before = level.steps()[-1]
    on_b = start_on(b, second, a)
    wait_for(lambda: level.steps()[-1] > before, 100, "a checkpoint after host b came back")
    a.cut_power()
    on_a.ends(-signal.SIGKILL)
    assert level.steps()[-1] < 400
    on_a = start_on(a, level, a)
    on_a.ends(0)
    assert "Joining again" in on_b.ends(0)
    assert level.digest() == undisturbed.digest()
    assert second.steps() == []  # the first process alone writes


def test_a_killed_worker_and_one_that_hangs_are_started_again(level: Level, undisturbed: Level) -> None:
    """kill -9 of the one that writes checkpoints; SIGSTOP of the other, which the first gives up on after
    runtime.hang_seconds. Both times they go on from the last checkpoint, to the same bits."""
    level.settings = {"runtime.hang_seconds": 20}  # workers begin some seconds apart, on a busy machine ten
    command = level.start("--processes=2")
    wait_for(level.steps, 100, "a first checkpoint")
    known = level.steps()[-1] + 50  # it may have been begun
    os.kill(level.workers()[0], signal.SIGKILL)
    wait_for(lambda: level.steps()[-1] > known, 100, "a checkpoint after a worker was killed")
    workers = level.workers()
    began = time.monotonic()
    os.kill(workers[1], signal.SIGSTOP)
    wait_for(lambda: workers[0] not in level.workers(), 60, "the end of the worker that waited")
    assert 18 < time.monotonic() - began < 50
    assert level.steps()[-1] < 400
    os.kill(workers[1], signal.SIGCONT)  # else torchrun takes half a minute more before it kills it
    command.ends(0)
    assert level.digest() == undisturbed.digest()


def test_what_one_process_refuses_all_refuse(level: Level, two_hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Hosts that would train something else end before they do, with the same code, and each says why."""
    a, b = two_hosts
    second = level.at(tmp_path / "second")
    second.settings = {"levels.2.condition_noise": 0.25, "levels.2.train": {"num_steps": 390}}
    for command in [start_on(a, level, a), start_on(b, second, a)]:
        record = command.refuses(4)
        assert "do not see the same" in record["error"]
        assert record["key"] == "config"


def test_a_stop_on_any_host_saves_once_and_ends_all(level: Level, two_hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """SIGTERM to the host that writes nothing: exit code 75 on both, one checkpoint of that step."""
    a, b = two_hosts
    second = level.at(tmp_path / "second")
    on_a, on_b = start_on(a, level, a), start_on(b, second, a)
    wait_for(level.steps, 100, "a first checkpoint")
    on_b.process.send_signal(signal.SIGTERM)
    assert (
        on_a.refuses(75)["error"] == on_b.refuses(75)["error"] == f"Stopped by a signal after step {level.steps()[-1]}"
    )
    assert second.steps() == []
