"""Evaluation by the clock."""

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition


def build_schedules(evaluate: UnresolvedAssetJobDefinition) -> list[dg.ScheduleDefinition]:
    return [
        dg.ScheduleDefinition(
            name="nightly_evaluation",
            job=evaluate,
            cron_schedule="0 3 * * *",
            default_status=dg.DefaultScheduleStatus.STOPPED,
            description=(
                "Samples and numbers of the newest denoisers every night at three, with fixed seeds; what is there "
                "already is checked against its manifest, not computed again. Off until switched on."
            ),
        )
    ]
