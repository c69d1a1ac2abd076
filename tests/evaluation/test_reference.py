"""Reference statistics: streamed in bounded memory, kept in a file, read from others' files, refused by name."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from nestdiff_core import loading, stages
from nestdiff_core.cli import main
from nestdiff_core.config import EncoderConfig, EvaluationConfig, JudgeConfig
from nestdiff_core.errors import ConfigError, InputError, IntegrityError
from nestdiff_core.evaluation import features
from nestdiff_core.evaluation.card import MetricCard
from nestdiff_core.evaluation.extractors import Extractor, pixel_extractor
from nestdiff_core.evaluation.features import extract, extract_all
from nestdiff_core.evaluation.image_metrics import feature_metrics
from nestdiff_core.evaluation.reference import describe, load_statistics, save_statistics
from nestdiff_core.evaluation.samples import save_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import toy
from nestdiff_core.stages.reference import extractors as stage_extractors
from nestdiff_core.stages.reference import file_name, open_statistics


def random_images(n: int, seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 1), dtype=np.uint8)


class Endless:
    """As many 32x32 RGB images as are asked for, of which 256 differ."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.images = np.random.default_rng(0).integers(0, 256, (256, 32, 32, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index % 256].copy()


def with_logits() -> Extractor:
    """Pixels as an inception: their first ten are the logits."""
    pixels = pixel_extractor()

    def embed(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        features, _ = pixels.embed(images)
        return features, 5 * features[:, :10]

    return Extractor("inception", "none", {}, embed)


# --- streaming ----------------------------------------------------------------------------------------------------


@pytest.fixture
def few_kept(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(features, "MAX_KEPT", 300)
    return 300


def test_a_large_set_has_the_numbers_of_all_its_images(few_kept: int) -> None:
    """With 300 of 5,000 features kept: the distance is torch-fidelity's of all images, and so is the score."""
    images, reference = random_images(5000, 0), random_images(700, 1) // 2
    found, real = extract(images, with_logits()), extract(reference, with_logits())
    assert len(found) == 5000 and len(found.values) == few_kept
    numbers = feature_metrics(found, real, with_logits()).values
    values, logits = with_logits().embed(images)
    theirs, other = (fid_features_to_statistics(f) for f in (values, with_logits().embed(reference)[0]))
    distance = fid_statistics_to_metric(theirs, other, verbose=False)["frechet_inception_distance"]
    assert numbers["fid"] == pytest.approx(distance, rel=1e-6)
    assert logits is not None
    score = isc_features_to_metric(logits, rng_seed=features.SCORE_SEED)
    assert found.score is not None
    assert found.score == pytest.approx((score["inception_score_mean"], score["inception_score_std"]), rel=1e-9)
    assert numbers["inception_score"] == found.score[0]


def test_the_batches_do_not_matter(few_kept: int) -> None:
    """Moments, parts, kept features and digest have the same bits from batches of 7 and of 1,000."""
    images = random_images(4500, 0)
    one, other = (extract(images, pixel_extractor(), batch_size=size) for size in (7, 1000))
    assert one.digest == other.digest and torch.equal(one.values, other.values)
    for a, b in zip(one.parts, other.parts, strict=True):
        assert a.count == b.count and np.array_equal(a.mean, b.mean) and np.array_equal(a.scatter, b.scatter)
    assert np.array_equal(one.gaussian.covariance, other.gaussian.covariance)


def test_kept_features_are_a_random_part_in_order(few_kept: int) -> None:
    """They are those of 300 different images, spread over the set, whatever other set is as large."""
    images = random_images(1000, 0)
    whole = pixel_extractor().embed(images)[0]
    kept = extract(images, pixel_extractor()).values
    rows = [int((whole == row).all(dim=1).nonzero()[0]) for row in kept]
    assert rows == sorted(set(rows)) and len(rows) == few_kept
    assert 400 < np.mean(rows) < 600
    assert extract_all(images, [pixel_extractor()], seed=1)[0].values[0].ne(kept[0]).any()


def test_memory_does_not_grow_with_the_images() -> None:
    """Resident memory after 40,000 images is what it was after 12,000, within a kilobyte an image."""
    resident: dict[int, int] = {}

    def note(done: int, total: int, what: str, **_: float) -> None:
        resident[done] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    extract_all(Endless(40_960), [pixel_extractor()], progress=note)
    assert resident[40_960] - resident[12_288] < 1024 * (40_960 - 12_288)


def test_several_spaces_take_one_pass() -> None:
    """Images are read once, however many extractors there are, with what each alone would find."""
    images, seen = random_images(50, 0), []

    class Counted:
        def __len__(self) -> int:
            return 50

        def __getitem__(self, index: int) -> np.ndarray:
            seen.append(index)
            return images[index]

    both = extract_all(Counted(), [pixel_extractor(), with_logits()], batch_size=16)
    assert seen == list(range(50))
    for found, space in zip(both, (pixel_extractor(), with_logits()), strict=True):
        assert torch.equal(found.values, extract(images, space).values)


def test_images_in_the_range_of_zero_to_one_are_refused() -> None:
    """uint8 images that are all 0 or 1 are floats that somebody cut."""
    with pytest.raises(InputError, match="0 or 1"):
        extract(random_images(50, 0) // 128, pixel_extractor())


# --- files --------------------------------------------------------------------------------------------------------


def test_statistics_survive_the_file(tmp_path: Path) -> None:
    """A comparison with what was saved gives the same numbers; others read mu and sigma from it."""
    images, reference = random_images(500, 0), random_images(800, 1)
    found, real = (extract(i, with_logits()) for i in (images, reference))
    path = tmp_path / "real.npz"
    save_statistics(path, real, with_logits(), resize_filter="bicubic")
    again = load_statistics(path, with_logits())
    assert again.digest == real.digest and again.count == 800 and again.image_shape == (8, 8, 1)
    one, other = (feature_metrics(found, r, with_logits(), infinity=True) for r in (real, again))
    assert one.values == other.values and set(one.values) >= {"fid", "fid_infinity", "kid", "precision"}
    with np.load(path) as arrays:
        assert np.allclose(arrays["mu"], real.values.mean(dim=0))
        assert np.allclose(arrays["sigma"], np.cov(real.values.numpy(), rowvar=False))
    before = path.read_bytes()
    save_statistics(path, real, with_logits(), resize_filter="bicubic")
    assert path.read_bytes() == before


def test_statistics_of_another_extractor_are_refused(tmp_path: Path) -> None:
    """Another name, other weights, another preprocessing: exit code 4, and the field is named with both values."""
    path, mine = tmp_path / "real.npz", pixel_extractor()
    save_statistics(path, extract(random_images(90, 0), mine), mine, resize_filter="bicubic")
    for change in ({"kind": "inception"}, {"weights_sha256": "ab"}, {"preprocessing": {"grid": 4, "resize": "area"}}):
        with pytest.raises(IntegrityError) as caught:
            load_statistics(path, replace(mine, **change))
        name = next(iter(change)).replace("kind", "extractor")
        assert name in str(caught.value) and list(caught.value.expected) == [name]
        assert caught.value.expected != caught.value.found


def test_files_of_others(tmp_path: Path) -> None:
    """mu and sigma alone give a distance and say what they cannot give; images beside them give the rest."""
    images, real = random_images(300, 0), random_images(400, 1)
    found, known = (extract(i, with_logits()) for i in (images, real))
    moments = {"mu": known.gaussian.mean, "sigma": known.gaussian.covariance}
    np.savez(tmp_path / "moments.npz", **moments)
    np.savez(tmp_path / "adm.npz", arr_0=real[:150], **moments)
    np.savez(tmp_path / "images.npz", arr_0=real)
    exact = feature_metrics(found, known, with_logits()).values
    bare = feature_metrics(found, load_statistics(tmp_path / "moments.npz", with_logits()), with_logits())
    assert bare.values["fid"] == pytest.approx(exact["fid"], rel=1e-12)
    assert set(bare.values) == {"fid", "inception_score"}
    assert {w.split(":")[0] for w in bare.warnings} == {"fid", "precision and recall", "kid"}
    adm = load_statistics(tmp_path / "adm.npz", with_logits())
    assert adm.count is None and len(adm.values) == 150
    whole = feature_metrics(found, adm, with_logits())
    assert whole.values["fid"] == bare.values["fid"] and "recall" in whole.values
    assert (
        feature_metrics(found, load_statistics(tmp_path / "images.npz", with_logits()), with_logits()).values == exact
    )


@pytest.mark.parametrize(
    ("arrays", "error", "words"),
    [
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, IntegrityError, "mean and its covariance"),
        ({"other": np.zeros(3)}, InputError, "no reference"),
        ({"arr_0": np.zeros((9, 8, 8, 3))}, IntegrityError, "does not hold images"),
    ],
    ids=["shapes", "nothing", "floats"],
)
def test_files_that_are_no_reference(tmp_path: Path, arrays: dict, error: type[Exception], words: str) -> None:
    """What a file holds, and what it should, is in the refusal."""
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(error, match=words):
        load_statistics(tmp_path / "file.npz", pixel_extractor())
    (tmp_path / "file.npz").write_bytes(b"PK\3\4nothing")
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_statistics(tmp_path / "file.npz", pixel_extractor())


def test_features_of_another_dimension_are_refused(tmp_path: Path) -> None:
    """Moments of 32 features against 64: exit code 4 with both numbers."""
    np.savez(tmp_path / "moments.npz", mu=np.zeros(32), sigma=np.eye(32))
    with pytest.raises(IntegrityError, match="dimensions") as caught:
        space = pixel_extractor()
        feature_metrics(extract(random_images(90, 0), space), load_statistics(tmp_path / "moments.npz", space), space)
    assert (caught.value.expected, caught.value.found) == (32, 64)


# --- the stage ----------------------------------------------------------------------------------------------------


@pytest.fixture
def made(toy_run: Any, tmp_path: Path) -> Experiment:
    shutil.copytree(toy_run.root, tmp_path / "artifacts")
    return Experiment(toy(), tmp_path / "artifacts")


def test_the_stage_keeps_what_the_images_say(made: Experiment) -> None:
    """Both splits in both spaces, as extracted here from the same images; the evaluation's cards name them."""
    index, spaces = loading.open_index(made), stage_extractors(made)
    for split in ("train", "held_out"):
        kept = open_statistics(made, split, spaces)
        for space in spaces:
            found = extract(loading.SplitImages(index, split), space)
            assert kept[space.kind].digest == found.digest and kept[space.kind].count == len(index.rows(split))
            assert np.array_equal(kept[space.kind].gaussian.covariance, found.gaussian.covariance)
    card = MetricCard.from_dict(made.artifact(Ref("evaluation")).info["metrics"]["fd_pixels"]["card"])
    assert card.reference_digest == open_statistics(made, "train", spaces)["pixels"].digest
    assert card.num_reference == len(index.rows("train")) and card.origin is not None


def test_a_stopped_reference_goes_on_at_the_next_split(made: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies in the second split has the first, and ends with the same bytes."""
    artifact = made.artifact(Ref("reference"))
    shutil.rmtree(artifact.path)
    passes = []

    def failing(images: Any, spaces: Any, **about: Any) -> Any:
        passes.append(about["what"])
        if len(passes) == 2:
            raise KeyboardInterrupt
        return extract_all(images, spaces, **about)

    monkeypatch.setattr(sys.modules["nestdiff_core.stages.reference"], "extract_all", failing)
    with pytest.raises(KeyboardInterrupt):
        stages.reference(made)
    assert stages.reference(made).digest == artifact.digest
    assert passes == ["reference (train)", "reference (held_out)", "reference (held_out)"]


def test_judges_are_further_spaces(made: Experiment) -> None:
    """Encoders of libraries and of another experiment's artifact judge beside the own one, each under its name; a
    change of their weights makes the reference and the evaluation new, and the samples not."""
    moco = JudgeConfig(name="own", encoder=EncoderConfig(kind="moco", weights=str(made.artifact(Ref("encoder")).path)))
    vit = JudgeConfig(name="vit", encoder=EncoderConfig(kind="timm", name="test_vit", weights="random", input_size=32))
    unit = replace(moco, name="unit", unit_length=True)
    x = Experiment(replace(made.config, evaluation=EvaluationConfig(judges=(moco, vit, unit))), made.root)
    stages.reference(x)
    metrics = stages.evaluation(x).info["metrics"]
    assert {name for name in metrics if name.startswith("fd_") and "infinity" not in name} == {
        "fd_encoder", "fd_own", "fd_vit", "fd_unit"
    }  # fmt: skip
    assert metrics["fd_own"]["value"] == metrics["fd_encoder"]["value"]
    cards = {name: metrics[f"fd_{name}"]["card"] for name in ("encoder", "vit", "unit")}
    assert cards["unit"]["preprocessing"] == {**cards["encoder"]["preprocessing"], "unit_length": True}
    assert metrics["fd_unit"]["value"] < 4.0  # of vectors of length 1
    assert cards["vit"]["weights_sha256"] != cards["encoder"]["weights_sha256"]
    assert x.path(Ref("samples")) == made.path(Ref("samples"))
    assert x.path(Ref("reference")) != made.path(Ref("reference"))


def test_a_file_takes_the_place_of_the_training_images(made: Experiment, tmp_path: Path) -> None:
    """In its space only, and its hash and number are on the card; another file makes the numbers anew."""
    index, space = loading.open_index(made), pixel_extractor()
    path = tmp_path / "given.npz"
    save_statistics(path, extract(loading.SplitImages(index, "held_out"), space), space, resize_filter="area")
    evaluation = replace(made.config.evaluation, reference_statistics=str(path))
    x = Experiment(replace(made.config, evaluation=evaluation), made.root)
    stages.reference(x)
    metrics, before = stages.evaluation(x).info["metrics"], made.artifact(Ref("evaluation")).info["metrics"]
    assert metrics["fd_encoder"] == before["fd_encoder"]
    assert metrics["fd_pixels"]["card"]["num_reference"] == len(index.rows("held_out"))
    assert [metrics[f"fd_{space}"]["card"]["resize_filter"] for space in ("pixels", "encoder")] == ["area", "bicubic"]
    assert metrics["fd_pixels"]["floor"] == pytest.approx(0, abs=1e-5)  # held-out images against themselves
    first = x.artifact(Ref("reference")).digest
    save_statistics(path, extract(loading.SplitImages(index, "train"), space), space, resize_filter="area")
    assert stages.reference(x).digest != first
    assert describe(x.artifact(Ref("reference")).path / file_name("train", "pixels"))["images"] == len(
        index.rows("train")
    )


def test_a_file_of_a_space_that_is_not_measured_is_refused(made: Experiment, tmp_path: Path) -> None:
    """Moments of no stated space are inception's, which this experiment does not look at."""
    np.savez(tmp_path / "moments.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    evaluation = replace(made.config.evaluation, reference_statistics=str(tmp_path / "moments.npz"))
    x = Experiment(replace(made.config, evaluation=evaluation), made.root)
    with pytest.raises(ConfigError, match="nothing is measured"):
        stages.reference(x)


def test_an_evaluation_without_its_reference_is_refused(made: Experiment) -> None:
    """The stage is named, with the job that makes it."""
    shutil.rmtree(made.artifact(Ref("reference")).path)
    shutil.rmtree(made.root / "evaluation")
    with pytest.raises(IntegrityError, match="reference") as caught:
        stages.evaluation(made)
    assert "evaluate" in caught.value.fix


def test_samples_that_are_not_all_there_are_refused(made: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample file of fewer images under a manifest that vouches for it: exit code 4 with both counts."""
    samples, pictures = made.artifact(Ref("samples")), random_images(100, 0)
    shutil.rmtree(made.root / "evaluation")
    save_samples(samples.path / "samples.npz", pictures)
    monkeypatch.setattr("nestdiff_core.artifacts.Artifact.verify", lambda _: 0)
    with pytest.raises(IntegrityError) as caught:
        stages.evaluation(made)
    assert (caught.value.code, caught.value.expected, caught.value.found) == (4, 256, 100)


def test_the_command_makes_it(made: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run --stage reference` makes what was removed, to the bit."""
    monkeypatch.setenv("NESTDIFF_HOME", str(made.root))
    digest = made.artifact(Ref("reference")).digest
    shutil.rmtree(made.root / "reference")
    assert main(["run", "toy", "--stage", "reference"]) == 0
    assert made.artifact(Ref("reference")).digest == digest
