"""Numbers of the newest weights, their history, what counts as worse; the report of what there is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nestdiff_core import loading, stages
from nestdiff_core.cli import main
from nestdiff_core.config import SweepConfig, WatchConfig
from nestdiff_core.errors import IntegrityError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.newest import newest_weights
from nestdiff_core.recipes import toy
from nestdiff_core.stages.report import page
from nestdiff_core.stages.watch import best, history, is_worse
from nestdiff_core.tables import number_table

DATA = ("images", "encoder", "features", "moments", "svd_basis", "latents")


def begun(toy_run: Any, folder: Path) -> Experiment:
    """The toy with latents and no denoiser, whose level 2 is trained for long enough to be worth breaking."""
    for stage in DATA:
        shutil.copytree(toy_run.root / stage, folder / stage)
    config = toy()
    train = replace(config.level(2).train, num_steps=200, lr=3e-3, ema_decay=0.9, checkpoint_every=50, keep_last=9)
    levels = (config.level(1), replace(config.level(2), train=train))
    return Experiment(replace(config, levels=levels, watch=WatchConfig(num_images=20, resamples=50)), folder)


@pytest.fixture(scope="module")
def x(toy_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return begun(toy_run, tmp_path_factory.mktemp("watched"))


def test_numbers_follow_the_newest_checkpoints(
    x: Experiment, shuffle_newest: Callable[[Experiment, int], None]
) -> None:
    """No weights: nothing. A level in training is judged at its newest step, once, and a level without weights is
    named; finished levels give a number of the whole cascade, too. Trained longer is better; shuffled is worse."""
    assert stages.watch(x) is None
    stages.train(x, 2, until_step=60)
    first = stages.watch(x)
    assert first is not None
    record = first.info["newest"]["2"]
    assert (record["step"], first.info["missing"]) == (60, [1])
    assert record["error"] > 0 and record["num_images"] == 20
    assert stages.watch(x) is not None and len(history(x)) == 1  # the same weights are not judged again

    stages.train(x, 2, until_step=199)
    after = stages.watch(x)
    assert after is not None
    later = after.info["newest"]["2"]
    assert [r["step"] for r in history(x, "2")] == [60, 199]
    assert later["fd"] < record["fd"] and best(history(x, "2"), later) == later
    assert not is_worse(later, best(history(x, "2"), later))

    stages.train(x, 1, until_step=10)
    every = stages.watch(x)
    assert every is not None and every.info["missing"] == []
    assert set(every.info["newest"]) == {"1", "2", "images"}
    assert every.info["newest"]["images"]["name"] == "fd_encoder"

    shuffle_newest(x, 2)
    broken = stages.watch(x)
    assert broken is not None
    now = broken.info["newest"]["2"]
    assert now["step"] == 199 and now["fd"] > later["fd"]
    assert is_worse(now, best(history(x, "2"), now))
    assert broken.verify() > 0


def test_one_level_is_sampled_as_the_cascade_samples_it(toy_run: Any) -> None:
    """Stopping above level 1 gives the latents that the whole cascade has there."""
    cascade = loading.Cascade(Experiment(toy(), toy_run.root))
    whole, top = cascade.latents(range(3), seed=0), cascade.latents(range(3), seed=0, lowest=2)
    assert set(top) == {2} and torch.equal(top[2], whole[2])


def test_a_checkpoint_that_is_damaged_or_gone_is_passed_over(toy_run: Any, tmp_path: Path) -> None:
    """A trainer may remove it meanwhile: the one before is judged."""
    x = begun(toy_run, tmp_path)
    stages.train(x, 2, until_step=120)
    folder = x.path(Ref("denoiser", 2)) / "checkpoints"
    (folder / "step_00000120" / "ema.safetensors").unlink()
    found = stages.watch(x)
    assert found is not None and found.info["newest"]["2"]["step"] == 100
    (folder / "step_00000120" / "state.json").write_text("{}")
    weights = newest_weights(x, 2)
    assert weights is not None and weights.step == 100


def test_a_sweep_begins_no_new_history() -> None:
    """It chooses for finished weights: who lets it choose keeps the numbers so far, and another guidance does not."""
    config, watched = toy(), Ref("watch")
    sweep, sampling = SweepConfig(num_evaluations=(5,)), replace(config.sampling, chosen_by="sweep")
    guided = replace(config, levels=(replace(config.level(1), guidance=9.0), config.level(2)))
    here = Experiment(config).config_hash(watched)
    assert Experiment(replace(config, sampling=sampling, sweep=sweep)).config_hash(watched) == here
    assert Experiment(guided).config_hash(watched) != here


def test_another_space_begins_another_history(toy_run: Any, tmp_path: Path) -> None:
    """The images' distance is that of the evaluation's first space; statistics of both are the same, in any order."""
    shutil.copytree(toy_run.root, tmp_path / "artifacts")
    evaluation = toy().evaluation
    turned = replace(toy(), evaluation=replace(evaluation, extractors=evaluation.extractors[::-1]))
    x, other = (Experiment(config, tmp_path / "artifacts") for config in (toy(), turned))
    assert stages.reference(other).digest == x.artifact(Ref("reference")).digest
    assert other.path(Ref("watch")) != x.path(Ref("watch"))


def test_a_history_that_somebody_has_edited_is_refused(x: Experiment) -> None:
    """A best that never was would make everything worse."""
    stages.train(x, 2, until_step=60)
    made = stages.watch(x)
    assert made is not None
    file = made.path / "history.json"
    text = file.read_text()
    file.write_text(re.sub('"fd": [0-9.]+', '"fd": 0.0', text))
    with pytest.raises(IntegrityError, match=r"history\.json"):
        stages.watch(x)
    file.write_text(text)
    assert stages.watch(x) is not None


@pytest.mark.parametrize(("fd", "worse"), [(1.29, True), (1.28, False), (0.5, False)])
def test_worse_is_more_than_two_combined_errors(fd: float, worse: bool) -> None:
    """Of errors .1 and .1: 2 sqrt(.02) = .2828 above a best of 1."""
    before = {"fd": 1.0, "error": 0.1, "denoiser": "a"}
    assert is_worse({"fd": fd, "error": 0.1, "denoiser": "a"}, before) is worse


def test_the_best_is_of_the_same_denoiser() -> None:
    """Another setting is another denoiser, whose numbers are its own."""
    records = [{"fd": 1.0, "denoiser": "a"}, {"fd": 0.5, "denoiser": "b"}, {"fd": 2.0, "denoiser": "a"}]
    assert best(records, records[2])["fd"] == 1.0


# --- the report ---------------------------------------------------------------------------------------------------


def test_a_report_says_what_is_missing_and_what_makes_it(toy_run: Any, tmp_path: Path) -> None:
    """Nothing made, only latents, in training, finished: each is a page."""
    empty = page(Experiment(toy(), tmp_path / "empty"))
    assert "-j evaluate" in empty and "-j train_level_2" in empty and "-j watch" in empty
    x = begun(toy_run, tmp_path)
    stages.train(x, 2, until_step=60)
    text = page(x)
    assert "So far: step 60 of 200." in text and "-j train_level_1" in text and "60 of 200 steps" in text


def test_a_report_is_made_again_only_when_something_has_changed(toy_run: Any, tmp_path: Path) -> None:
    """The same file as long as its parts are the same; a part that has gone is said to be missing."""
    root = tmp_path / "artifacts"
    shutil.copytree(toy_run.root, root)
    x = Experiment(toy(), root)
    made = stages.report(x)
    file = made.path / "report.html"
    before = file.stat().st_mtime_ns
    assert stages.report(x).digest == made.digest and file.stat().st_mtime_ns == before
    text = file.read_text()
    assert len(re.findall("<img ", text)) >= 12 and "nan" not in text.lower().split()
    shutil.rmtree(x.artifact(Ref("ladder")).path)
    again = stages.report(x)
    assert again.digest != made.digest and "Not made yet" in file.read_text()
    again.verify()


def test_real_numbers_are_named_for_the_images_that_they_are_of(toy_run: Any, tmp_path: Path) -> None:
    """Those of the split that samples are not compared with: training images, where these are the held-out ones."""
    shutil.copytree(toy_run.root, tmp_path / "artifacts")
    config = toy()
    turned = replace(config, evaluation=replace(config.evaluation, reference="held_out", probe=False))
    x, y = Experiment(config, tmp_path / "artifacts"), Experiment(turned, tmp_path / "artifacts")
    stages.reference(y)
    stages.evaluation(y)
    assert all("held out" in row and "training" not in row for row in number_table(x))
    assert all("training" in row and "held out" not in row for row in number_table(y))
    assert "Samples against training images" in page(x) and "Samples against held-out images" in page(y)


def test_pictures_show_real_images_beside_what_shares_their_latents(toy_run: Any) -> None:
    """A picture for each level above 1 and a walk for each level; walks begin and end at the images' own latents."""
    from nestdiff_core.stages.pictures import between

    figures = Experiment(toy(), toy_run.root).artifact(Ref("pictures")).info["figures"]
    assert [figure["file"] for figure in figures] == ["frozen_z_2.png", "walk_z_2.png", "walk_z_1.png"]
    a, b = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)), torch.ones(3, 4, 2, 2)
    for level in (1, 2):
        torch.testing.assert_close(between(a, b, 0.0, level), a)
        torch.testing.assert_close(between(a, b, 1.0, level), b)
    a, b = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 3.0]).view(1, 2, 1, 1)
    assert between(a, b, 0.5, 2).norm() == pytest.approx(3.0) and between(a, b, 0.5, 1).norm() < 2.2
    torch.testing.assert_close(between(a, a, 0.3, 2), a)


def test_the_command_line_prints_where_the_report_is(
    toy_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`run EXPERIMENT --stage report` ends with the file's path."""
    monkeypatch.setenv("NESTDIFF_HOME", str(toy_run.root))
    assert main(["run", "toy", "--stage", "report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert Path(lines[0]).name == "report.html" and Path(lines[0]).is_file()
