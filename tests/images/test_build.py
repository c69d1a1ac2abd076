"""From a source to an index: nothing lost, nothing half-read, everything named."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from nestdiff_core.artifacts import Artifact, writing
from nestdiff_core.config import ImagesConfig
from nestdiff_core.errors import ConfigError, InputError, IntegrityError
from nestdiff_core.images.build import build_images, split_fraction
from nestdiff_core.images.index import ImageIndex
from nestdiff_core.images.sources import file_key

HEADER = {"stage": "images", "level": None, "fingerprint": "0", "config": {}, "inputs": [], "experiment": "test"}
Build = Callable[..., Artifact]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def run(name: str = "artifact", **settings: Any) -> Artifact:
        with writing(tmp_path / name, HEADER) as writer:
            info = build_images(ImagesConfig(**{"resolution": 8, "channels": 1, **settings}), writer)
            return writer.seal(**info)

    return run


def png(value: int = 0, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (side, side), value).save(buffer, format="PNG")
    return buffer.getvalue()


def tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(keys: list[str]) -> dict[str, bytes]:
    return {f"{k}.{s}": d for i, k in enumerate(keys) for s, d in (("png", png(i)), ("cls", b"%d" % (i % 3)))}


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


# --- sources ------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns(build: Build) -> None:
    """Pixels are value * 255 / 16, labels and order are scikit-learn's, over the shard borders."""
    index = ImageIndex(build(source="digits", labels=True, images_per_shard=1000))
    digits = load_digits()
    images = np.concatenate([index.read_shard(k) for k in range(len(index.shards))])
    np.testing.assert_allclose(images[..., 0], digits.images * 255 / 16, atol=0.5)
    np.testing.assert_array_equal(index.labels, digits.target)
    assert [s.count for s in index.shards] == [1000, 797]
    assert [s.first_row for s in index.shards] == [0, 1000]


def test_same_images_same_bytes(build: Build) -> None:
    """An artifact built twice has the same digest: times, users and threads leave no trace."""
    assert build("a", source="toy", labels=True).digest == build("b", source="toy", labels=True).digest


def test_folder_with_classes(build: Build, tmp_path: Path) -> None:
    """Classes are the sorted sub-folders, keys lead back to the files, other files are counted."""
    names = ["bee/x.y.png", "bee/deep/é n.PNG", "ant/x.y.png", "ant/__odd__.png", "ant/notes.txt"]
    root = folder(
        tmp_path / "data", {n: png(i * 10) if n.lower().endswith("png") else b"" for i, n in enumerate(names)}
    )
    artifact = build(source="folder", path=str(root), labels=True)
    index = ImageIndex(artifact)
    assert index.class_names == ["ant", "bee"] and artifact.info["ignored_files"] == 1
    files = [unquote(key) for key in index.keys]
    assert files == sorted(names[:4])
    assert {f: index.class_names[i] for f, i in zip(files, index.labels, strict=True)} == {
        f: f.split("/")[0] for f in files
    }
    values = index.read_shard(0)[:, 0, 0, 0].tolist()
    assert values == [names.index(f) * 10 for f in files]


def test_folder_names_its_splits(build: Build, tmp_path: Path) -> None:
    """train/CLASS and val/CLASS are splits, not classes."""
    root = folder(
        tmp_path / "data", {f"{s}/{c}/{i}.png": png() for s in ("train", "val") for c in "ab" for i in range(3)}
    )
    index = ImageIndex(build(source="folder", path=str(root), labels=True))
    assert index.class_names == ["a", "b"]
    assert [unquote(k).split("/")[0] == "val" for k in index.keys] == (index.splits == "held_out").tolist()


@given(st.text(min_size=1).filter(lambda s: "\0" not in s and s.isprintable()))
def test_file_keys_are_safe_and_reversible(name: str) -> None:
    """No key has a dot or points upwards, and each leads back to its file."""
    key = file_key(name)
    assert unquote(key) == name and "." not in key and key.isascii() and not key.startswith("__")


def test_shards_are_indexed_where_they_lie(build: Build, tmp_path: Path) -> None:
    """Labels and captions come from the members, splits from the shards' names, order from their paths."""
    captions = {"json": json.dumps({"captions": ["one", "two"], "caption": None}).encode(), "txt": b"one"}
    tar(tmp_path / "w/train-0.tar", samples(["a", "b"]) | {f"b.{s}": d for s, d in captions.items()})
    tar(tmp_path / "w/val-0.tar", samples(["c"]) | {"c.txt": "ä\n".encode(), "c.mask.png": png(9)})
    artifact = build(source="webdataset", path=str(tmp_path / "w"), labels=True)
    index = ImageIndex(artifact)
    assert index.keys == ["a", "b", "c"] and index.splits.tolist() == ["train", "train", "held_out"]
    assert index.captions() == [[], ["one", "two"], ["ä"]] and index.read_shard(1).max() == 0
    assert [s.path for s in index.shards] == [str(tmp_path / "w/train-0.tar"), str(tmp_path / "w/val-0.tar")]
    assert not (artifact.path / "shards").exists()


@pytest.mark.parametrize("source", ["folder", "webdataset"])
def test_other_pixels_are_another_index(build: Build, tmp_path: Path, source: str) -> None:
    """Of shards that are read where they lie too: what is made from it is addressed by its digest."""
    images = samples([str(i) for i in range(8)])
    tar(tmp_path / "webdataset/0.tar", images)
    folder(tmp_path / "folder", {name: data for name, data in images.items() if name.endswith(".png")})
    settings = ({}, {"resolution": 16}, {"channels": 3}, {})
    one, larger, colour, again = (
        build(str(i), source=source, path=str(tmp_path / source), **changed).digest
        for i, changed in enumerate(settings)
    )
    assert one == again and len({one, larger, colour}) == 3


def test_braces_and_stars_name_shards(build: Build, tmp_path: Path) -> None:
    """The two usual ways to name shards, and a shard of the braces that is not there."""
    for i in range(3):
        tar(tmp_path / f"w/{i:02d}.tar", samples([f"k{i}"]))
    for pattern in ("*.tar", "{00..02}.tar", "0?.tar"):
        assert build(source="webdataset", path=str(tmp_path / "w" / pattern)).info["num_images"] == 3
    with pytest.raises(InputError, match="1 of 4 shards are missing"):
        build(source="webdataset", path=str(tmp_path / "w/{00..03}.tar"))


def test_real_shards(build: Build) -> None:
    """Captioned photographs: pixels as an independent reader finds them, all captions of each."""
    shared = Path(os.environ.get("NESTDIFF_SHARED", "../shared"))
    path = shared / "data/coco_captions/coco256-open-00000.tar"
    if not path.is_file():
        pytest.skip(f"{path} is not there; NESTDIFF_SHARED names the folder of shared data")
    index = ImageIndex(build(source="webdataset", path=str(path), resolution=256, channels=3))
    images = index.read_shard(0)
    assert len(images) == 111
    with tarfile.open(path) as archive:
        for row in (0, 110):
            photograph, record = (archive.extractfile(f"{index.keys[row]}.{s}") for s in ("jpg", "json"))
            assert photograph is not None and record is not None
            np.testing.assert_array_equal(images[row], np.asarray(Image.open(photograph).convert("RGB")))
            assert index.captions(slice(row, row + 1))[0] == json.load(record)["captions"]


# --- what is wrong is named ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "key", "reason"),
    [
        ({"z.cls": b"1"}, "z", "no image"),
        ({"z.png": b"", "z.cls": b"1"}, "z", "empty"),
        ({"z.png": png()[:60], "z.cls": b"1"}, "z", "decoded"),
        ({"z.png": png()}, "z", "no label"),
        ({"z.png": png(), "z.cls": b"-1"}, "z", "not a number"),
        ({"z.png": png(), "z.cls": b"cat"}, "z", "not a number"),
        ({"z.png": png(), "z.cls": b"99999999999999999999"}, "z", "not a number"),
        ({"z.png": png(), "z.jpg": png(), "z.cls": b"1"}, "z", "2 image members"),
        ({"z.png": png(), "z.cls": b"1", "z.json": b"{"}, "z", "caption"),
        ({"../z.png": png(), "../z.cls": b"1"}, "../z", "outside"),
        ({"/z.png": png(), "/z.cls": b"1"}, "/z", "outside"),
        ({"a.png": png(), "a.cls": b"1"}, "a", "before"),
        ({"LICENSE": b""}, "LICENSE", "no key"),
    ],
)
def test_a_bad_sample_is_refused_or_set_aside(
    build: Build, tmp_path: Path, files: dict[str, bytes], key: str, reason: str
) -> None:
    """Without a budget it is an InputError with its key; with one it is in rejects.jsonl, and the rest is there."""
    path = str(tar(tmp_path / "w/0.tar", samples(["a", "b", "c"]) | samples(["d"])).parent)
    tar(tmp_path / "w/1.tar", files | samples(["e"]))
    with pytest.raises(InputError, match=reason) as caught:
        build(source="webdataset", path=path, labels=True)
    assert caught.value.key == key and "1.tar" in str(caught.value.path)
    artifact = build(source="webdataset", path=path, labels=True, max_bad_samples=1)
    rejects = [json.loads(line) for line in (artifact.path / "rejects.jsonl").read_text().splitlines()]
    assert [r["key"] for r in rejects] == [key] and reason in rejects[0]["reason"]
    assert ImageIndex(artifact).rejects(5) == rejects
    assert artifact.info["read"] == artifact.info["kept"] + 1 == 6
    index = ImageIndex(artifact)
    assert index.keys == ["a", "b", "c", "d", "e"] and len(index.read_shard(1)) == 1


def test_all_bad_samples_are_told_at_once(build: Build, tmp_path: Path) -> None:
    """Seven bad files: the count, the first few, and the list of all."""
    root = folder(tmp_path / "data", {f"{i}.png": b"x" if i < 7 else png() for i in range(10)})
    with pytest.raises(InputError, match="7 of 10") as caught:
        build(source="folder", path=str(root))
    assert len(caught.value.found) == 5
    assert len((tmp_path / "artifact.rejects.jsonl").read_text().splitlines()) == 7


def test_all_damaged_shards_are_told(build: Build, tmp_path: Path) -> None:
    """A damaged shard stops the stage whatever the budget, and the other damaged ones are named with it."""
    for i in range(4):
        path = tar(tmp_path / f"w/{i}.tar", samples([f"k{i}"]))
        if i % 2:
            path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match="2 of 4 shards") as caught:
        build(source="webdataset", path=str(tmp_path / "w"), max_bad_samples=100)
    assert "1.tar" in caught.value.found[0] and "3.tar" in caught.value.found[1]


def test_interleaved_members_are_not_half_samples(build: Build, tmp_path: Path) -> None:
    """All images, then all labels: no sample comes out with another's label or with none."""
    files = samples(["a", "b", "c"])
    tar(tmp_path / "w/0.tar", {k: files[k] for k in sorted(files, key=lambda k: k[::-1])})
    with pytest.raises(InputError, match="6 of 6"):
        build(source="webdataset", path=str(tmp_path / "w"), labels=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "folder", "path": "absent"}, "not a folder"),
        ({"source": "folder", "path": "empty"}, "no image files"),
        ({"source": "folder", "path": "flat", "labels": True}, "no image lies in a sub-folder"),
        ({"source": "webdataset", "path": "empty"}, "matches no shards"),
        ({"source": "webdataset", "path": "absent-*.tar"}, "matches no shards"),
        ({"source": "webdataset", "path": "absent.tar"}, "matches no shards"),
        ({"source": "webdataset", "path": "pipe:touch canary"}, "not a URL of object storage"),
        ({"source": "folder", "path": "single"}, "too few images"),
    ],
)
def test_a_wrong_path_is_one_clear_error(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    """Nothing there, nothing usable there, or something that is no path at all: refused, and nothing is run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    folder(tmp_path / "flat", {"a.png": png(), "b.png": png()})
    folder(tmp_path / "single", {"a.png": png()})
    with pytest.raises((InputError, ConfigError), match=message):
        build(**settings)
    assert not (tmp_path / "canary").exists()


def test_members_never_become_files(build: Build, tmp_path: Path) -> None:
    """Reading a shard full of hostile names writes nothing outside the artifact."""
    names = ["../up", "/tmp/nestdiff-canary", "a/../../b", "c:\\d", "..\\e"]
    tar(tmp_path / "w/0.tar", samples(names) | samples(["good", "better"]))
    before = {p for p in tmp_path.parent.rglob("*") if tmp_path / "artifact" not in (p, *p.parents)}
    artifact = build(source="webdataset", path=str(tmp_path / "w"), max_bad_samples=9)
    assert {p for p in tmp_path.parent.rglob("*") if tmp_path / "artifact" not in (p, *p.parents)} == before
    assert not Path("/tmp/nestdiff-canary.png").exists()
    assert ImageIndex(artifact).keys == ["c:\\d", "good", "better"]


# --- the split ----------------------------------------------------------------------------------------------------


def test_split_is_stable_when_images_are_added(build: Build, tmp_path: Path) -> None:
    """An image keeps its split when others join; the share is the asked one; another seed gives another split."""
    root = folder(tmp_path / "data", {f"{i:03d}.png": png() for i in range(200)})

    def splits(name: str, **settings: Any) -> dict[str, str]:
        index = ImageIndex(build(name, source="folder", path=str(root), held_out_fraction=0.25, **settings))
        return dict(zip(index.keys, index.splits.tolist(), strict=True))

    before, other = splits("a"), splits("b", split_seed=1)
    folder(root, {f"{i:03d}a.png": png() for i in range(0, 200, 2)})
    after = splits("c")
    assert before.items() <= after.items() and before != other
    held_out = list(after.values()).count("held_out")
    assert abs(held_out - 75) < 4 * np.sqrt(300 * 0.25 * 0.75)


def test_fractions_are_uniform() -> None:
    """What decides the split is spread evenly over [0, 1)."""
    values = np.sort([split_fraction(3, str(i)) for i in range(2000)])
    assert np.abs(values - np.arange(2000) / 2000).max() < 1.63 / np.sqrt(2000)  # Kolmogorov-Smirnov, 1 %


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_no_split_is_empty(build: Build, tmp_path: Path, fraction: float) -> None:
    """Two images are enough for both splits."""
    root = folder(tmp_path / "data", {"a.png": png(), "b.png": png()})
    artifact = build(source="folder", path=str(root), held_out_fraction=fraction)
    assert sorted(ImageIndex(artifact).splits) == ["held_out", "train"]
    assert artifact.info["train"] == artifact.info["held_out"] == 1


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_a_split_has_a_distribution(build: Build, tmp_path: Path, fraction: float) -> None:
    """Of one image there is none: two go where the fraction leaves fewer, those that would go there first."""
    root = folder(tmp_path / "data", {f"{i}.png": png(i) for i in range(9)})
    index = ImageIndex(build(source="folder", path=str(root), held_out_fraction=fraction))
    few = "held_out" if fraction < 0.5 else "train"
    nearest = sorted(index.keys, key=lambda key: split_fraction(0, key), reverse=few == "train")[:2]
    assert {key for key, split in zip(index.keys, index.splits, strict=True) if split == few} == set(nearest)


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [7, 100, 1000])
def test_iterate_is_the_index_in_order(build: Build, batch_size: int) -> None:
    """Batches of a split hold its rows in order, full but for the last, whatever the shards."""
    index = ImageIndex(build(source="toy", images_per_shard=60))
    everything = np.concatenate([index.read_shard(k) for k in range(len(index.shards))])
    for split, rows in (("train", index.rows("train")), ("held_out", index.rows("held_out")), (None, np.arange(256))):
        batches = list(index.iterate(split, batch_size))
        np.testing.assert_array_equal(np.concatenate([r for r, _ in batches]), rows)
        np.testing.assert_array_equal(np.concatenate([x for _, x in batches]), everything[rows])
        assert all(len(r) == batch_size for r, _ in batches[:-1])


@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_a_changed_shard_is_refused(build: Build, tmp_path: Path, damage: str) -> None:
    """A user's tar that is not what was indexed is an IntegrityError with the shard's name."""
    path = tar(tmp_path / "w/0.tar", samples(["a", "b", "c"]))
    index = ImageIndex(build(source="webdataset", path=str(tmp_path / "w")))
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    {"byte": lambda: path.write_bytes(data), "cut": lambda: path.write_bytes(data[:-1]), "gone": path.unlink}[damage]()
    with pytest.raises(IntegrityError, match=r"0\.tar") as caught:
        index.read_shard(0)
    assert caught.value.key == "00000"
