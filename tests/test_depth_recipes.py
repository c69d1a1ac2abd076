"""The arms of a table of depths: what they cost, and what they share."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from typing import Any

import pytest

from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.models.nested import build_denoiser, count_macs
from nestdiff_core.recipes import RECIPES
from nestdiff_core.recipes.depth import SCALES
from scripts.reproduce import JUDGES_SEED

ARMS = ("l1", "l1_star", "l2", "l3")
CLASS_ARMS = ("l1_class", "l2_class", "l3_class")
VARIANTS = ("l2_noise0", "l2_noise50", "l2_noise100", "l2_vector", "l2_moco", "l2_untrained", "l2_code", "l4")
GUIDED = [(name, f"{name}_guided") for name in ARMS if name not in ("l1", "l1_star")]
GUIDED += [(name, f"{name}_autoguided") for name in ARMS]
scales = pytest.mark.parametrize("scale", SCALES)


def arm(scale: str, name: str) -> ExperimentConfig:
    return RECIPES[f"{scale}_{name}"]()


def settings(config: ExperimentConfig) -> dict[str, Any]:
    """By their names, those of levels with the level's number."""

    def flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
        found = {}
        for key, value in values.items():
            inner = flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
            found.update(inner)
        return found

    return flat(asdict(config) | {"levels": {str(level.level): asdict(level) for level in config.levels}})


@functools.cache
def macs(scale: str, name: str) -> list[int]:
    """Of each level's denoiser, from level 1 up."""
    config = arm(scale, name)
    classes = SCALES[scale].num_classes if name in CLASS_ARMS else 0
    return [count_macs(build_denoiser(config, level.level, classes)) for level in config.levels]


@scales
@pytest.mark.parametrize("name", ARMS + CLASS_ARMS + VARIANTS)
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
@pytest.mark.parametrize(
    ("name", "differ"),
    [
        *[(f"l2_noise{percent}", ("levels.2.condition_noise",)) for percent in (0, 50, 100)],
        ("l2_untrained", ("encoder.weights",)),
        ("l2_code", ("encoder.",)),
        ("l2_moco", ("encoder.",)),
        ("l2_vector", ("levels.2.grid", "levels.2.channels")),
    ],
)
def test_variants_differ_from_two_levels_in_one_thing(scale: str, name: str, differ: tuple[str, ...]) -> None:
    """And in the steps that equal FLOPs leave them, where their networks are of another size."""
    two, other = settings(arm(scale, "l2")), settings(arm(scale, name))
    steps = (".num_steps", ".keep_every", ".checkpoint_every")
    changed = {key for key in two if two[key] != other[key] and key != "name" and not key.endswith(steps)}
    assert all(any(key.startswith(what) for key in changed) for what in differ)
    assert all(key.startswith(differ) for key in changed)


@scales
def test_an_autoencoders_code_is_folded_to_the_grid_of_its_level(scale: str) -> None:
    config = arm(scale, "l2_code")
    _, side, _ = config.latent_shape(1)
    assert side == config.encoder.fold * config.level(2).grid


@scales
def test_an_encoder_of_the_images_own_is_none_of_the_judges(scale: str) -> None:
    """It has as many tokens as its level; its start and the views that it learns from are its own."""
    config = arm(scale, "l2_moco")
    encoder = config.encoder
    assert encoder.input_size == config.images.resolution == config.level(2).grid * encoder.vit.patch_size
    assert encoder.moco.seed != JUDGES_SEED


@scales
def test_condition_noise_is_of_level_1_alone(scale: str) -> None:
    """Level 2 is trained once for all of the grid."""
    two, noised = Experiment(arm(scale, "l2")), Experiment(arm(scale, "l2_noise100"))
    first, second = Ref("denoiser", 1), Ref("denoiser", 2)
    assert two.config_hash(second) == noised.config_hash(second)
    assert two.config_hash(first) != noised.config_hash(first)


@scales
def test_a_fourth_level_keeps_level_1(scale: str) -> None:
    three, four = arm(scale, "l3"), arm(scale, "l4")
    assert Experiment(three).config_hash(Ref("denoiser", 1)) == Experiment(four).config_hash(Ref("denoiser", 1))
    assert four.num_levels == 4 and four.level(4).grid == three.level(3).grid == 1


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
