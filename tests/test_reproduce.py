"""What a table of docs/results.md says is left to do."""

from __future__ import annotations

import argparse
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestdiff_core.errors import ConfigError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import read_json, write_json
from nestdiff_core.models.nested import build_denoiser, count_macs
from nestdiff_core.recipes import toy
from nestdiff_core.recipes.depth import SCALES
from scripts import depth_table, reproduce
from scripts.depth_table import DISTANCES, NUMBERS, Run, curves, network, write
from scripts.reproduce import left, make, make_judges, plan, runs


def asked(
    *arms: str, seeds: tuple[int, ...] = (0,), scale: str = "cifar10_16px", tflops: float | None = None
) -> list[Run]:
    told = {"images": None, "encoder": "hub", "autoencoder": "", "judges": None}
    return runs(argparse.Namespace(scale=scale, tflops=tflops, seeds=seeds, arms=arms, **told))


@pytest.fixture(autouse=True)
def nothing_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path))


def test_arms_that_share_a_network_train_it_once() -> None:
    """L = 1 in three dresses is one training of 100 TFLOP; L = 3 after L = 2 adds its own 20 of 100."""
    todo = asked("l1", "l1_contrast", "l1_autoguided", "l2", "l3")
    macs = {
        network(run, level.level): count_macs(build_denoiser(run.x.config, level.level, 0))
        for run in todo
        for level in run.x.config.levels
    }
    work = list(left(todo, macs))
    trained = {w.what: w.tflops for w in work if "level" in w.what}
    assert list(trained) == [
        "l1, seed 0, level 1",
        "l2, seed 0, level 1",
        "l2, seed 0, level 2",
        "l3, seed 0, level 2",
        "l3, seed 0, level 3",
    ]
    assert list(trained.values()) == pytest.approx([100, 80, 20, 15, 5], rel=0.01)
    sampled = {w.what: w.tflops for w in work if w.what.endswith("samples")}
    assert len(sampled) == len(todo)
    swept = [w.what for w in work if "sweep" in w.what]
    assert swept == ["l1_autoguided, seed 0, sweep"]
    # 10,000 images, 25 evaluations of 27.8 million MACs; a guide is asked as often as what it guides
    assert sampled["l1, seed 0, samples"] == pytest.approx(2 * 25 * 27.846e6 * 10_000 / 1e12, rel=1e-3)
    assert sampled["l1_autoguided, seed 0, samples"] == 2 * sampled["l1, seed 0, samples"]


@pytest.mark.parametrize("arm", ["l1", "l1_class_guided"])
def test_how_long_it_takes_is_said_before_anything_is_made(arm: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of arms that are told the class, of images that nobody has looked at."""
    work = plan(asked(arm), SCALES["cifar10_16px"], torch.device("cpu"))
    assert work[0].tflops == pytest.approx(100, rel=0.01)
    assert "TFLOP/s of training, measured now" in capsys.readouterr().out


def test_a_seed_is_another_training_of_all_levels_and_of_nothing_else() -> None:
    first, second = asked("l2", seeds=(0, 1))
    assert [level.train.seed for level in second.x.config.levels] == [1, 1]
    assert first.x.config.name != second.x.config.name
    for part in ("images", "encoder", "sampling", "evaluation"):
        assert getattr(first.x.config, part) == getattr(second.x.config, part)


def test_a_longer_training_changes_nothing_else() -> None:
    """Not the judges that were made for the scale either."""
    for arm in ("l2_autoguided", "l2_class"):
        (usual,), (longer,) = asked(arm), asked(arm, tflops=400.0)
        for before, after in zip(usual.x.config.levels, longer.x.config.levels, strict=True):
            assert after.train.num_steps == pytest.approx(4 * before.train.num_steps, rel=1e-3)
            assert (after.guide_step or 0) == pytest.approx((after.train.num_steps / 4) * (arm != "l2_class"), rel=0.1)
        assert longer.x.config.evaluation == usual.x.config.evaluation
        assert longer.x.config.name == f"cifar10_16px_400tflop_{arm}"
        assert longer.x.config_hash(Ref("features")) == usual.x.config_hash(Ref("features"))


def test_another_set_of_images_brings_its_own_autoencoder_and_judges() -> None:
    """Of tinyimagenet20 z_1 is a code; what CIFAR-10 is measured with does not change."""
    (pixels,), (code,) = asked("l1"), asked("l1", scale="tinyimagenet20")
    assert pixels.x.config.autoencoder.kind == "identity" and code.x.config.autoencoder.kind == "taef2"
    for run, name, classes in ((pixels, "cifar10_16px", 10), (code, "tinyimagenet20", 20)):
        classifier, moco = run.x.config.evaluation.judges
        assert classifier.encoder.weights == f"data/judges_{name}/classifier.safetensors"
        assert moco.encoder.weights == f"data/judges_{name}/moco" and classifier.num_classes == classes


def test_judges_are_made_unless_both_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the first, the same command goes on with the second."""
    called: list[list[str]] = []
    done = argparse.Namespace(returncode=0)
    monkeypatch.setattr(reproduce.subprocess, "run", lambda words, **_: called.append(words) or done)
    (run,), scale = asked("l1"), SCALES["cifar10_16px"]
    encoder = {"kind": "torchvision", "name": "resnet18", "layer": "layer4", "input_size": 32}
    classifier = {"made_of": {"encoder": encoder, "num_classes": 10, "images": "x"}}
    for record, wanted in (({}, 1), ({"classifier": classifier}, 2), ({"classifier": classifier, "moco": {}}, 2)):
        if record:
            write_json(tmp_path / "judges.json", record)
        make_judges(run, scale, tmp_path, "cpu")
        assert len(called) == wanted
    options = dict(itertools.pairwise(called[0]))
    assert options["--input-size"] == "32" and options["--epochs"] == "8" and options["--out"] == str(tmp_path)


def test_a_classifier_of_another_table_is_refused(tmp_path: Path) -> None:
    """Shown images at half the size that it was trained at, it would judge all the same."""
    (run,) = asked("l1", scale="tinyimagenet20")
    encoder = {"kind": "torchvision", "name": "resnet18", "layer": "layer4", "input_size": 128}
    classifier = {"made_of": {"encoder": encoder, "num_classes": 20, "images": "x"}}
    write_json(tmp_path / "judges.json", {"classifier": classifier, "moco": {}})
    with pytest.raises(ConfigError, match="not this table's") as refused:
        make_judges(run, SCALES["tinyimagenet20"], tmp_path, "cpu")
    assert (refused.value.key, refused.value.expected, refused.value.found) == ("input_size", 64, 128)


def test_the_table_is_there_from_its_first_row(tmp_path: Path) -> None:
    """Before any arm has conditions or a picture; real images have no errors; every number is under its own name."""
    numbers = dict(zip(NUMBERS, (1.0, 2.0, 3.0, 0.5, 0.6, 2.3), strict=True))
    told = {"seed": "", "w": "", "sampling_gmacs": None}
    real = {"arm": "training images", **told, **numbers, "errors": {}, "cards": {}}
    cards = {name: {"metric": name, "num_samples": 8, "code_version": "a", "samples_digest": "1"} for name in NUMBERS}
    arm = {"arm": "l1", **told, **numbers, "errors": dict.fromkeys(DISTANCES, 0.25), "cards": cards}
    write([real, arm], [], {}, tmp_path)
    header, _, first, second = (tmp_path / "table.md").read_text().splitlines()
    assert header.split()[-len(NUMBERS) :] == list(NUMBERS)
    assert first.split()[-6:] == ["1", "2", "3", "0.5", "0.6", "2.3"]
    assert "1.000 ± 0.250  2.000 ± 0.250  3.000 ± 0.250" in second
    kept = read_json(tmp_path / "table.json")
    for row, seen in zip((real, arm), kept["rows"], strict=True):
        assert {**row, "card": seen["card"]} == {**seen, "cards": row["cards"]}
    assert kept["cards"] == {name: {"metric": name, "num_samples": 8} for name in NUMBERS}
    assert kept["rows"][1]["card"] == {"code_version": "a", "samples_digest": "1", "differs": []}
    write([real, arm], [{"arm": "l2", "level": 1, "all": 0.1}], {"l1": np.zeros((36, 8, 8, 3), np.uint8)}, tmp_path)
    assert "condition" in (tmp_path / "table.md").read_text() and (tmp_path / "samples.png").is_file()


def test_a_row_that_was_measured_otherwise_says_so(tmp_path: Path) -> None:
    """Other samples are what a table compares; another number of them is not."""
    numbers = {"seed": "0", "w": "", "sampling_gmacs": None, **dict.fromkeys(NUMBERS, 1.0), "errors": {}}

    def row(arm: str, **card: Any) -> dict[str, Any]:
        cards = {name: {"num_samples": 8, "samples_digest": "1", **card} for name in NUMBERS}
        return {"arm": arm, **numbers, "cards": cards}

    write([row("l1"), row("l2", samples_digest="2"), row("l3", num_samples=4)], [], {}, tmp_path)
    _, second, third = (seen["card"] for seen in read_json(tmp_path / "table.json")["rows"])
    assert second == {"samples_digest": "2", "differs": []}
    assert third["differs"] == [f"{name}.num_samples" for name in NUMBERS]
    _, warning = (tmp_path / "table.md").read_text().split("Measured otherwise")
    assert "l3" in warning and "fd_moco.num_samples" in warning and "l2" not in warning


def test_curves_are_over_what_their_arm_has_cost(toy_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each level 1 once, with its condition and without, at 6 x MACs x images; other seeds are not drawn."""
    drawn: list[Any] = []
    monkeypatch.setattr(depth_table, "loss_curve", lambda x, curves, **about: drawn.append((x, curves)) or b"")
    x = Experiment(toy(), toy_run.root)
    curves([Run("l2", 0, x), Run("l2_guided", 0, x), Run("l1", 1, x)])
    ((spent, losses),) = drawn
    assert list(losses) == ["l2", "l2, told nothing"]
    train, macs = x.config.level(1).train, count_macs(build_denoiser(x.config, 1, 0))
    assert spent[-1] == pytest.approx(6e-12 * macs * train.num_steps * train.batch_size)
    assert len(losses["l2"]) == len(spent) and losses["l2"] != losses["l2, told nothing"]


def test_a_row_is_made_from_images_to_numbers(toy_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is is kept, what is missing is made: here all from the denoisers on."""
    root = tmp_path / "artifacts"
    made = ("denoiser", "samples", "evaluation", "ladder", "neighbours", "pictures", "report", "watch")
    shutil.copytree(toy_run.root, root, ignore=shutil.ignore_patterns(*made))
    monkeypatch.setenv("NESTDIFF_HOME", str(root))
    x = Experiment(toy(), root)
    assert make(Run("l2", 0, x), "cpu") == 0
    for ref in (Ref("evaluation"), Ref("ladder")):
        assert x.artifact(ref).digest == Experiment(toy(), toy_run.root).artifact(ref).digest
