"""The script that trains judges: what it leaves are judges, and it does nothing twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from nestdiff_core.config import EvaluationConfig
from nestdiff_core.config_io import from_dict
from nestdiff_core.encoders import build_judge
from nestdiff_core.encoders.convnet import Classifier
from nestdiff_core.evaluation.extractors import build_extractor
from scripts import judges


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The command on an experiment, with a small network and one epoch each; returns what it printed."""
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path / "artifacts"))
    small = ["--network", "shufflenet_v2_x0_5", "--layer", "conv5", "--input-size", "32", "--no-flip"]

    def command(experiment: str, *more: str) -> str:
        arguments = ["judges", experiment, "--out", str(tmp_path / "judges"), "--epochs", "1", "--moco-epochs", "1"]
        monkeypatch.setattr(sys, "argv", [*arguments, *small, *more])
        judges.main()
        return capsys.readouterr().out

    return command


def test_what_it_prints_are_judges(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The printed lines are an experiment's; both networks load from them; a second run trains nothing, and one after
    a file was damaged makes that judge anew, with the same bits."""
    printed = run("toy")
    config = from_dict(EvaluationConfig, yaml.safe_load(printed)["evaluation"])
    networks = {j.name: build_judge(j.encoder, num_classes=j.num_classes) for j in config.judges}
    assert [judge.name for judge in config.judges if judge.unit_length] == ["classifier"]
    assert isinstance(networks["classifier"], Classifier) and not isinstance(networks["moco"], Classifier)
    assert build_extractor("moco", judges=networks).metric_name("fd") == "fd_moco"
    record = json.loads((tmp_path / "judges" / "judges.json").read_text())
    assert record["classifier"]["training_flops"] > 0 and record["moco"]["training_flops"] > 0
    assert set(record["moco"]["held_out_knn_accuracy"]) >= {"encoder", "pixels", "untrained"}

    made = []
    for name in ("make_classifier", "make_moco"):
        real = getattr(judges, name)
        monkeypatch.setattr(judges, name, lambda *a, _name=name, _real=real, **k: made.append(_name) or _real(*a, **k))
    assert run("toy") == printed
    assert made == []
    file = tmp_path / "judges" / judges.FILE
    file.write_bytes(file.read_bytes()[:-8])
    run("toy")
    assert made == ["make_classifier"]
    again = json.loads((tmp_path / "judges" / "judges.json").read_text())
    assert again["classifier"]["sha256"] == record["classifier"]["sha256"]
    assert again["moco"] == record["moco"]


def test_images_without_classes_are_refused(run, tmp_path: Path) -> None:
    """With the setting that gives them."""
    path = tmp_path / "bare.yaml"
    path.write_text("recipe: toy\nimages.labels: false\nevaluation.probe: false\n")
    with pytest.raises(SystemExit, match=r"images\.labels"):
        run(str(path))
