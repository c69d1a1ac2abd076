"""Work that several processes share: started under torchrun, reported by one of them, ended in order.

Not a verb. A verb's `run` calls `share`: where more than one process is wanted the same command is started in each of
them, and where it already runs under torchrun (this one's, or one over several hosts) it does its part.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

from nestdiff_core.errors import Interrupted, NestdiffError
from nestdiff_core.progress import LogProgress, NumbersProgress, Progress, TerminalProgress, all_of, silent
from nestdiff_core.training import launch

PATIENCE = timedelta(days=7)  # processes meet at the end only


def share(command: Sequence[str], work: Callable[[str, Progress], object], *, device: str, processes: int) -> int:
    """Do `work(device, progress)` in `processes` processes; returns the exit code.

    command: what starts it again in each of them, without the number of processes.
    """
    if launch.DIE_WITH_PARENT in os.environ:
        launch.end_with_parent()
    if launch.under_torchrun():
        return _worker(work, device)
    if processes > 1:
        return launch.run_torchrun(command, num_processes=processes)
    from nestdiff_core.devices import choose_device

    with ended_by_signals(), reporting(0) as progress:
        work(choose_device(device), progress)
    return 0


def _worker(work: Callable[[str, Progress], object], device: str) -> int:
    """One of them. The first that refuses says so, and torchrun ends the others, which may wait for it."""
    from nestdiff_core.devices import choose_device, process_group

    rank = int(os.environ["RANK"])
    try:
        # Nothing but meetings: on the CPU, and so that nobody has to be done at the same minute as the others.
        with ended_by_signals(), process_group("cpu", patience=PATIENCE), reporting(rank) as progress:
            work(choose_device(device), progress)
    except NestdiffError as error:
        stopped = isinstance(error, Interrupted)
        if not (stopped and launch.has_reported()):  # torchrun stops the others where one has refused
            launch.report_exit(error.code, f"{error}\n{error.to_json()}")
        if launch.EXIT_FILE not in os.environ:
            print(error, error.to_json(), sep="\n", file=sys.stderr, flush=True)
        if not stopped:
            raise SystemExit(error.code) from None
        return 0
    if rank == 0:
        launch.report_exit(0)
    return 0


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGINT raise Interrupted: committed work is kept, so nothing has to be saved."""

    def end(number: int, frame: object) -> None:
        raise Interrupted("Stopped by a signal", fix="Run the same command again: it goes on from there.")

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def reporting(rank: int) -> Iterator[Progress]:
    """Rank 0 reports home: to Dagster where it was launched from there, else to the terminal."""
    listener: Progress = silent
    with contextlib.ExitStack() as stack:
        if rank == 0 and "DAGSTER_PIPES_CONTEXT" in os.environ:
            listener = stack.enter_context(_to_dagster())
        elif rank == 0:
            listener = TerminalProgress()
            stack.callback(listener.close)
        yield listener


@contextlib.contextmanager
def _to_dagster() -> Iterator[Progress]:
    """Lines for the run's log, numbers to plot, and the refusal, if it ends with one, over Dagster Pipes.

    A message that cannot be delivered costs nothing but itself: training goes on.
    """
    from dagster_pipes import open_dagster_pipes

    lost = contextlib.suppress(OSError)
    pipes = None
    with lost:
        pipes = open_dagster_pipes()
    if pipes is None:
        yield silent
        return

    def log(line: str) -> None:
        with lost:
            pipes.log.info(line)

    def tell(numbers: dict[str, float]) -> None:
        with lost:
            pipes.report_custom_message({"numbers": numbers})

    try:
        yield all_of(LogProgress(log), NumbersProgress(tell))
    except NestdiffError as error:
        record = {"kind": type(error).__name__, "sentence": str(error), **json.loads(error.to_json())}
        with lost:
            pipes.log.error(str(error))
            pipes.report_custom_message({"refusal": record})
            pipes.close()
        raise
    except BaseException:
        with lost:
            pipes.__exit__(*sys.exc_info())
        raise
    with lost:
        pipes.close()
