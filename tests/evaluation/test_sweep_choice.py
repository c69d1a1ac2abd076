"""What a sweep tries, how it chooses, and what it says of its choice."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nestdiff_core.config import ExperimentConfig, SweepConfig
from nestdiff_core.config_io import from_dict, to_dict
from nestdiff_core.errors import ConfigError
from nestdiff_core.evaluation.figures import pareto_plot
from nestdiff_core.evaluation.sweep import (
    Setting,
    best,
    candidates,
    configured,
    from_plain,
    noise_of_differences,
    pareto,
    passes,
    short_list,
    to_plain,
    verdict,
    with_settings,
)
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import digits, toy

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
