"""Nearest training images: brute force, and models that copy or repeat themselves."""

from __future__ import annotations

import importlib
import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nestdiff_core import loading, stages
from nestdiff_core.artifacts import ArtifactWriter
from nestdiff_core.encoders import load_encoder
from nestdiff_core.errors import InputError
from nestdiff_core.evaluation import neighbours as module
from nestdiff_core.evaluation.extractors import encoder_extractor
from nestdiff_core.evaluation.figures import neighbour_grid
from nestdiff_core.evaluation.neighbours import copy_numbers, nearest, neighbour_table, verdicts
from nestdiff_core.evaluation.samples import Blocks, save_samples, write_safetensors
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.images.index import ImageIndex
from nestdiff_core.recipes import toy

neighbours_stage = importlib.import_module("nestdiff_core.stages.neighbours")  # `stages.neighbours` is the function


def blocks_of(views: np.ndarray, rows: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(rows[i : i + size], views[i : i + size]) for i in range(0, len(rows), size)]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_neighbours_are_those_of_brute_force(size: int) -> None:
    """Whatever the blocks: the k smallest distances to the nearest view of each image, and the rows they are at."""
    rng = np.random.default_rng(0)
    queries, views, rows = rng.normal(size=(9, 5)), rng.normal(size=(60, 2, 5)), rng.permutation(1000)[:60]
    exact = np.linalg.norm(queries[:, None, None] - views[None], axis=-1).min(axis=2)
    found = nearest(queries, blocks_of(views, rows, size), 4)
    order = np.argsort(exact, axis=1)[:, :4]
    np.testing.assert_allclose(found.distances, np.take_along_axis(exact, order, axis=1))
    np.testing.assert_array_equal(found.rows, rows[order])


def test_a_query_is_no_neighbour_of_itself() -> None:
    """Where queries are among the images, the nearest is another one."""
    values = np.array([[0.0], [1.0], [5.0]])
    found = nearest(values, [(np.arange(3), values[:, None])], 1, own=np.arange(3))
    assert found.rows.tolist() == [[1], [0], [1]] and found.distances.tolist() == [[1], [1], [4]]
    with pytest.raises(InputError, match="too few"):
        nearest(values, [(np.arange(3), values[:, None])], 3, own=np.arange(3))


def judged(samples: np.ndarray, seed: int = 0, quantile: float = 0.05, leaked: int = 0) -> dict[str, Any]:
    """Of N(0, I) in eight dimensions: 2,000 training points, 400 held-out ones, of which `leaked` are training points
    as well."""
    train, held_out = data(2000, 1), data(400, 2)
    held_out[:leaked] = train[-leaked:] if leaked else held_out[:0]
    blocks = blocks_of(train[:, None], np.arange(2000), 512)
    found = copy_numbers(
        samples,
        held_out,
        train[np.random.default_rng(seed).permutation(2000)],
        nearest(samples, blocks, 2),
        nearest(held_out, blocks, 2),
        quantile=quantile,
    )
    return {"spaces": {"z_2": found}}


def data(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 8))


def test_a_model_that_copies_is_caught() -> None:
    """Training points with a little noise count as copies, every one; half of them among fresh points are seen, too."""
    copies = data(2000, 1)[:500] + 0.05 * data(500, 3)
    record = judged(copies)
    assert record["spaces"]["z_2"]["copies"]["samples"] > 0.99 and record["spaces"]["z_2"]["copies"]["seen"]
    assert "the model copies" in " ".join(verdicts(record))
    some = judged(np.concatenate([copies[:50], data(450, 4)]))
    assert some["spaces"]["z_2"]["copies"]["seen"] and some["spaces"]["z_2"]["copies"]["samples"] < 0.2


def test_a_source_with_duplicates_does_not_hide_copies() -> None:
    """Held-out points that are training points are no measure of unseen ones, and are told of."""
    copies, fresh = data(2000, 1)[:500] + 1e-3 * data(500, 3), data(500, 4)
    found = judged(copies, leaked=40)["spaces"]["z_2"]
    assert found["copies"]["seen"] and found["in_training"] == 40 and found["num_held_out"] == 360
    said = verdicts(judged(fresh, leaked=40))
    assert said[0].startswith("No sign") and said[1].startswith("40 held-out images are in the training split")
    assert abs(judged(fresh, leaked=40)["spaces"]["z_2"]["nearer"] - 0.05) < 0.05


def test_a_model_that_repeats_itself_is_caught() -> None:
    """Twenty images with a little noise, over and over: twins, few different neighbours, little coverage; no copies."""
    fresh = data(20, 5)[np.arange(500) % 20]
    found = judged(fresh + 0.02 * data(500, 3))["spaces"]["z_2"]
    assert found["twins"]["samples"] > 0.95 and found["twins"]["seen"]
    assert found["distinct"]["samples"] < 0.3 < found["distinct"]["floor"]
    assert found["coverage"]["samples"] < 0.5 * found["coverage"]["floor"]
    said = verdicts({"spaces": {"z_2": found}})
    assert said[0].startswith("Copies or repetitions are seen in 1 of 1") and "repeats itself" in said[-1]


@pytest.mark.parametrize("seed", range(5))
def test_fresh_samples_are_not_accused(seed: int) -> None:
    """As many points of the same distribution, and ones that are only nearer to everything: no sign of copies."""
    fresh = data(500, 10 + seed)
    record = judged(fresh)
    found = record["spaces"]["z_2"]
    assert verdicts(record) == ["No sign of copied training images or of repeated samples (z_2)."]
    assert found["copies"]["samples"] < 0.05 and abs(found["nearer"] - 0.05) < 0.05
    assert abs(found["coverage"]["samples"] - found["coverage"]["floor"]) < 0.1
    central = judged(0.5 * fresh)["spaces"]["z_2"]
    assert central["nearer"] > 0.15 and not central["copies"]["seen"]


def test_blocks_are_bounded() -> None:
    """Queries times images of a block stay below what is kept in memory, and a block has an image at least."""
    assert module.block_size(1000) * 1000 <= module.BLOCK_DISTANCES
    assert module.block_size(10**9) == 1


def test_vectors_without_a_store_are_those_of_one(made: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mirror images among them where latents have them; whatever the order of rows, each shard is read once."""
    mirrored = Experiment(replace(made.config, features=replace(made.config.features, flip=True)), made.root)
    stages.features(mirrored)
    encoder = encoder_extractor(load_encoder(mirrored.artifact(Ref("encoder"))))
    index = loading.open_index(mirrored)
    unkept = replace(mirrored.config, features=replace(mirrored.config.features, keep=False))
    held_out, training = (loading.SplitImages(index, split) for split in ("held_out", "train"))
    rows = np.random.default_rng(0).permutation(training.rows)[:100]
    shards: list[int] = []
    read = ImageIndex.read_shard
    monkeypatch.setattr(ImageIndex, "read_shard", lambda self, k: (shards.append(k), read(self, k))[1])
    spaces = [
        neighbours_stage._encoder_space(x, encoder, held_out, held_out, training)
        for x in (mirrored, Experiment(unkept, made.root))
    ]
    shards.clear()
    stored, encoded = (space.training(rows) for space in spaces)
    assert stored.shape == encoded.shape == (100, 2, stored.shape[2])
    np.testing.assert_allclose(encoded, stored, atol=2e-3, rtol=2e-3)  # stored as float16
    assert len(shards) <= 2 * len(index.shards)  # once for the images, once for their mirror images


def test_grid_shows_the_images_in_their_rows() -> None:
    """Every image appears; black query rows and white neighbours are where they should be."""
    white, black = np.full((5, 8, 8, 1), 255, np.uint8), np.zeros((1, 8, 8, 1), np.uint8)
    drawn = neighbour_grid([(f"sample {i}", np.concatenate([black, white])) for i in range(3)], title="t")
    pixels = np.asarray(Image.open(io.BytesIO(drawn)).convert("L"))
    assert pixels.shape[1] == 600 and len(drawn) < 100_000
    dark = (pixels == 0).sum()
    assert dark > 3 * 30 * 30  # three squares of about 44 pixels a side, and letters
    colour = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    assert len(neighbour_grid([("sample", colour)] * 6, title="t")) < 200_000


# --- the stage ----------------------------------------------------------------------------------------------------


@pytest.fixture
def made(toy_run: Any, tmp_path: Path) -> Experiment:
    shutil.copytree(toy_run.root, tmp_path / "artifacts")
    return Experiment(toy(), tmp_path / "artifacts")


def test_every_space_has_numbers_and_the_neighbours_are_training_images(made: Experiment) -> None:
    """All levels and the encoder; rows are of the training split and their distances those of the stored latents."""
    artifact = made.artifact(Ref("neighbours"))
    assert set(artifact.info["spaces"]) == {"z_1", "z_2", "encoder"}
    train = set(loading.open_index(made).rows("train").tolist())
    with np.load(artifact.path / "neighbours.npz") as arrays:
        for space in artifact.info["spaces"]:
            assert arrays[f"rows_{space}"].shape == (256, 8) and set(arrays[f"rows_{space}"].ravel()) <= train
        rows, distances = arrays["rows_z_2"][3], arrays["distances_z_2"][3]
    from safetensors.torch import load_file

    sample = load_file(made.artifact(Ref("samples")).path / "latents.safetensors")["z_2"][3].float().numpy()
    stored = loading.open_latents(made, 2).read(rows, 0 * rows).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm((stored - sample).reshape(8, -1), axis=1), distances, rtol=1e-5)
    assert len(neighbour_table(artifact.info)) == 3


def test_pictures_read_a_shard_once(made: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many neighbours in however many spaces come from it."""
    read_shard, reads = ImageIndex.read_shard, []
    monkeypatch.setattr(ImageIndex, "read_shard", lambda index, k: (reads.append(k), read_shard(index, k))[1])
    pictures = stages.neighbour_pictures(made)
    assert set(pictures) == {"z_1", "z_2", "encoder", "encoder_and_z_1"}
    assert sorted(reads) == sorted(set(reads))


@pytest.mark.parametrize("kept", [True, False])
def test_samples_that_are_training_images_are_caught_in_every_space(made: Experiment, kept: bool) -> None:
    """The toy's samples replaced by training images and their latents, with and without stored features."""
    if not kept:
        config = replace(made.config, features=replace(made.config.features, keep=False))
        made = Experiment(config, made.root)
        stages.bases(made)
        stages.latents(made)
        for level in (1, 2):
            stages.train(made, level)
    index = loading.open_index(made)
    rows = np.random.default_rng(0).permutation(index.rows("train"))[:200]
    rows = rows[np.arange(256) % 200]
    ref = Ref("samples")
    path = made.path(ref)
    path.mkdir(parents=True, exist_ok=True)
    images = loading.SplitImages(index, "train").of(rows)
    save_samples(path / "samples.npz", np.stack([images[i] for i in range(256)]))
    z_2 = torch.from_numpy(loading.open_latents(made, 2).read(rows, 0 * rows)).float()
    z_2 += 0.01 * torch.randn(z_2.shape, generator=torch.Generator().manual_seed(0))
    write_safetensors(
        path / "latents.safetensors", {"z_2": Blocks(tuple(z_2.shape), np.dtype(np.float16), [z_2.numpy()])}
    )
    for name in ("without_conditions.npz", "manifest.json"):
        (path / name).unlink(missing_ok=True)
    from nestdiff_core.artifacts import SCHEMA_VERSION

    header = {"schema_version": SCHEMA_VERSION, **made.header(ref)}
    ArtifactWriter(path, header).seal(images=256, minimum=0, maximum=255)
    found = stages.neighbours(made).info
    for name, numbers in found["spaces"].items():
        assert numbers["copies"]["samples"] > 0.9 and numbers["copies"]["seen"], name
        assert f"{name}: " in " ".join(found["verdicts"])
    assert found["spaces"]["z_1"]["distance"]["samples"] < 1e-3
