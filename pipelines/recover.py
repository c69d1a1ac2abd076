"""Ends runs whose process has died, and frees their pool slots: `python -m pipelines.recover`.

Dagster's default launcher cannot tell that a killed run is dead: it stays STARTED and keeps its slot of the `gpu`
pool, for which the next run would wait without end. Run this on the machine that ran them; `make quickstart` and
`make dev` do.
"""

import os
from pathlib import Path

import dagster as dg

UNFINISHED = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def run_process(instance: dg.DagsterInstance, run_id: str) -> int | None:
    """The process that executes a run's steps, as its engine events tell; None before it has told."""
    found = None
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        event = entry.dagster_event
        if event is not None and (pid := event.engine_event_data.metadata.get("pid")) is not None:
            found = int(str(pid.value))
    return found


def is_dagster(pid: int) -> bool:
    """Whether a live process of this machine is Dagster's (the number may have gone to another program since)."""
    try:
        return b"dagster" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return not Path("/proc/self").exists() and _is_alive(pid)  # no /proc: not Linux


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def recover(instance: dg.DagsterInstance) -> list[str]:
    """Mark dead runs as failed and free their slots; returns their ids."""
    dead = []
    for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
        pid = run_process(instance, run.run_id)
        if pid is None or is_dagster(pid):
            continue
        instance.report_run_failed(
            run, f"The process of this run ({pid}) has died. Run it again: finished work is kept."
        )
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        dead.append(run.run_id)
    return dead


if __name__ == "__main__":
    with dg.DagsterInstance.get() as dagster_instance:
        for ended in recover(dagster_instance):
            print(f"Run {ended} had died; it is marked as failed and its pool slot is free.")
