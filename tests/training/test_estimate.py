"""`train --dry-run`: what a level will take, before there is anything to train on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestdiff_core.cli import main
from nestdiff_core.config import ConditioningConfig, ExperimentConfig, TextConfig
from nestdiff_core.models.nested import build_denoiser, count_macs, count_parameters
from nestdiff_core.recipes import toy
from nestdiff_core.training.estimate import estimate


def conditioned(labels: str) -> ExperimentConfig:
    base = toy()
    text = TextConfig(name="ViT-B-32", weights="random", length=7, width=12)
    return replace(base, conditioning=ConditioningConfig(labels=labels, text=text))


@pytest.mark.parametrize(("labels", "classes"), [("none", 0), ("class", 10), ("text", 0)])
@pytest.mark.parametrize("level", [1, 2])
def test_the_network_is_the_one_that_would_be_trained(labels: str, classes: int, level: int) -> None:
    """With labels, captions or neither: its size is counted on the very same network."""
    config = conditioned(labels)
    found = estimate(config, level, device=torch.device("cpu"), num_classes=classes, num_steps=1)
    model = build_denoiser(config, level, classes)
    assert found.parameters == count_parameters(model) and found.macs == count_macs(model)
    assert 0 < found.seconds_per_step < 60 and 2**26 < found.memory < 2**37


def test_more_processes_share_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = torch.nn.Module.__call__

    def counting(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        if type(self).__name__ == "NestedDenoiser":
            seen.append(len(args[0]))  # pyright: ignore
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", counting)
    for processes, batch in ((1, 32), (4, 8)):
        seen.clear()
        estimate(toy(), 1, device=torch.device("cpu"), processes=processes, num_steps=1)
        assert max(seen) == batch  # and one image, for its cost


def test_nothing_is_read() -> None:
    """Neither the weights nor the checkpoint that training would begin with."""
    base = toy()
    train = replace(base.level(1).train, start_from="/nowhere/weights.pth", fork_from="/nowhere/step_00000010")
    config = replace(base, levels=(replace(base.level(1), train=train), base.level(2)))
    assert estimate(config, 1, device=torch.device("cpu"), num_steps=1).parameters > 0


def test_dry_run_says_it_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path / "home"))
    assert main(["train", "toy", "--level", "1", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "num_steps: 20" in said and "z_1 (1, 8, 8)" in said and "all 20 steps  about " in said and "GiB" in said
    parameters = estimate(toy(), 1, device=torch.device("cpu"), num_steps=1).parameters
    assert f"640 images of 16 tokens: {640 * 16 / parameters:.1f} a parameter" in said  # 20 steps of 32, patches of 2x2
    assert not (tmp_path / "home").exists()
    assert main(["train", "toy", "--level", "3", "--dry-run"]) == 2
