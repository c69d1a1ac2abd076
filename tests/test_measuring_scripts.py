"""scripts/linear_denoiser.py and scripts/power.py: their tables of an experiment that has been run."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from scripts import linear_denoiser, power


def table_of(main: Callable[[], int], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    return main()


def test_linear_denoisers_stand_beside_trained_ones(
    toy_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NESTDIFF_HOME", str(toy_run.root))
    assert table_of(linear_denoiser.main, monkeypatch, "toy") == 0
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines[:4] == [
        ["1", "linear", "nothing"],
        ["1", "linear", "z_2"],
        ["1", "trained", "nothing"],
        ["1", "trained", "z_2"],
    ]


def test_power_of_images_and_latents_beside_held_out_ones(
    toy_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NESTDIFF_HOME", str(toy_run.root))
    assert table_of(power.main, monkeypatch, "toy") == 0
    images, latents = capsys.readouterr().out.split("\ncomponents of z_2")
    frequencies, _, held_out, samples = images.splitlines()
    assert frequencies.split()[:4] == ["frequencies", "0", "1-2", "3-5"]
    for row in (held_out, samples, *latents.splitlines()[2:4]):
        numbers = row.removeprefix("held out").removeprefix("samples").split()
        assert numbers and all(float(number) > 0 for number in numbers), row


def test_power_without_samples_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path))
    assert table_of(power.main, monkeypatch, "toy") != 0
    assert "samples" in capsys.readouterr().err
