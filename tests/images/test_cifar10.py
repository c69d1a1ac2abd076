"""Shards made from CIFAR-10's public archive."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nestdiff_core import loading, stages
from nestdiff_core.config import ImagesConfig
from nestdiff_core.errors import InputError
from nestdiff_core.experiment import Experiment
from nestdiff_core.recipes import toy
from scripts import cifar10

RECORDS = 20


def archive(path: Path, records: int) -> dict[str, np.ndarray]:
    """A file laid out as the archive's page says, with few records: a class, then red, green and blue row by row."""
    rng, batches = np.random.default_rng(0), {}
    with tarfile.open(path, "w:gz") as tar:
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
            batches[name] = rng.integers(0, 256, (records, 3073), np.uint8)
            batches[name][:, 0] %= 10
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = batches[name].size
            tar.addfile(member, io.BytesIO(batches[name].tobytes()))
    return batches


def test_the_archive_becomes_both_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the pipeline's own reader: every pixel and class, in order, the test batch held out."""
    monkeypatch.setattr(cifar10, "RECORDS", RECORDS)
    monkeypatch.setattr(cifar10, "SHARD", 30)
    batches = archive(tmp_path / "cifar.tar.gz", RECORDS)
    cifar10.convert(tmp_path / "cifar.tar.gz", tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 5
    images = ImagesConfig(source="webdataset", path=str(tmp_path / "shards"), resolution=32, labels=True)
    base = toy()
    x = Experiment(replace(base, images=images, evaluation=replace(base.evaluation, probe=False)), tmp_path / "root")
    stages.images(x)
    index = loading.open_index(x)
    for split, names in (("train", sorted(batches)[:5]), ("held_out", ["test_batch.bin"])):
        records = np.concatenate([batches[name] for name in names])
        found = loading.SplitImages(index, split)
        assert index.labels[found.rows].tolist() == records[:, 0].tolist()
        for i, record in enumerate(records):
            red, green, blue = record[1:].reshape(3, 32, 32)
            assert np.array_equal(found[i], np.stack([red, green, blue], axis=-1))


@pytest.mark.parametrize("broken", ["short", "class", "missing", "garbage"])
def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """By what is wrong with it."""
    monkeypatch.setattr(cifar10, "RECORDS", RECORDS)
    path = tmp_path / "cifar.tar.gz"
    archive(path, RECORDS - (broken == "short"))
    name = "another.bin" if broken == "missing" else "test_batch.bin"
    if broken == "class":
        with tarfile.open(path, "w:gz") as tar:
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = RECORDS * 3073
            tar.addfile(member, io.BytesIO(bytes([10]) * member.size))
    if broken == "garbage":
        path.write_bytes(b"no tar at all" * 100)
    said = {"short": "58,387 bytes", "class": "a class 10", "missing": "another.bin", "garbage": "not CIFAR-10's"}
    with pytest.raises(InputError, match=said[broken]):
        list(cifar10.read_batch(path, name))
