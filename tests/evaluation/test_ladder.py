"""The oracle ladder: its arithmetic, and the stage on small trained cascades."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nestdiff_core import loading, stages
from nestdiff_core.cli import main
from nestdiff_core.config import DiffusionConfig, ExperimentConfig, LadderConfig
from nestdiff_core.errors import IntegrityError
from nestdiff_core.evaluation.extractors import pixel_extractor
from nestdiff_core.evaluation.features import extract
from nestdiff_core.evaluation.figures import ladder_plot
from nestdiff_core.evaluation.image_metrics import image_metrics
from nestdiff_core.evaluation.ladder import image_ladder, ladder_table, level_numbers, level_table, verdicts
from nestdiff_core.evaluation.samples import StoredSamples, load_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import toy
from nestdiff_core.sampling import parts


def pictures(n: int, seed: int, noise: float) -> np.ndarray:
    """Smooth images and, on top of the same ones, noise."""
    rng = np.random.default_rng(seed)
    smooth = np.cumsum(rng.normal(size=(n, 6, 6, 1)), axis=1) * 20 + 128
    return (smooth + noise * rng.normal(size=smooth.shape)).clip(0, 255).astype(np.uint8)


def test_costs_add_up_and_name_the_rung_where_noise_comes_in() -> None:
    """Noise of 5, 40 and 45 grey levels at rungs 2, 3 and 4: level 2 costs most, and the costs sum to D_4 - D_1."""
    training = pictures(400, 0, 0)
    rungs = {k: pictures(120, 1, noise) for k, noise in {4: 45.0, 3: 40.0, 2: 5.0, 1: 0.0}.items()}
    known = {"pixels": extract(training, pixel_extractor())}
    found = image_ladder(rungs, pictures(120, 1, 0), known, [pixel_extractor()])
    distances, cost = found["metrics"]["fd_pixels"]["rungs"], found["costs"]["fd_pixels"]
    for k, images in rungs.items():
        assert distances[str(k)] == image_metrics(images, training, pixel_extractor()).values["fd_pixels"]
    assert cost["levels"]["2"] == distances["3"] - distances["2"]
    assert sum(cost["levels"].values()) == pytest.approx(distances["4"] - distances["1"])
    assert cost["autoencoder"] == 0
    assert cost["costliest"] == 2 and cost["halves"] == [2, 2]
    assert "level 2 costs most" in verdicts(found)[0]
    assert found == image_ladder(rungs, rungs[1], known, [pixel_extractor()], batch_size=7)


def test_a_coin_decides_between_equal_levels_and_it_is_said() -> None:
    """Where every rung is as good, the halves of the images need not agree, and a sentence says when they do not."""
    record = {
        "costs": {
            "fd": {
                "levels": {"2": 0.1, "1": 0.0},
                "errors": {"2": 0.02, "1": 0.02},
                "autoencoder": 0.0,
                "costliest": 2,
                "halves": [2, 1],
            }
        }
    }
    assert "disagree" in verdicts(record)[0]
    record["costs"]["fd"]["halves"] = [2, 2]
    assert "each half" in verdicts(record)[0] and "0.1 ± 0.04" in verdicts(record)[0]


def test_floors_stand_where_they_should() -> None:
    """Skewed latents on a line: fresh and held-out ones score as training ones do, a Gaussian worse."""
    rng = np.random.default_rng(0)
    z = torch.from_numpy(np.exp(rng.normal(size=(1200, 1, 1, 1))) * np.ones((1, 2, 1, 1)))
    held_out, training, fresh = z[:300], z[300:900], z[900:]
    found = level_numbers({"unconditional": fresh}, held_out, training, name="z_2")
    numbers = found["numbers"]
    assert set(numbers) == {"unconditional", "held_out", "resampled", "gaussian"}
    assert not any("left out" in text for text in found["warnings"])
    for real in ("unconditional", "held_out", "resampled"):
        assert abs(numbers[real]["coverage"] - 0.875) < 0.1
    assert numbers["gaussian"]["coverage"] < 0.7 and numbers["gaussian"]["precision"] < numbers["held_out"]["precision"]
    few = level_numbers({"unconditional": fresh}, held_out, training[:400], name="z_2")
    assert set(few["numbers"]) == {"unconditional", "held_out", "gaussian"}
    assert any("resampled" in text and "400" in text for text in few["warnings"])
    fewer = level_numbers({"unconditional": fresh}, held_out, training[:200], name="z_2")
    assert fewer["settings"]["latents"] == 200


def test_plot_is_a_small_repeatable_png() -> None:
    """About 600 pixels wide; a level of negative cost, and all distances 0, can be drawn."""
    for distances in ({3: 0.4, 2: 0.3, 1: 0.35}, {2: 0.0, 1: 0.0}):
        first, again = (
            ladder_plot(distances, title="t", xlabel="fd", floor=("held-out images", 0.2)) for _ in range(2)
        )
        assert first == again and len(first) < 60_000
        assert Image.open(io.BytesIO(first)).width == 600


# --- the stage ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(toy_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A copy of the toy experiment's artifacts, beside which others are made."""
    root = tmp_path_factory.mktemp("made") / "artifacts"
    shutil.copytree(toy_run.root, root)
    return Experiment(toy(), root)


def test_rungs_are_the_cascade_with_true_latents(made: Experiment) -> None:
    """Rung 1 is the held-out images, rung 3 what labels and seed make; every number says of how many."""
    artifact, index = made.artifact(Ref("ladder")), loading.open_index(made)
    rows = index.rows("held_out")
    images = np.stack([image for image in loading.SplitImages(index, "held_out")])
    np.testing.assert_allclose(load_samples(artifact.path / "rung_1.npz").astype(int), images, atol=1)  # fp16 z_1
    cascade = loading.Cascade(made)
    z = cascade.latents(range(5), seed=made.config.sampling.seed, rows=rows[:5])
    np.testing.assert_array_equal(load_samples(artifact.path / "rung_3.npz")[:5], cascade.images(range(5), z[1]))
    true = {2: torch.from_numpy(loading.open_latents(made, 2).read(rows, 0 * rows)).float()}
    given = cascade.latents(range(len(rows)), seed=made.config.sampling.seed, given=true)
    np.testing.assert_array_equal(
        load_samples(artifact.path / "rung_2.npz"), cascade.images(range(len(rows)), given[1])
    )
    record = artifact.info
    assert record["num_images"] == len(rows) == record["levels"]["2"]["settings"]["latents"]
    assert set(record["levels"]["2"]["numbers"]) == {"unconditional", "held_out", "resampled", "gaussian"}
    assert {"conditional", "ancestral"} < set(record["levels"]["1"]["numbers"])


def test_captions_and_classes_are_those_of_the_rows(made: Experiment) -> None:
    """An experiment that is told classes gets those of the true images, not of the image's number."""
    x = Experiment(replace(made.config, conditioning=replace(made.config.conditioning, labels="class")), made.root)
    cascade = loading.Cascade(x, levels=[])
    rows = loading.open_index(x).rows("held_out")
    np.testing.assert_array_equal(cascade._labels_of(rows), loading.open_index(x).labels[rows])


def test_fewer_images_and_another_batch_size(made: Experiment) -> None:
    """ladder.num_images takes a random part of the held-out images; another batch size changes by rounding only."""
    config = replace(made.config, ladder=LadderConfig(num_images=12))
    one = stages.ladder(Experiment(config, made.root)).info
    other = replace(config, sampling=replace(config.sampling, batch_size=5))
    two = stages.ladder(Experiment(other, made.root)).info
    assert one["num_images"] == two["num_images"] == 12
    for name, numbers in one["metrics"].items():
        if name.startswith("fd"):
            assert two["metrics"][name]["rungs"] == pytest.approx(numbers["rungs"], rel=0.02)


def test_tables_are_printed(made: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """`inspect` shows a row per rung and per level and number, from the top, without NaN."""
    monkeypatch.setenv("NESTDIFF_HOME", str(made.root))
    assert main(["inspect", "toy"]) == 0
    said = capsys.readouterr().out
    record = made.artifact(Ref("ladder")).info
    assert [row["true latents"] for row in ladder_table(record)] == ["none", "z_2", "z_1 up", "images"]
    assert next(iter(level_table(record)))["latent"] == "z_2"
    assert f"report: {made.artifact(Ref('report')).path / 'report.html'}" in said
    assert "oracle ladder, 20 images to a rung" in said and "costs most" in said and "nan" not in said.lower()


def shuffled(weights: torch.Tensor) -> torch.Tensor:
    order = torch.from_numpy(np.random.default_rng(0).permutation(weights.numel()))
    return weights.flatten()[order].view_as(weights)


def trained_briefly() -> ExperimentConfig:
    """The toy with a z_2 that all but holds the image, trained until both levels are worth breaking."""
    config = toy()
    model = replace(config.level(1).model, width=64, num_heads=4, position_init="sincos")
    train = replace(
        config.level(1).train,
        num_steps=250,
        batch_size=64,
        lr=3e-3,
        lr_decay="cosine",
        warmup_steps=20,
        ema_decay=0.95,
        grad_clip=1.0,
        checkpoint_every=250,
    )
    levels = (
        replace(config.level(1), guidance=0.0, model=model, train=train),
        replace(config.level(2), grid=4, channels=8, condition_noise=0.1, model=model, train=train),
    )
    sampling = replace(config.sampling, num_evaluations=12)
    return replace(config, levels=levels, sampling=sampling, diffusion=DiffusionConfig(prediction="x"))


@pytest.fixture(scope="module")
def trained(toy_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    root = tmp_path_factory.mktemp("trained") / "artifacts"
    shutil.copytree(toy_run.root, root)
    x = Experiment(trained_briefly(), root)
    stages.bases(x)
    stages.latents(x)
    for level in (1, 2):
        stages.train(x, level)
    return x


@pytest.mark.parametrize("broken", [1, 2])
def test_a_broken_level_is_named(trained: Experiment, broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ladder names the level whose denoiser's weights are shuffled."""
    opened = loading.open_denoiser

    def broken_one(x: Experiment, level: int, **how: Any) -> Any:
        model = opened(x, level, **how)
        if level == broken:
            model.load_state_dict({name: shuffled(values) for name, values in model.state_dict().items()})
        return model

    monkeypatch.setattr(loading, "open_denoiser", broken_one)
    artifact = stages.ladder(trained)
    record = artifact.info
    shutil.rmtree(artifact.path)
    for cost in record["costs"].values():
        assert cost["costliest"] == broken and cost["halves"] == [broken, broken], record["costs"]


def test_a_stopped_ladder_goes_on_at_the_next_rung(made: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rungs that were committed are kept as they are, and the result is the same."""
    x = Experiment(replace(made.config, ladder=LadderConfig(num_images=10)), made.root)
    whole = stages.ladder(x)
    before = {k: load_samples(whole.path / f"rung_{k}.npz") for k in (1, 2, 3)}
    shutil.rmtree(whole.path)
    latents, asked = loading.Cascade.latents, []

    def stop(self: Any, *arguments: Any, **request: Any) -> Any:
        asked.append(len(request["given"]))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return latents(self, *arguments, **request)

    with monkeypatch.context() as patch:
        patch.setattr(loading.Cascade, "latents", stop)
        with pytest.raises(KeyboardInterrupt):
            stages.ladder(x)
        assert stages.ladder(x).digest == whole.digest
    assert asked == [0, 1, 1, 2]
    for k, images in before.items():
        np.testing.assert_array_equal(StoredSamples(whole.path / f"rung_{k}.npz").read(0, 10), images)


def test_processes_share_the_rungs(made: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two processes makes every second part and seals nothing; the other makes the rest and puts them together,
    to the same bytes as one process alone."""
    sampling = replace(made.config.sampling, batch_size=6, num_evaluations=2)
    x = Experiment(replace(made.config, ladder=LadderConfig(num_images=10), sampling=sampling), made.root)
    alone, path = stages.ladder(x).digest, x.path(Ref("ladder"))
    shutil.rmtree(path)
    latents, asked = loading.Cascade.latents, []
    monkeypatch.setattr(parts, "LEAST_PART", 6)

    def count(self: Any, indices: range, **request: Any) -> Any:
        asked.append((len(request["given"]), len(indices)))
        return latents(self, indices, **request)

    monkeypatch.setattr(loading.Cascade, "latents", count)
    with monkeypatch.context() as second:
        second.setattr(parts.dist, "is_initialized", lambda: True)
        second.setattr(parts.dist, "get_rank", lambda: 1)
        second.setattr(parts.dist, "get_world_size", lambda: 2)
        second.setattr(parts.dist, "barrier", lambda: None)
        with pytest.raises(IntegrityError, match="has not been made"):
            stages.ladder(x)
    assert asked == [(0, 4), (1, 4), (2, 4)]
    whole = stages.ladder(x)
    assert asked[3:] == [(0, 6), (1, 6), (2, 6)]
    assert whole.digest == alone and not (path / "shards").exists() and not list(path.glob("_parts/rung_*"))
