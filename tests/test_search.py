"""The search for one level's condition noise: what a candidate shares, and the table at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from nestdiff_core.cli import main
from nestdiff_core.config import ConditioningConfig, SearchConfig
from nestdiff_core.errors import ConfigError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import digits, save_experiment, toy
from nestdiff_core.search import candidate, levels_to_train, search_table
from pipelines.definitions import build_definitions


@pytest.mark.parametrize(("conditioning", "trained"), [("all_above", (2, 1)), ("markov", (2,))])
def test_only_readers_of_the_level_are_trained(conditioning: str, trained: tuple[int, ...]) -> None:
    """Another sigma_3 changes the denoisers that read z_3, and nothing else."""
    config = replace(
        digits(),
        search=SearchConfig(level=3),
        conditioning=ConditioningConfig(levels=conditioning),  # pyright: ignore[reportArgumentType]
    )
    assert levels_to_train(config) == trained
    one, other = Experiment(candidate(config, 0.0)), Experiment(candidate(config, 1.5))
    for ref in one.refs():
        differs = one.config_hash(ref) != other.config_hash(ref)
        assert differs == (
            ref.stage in ("samples", "evaluation", "ladder", "neighbours", "pictures", "report")
            or (ref.stage == "denoiser" and ref.level in trained)
        )


@pytest.mark.parametrize("level", [1, 4])
def test_a_level_that_conditions_nothing_is_refused(level: int) -> None:
    """The image conditions nothing, and level 4 is not there."""
    with pytest.raises(ConfigError, match=r"search\.level"):
        replace(digits(), search=SearchConfig(level=level))


def test_search_through_dagster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One job: a training and an evaluation for each candidate, the rest shared, one table, the least number marked."""
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path / "artifacts"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    config = replace(toy(), search=SearchConfig(level=2, sigmas=(0.0, 1.5), metric="fd_pixels"))
    definitions = build_definitions(config)
    with dg.DagsterInstance.get() as instance:
        for job in ("build_latents", "search_sigma_level_2"):
            result = definitions.resolve_job_def(job).execute_in_process(instance=instance)
            assert result.success
    table = result.asset_materializations_for_node("level_2")[0].metadata
    x = Experiment(config, tmp_path / "artifacts")
    rows = search_table(x)
    assert [row["sigma"] for row in rows] == [0.0, 1.5] and all(row["evaluated"] == "yes" for row in rows)
    best = min(rows, key=lambda row: row["fd_pixels"])
    assert best["best"] == "*" and table["best_sigma"].value == best["sigma"]
    made = sorted(path.parent.name for path in (x.root / "denoiser").glob("*/manifest.json"))
    candidates = [Experiment(candidate(config, sigma), x.root) for sigma in (0.0, 1.5)]
    assert made == sorted({y.artifact(Ref("denoiser", level)).path.name for y in candidates for level in (1, 2)})
    assert len(made) == 3  # level 2 is shared
    path = save_experiment(config, x.root)
    assert main(["search", str(path), "--table"]) == 0
    assert "fd_pixels" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="number that the evaluation does not have"):
        search_table(Experiment(replace(config, search=replace(config.search, metric="is_pixels")), x.root))
