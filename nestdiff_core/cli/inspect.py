"""Show an experiment: its levels, what they cost and carry, which stages have been made, and its numbers.

Nothing is computed and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from nestdiff_core.config_io import to_dict
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import load_experiment
from nestdiff_core.recipes.paper import PRINTED, Printed
from nestdiff_core.tables import format_table, level_table, number_table, paper_table, stage_table, total_row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nestdiff_core.cli import add_experiment

    add_experiment(parser)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout: levels, stages and the whole configuration"
    )


DENOISER = (
    "level", "tokens", "condition tokens", "parameters", "without positions", "MACs", "GFlops iclr", "GFlops cvpr",
)  # fmt: skip
HIERARCHY = ("level", "z", "source", "patch", "reads", "sigma", "nats", "KL nats", "guidance", "steps")


def run(arguments: argparse.Namespace) -> int:
    experiment = Experiment(load_experiment(arguments.experiment))
    levels, stages, numbers = level_table(experiment), stage_table(experiment), number_table(experiment)
    totals, printed = total_row(levels), paper_table(experiment.config)
    if arguments.json:
        plain = {"levels": levels, "total": totals, "paper": printed, "stages": stages, "numbers": numbers}
        for stage in ("sweep", "ladder", "neighbours"):
            plain[stage] = found.info if (found := experiment.find(Ref(stage))) else None
        print(json.dumps(_finite({**plain, "config": to_dict(experiment.config)}), indent=1))
        return 0
    print(
        f"experiment {experiment.config.name!r}, {experiment.config.num_levels} levels, artifacts in "
        f"{experiment.root}\n"
    )
    tables = (_columns(levels, HIERARCHY), _columns([*levels, totals], DENOISER), printed, stages, numbers)
    print(*(format_table(table) for table in tables if table), sep="\n\n")
    if note := PRINTED.get(experiment.config.name, Printed()).note:
        print(f"\npaper: {note}")
    if found := experiment.find(Ref("ladder")):
        from nestdiff_core.evaluation import ladder

        record = found.info
        print(f"\noracle ladder, {record['num_images']:,} images to a rung")
        print(format_table(ladder.ladder_table(record)), *ladder.verdicts(record), sep="\n")
        print("\n" + format_table(ladder.level_table(record)))
    if found := experiment.find(Ref("neighbours")):
        from nestdiff_core.evaluation import neighbours

        print("\nnearest training images of the samples")
        print(format_table(neighbours.neighbour_table(found.info)), *neighbours.verdicts(found.info), sep="\n")
    if experiment.config.sweep.anything and (found := experiment.find(Ref("sweep"))):
        from nestdiff_core.evaluation import sweep

        print("\nsweep: settings of the whole cascade, by their images")
        print(format_table(sweep.short_table(found.info)), sweep.verdict(found.info), sep="\n")
    if samples := experiment.find(Ref("samples")):
        print(f"\nsamples: {samples.path / 'samples.npz'}")
    if report := experiment.find(Ref("report")):
        print(f"report: {report.path / 'report.html'}")
    return 0


def _columns(rows: list[dict[str, Any]], names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{name: row.get(name) for name in names} for row in rows]


def _finite(data: Any) -> Any:
    """JSON has no infinity: null instead."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and math.isinf(data) else data
