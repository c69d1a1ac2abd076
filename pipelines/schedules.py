"""Evaluation by the clock."""

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition


def build_schedules(watch: UnresolvedAssetJobDefinition) -> list[dg.ScheduleDefinition]:
    """watch: the job that judges the newest weights."""
    return [
        dg.ScheduleDefinition(
            name="nightly_evaluation",
            job=watch,
            cron_schedule="0 3 * * *",
            default_status=dg.DefaultScheduleStatus.STOPPED,
            description=(
                "Numbers of the newest weights of every level, finished or in training, every night at three, with "
                "fixed seeds, and whether one is worse than its best. Weights that have been judged are not judged "
                "again. Off until switched on."
            ),
        )
    ]
