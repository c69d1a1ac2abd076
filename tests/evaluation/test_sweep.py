"""The sweep: what is tried, how it is chosen, and that samples are made with what was chosen."""

from __future__ import annotations

import importlib
import io
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nestdiff_core import loading, stages
from nestdiff_core.cli import main
from nestdiff_core.config import EncoderConfig, EvaluationConfig, ExperimentConfig, JudgeConfig, SweepConfig
from nestdiff_core.config_io import from_dict, to_dict
from nestdiff_core.errors import ConfigError, InputError, IntegrityError
from nestdiff_core.evaluation.extractors import pixel_extractor
from nestdiff_core.evaluation.figures import pareto_plot
from nestdiff_core.evaluation.image_metrics import image_metrics
from nestdiff_core.evaluation.samples import load_samples
from nestdiff_core.evaluation.sweep import (
    Setting,
    best,
    candidates,
    configured,
    from_plain,
    level_table,
    noise_of_differences,
    pareto,
    passes,
    short_list,
    short_table,
    sweep_plots,
    to_plain,
    verdict,
    with_settings,
)
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import read_json
from nestdiff_core.recipes import digits, save_experiment, toy
from pipelines.definitions import build_definitions

stage = importlib.import_module("nestdiff_core.stages.sweep")  # `stages.sweep` is the function
UNGUIDED = {"guidance": 0.0, "train": {"condition_drop": 0.0}}


def setting(guidance: float = 0.0, gamma: float = 0.0, count: int = 8, decay: float = 0.9) -> Setting:
    return Setting(guidance=guidance, noise_gamma=gamma, num_evaluations=count, sampled_decay=decay)


# --- what is tried ------------------------------------------------------------------------------------------------


def test_a_level_tries_only_what_makes_a_difference() -> None:
    """Guidance where there is something to be told, gamma where conditions are noised, all times the rest; the
    configured setting first, whether or not the lists name it."""
    config = replace(digits(), sweep=SweepConfig(guidance=(0.0, 1.0), noise_gammas=(0.3, math.inf), decays=True))
    top, middle = candidates(config, 3), candidates(config, 2)
    assert {s.sampled_decay for s in top} == {0.0, 0.99} and len(top) == 2
    assert middle[0] == configured(config)[2] == setting(0.5, 0.0, 25, 0.99)
    assert len(middle) == 1 + 2 * 2 * 2 and len(set(middle)) == len(middle)
    quiet = replace(config, levels=tuple(replace(level, condition_noise=0.0) for level in config.levels))
    assert {s.noise_gamma for s in candidates(quiet, 2)} == {0.0}


def test_guidance_doubles_the_passes_of_a_level_that_is_told_something() -> None:
    """Eight evaluations are eight passes, sixteen with guidance; the top of an unconditional is never guided."""
    config = toy()
    assert [passes(config, 1, setting(w)) for w in (0.0, 0.5)] == [8, 16]
    assert passes(config, 2, setting(0.5)) == 8


def test_settings_are_knobs_and_come_back_from_json() -> None:
    """An experiment with settings is sampled by them, and is an experiment like any other."""
    settings = {1: setting(0.7, math.inf, 3, 0.0), 2: setting(0.0, 0.5, 5, 0.9)}
    config = with_settings(toy(), settings)
    assert configured(config) == settings == from_plain(to_plain(settings))
    assert (config.num_evaluations(1), config.noise_gamma(2), config.level(1).decay) == (3, 0.5, 0.0)
    assert from_dict(ExperimentConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"levels": {1: {"sampled_decay": 0.5}}}, "levels.sampled_decay"),
        ({"levels": {1: {"noise_gamma": -0.5}}}, "levels.noise_gamma"),
        ({"sampling": {"chosen_by": "sweep"}}, "sampling.chosen_by"),
        ({"sweep": {"guidance": [1.0, 1.0]}}, "sweep.guidance"),
        ({"sweep": {"num_evaluations": [0]}}, "sweep.num_evaluations"),
        ({"sweep": {"metric": "fid"}}, "sweep.metric"),
        ({"sweep": {"guidance": [1.0]}, "levels": {1: UNGUIDED}}, "condition_drop"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_refused_by_name(changes: dict[str, Any], key: str) -> None:
    """Before anything is sampled."""
    with pytest.raises(ConfigError) as caught:
        from_dict(ExperimentConfig, changes, base=toy())
    assert key in str(caught.value.key)


def test_new_knobs_leave_what_was_made_where_it_is() -> None:
    """At their defaults none of them is part of a fingerprint."""
    assert Experiment(toy()).stage_config(Ref("samples")) == {
        "sampling": {
            name: value
            for name, value in to_dict(toy().sampling).items()
            if name not in ("precision", "compile", "contrast", "chosen_by", "without_conditions", "terminal_step")
        },
        "guidance": [[0.5, 0.0, 1.0], [0.0, 0.0, 1.0]],
    }


# --- how it is chosen ---------------------------------------------------------------------------------------------


def test_the_best_is_the_smallest_and_of_equal_ones_the_cheapest() -> None:
    """By distance, then by passes."""
    rows = [{"fd": 2.0, "passes": 8}, {"fd": 1.0, "passes": 16}, {"fd": 1.0, "passes": 8}]
    assert best(rows) == 2


def test_noise_is_that_of_differences() -> None:
    """What both halves agree about is no noise, however far they are apart themselves."""
    assert noise_of_differences([[1.0, 5.0], [2.0, 6.0], [4.0, 8.0]], 0) == 0
    assert noise_of_differences([[1.0, 1.0], [2.0, 4.0]], 0) == 1
    assert noise_of_differences([[1.0, 1.0]], 0) == 0


def test_noise_of_differences_is_their_deviation() -> None:
    """A mean over n numbers whose differences have deviation s: s / sqrt(n), within what 2,000 settings leave open."""
    rng, n, s = np.random.default_rng(0), 50, 3.0
    halves = [[0.0, 0.0], *(rng.normal(scale=s, size=(2, n // 2)).mean(axis=1).tolist() for _ in range(2000))]
    assert noise_of_differences(halves, 0) == pytest.approx(s / n**0.5, rel=0.06)


def test_the_short_list_is_the_configured_one_the_greedy_one_and_its_nearest_rivals() -> None:
    """Rivals differ at one level, the least loss first; nothing stands in it twice."""
    config = toy()
    own = configured(config)
    levels = {
        2: [(own[2], 1.0), (setting(0.0, 0.0, 5), 1.5)],
        1: [(own[1], 3.0), (setting(1.0), 2.0), (setting(2.0), 2.2), (setting(4.0), 9.0)],
    }
    chosen = short_list(config, levels, 4)
    assert list(chosen) == ["configured", "best of each level", "level 1: number 2", "level 2: number 2"]
    assert chosen["best of each level"] == {2: own[2], 1: setting(1.0)}
    assert chosen["level 1: number 2"] == {2: own[2], 1: setting(2.0)}
    assert chosen["level 2: number 2"] == {2: setting(0.0, 0.0, 5), 1: setting(1.0)}
    assert len(short_list(config, levels, 99)) == 5  # `own` at level 1 is the configured one
    assert list(short_list(config, {2: levels[2][:1], 1: [(own[1], 1.0)]}, 4)) == ["configured"]


def test_pareto_front() -> None:
    """Points that no cheaper or equally cheap one beats."""
    assert pareto([1.0, 2.0, 2.0, 3.0, 4.0], [5.0, 6.0, 3.0, 3.0, 1.0]) == [0, 2, 4]


def test_plot_is_a_small_repeatable_png() -> None:
    """600 pixels wide, one point included."""
    for points in ([8.0], [8.0, 16.0, 50.0]):
        first, again = (
            pareto_plot(points, points[::-1], title="t", xlabel="x", ylabel="y", front=[0], marked={"best": 0})
            for _ in range(2)
        )
        assert first == again and len(first) < 60_000
        assert Image.open(io.BytesIO(first)).width == 600


# --- the stage ----------------------------------------------------------------------------------------------------

SWEEP = SweepConfig(guidance=(0.0, 1.0), num_evaluations=(2, 4), decays=True, num_images=40, short_list=3)


def judged(classifier: Sequence[float], moco: Sequence[float], spread: float) -> dict[str, Any]:
    """The record of a short list whose settings have these distances; each half is `spread` off, in turn."""
    rows = [
        {
            "name": f"number {i}",
            "passes": i,
            "metrics": {"fd_classifier": c, "fd_moco": m},
            "halves": {"fd_classifier": [c, c], "fd_moco": [m + spread * (-1) ** i, m]},
        }
        for i, (c, m) in enumerate(zip(classifier, moco, strict=True))
    ]
    chosen = int(np.argmin(classifier))
    counts = {"num_images": 1000, "num_reference": 1000, "reference": "train"}
    return {"short_list": rows, "chosen": chosen, "metric": "fd_classifier", "noise": 0.0, **counts}


def test_the_verdict_names_distances_that_prefer_another_setting() -> None:
    """Beyond noise: where halves disagree as much, the same difference says nothing."""
    classifier, moco = [0.09, 0.08, 0.07], [0.30, 0.20, 0.40]
    assert "fd_moco prefers another, number 1: 0.2 for 0.4." in verdict(judged(classifier, moco, spread=0.01))
    assert "prefers" not in verdict(judged(classifier, moco, spread=0.4))
    assert "prefers" not in verdict(judged(classifier, [0.3, 0.2, 0.1], spread=0.01))
    assert "it stays. fd_moco prefers another" in verdict(judged([0.07, 0.08, 0.09], [0.4, 0.2, 0.3], spread=0.01))


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
