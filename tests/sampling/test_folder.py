"""A sample set in a folder: an image is decided by seed and index, whatever it is written into."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds

from nestdiff_core import loading, sampling
from nestdiff_core.cli import main
from nestdiff_core.errors import ConfigError, IntegrityError
from nestdiff_core.evaluation.samples import StoredSamples
from nestdiff_core.experiment import Experiment
from nestdiff_core.images.tars import scan
from nestdiff_core.recipes import toy
from nestdiff_core.sampling import folder as sets


@pytest.fixture
def x(toy_run: Any) -> Experiment:
    return with_batch(toy_run.root, 8)


def with_batch(root: Path, batch_size: int) -> Experiment:
    config = toy()
    return Experiment(
        replace(config, sampling=replace(config.sampling, batch_size=batch_size, num_evaluations=2)), root
    )


def pictures(folder: Path) -> np.ndarray:
    return np.concatenate([StoredSamples(file).read(0, 10**6) for file in sorted(folder.glob("*.npz"))])


def direct(x: Experiment, indices: range, seed: int = 5) -> np.ndarray:
    return loading.decode(x, loading.generate(x, indices, seed=seed)[1])


@pytest.mark.parametrize("shard_size", [8, 24, None])
def test_shards_of_any_size_hold_the_same_images(x: Experiment, tmp_path: Path, shard_size: int | None) -> None:
    """Those that `generate` and `decode` give, to the bit, with their numbers; nothing else is in the folder."""
    made = sampling.write_folder(x, tmp_path / "set", seed=5, num_images=37, shard_size=shard_size)
    assert np.array_equal(pictures(tmp_path / "set"), direct(x, range(37)))
    files = sorted((tmp_path / "set").glob("*.npz"))
    indices = np.concatenate([np.load(file)["index"] for file in files])
    assert indices.tolist() == list(range(37))
    assert [shard["file"] for shard in made.info["shards"]] == [file.name for file in files]
    assert made.info["images"] == 37 and made.verify() > 0
    assert len(files) == {8: 5, 24: 2, None: 1}[shard_size]


def test_another_batch_size_is_rounding(x: Experiment, tmp_path: Path) -> None:
    """Batches of 8 and of 5: the same image for the same seed and number, up to one grey level in few pixels."""
    sampling.write_folder(x, tmp_path / "8", seed=5, num_images=24)
    sampling.write_folder(with_batch(x.root, 5), tmp_path / "5", seed=5, num_images=24)
    a, b = (pictures(tmp_path / name).astype(int) for name in ("8", "5"))
    assert np.abs(a - b).max() <= 1 and (a != b).mean() < 0.01


def test_mixed_precision_is_of_the_networks_alone(x: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Denoisers run under bfloat16 autocast; latents that they get and what is made of their output are float32, and
    the images are about those of float32."""
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, z_t, *arguments):
            output = self.network(z_t, *arguments)
            seen.append((torch.is_autocast_enabled("cpu"), z_t.dtype, output.dtype))
            return output

    opened = loading.open_denoiser
    monkeypatch.setattr(loading, "open_denoiser", lambda *a, **k: Watched(opened(*a, **k)))
    exact = loading.generate(x, range(2), seed=5)
    mixed = Experiment(replace(x.config, sampling=replace(x.config.sampling, precision="bfloat16")), x.root)
    seen.clear()
    rounded = loading.generate(mixed, range(2), seed=5)
    assert seen and set(seen) == {(True, torch.float32, torch.bfloat16)}
    for level, z in exact.items():
        assert rounded[level].dtype == torch.float32
        assert 0 < (rounded[level] - z).abs().max() < 0.1


def test_more_images_go_on(x: Experiment, tmp_path: Path) -> None:
    """From 20 images to 37: whole shards stay as they are, and all is as if 37 had been asked for at once. Fewer then
    change nothing."""
    sampling.write_folder(x, tmp_path / "set", seed=5, num_images=20, shard_size=8)
    whole = {file: file.stat().st_mtime_ns for file in sorted((tmp_path / "set").glob("*.npz"))[:2]}
    sampling.write_folder(x, tmp_path / "set", seed=5, num_images=37, shard_size=8)
    assert {file: file.stat().st_mtime_ns for file in whole} == whole
    assert np.array_equal(pictures(tmp_path / "set"), direct(x, range(37)))
    made = sampling.write_folder(x, tmp_path / "set", seed=5, num_images=4, shard_size=8)
    assert made.info["images"] == 37


def test_ranges_made_apart_are_the_whole(x: Experiment, tmp_path: Path) -> None:
    """Images 16 to 32 made elsewhere are those shards of the whole, byte for byte."""
    sampling.write_folder(x, tmp_path / "whole", seed=5, num_images=40, shard_size=8)
    sampling.write_folder(x, tmp_path / "range", seed=5, num_images=16, first=16, shard_size=8)
    names = sorted(file.name for file in (tmp_path / "range").glob("*.npz"))
    assert names == ["00002.npz", "00003.npz"]
    for name in names:
        assert (tmp_path / "range" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_damaged_shard_alone_is_made_again(x: Experiment, tmp_path: Path) -> None:
    """One flipped bit costs one shard; where that shard was not asked for, it is refused by name."""
    ask = {"seed": 5, "shard_size": 8}
    sampling.write_folder(x, tmp_path / "set", num_images=24, **ask)
    files = sorted((tmp_path / "set").glob("*.npz"))
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    files[2].write_bytes(bytes([before[files[2]][0][0] ^ 1]) + before[files[2]][0][1:])
    with pytest.raises(IntegrityError) as caught:
        sampling.write_folder(x, tmp_path / "set", num_images=16, **ask)
    assert caught.value.path == str(files[2])
    sampling.write_folder(x, tmp_path / "set", num_images=24, **ask)
    assert [file.read_bytes() for file in files] == [data for data, _ in before.values()]
    assert [file.stat().st_mtime_ns == time for file, (_, time) in before.items()] == [True, True, False]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"seed": 6}, {"config.sampling.seed": 6}),
        ({"shard_size": 16}, {"config.shard_size": 16}),
        ({"kind": "webdataset"}, {"config.format": "webdataset"}),
    ],
    ids=["seed", "shard size", "format"],
)
def test_a_folder_of_something_else_is_refused(
    x: Experiment, tmp_path: Path, change: dict[str, Any], differs: dict[str, Any]
) -> None:
    """Exit code 4 says what was asked for and what is there; the folder stays as it is, whole or not."""
    ask = {"seed": 5, "num_images": 8, "shard_size": 8}
    sampling.write_folder(x, tmp_path / "set", **ask)
    for whole in (True, False):
        if not whole:
            (tmp_path / "set" / "manifest.json").unlink()
        before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*.*") if path.name != ".lock"}
        with pytest.raises(IntegrityError) as caught:
            sampling.write_folder(x, tmp_path / "set", **(ask | change))
        assert caught.value.expected == differs
        assert before == {path: path.read_bytes() for path in (tmp_path / "set").rglob("*.*") if path.name != ".lock"}


def test_another_experiment_is_refused(x: Experiment, tmp_path: Path) -> None:
    """Other evaluations per level make other images."""
    sampling.write_folder(x, tmp_path / "set", seed=5, num_images=8)
    other = Experiment(replace(x.config, sampling=replace(x.config.sampling, num_evaluations=3)), x.root)
    with pytest.raises(IntegrityError) as caught:
        sampling.write_folder(other, tmp_path / "set", seed=5, num_images=8)
    assert caught.value.expected == {"config.sampling.num_evaluations": 3}


def test_a_folder_with_other_files_is_left_alone(x: Experiment, tmp_path: Path) -> None:
    """And so are numbers that would tear batches apart or begin within a shard."""
    (tmp_path / "thesis.tex").write_text("...")
    for request in ({}, {"shard_size": 12}, {"shard_size": 8, "first": 4}):
        folder = tmp_path / "new" if request else tmp_path
        with pytest.raises(ConfigError):
            sampling.write_folder(x, folder, seed=5, num_images=8, **request)
    assert not (tmp_path / "new").exists()


def test_webdataset_shards_hold_the_same_images(x: Experiment, tmp_path: Path) -> None:
    """Whole tars that webdataset reads: pixels to the bit, with seed and number."""
    sampling.write_folder(x, tmp_path / "set", seed=5, num_images=20, shard_size=8, kind="webdataset")
    tars = sorted(map(str, (tmp_path / "set").glob("*.tar")))
    assert [scan(Path(tar)).num_samples for tar in tars] == [8, 8, 4]
    found = list(wds.WebDataset(tars, shardshuffle=False).decode("pil"))  # pyright: ignore
    assert np.array_equal(
        np.stack([np.asarray(one["png"].convert("L")) for one in found]), direct(x, range(20))[..., 0]
    )
    assert [one["json"] for one in found] == [{"index": i, "seed": 5} for i in range(20)]
    assert [one["__key__"] for one in found] == [f"{i:08d}" for i in range(20)]


def test_labels_go_with_their_images(x: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class labels are arr_1 of an .npz, as ADM has them, and .cls and json of a tar."""
    monkeypatch.setattr(loading.Cascade, "told", lambda _, i: {"label": i % 3})
    sampling.write_folder(x, tmp_path / "tar", seed=5, num_images=8, kind="webdataset")
    [tar] = (tmp_path / "tar").glob("*.tar")
    found = list(wds.WebDataset(str(tar), shardshuffle=False).decode())  # pyright: ignore
    assert [one["cls"] for one in found] == [one["json"]["label"] for one in found] == [0, 1, 2, 0, 1, 2, 0, 1]
    sampling.write_npz_file(x, tmp_path / "one.npz", seed=5, num_images=20, shard_size=8)
    assert np.load(tmp_path / "one.npz")["arr_1"].tolist() == [i % 3 for i in range(20)]


def test_a_conditional_cascade_tells_what_it_was_told(x: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """The label of image i is i modulo the number of classes, in what is sampled and in what is written."""
    cascade = loading.Cascade(x, levels=[])
    assert cascade.told(13) == {}
    monkeypatch.setattr(loading, "num_classes", lambda *_: 10)
    assert cascade.told(13) == {"label": 3}


def test_a_class_that_has_no_images_is_not_asked_for(x: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that begin at 1, or leave some out, or are held out only: nothing was learnt of the others."""
    cascade = loading.Cascade(x, levels=[])
    monkeypatch.setattr(loading, "num_classes", lambda *_: 8)
    index = cascade._index
    labels = 1 + 2 * (index.labels % 3)
    labels[index.rows("held_out")] = 7
    monkeypatch.setitem(vars(index), "labels", labels)
    assert [cascade.told(i)["label"] for i in range(4)] == [1, 3, 5, 1]
    assert cascade._labels([5, 7]).tolist() == [5, 3]


def test_one_file_is_the_shards_together(x: Experiment, tmp_path: Path) -> None:
    """An .npz has the images and their numbers, and its shards are gone."""
    assert sampling.write_npz_file(x, tmp_path / "one.npz", seed=5, num_images=20, shard_size=8) == 20
    assert np.array_equal(StoredSamples(tmp_path / "one.npz", num_images=20).read(0, 20), direct(x, range(20)))
    assert np.load(tmp_path / "one.npz")["index"].tolist() == list(range(20))
    assert [path.name for path in tmp_path.iterdir()] == ["one.npz"]


@pytest.mark.parametrize(("first", "num_images"), [(0, 5), (8, 11), (16, 8)])
def test_one_file_has_the_images_that_were_asked_for(
    x: Experiment, tmp_path: Path, first: int, num_images: int
) -> None:
    """Also where a larger request had been stopped half-way."""
    sampling.write_folder(x, tmp_path / "one.npz.parts", seed=5, num_images=24, shard_size=8)
    made = sampling.write_npz_file(x, tmp_path / "one.npz", seed=5, first=first, num_images=num_images, shard_size=8)
    wanted = range(first, first + num_images)
    assert made == num_images and np.load(tmp_path / "one.npz")["index"].tolist() == list(wanted)
    assert np.array_equal(StoredSamples(tmp_path / "one.npz").read(0, num_images), direct(x, wanted))


@pytest.mark.parametrize(
    "wrong", [["--out=x.jpg"], ["--out=x.png", "--processes=2"], ["--processes=0"], ["--first=-1"], ["--num-images=0"]]
)
def test_the_verb_refuses_what_cannot_be(
    wrong: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 before anything is opened."""
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "toy", *wrong]) == 2
    assert json.loads(capsys.readouterr().err.splitlines()[-1])["fix"]
    assert not list(tmp_path.iterdir())


def test_labels_of_a_set_are_named_once(x: Experiment) -> None:
    """The formats of the command line are those that are written."""
    from nestdiff_core.cli.sample import KINDS

    assert tuple(sets.FORMATS) == KINDS
