"""The arms of a table of depths: what they cost, and what they share."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from nestdiff_core.config import ExperimentConfig
from nestdiff_core.models.nested import build_denoiser, count_macs
from nestdiff_core.recipes import RECIPES
from nestdiff_core.recipes.depth import SCALES

ARMS = ("l1", "l1_star", "l2", "l3")
CLASS_ARMS = ("l1_class", "l2_class", "l3_class")
GUIDED = [(name, f"{name}_guided") for name in ARMS if name not in ("l1", "l1_star")]
GUIDED += [(name, f"{name}_autoguided") for name in ARMS]
scales = pytest.mark.parametrize("scale", SCALES)


def arm(scale: str, name: str) -> ExperimentConfig:
    return RECIPES[f"{scale}_{name}"]()


@functools.cache
def macs(scale: str, name: str) -> list[int]:
    """Of each level's denoiser, from level 1 up."""
    config = arm(scale, name)
    classes = SCALES[scale].num_classes if name in CLASS_ARMS else 0
    return [count_macs(build_denoiser(config, level.level, classes)) for level in config.levels]


@scales
@pytest.mark.parametrize("name", ARMS + CLASS_ARMS)
def test_arms_of_a_scale_cost_the_same_to_train(scale: str, name: str) -> None:
    """6 x MACs x images, summed over levels, within 1 % of the scale's FLOPs, as counted from the networks."""
    config = arm(scale, name)
    flops = sum(
        6.0 * count * level.train.num_steps * level.train.batch_size
        for count, level in zip(macs(scale, name), config.levels, strict=True)
    )
    assert flops == pytest.approx(SCALES[scale].tflops * 1e12, rel=0.01)


@scales
def test_the_enlarged_network_is_as_large_as_the_deepest_system(scale: str) -> None:
    assert sum(macs(scale, "l1_star")) == pytest.approx(sum(macs(scale, "l3")), rel=0.01)


@scales
def test_arms_differ_in_depth_and_size_alone(scale: str) -> None:
    """Images, judges, sampling and all of training but the number of steps are shared, and so is the order of images;
    levels above 1 have a batch of their own and the schedule's noise levels. What is kept decides nothing."""
    one = arm(scale, "l1")
    for name in ARMS[1:]:
        config = arm(scale, name)
        for part in ("images", "autoencoder", "encoder", "diffusion", "sampling", "evaluation", "conditioning"):
            assert getattr(config, part) == getattr(one, part), part
        for level in config.levels:
            own = {} if level.level == 1 else {"batch_size": SCALES[scale].batch_above, "noise_levels": ()}
            own |= {key: getattr(level.train, key) for key in ("num_steps", "keep_every", "checkpoint_every")}
            assert level.train == replace(one.level(1).train, **own)
    assert arm(scale, "l2").level(1) == arm(scale, "l3").level(1)


@scales
def test_arms_with_classes_are_told_the_class_and_nothing_else(scale: str) -> None:
    """Every level can be guided by it, so that l1 needs no guide of its own."""
    for name in CLASS_ARMS:
        told, plain, guided = arm(scale, name), arm(scale, name.removesuffix("_class")), arm(scale, f"{name}_guided")
        assert told.conditioning == replace(plain.conditioning, labels="class")
        assert all(guided.can_be_guided(level.level) and not level.guide_step for level in guided.levels)
        assert [level.train for level in guided.levels] == [level.train for level in told.levels]
        for level in told.levels:
            own = plain.level(level.level)
            kept = {key: getattr(level.train, key) for key in ("keep_every", "checkpoint_every")}
            train = replace(own.train, num_steps=level.train.num_steps, **kept)
            assert level == replace(own, train=train) and train.num_steps < own.train.num_steps


@scales
@pytest.mark.parametrize(("name", "guided"), GUIDED)
def test_guided_arms_train_nothing_of_their_own(scale: str, name: str, guided: str) -> None:
    """They are sampled otherwise: same networks and training; by what is told, or by about a quarter of the steps."""
    plain, other = arm(scale, name), arm(scale, guided)
    assert [(level.model, level.train) for level in plain.levels] == [
        (level.model, level.train) for level in other.levels
    ]
    assert other.sampling.chosen_by == "sweep"
    for level in other.levels:
        steps, kept = level.train.num_steps, level.train.keep_every
        if guided.endswith("_autoguided"):
            assert level.guide_step in range(kept, steps, kept)
            assert level.guide_step == pytest.approx(steps / 4, abs=kept / 2)
            assert 0.15 < level.guide_step / steps < 0.4
        else:
            assert level.guide_step == 0
