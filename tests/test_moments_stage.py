"""The pass for moments: continued where it stopped, extended where images were added, always with the same bits."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nestdiff_core import stages
from nestdiff_core.config import EncoderConfig, FeaturesConfig, ImagesConfig
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import toy
from nestdiff_core.stages import moments
from nestdiff_core.stages.data import EncodedMaps
from nestdiff_core.stores.reader import StoreReader

MOMENTS = Ref("moments", 2)


def write_images(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for i in numbers:
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


@pytest.fixture(params=[True, False], ids=["features kept", "encoded anew"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Experiment:
    """Twelve images in three shards, and an encoder that does not depend on them."""
    write_images(tmp_path / "photos", range(12))
    base = toy()
    config = replace(
        base,
        images=ImagesConfig(
            source="folder", path=str(tmp_path / "photos"), resolution=16, images_per_shard=4, held_out_fraction=0.3
        ),
        encoder=EncoderConfig(kind="timm", name="test_vit", weights="random", input_size=160),
        features=FeaturesConfig(batch_size=4, chunk_rows=2, keep=request.param),
        evaluation=replace(base.evaluation, probe=False),
        levels=(base.level(1), replace(base.level(2), channels=2), replace(base.level(2), level=3, grid=1, channels=2)),
    )
    return Experiment(config, tmp_path / "artifacts")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards whose features are read (or encoded) from here on."""
    shards: list[int] = []
    for kind, method in ((StoreReader, "read_shard"), (EncodedMaps, "_encode")):
        original = getattr(kind, method)

        def counting(self: Any, *args: Any, original: Any = original) -> Any:
            shards.append(args[-1])
            return original(self, *args)

        monkeypatch.setattr(kind, method, counting)
    return shards


def up_to_features(x: Experiment) -> None:
    stages.images(x)
    stages.encoder(x)
    if x.config.features.keep:
        stages.features(x)


def content(x: Experiment) -> dict[int, bytes]:
    return {level: (x.artifact(Ref("moments", level)).path / moments.MOMENTS).read_bytes() for level in (2, 3)}


def fresh(x: Experiment, folder: Path) -> dict[int, bytes]:
    """The same, from nothing."""
    twin = Experiment(x.config, folder)
    up_to_features(twin)
    stages.bases(twin)
    return content(twin)


class Stopped(Exception):
    pass


def stop_after(shards: int) -> Any:
    def progress(done: int, total: int, what: str) -> None:
        if done == shards and what == "moments":
            raise Stopped

    return progress


def test_a_stopped_pass_goes_on(
    own: Experiment, read: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was merged before the stop is not read again, also where levels are then made one by one."""
    monkeypatch.setattr(moments, "SAVE_SECONDS", 0.0)
    up_to_features(own)
    with pytest.raises(Stopped):
        stages.bases(own, progress=stop_after(2))
    read.clear()
    stages.bases(own)
    assert read == [2]
    folder = own.artifact(MOMENTS).path
    assert not list(folder.glob("running-*"))
    assert content(own) == fresh(own, tmp_path / "fresh")


def test_a_damaged_beginning_does_not_count(
    own: Experiment, read: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(moments, "SAVE_SECONDS", 0.0)
    up_to_features(own)
    with pytest.raises(Stopped):
        stages.bases(own, levels=[2], progress=stop_after(2))
    (running,) = own.path(MOMENTS).glob("running-*.npz")
    data = bytearray(running.read_bytes())
    data[len(data) // 2] ^= 1
    running.write_bytes(data)
    read.clear()
    stages.bases(own)
    assert read == [0, 1, 2]
    assert content(own) == fresh(own, tmp_path / "fresh")


def test_added_images_are_added_to_the_moments(own: Experiment, read: list[int], tmp_path: Path) -> None:
    """A refit reads the new shards only and has the bits of a fit on all of them; features may even be gone."""
    up_to_features(own)
    stages.bases(own)
    before = own.artifact(Ref("svd_basis", 2)).digest
    write_images(tmp_path / "photos", range(12, 20))
    up_to_features(own)
    read.clear()
    stages.bases(own)
    assert read == [3, 4]
    assert own.artifact(Ref("svd_basis", 2)).digest != before
    assert content(own) == fresh(own, tmp_path / "fresh")


def test_images_that_were_replaced_begin_a_new_pass(own: Experiment, read: list[int], tmp_path: Path) -> None:
    up_to_features(own)
    stages.bases(own)
    shutil.copy(tmp_path / "photos/000.png", tmp_path / "photos/005.png")
    up_to_features(own)
    read.clear()
    stages.bases(own)
    assert read == [0, 1, 2]
    assert content(own) == fresh(own, tmp_path / "fresh")
