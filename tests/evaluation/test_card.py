"""Metric cards: complete, plain JSON, and able to say in what two numbers differ."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from nestdiff_core.config import ExperimentConfig, LevelConfig, SamplingConfig, TrainConfig
from nestdiff_core.evaluation.card import MetricCard, SampleOrigin, compare, differences

CONFIG = ExperimentConfig(
    levels=(
        LevelConfig(level=1, guidance=0.5, train=TrainConfig(ema_decay=0.9)),
        LevelConfig(level=2, grid=2, channels=8, condition_noise=0.7),
    ),
    sampling=SamplingConfig(sampler="ddim", num_evaluations=17, seed=5, noise_gamma=2.0),
)


def card(**changes: object) -> MetricCard:
    fields = {
        "metric": "fd_encoder",
        "extractor": "encoder",
        "weights_sha256": "ab",
        "preprocessing": {"input_size": 8},
        "reference_digest": "cd",
        "num_reference": 100,
        "samples_digest": "ef",
        "num_samples": 50,
        "resize_filter": "bicubic",
        "settings": {"seed": 0},
        "origin": SampleOrigin.of(CONFIG, {1: "one", 2: "two"}),
    }
    return MetricCard(**{**fields, **changes})


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return {**value, 2: another(value.get(2, 0))}
    if isinstance(value, tuple):
        return (*value[:-1], 0.9)
    return value + "other" if isinstance(value, str) else value + 1


def test_origin_reads_the_experiment() -> None:
    """Sampler, evaluations, seed, and guidance, noise and EMA of each level come from the configuration."""
    origin = SampleOrigin.of(CONFIG, {1: "one", 2: "two"}, label_sampling="uniform")
    assert (origin.sampler, origin.seed) == ("ddim", 5)
    assert (origin.num_evaluations, origin.noise_gamma) == ({1: 17, 2: 17}, {1: 2.0, 2: 2.0})
    assert origin.guidance == {1: 0.5, 2: 0.0}
    assert origin.condition_noise == {1: 0.0, 2: 0.7}
    assert origin.ema_decay == {1: 0.9, 2: 0.9999}
    assert origin.checkpoints == {1: "one", 2: "two"}
    assert origin.label_sampling == "uniform"
    assert "half to even" in origin.rounding


def test_card_survives_json() -> None:
    """A card read from its own JSON is equal, levels being numbers again."""
    written = json.dumps(card().to_dict(), allow_nan=False)
    assert MetricCard.from_dict(json.loads(written)) == card()


def test_every_field_counts() -> None:
    """A change of any field of card or origin is named, and nothing else."""
    base = card()
    assert differences(base, card()) == []
    for field in dataclasses.fields(MetricCard):
        if field.name not in ("origin", "settings", "packages", "preprocessing"):
            other = another(getattr(base, field.name))
            assert differences(base, dataclasses.replace(base, **{field.name: other})) == [field.name]
    for field in dataclasses.fields(SampleOrigin):
        other = another(getattr(base.origin, field.name))
        changed = card(origin=dataclasses.replace(base.origin, **{field.name: other}))
        assert differences(base, changed)
        assert all(n.startswith(f"origin.{field.name}") for n in differences(base, changed))


def test_comparing_says_what_was_measured_differently_and_what_was_made_differently() -> None:
    """Numbers of another guidance compare; those of another reference and filter do not, and both are named."""
    base = card()
    guided = card(origin=dataclasses.replace(base.origin, guidance={1: 0.5, 2: 0.8}), samples_digest="gh")
    filtered = card(reference_digest="ij", resize_filter="lanczos")
    one = {"fd_encoder": {"value": 1.0, "card": base.to_dict()}, "fd_pixels": {"value": 5.0, "card": base.to_dict()}}
    [row] = compare(one, {"fd_encoder": {"value": 2.0, "card": guided.to_dict()}})
    assert (row["number"], row["one"], row["other"], row["comparable"]) == ("fd_encoder", 1.0, 2.0, "yes")
    assert (row["measured differently"], row["samples differ in"]) == ("", "samples_digest, origin.guidance.2")
    [row] = compare(one, {"fd_encoder": {"value": 2.0, "card": filtered.to_dict()}})
    assert (row["comparable"], row["measured differently"]) == ("no", "reference_digest, resize_filter")


def test_images_without_a_record_have_a_card_too() -> None:
    """A card without an origin goes to JSON and back, and differs from one with an origin in that."""
    bare = card(origin=None)
    assert MetricCard.from_dict(json.loads(json.dumps(bare.to_dict()))) == bare
    assert differences(bare, card()) == ["origin"]


def test_differences_name_the_level() -> None:
    """Another guidance of level 2 is named by its level; packages by their name; a missing setting by its key."""
    base = card()
    origin = dataclasses.replace(base.origin, guidance={1: 0.5, 2: 0.8})
    other = card(origin=origin, packages={**base.packages, "torch": "0.1"}, settings={"seed": 0, "num_neighbours": 3})
    assert differences(base, other) == ["settings.num_neighbours", "origin.guidance.2", "packages.torch"]


def test_versions_are_recorded() -> None:
    """The card knows the code and the packages that computed the number."""
    assert set(card().packages) == {"torch", "torch-fidelity"}
    assert card().code_version
