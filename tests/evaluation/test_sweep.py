"""The sweep: each setting is scored as it would sample, and samples are made with what was chosen."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from nestdiff_core import loading, stages
from nestdiff_core.cli import main
from nestdiff_core.config import EncoderConfig, EvaluationConfig, JudgeConfig, SweepConfig
from nestdiff_core.errors import ConfigError, InputError, IntegrityError
from nestdiff_core.evaluation.extractors import pixel_extractor
from nestdiff_core.evaluation.image_metrics import image_metrics
from nestdiff_core.evaluation.samples import load_samples
from nestdiff_core.evaluation.sweep import (
    candidates,
    configured,
    from_plain,
    level_table,
    short_table,
    sweep_plots,
    verdict,
    with_settings,
)
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import read_json
from nestdiff_core.recipes import save_experiment, toy
from pipelines.definitions import build_definitions

stage = importlib.import_module("nestdiff_core.stages.sweep")  # `stages.sweep` is the function
SWEEP = SweepConfig(guidance=(0.0, 1.0), num_evaluations=(2, 4), decays=True, num_images=40, short_list=3)


@pytest.fixture(scope="module")
def root(toy_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the toy experiment's artifacts, beside which sweeps are made."""
    root = tmp_path_factory.mktemp("sweeps") / "artifacts"
    shutil.copytree(toy_run.root, root)
    return root


@pytest.fixture(scope="module")
def swept(root: Path) -> Experiment:
    x = Experiment(replace(toy(), sweep=SWEEP), root)
    stages.sweep(x)
    return x


def test_every_setting_is_scored_with_the_same_noise_and_the_best_is_given_to_the_level_below(
    swept: Experiment,
) -> None:
    """Greedy from the top: the numbers are those of latents that the cascade makes under the best settings above."""
    record = swept.artifact(Ref("sweep")).info
    top, low = record["levels"]["2"], record["levels"]["1"]
    assert len(top["rows"]) == 1 + 2 * 2 and len(low["rows"]) == 1 + 2 * 2 * 2
    assert top["best"] == min(range(5), key=lambda i: top["rows"][i]["fd"])
    chosen = {2: candidates(swept.config, 2)[top["best"]]}
    for number in (0, 3):
        config = with_settings(swept.config, {**chosen, 1: candidates(swept.config, 1)[number]})
        z = loading.Cascade(swept, config=config).latents(range(40), seed=swept.config.sampling.seed + 1)
        found = stage._Latents(_training(swept, 1), 3, 1).numbers(z[1])
        assert found["fd"] == pytest.approx(low["rows"][number]["fd"])
        assert found["coverage"] == low["rows"][number]["coverage"]


def _training(x: Experiment, level: int) -> torch.Tensor:
    rows = loading.open_index(x).rows("train")
    return torch.from_numpy(loading.open_latents(x, level).read(rows, 0 * rows)).float()


def whitened(n: int) -> torch.Tensor:
    """Mean 0 and covariance I exactly, in two dimensions."""
    z = np.random.default_rng(0).normal(size=(n, 2))
    return torch.from_numpy((z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T)


def test_the_distance_is_that_of_two_gaussians() -> None:
    """Training latents N(0, 1) exactly, generated ones shifted by 2 and three times as wide: 4 + 4 in each number."""
    real = whitened(400).reshape(400, 2, 1, 1)
    assert stage._Latents(real, 3, 0).numbers(2 + 3 * real)["fd"] == pytest.approx(16)


def test_each_half_is_judged_by_its_own_half() -> None:
    """Every second one is off by 1 from every second real one, the others by 2 from the others, which lie elsewhere."""
    z = whitened(100)
    real, values = (torch.stack(pair, dim=1).flatten(0, 1) for pair in ((z, z + 100), (z + 1, z + 102)))
    assert stage._Judge(real)(values)["halves"] == pytest.approx([2, 8])
    with pytest.raises(InputError, match="too few"):
        stage._Judge(real[:3])


def test_the_short_list_is_judged_by_images_that_the_evaluation_does_not_compare_with(swept: Experiment) -> None:
    """Images of whole cascades against the held-out split, where the evaluation's reference is the training one."""
    artifact = swept.artifact(Ref("sweep"))
    record, held_out = artifact.info, loading.SplitImages(loading.open_index(swept), "held_out")
    assert record["reference"] == "held_out" and record["num_reference"] == len(held_out)
    assert [row["name"] for row in record["short_list"]][:2] == ["configured", "best of each level"]
    for row in record["short_list"]:
        images = load_samples(artifact.path / row["file"])
        config = with_settings(swept.config, from_plain(row["settings"]))
        cascade = loading.Cascade(swept, config=config)
        z = cascade.latents(range(40), seed=swept.config.sampling.seed + 1)
        np.testing.assert_array_equal(images, cascade.images(range(40), z[1]))
        found = image_metrics(images, held_out, pixel_extractor()).values["fd_pixels"]
        assert row["metrics"]["fd_pixels"] == pytest.approx(found)
    values = [row["metrics"]["fd_encoder"] for row in record["short_list"]]
    assert record["metric"] == "fd_encoder" and values[record["chosen"]] == min(values)
    chosen = read_json(artifact.path / "chosen.json")
    assert chosen == record["short_list"][record["chosen"]]["settings"]


def test_samples_follow_the_sweep_and_their_cards_say_so(swept: Experiment, tmp_path: Path) -> None:
    """With sampling.chosen_by `sweep`, samples, single images and metric cards have the chosen settings."""
    record = swept.artifact(Ref("sweep")).info
    by_sweep = replace(swept.config, sampling=replace(swept.config.sampling, chosen_by="sweep", num_images=60))
    x = Experiment(by_sweep, swept.root)
    assert Ref("sweep") in x.inputs(Ref("samples")) and x.path(Ref("sweep")) == swept.path(Ref("sweep"))
    chosen = from_plain(record["short_list"][record["chosen"]]["settings"])
    assert configured(loading.sampled_config(x)) == chosen
    images = load_samples(stages.samples(x).path / "samples.npz")
    by_hand = Experiment(
        with_settings(replace(by_sweep, sampling=replace(by_sweep.sampling, chosen_by="config")), chosen)
    )
    by_hand.root = swept.root
    np.testing.assert_array_equal(images, load_samples(stages.samples(by_hand).path / "samples.npz"))
    z = loading.generate(x, range(3), seed=x.config.sampling.seed)
    np.testing.assert_array_equal(loading.decode(x, z[1]), images[:3])
    [card, *_] = (number["card"] for number in stages.evaluation(x).info["metrics"].values())
    origin = card["origin"]
    for m, found in chosen.items():
        assert origin["guidance"][str(m)] == found.guidance and origin["ema_decay"][str(m)] == found.sampled_decay
        assert origin["num_evaluations"][str(m)] == found.num_evaluations
        assert origin["noise_gamma"][str(m)] == found.noise_gamma
    reported = importlib.import_module("nestdiff_core.stages.report")._levels(x).tables["The hierarchy, from the top"]
    assert {row["level"]: row["guidance"] for row in reported} == {m: found.guidance for m, found in chosen.items()}


def test_without_a_sweep_its_samples_are_refused_with_the_job(swept: Experiment) -> None:
    """Exit 4, and what to run."""
    config = replace(
        swept.config,
        sampling=replace(swept.config.sampling, chosen_by="sweep"),
        sweep=replace(SWEEP, num_images=41),
    )
    with pytest.raises(IntegrityError) as caught:
        stages.samples(Experiment(config, swept.root))
    assert str(caught.value.fix).endswith("dagster job execute -m pipelines.definitions -j sweep")


def test_a_stopped_sweep_goes_on_at_the_next_setting(swept: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was committed is not sampled again but for one setting of each level that was done, with the same result."""
    x = Experiment(replace(swept.config, sweep=replace(SWEEP, num_images=24)), swept.root)
    asked: list[int] = []
    latents = stage._Sweep._latents

    def watched(self: Any, level: int, *rest: Any) -> Any:
        asked.append(level)
        if len(asked) == stop:
            raise KeyboardInterrupt
        return latents(self, level, *rest)

    monkeypatch.setattr(stage._Sweep, "_latents", watched)
    stop = 0
    whole = stages.sweep(x)
    before = (len(asked), whole.digest, (whole.path / "chosen.json").read_bytes())
    shutil.rmtree(whole.path)
    asked.clear()
    stop = 8
    with pytest.raises(KeyboardInterrupt):
        stages.sweep(x)
    done = len(asked) - 1
    asked.clear()
    stop = 0
    again = stages.sweep(x)
    assert (again.digest, (again.path / "chosen.json").read_bytes()) == before[1:]
    assert len(asked) <= before[0] - done + 1  # the top level's best once more


def test_a_missing_guide_is_refused_before_anything_is_sampled(
    swept: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last level to be swept, too: what is above it takes hours."""
    first, second = swept.config.levels
    train = replace(first.train, keep_every=5, checkpoint_every=5)  # not so when it was trained
    kept = replace(first, guide_step=5, train=train)
    x = Experiment(replace(swept.config, levels=(kept, second)), swept.root)
    monkeypatch.setattr(stage._Sweep, "_latents", lambda *_: pytest.fail("sampled"))
    with pytest.raises(IntegrityError, match="as they were at step 5") as caught:
        stages.sweep(x)
    assert caught.value.level == 1


def test_raw_weights_are_those_of_the_last_checkpoint(swept: Experiment) -> None:
    """Decay 0 is what training left; without its checkpoint that is said."""
    path = swept.artifact(Ref("denoiser", 1)).path
    last = path / "checkpoints" / "step_00000020"
    found, average = (loading.open_denoiser(swept, 1, decay=decay).state_dict() for decay in (0.0, None))
    expected = load_file(last / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(not torch.equal(found[name], average[name]) for name in found)
    last.rename(path / "checkpoints" / "elsewhere")
    with pytest.raises(IntegrityError, match="not on this machine"):
        loading.open_denoiser(swept, 1, decay=0.0)
    (path / "checkpoints" / "elsewhere").rename(last)


def test_further_averages_are_exported_and_sampled(swept: Experiment) -> None:
    """Every average that training kept is one of the candidates, and its own weights are opened."""
    own = swept.config.level(2)
    kept = replace(own, train=replace(own.train, more_ema_decays=(0.5,)), sampled_decay=0.5)
    x = Experiment(replace(swept.config, levels=(swept.config.level(1), kept)), swept.root)
    artifact = stages.train(x, 2)
    assert artifact is not None and {"ema.safetensors", "ema_0.5.safetensors"} <= set(artifact.manifest["files"])
    exported = load_file(artifact.path / "ema_0.5.safetensors")
    opened = loading.Cascade(x, levels=[2]).denoisers[2].state_dict()
    average = loading.open_denoiser(swept, 2).state_dict()
    assert all(torch.equal(opened[name], value) for name, value in exported.items())
    assert any(not torch.equal(average[name], value) for name, value in exported.items())
    assert all(torch.equal(average[name], value) for name, value in load_file(artifact.path / loading.EMA).items())
    assert {found.sampled_decay for found in candidates(x.config, 2)} == {0.0, 0.5, 0.9}


def test_a_sweep_is_made_again_when_a_judge_of_it_is_replaced(root: Path, tmp_path: Path) -> None:
    """And not before: its distances are those of the file of weights that is there now."""
    file = tmp_path / "vit.safetensors"
    save_file(random_vit(0), file)
    vit = EncoderConfig(kind="timm", name="test_vit", weights=str(file), input_size=32)
    evaluation = EvaluationConfig(extractors=("pixels",), judges=(JudgeConfig(name="vit", encoder=vit),))
    x = Experiment(replace(toy(), evaluation=evaluation, sweep=SweepConfig(guidance=(0.0, 1.0), num_images=24)), root)
    first = stages.sweep(x)
    assert stages.sweep(x).digest == first.digest
    save_file(random_vit(1), file)
    second = stages.sweep(x)
    before, after = (made.info["short_list"][0]["metrics"] for made in (first, second))
    assert after["fd_pixels"] == before["fd_pixels"] and after["fd_vit"] != pytest.approx(before["fd_vit"], rel=0.01)
    assert second.info["levels"] == first.info["levels"]


def random_vit(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return timm.create_model("test_vit", img_size=32).state_dict()


def test_nothing_to_sweep_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to sweep"):
        stages.sweep(Experiment(toy(), root))


def test_through_dagster_and_from_the_command_line(
    swept: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job `sweep` shows tables, plots and pictures; `run --stage sweep` makes it; `inspect` has the table."""
    monkeypatch.setenv("NESTDIFF_HOME", str(swept.root))
    definitions = build_definitions(swept.config)
    result = definitions.resolve_job_def("sweep").execute_in_process(instance=dg.DagsterInstance.ephemeral())
    shown = result.asset_materializations_for_node("try_settings")[0].metadata
    assert {"verdict", "short_list", "settings", "level_1", "level_2", "images", "samples", "chosen"} <= set(shown)
    assert "sweep" not in {job.name for job in build_definitions(toy()).resolve_all_job_defs()}
    path = save_experiment(swept.config, tmp_path)
    capsys.readouterr()
    assert main(["run", str(path), "--stage=sweep"]) == 0
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "sweep: done" in said and "best of each level" in said and verdict(swept.artifact(Ref("sweep")).info) in said


def test_tables_begin_with_the_best_and_mark_it(swept: Experiment) -> None:
    """A row for each setting, from the top level; how much worse the others are in deviations of a difference."""
    record = swept.artifact(Ref("sweep")).info
    rows = level_table(record)
    assert [row["level"] for row in rows] == [2] * 5 + [1] * 9
    assert rows[0][""].startswith("chosen") and rows[5][""].startswith("chosen")
    assert short_table(record)[0][""].startswith("chosen")
    assert sum("configured" in row[""] for row in short_table(record)) == 1


def test_the_report_shows_the_sweep_or_how_to_make_one(swept: Experiment) -> None:
    """With its verdict, both tables, a picture for each level and two for the images; without one, what is missing."""
    page = importlib.import_module("nestdiff_core.stages.report").page
    info = swept.artifact(Ref("sweep")).info
    html = page(swept)
    section = html[html.index('id="sweeps"') : html.index('id="nearest-training-images"')]
    assert escape(verdict(info)) in section and section.count("<table") == 2
    assert section.count("<img") == len(sweep_plots(info)) == swept.config.num_levels + 2
    assert "Nothing is swept" in page(Experiment(toy(), swept.root))
