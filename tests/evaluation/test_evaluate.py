"""The whole evaluation on digits: floors, cards, other sets, the probe."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nestdiff_core.config import ExperimentConfig
from nestdiff_core.evaluation import features
from nestdiff_core.evaluation.bootstrap import frechet_resamples
from nestdiff_core.evaluation.card import MetricCard, SampleOrigin, differences
from nestdiff_core.evaluation.extractors import encoder_extractor, pixel_extractor
from nestdiff_core.evaluation.features import extract
from nestdiff_core.evaluation.report import Labelled, evaluate, measured_spaces

ORIGIN = SampleOrigin.of(ExperimentConfig(), {1: "abc"})


class TinyEncoder(nn.Module):
    input_size, mean, std = 8, (0.0,), (1.0,)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 24, generator=torch.Generator().manual_seed(0)) / 8)
        self.seen = 0

    def encode(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        self.seen += len(images)
        vector = torch.tanh(torch.from_numpy(images).flatten(1).float() / 255 @ self.weight)
        return vector[:, :, None, None], vector


@pytest.fixture(scope="module")
def sets() -> dict[str, np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = np.round(pixels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)[order], labels[order]
    rng = np.random.default_rng(1)
    noisy = (images[1200:1700] + rng.normal(size=(500, 8, 8, 1)) * 40).clip(0, 255).astype(np.uint8)
    return {
        "reference": images[:1000],
        "reference_labels": labels[:1000],
        "held_out": images[1000:1200],
        "held_out_labels": labels[1000:1200],
        "samples": noisy,
        "noise": rng.integers(0, 256, (300, 8, 8, 1), dtype=np.uint8),
    }


@pytest.fixture(scope="module")
def encoder() -> TinyEncoder:
    return TinyEncoder()


@pytest.fixture(scope="module")
def result(sets: dict[str, np.ndarray], encoder: TinyEncoder) -> dict:
    spaces = [encoder_extractor(encoder), pixel_extractor()]
    return evaluate(
        sets["samples"],
        measured_spaces(spaces, sets["reference"], sets["held_out"]),
        origin=ORIGIN,
        others={"noise": sets["noise"]},
        probe=tuple(Labelled(sets[name], sets[f"{name}_labels"]) for name in ("reference", "held_out")),
    )


def test_better_images_have_better_numbers(result: dict) -> None:
    """In both spaces: unseen digits before noisy digits before noise, at equal numbers of images."""
    for space in ("encoder", "pixels"):
        fd, precision = result["metrics"][f"fd_{space}"], result["metrics"][f"precision_{space}"]
        assert fd["floor"] < fd["value_at_floor"] < fd["others"]["noise"]
        assert precision["floor"] > precision["value_at_floor"] > precision["others"]["noise"]
        assert fd["value"] < fd["value_at_floor"]  # fewer images, larger distance
        assert fd["floor_images"] == 200


def test_only_inception_has_a_fid(result: dict) -> None:
    """Numbers of other spaces are named after their space."""
    assert set(result["metrics"]) == {
        f"{m}_{s}" for m in ("fd", "fd_infinity", "kd", "precision", "recall") for s in ("encoder", "pixels")
    }


def test_it_is_plain_json_with_a_card_beside_each_number(result: dict) -> None:
    """The result is valid JSON without NaN; each card names its metric, sets and counts."""
    read = json.loads(json.dumps(result, allow_nan=False))
    assert read == result
    cards = {name: MetricCard.from_dict(record["card"]) for name, record in read["metrics"].items()}
    assert all(card.metric == name and card.origin == ORIGIN for name, card in cards.items())
    assert all((card.num_samples, card.num_reference) == (500, 1000) for card in cards.values())
    assert differences(cards["precision_encoder"], cards["recall_encoder"]) == ["metric"]
    assert cards["fd_encoder"].settings == {"feature_dimension": 24}
    assert cards["precision_encoder"].settings["num_neighbours"] == 3
    assert {"extractor", "weights_sha256"} <= set(differences(cards["fd_encoder"], cards["fd_pixels"]))


def test_each_set_is_encoded_once(result: dict, encoder: TinyEncoder) -> None:
    """Floors and subsets reuse the features: 1000 + 200 + 500 + 300 images pass through the encoder."""
    assert result["metrics"]
    assert encoder.seen == 2000


def test_the_probe_judges_all_sets(result: dict) -> None:
    """It knows held-out digits, is less sure of noisy ones and least of noise."""
    probe = result["probe"]
    assert probe["held_out_accuracy"] > 0.9
    confidence = [judged["confidence"] for judged in (probe["held_out"], probe["samples"], probe["others"]["noise"])]
    assert confidence == sorted(confidence, reverse=True)


def test_it_repeats_itself(sets: dict[str, np.ndarray]) -> None:
    """The same sets give the same record, whatever the batches; without a probe it is None, without others none."""
    first, second = (
        evaluate(
            sets["samples"],
            measured_spaces([pixel_extractor()], sets["reference"], sets["held_out"]),
            origin=ORIGIN,
            batch_size=batch_size,
        )
        for batch_size in (256, 37)
    )
    assert first == second
    assert first["probe"] is None
    assert first["metrics"]["fd_pixels"]["others"] == {}


def test_a_frechet_distance_has_a_bootstrap_error_where_it_is_asked_for(sets: dict[str, np.ndarray]) -> None:
    """That of the samples' draw against the reference (test_bootstrap.py), and nothing else changes."""
    [space] = spaces = measured_spaces([pixel_extractor()], sets["reference"], sets["held_out"])
    plain, with_error = (evaluate(sets["samples"], spaces, origin=ORIGIN, resamples=number) for number in (0, 20))
    features = {"": extract(sets["samples"], space.extractor).values}
    drawn = frechet_resamples(features, space.reference.gaussian, resamples=20)[""]
    assert with_error["metrics"]["fd_pixels"].pop("deviation") == pytest.approx(drawn.std(ddof=1))
    assert plain["metrics"]["fd_pixels"].pop("deviation") is None
    assert with_error == plain


def test_few_images_come_with_warnings(sets: dict[str, np.ndarray]) -> None:
    """Forty held-out images are too few for 64 pixels: said of the floor, while the samples are enough."""
    found = evaluate(
        sets["samples"],
        measured_spaces([pixel_extractor()], sets["reference"], sets["held_out"][:40]),
        origin=ORIGIN,
    )
    assert found["warnings"]
    assert all(text.startswith("Floor: ") for text in found["warnings"])
    assert any("fd_pixels: 40 images" in text for text in found["warnings"])
    assert found["metrics"]["kd_pixels"]["floor"] is None


def test_the_limit_is_below_the_number_and_beside_the_floors(sets: dict[str, np.ndarray], result: dict) -> None:
    """500 images in 64 dimensions: fd_infinity is below fd, and still above that of as good a set as there can be."""
    for space in ("encoder", "pixels"):
        metrics = result["metrics"]
        infinity = metrics[f"fd_infinity_{space}"]
        assert 0 < infinity["value"] < metrics[f"fd_{space}"]["value"]
        assert 0 < infinity["deviation"] < infinity["value"]
        assert infinity["others"]["noise"] > infinity["value"]


def test_more_held_out_images_than_are_kept_have_a_floor_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 900 images features of 300 are kept: all floors, fd_infinity's included, are of as many held-out images."""
    monkeypatch.setattr(features, "MAX_KEPT", 300)
    draw = [np.random.default_rng(k).integers(0, 256, (900, 2, 2, 1), dtype=np.uint8) for k in range(3)]
    space = measured_spaces([pixel_extractor()], draw[0], draw[1])
    for count in (200, 900):
        for name, number in evaluate(draw[2][:count], space, origin=None)["metrics"].items():
            assert number["floor"] is not None and number["floor_images"] == min(count, 300), name
