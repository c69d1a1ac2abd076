"""Ends runs whose process has died, and frees their pool slots: `python -m pipelines.recover`.

Dagster's default launcher cannot tell that a killed run is dead: it stays STARTED and keeps its slot of the `gpu`
pool, for which the next run would wait without end. Run this on the machine that ran them; `make quickstart` and
`make dev` do.
"""

import os
from pathlib import Path

import dagster as dg

UNFINISHED = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def run_process(instance: dg.DagsterInstance, run_id: str) -> tuple[int, float] | None:
    """The process that executes a run's steps, and when it said so (seconds since 1970); None before it has."""
    found = None
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        event = entry.dagster_event
        if event is not None and (pid := event.engine_event_data.metadata.get("pid")) is not None:
            found = int(str(pid.value)), entry.timestamp
    return found


def is_alive(pid: int, at: float) -> bool:
    """Whether the process that had the number `pid` at a time still lives; the number may be another's since."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    began = _began(pid)
    return began is None or began <= at + 2.0  # the kernel's clock and ours differ by up to a second


def _began(pid: int) -> float | None:
    """When a process began (seconds since 1970), to a hundredth; None where there is no /proc."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    except (OSError, StopIteration):
        return None
    return int(booted.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def recover(instance: dg.DagsterInstance) -> list[str]:
    """Mark dead runs as failed and free their slots; returns their ids."""
    dead = []
    for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
        process = run_process(instance, run.run_id)
        if process is None or is_alive(*process):
            continue
        instance.report_run_failed(
            run, f"The process of this run ({process[0]}) has died. Run it again: finished work is kept."
        )
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        dead.append(run.run_id)
    return dead


if __name__ == "__main__":
    with dg.DagsterInstance.get() as dagster_instance:
        for ended in recover(dagster_instance):
            print(f"Run {ended} had died; it is marked as failed and its pool slot is free.")
