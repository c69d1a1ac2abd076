"""How long each step of the last run of a job took, as a Markdown table.

. .venv/bin/activate
python scripts/stage_times.py quickstart
"""

from __future__ import annotations

import argparse

import dagster as dg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    job = parser.parse_args().job
    with dg.DagsterInstance.get() as instance:
        record = next(iter(instance.get_run_records(dg.RunsFilter(job_name=job), limit=1)), None)
        if record is None:
            raise SystemExit(f"{job} has not been run in this Dagster instance.")
        print("| step | seconds |\n|---|---|")
        steps = [s for s in instance.get_run_step_stats(record.dagster_run.run_id) if s.start_time and s.end_time]
        for step in sorted(steps, key=lambda s: s.start_time or 0):
            print(f"| {step.step_key} | {(step.end_time or 0) - (step.start_time or 0):.1f} |")
        seconds = (record.end_time or 0) - (record.start_time or 0)
        print(f"| whole run ({record.dagster_run.status.value}) | {seconds:.1f} |")


if __name__ == "__main__":
    main()
