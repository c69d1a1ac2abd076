"""The metric cards in the web UI: shown as JSON, and compared with those of the materialisation before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from nestdiff_core.recipes import toy
from pipelines.definitions import build_definitions


def test_an_evaluation_says_what_it_differs_in_from_the_last(
    toy_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cards stand in the metadata; after a change of the neighbours, precision is not comparable with the last one and
    the distance is."""
    shutil.copytree(toy_run.root, tmp_path / "artifacts")
    shutil.copytree(toy_run.dagster_home, tmp_path / "home")
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path / "artifacts"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    [first] = toy_run.result.asset_materializations_for_node("evaluation")
    assert "compared_with_the_last" not in first.metadata
    card = first.metadata["metric_cards"].value["precision_pixels"]["card"]
    assert card["settings"]["num_neighbours"] == 3 and card["origin"]["checkpoints"].keys() == {"1", "2"}
    config = replace(toy(), evaluation=replace(toy().evaluation, num_neighbours=5))
    with dg.DagsterInstance.get() as instance:
        job = build_definitions(config).resolve_job_def("evaluate")
        key = dg.AssetKey(["toy", "evaluation"])
        result = job.execute_in_process(instance=instance, asset_selection=[key])
    [second] = result.asset_materializations_for_node("evaluation")
    rows = {r.data["number"]: r.data for r in second.metadata["compared_with_the_last"].records}
    assert rows["fd_pixels"]["comparable"] == "yes"
    assert rows["precision_pixels"]["comparable"] == "no"
    assert rows["precision_pixels"]["measured differently"] == "settings.num_neighbours"
