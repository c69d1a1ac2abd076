"""Ends runs whose process has died, and frees their pool slots.

Dagster's default launcher cannot tell that a killed run is dead: it stays STARTED and keeps its slot of the `gpu`
pool, for which the next run would wait without end. Every run therefore says which process executes it (`noted`, a tag
of the run), and ends those of this machine that have died, at its beginning and while it waits; the sensor `dead_runs`
looks too, and `python -m pipelines.recover` does it by hand. Runs of other machines and of other projects are left
alone.

A run that waits for a slot can be stopped, and leaves the processor to the one that has it.
"""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
from dagster._core.errors import raise_execution_interrupts
from dagster._core.execution.plan.active import ActiveExecution
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext

PROCESS = "nestdiff/process"  # tag of a run: who executes it
UNFINISHED = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def recover(instance: dg.DagsterInstance) -> list[str]:
    """Mark dead runs as failed and free the slots that they and ended runs have left taken; returns the runs' ids."""
    ended = []
    for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
        if not is_dead(run):
            continue
        now = instance.get_run_by_id(run.run_id)
        if now is None or now.is_finished:  # it ended by itself while we looked
            continue
        instance.report_run_failed(
            now, f"The process of this run ({run.tags[PROCESS]}) has died. Run it again: finished work is kept."
        )
        ended.append(run.run_id)
    storage = instance.event_log_storage
    for run_id in storage.get_concurrency_run_ids() if storage.supports_global_concurrency_limits else ():
        run = instance.get_run_by_id(run_id)
        if run is None or (run.is_finished and is_dead(run)):
            storage.free_concurrency_slots_for_run(run_id)
    return ended


def is_dead(run: dg.DagsterRun) -> bool:
    """Whether the process of a run is known to have ended; False where it cannot be known from here."""
    machine, _, process = run.tags.get(PROCESS, "").partition(" pid ")
    here = this_machine()
    if not process or machine.split()[0] != here.split()[0]:
        return False
    if machine.split()[1] != here.split()[1]:
        return True  # the machine has been started again since
    if machine != here:
        return False  # in another container
    pid, _, began = process.partition(" ")
    return _began(int(pid)) != began


def this_machine() -> str:
    """Its name, which start of it this is, and, in a container, whose process numbers these are."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    numbers = Path("/proc/self/ns/pid")
    return " ".join(
        [
            socket.gethostname(),
            boot.read_text().strip()[:8] if boot.exists() else "-",
            os.readlink(numbers) if numbers.is_symlink() else "-",
        ]
    )


def this_process() -> str:
    """This process as no other is called: a number is given again, a number and a time since the start are not."""
    return f"{this_machine()} pid {os.getpid()} {_began(os.getpid())}"


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty where it is not. No clock that may jump is read."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if Path("/proc/self/stat").exists() or not _exists(pid) else "-"
    return "" if state in "ZX" else rest[18]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


# --- waiting for a slot -------------------------------------------------------------------------------------------
#
# Dagster's own wait (as of 1.13.27) is a loop without a pause, on a whole core beside the training that has the slot.

WAIT_SECONDS = 2.0
PAUSE_SECONDS = 0.1  # a run whose steps are processes looks after those in the same loop

_claim = InstanceConcurrencyContext.claim


def claim(self: InstanceConcurrencyContext, concurrency_key: str, step_key: str, step_priority: int = 0) -> bool:
    """Whether a step may begin, with a pause where it may not."""
    if _claim(self, concurrency_key, step_key, step_priority):
        return True
    time.sleep(PAUSE_SECONDS)
    return False


def wait_for_slot(self: ActiveExecution) -> None:
    """What a run in one process does while no step of it may begin.

    In place of Dagster's own, which hears neither Ctrl-C nor a stop in the web UI until it has got the slot, and never
    gets one that was promised to a run that has died while it waited.
    """
    if (slots := self._instance_concurrency_context) is not None:
        recover(slots._instance)
    with raise_execution_interrupts():
        time.sleep(max(self.sleep_interval(), WAIT_SECONDS))


InstanceConcurrencyContext.claim = claim
ActiveExecution.sleep_til_ready = wait_for_slot


# --- executors ----------------------------------------------------------------------------------------------------


class _Noted(dg.Executor):
    """Runs begin with `recover`, and say who executes them."""

    def __init__(self, executor: dg.Executor) -> None:
        self._executor = executor

    @property
    def retries(self):
        return self._executor.retries

    @property
    def step_dependency_config(self):
        return self._executor.step_dependency_config

    def execute(self, plan_context, execution_plan) -> Iterator[dg.DagsterEvent]:
        for run_id in recover(plan_context.instance):
            plan_context.log.info(f"Run {run_id} had died: it is marked as failed, and its pool slot is free.")
        plan_context.instance.add_run_tags(plan_context.run_id, {PROCESS: this_process()})
        yield from self._executor.execute(plan_context, execution_plan)


def noted(definition: dg.ExecutorDefinition) -> dg.ExecutorDefinition:
    """The same executor for runs that can be told to have died."""
    create = definition.executor_creation_fn
    assert create is not None
    return dg.ExecutorDefinition(
        name=definition.name,
        config_schema=definition.config_schema,  # pyright: ignore[reportArgumentType]
        requirements=definition.get_requirements,
        executor_creation_fn=lambda context: _Noted(create(context)),
        description=definition.description,
    )


if __name__ == "__main__":
    with dg.DagsterInstance.get() as dagster_instance:
        for dead in recover(dagster_instance):
            print(f"Run {dead} had died; it is marked as failed and its pool slot is free.")
