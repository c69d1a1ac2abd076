"""Machines that share artifacts through object storage: what one has made no other makes again, and nothing mixes."""

import importlib
import io
import json
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from obstore.store import from_url
from PIL import Image
from zarr.storage import ObjectStore

from nestdiff_core import loading, mirror, stages
from nestdiff_core.artifacts import Artifact
from nestdiff_core.cli import main
from nestdiff_core.cli.digest import experiment_digests
from nestdiff_core.config import EncoderConfig, ExperimentConfig, ImagesConfig, SweepConfig, WatchConfig
from nestdiff_core.encoders import extract
from nestdiff_core.errors import IntegrityError
from nestdiff_core.evaluation.features import extract_all
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import is_bulk
from nestdiff_core.recipes import toy
from nestdiff_core.stages.common import reuse
from nestdiff_core.stages.reference import extractors, open_statistics
from nestdiff_core.stages.watch import history

FEATURES = Ref("features")
sweeps = importlib.import_module("nestdiff_core.stages.sweep")  # `stages.sweep` is the function


class Machines:
    """Machines without a disk in common, all with the same object storage."""

    def __init__(self, folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.url = folder, url
        monkeypatch.setenv("NESTDIFF_REMOTE", url)

    def __call__(self, name: str, config: ExperimentConfig | None = None) -> Experiment:
        return Experiment(config or toy(), self.folder / name)

    def object(self, artifact: Artifact, name: str) -> Any:
        return mirror.Remote(f"{self.url}/{artifact.stage}/{artifact.fingerprint}").read(name)

    def damage(self, artifact: Artifact, name: str) -> None:
        data = bytearray(self.object(artifact, name))
        data[100] ^= 1
        mirror.Remote(f"{self.url}/{artifact.stage}/{artifact.fingerprint}").replace(name, bytes(data))


@pytest.fixture
def machines(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Machines:
    return Machines(tmp_path, url, monkeypatch)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first row of each shard that is encoded from here on, in whatever process order."""
    rows: list[int] = []
    original = extract.extract_features

    def counting(*args: Any, **kwargs: Any) -> Any:
        rows.append(int(kwargs["name"](0).partition("row ")[2].rstrip(")")))
        return original(*args, **kwargs)

    monkeypatch.setattr("nestdiff_core.stages.data.extract_features", counting)
    return rows


def up_to_features(x: Experiment) -> Artifact:
    stages.images(x)
    stages.encoder(x)
    artifact, _ = stages.features(x)
    assert artifact is not None
    return artifact


def shards_here(artifact: Artifact) -> list[str]:
    return [name for name in artifact.manifest["files"] if is_bulk(name) and (artifact.path / name).is_file()]


def size_here(artifact: Artifact) -> int:
    return sum((artifact.path / name).stat().st_size for name in shards_here(artifact))


def test_a_second_machine_makes_nothing_again(machines: Machines, encoded: list[int]) -> None:
    """It has every artifact by asking; a shard comes when it is read, and training reads the same numbers."""
    a, b = machines("a"), machines("b")
    up_to_features(a)
    stages.bases(a)
    made = stages.latents(a)
    assert encoded == [0, 64, 128, 192]
    found = b.artifact(Ref("latents", 2))
    assert found.digest == made[2].digest and found.path.is_relative_to(machines.folder / "b")
    assert not shards_here(found) and not shards_here(b.artifact(FEATURES))
    rows = np.arange(256)
    for level in (1, 2):
        assert np.array_equal(loading.open_latents(b, level).read(rows), loading.open_latents(a, level).read(rows))
    assert len(shards_here(found)) == 4 and not shards_here(b.artifact(FEATURES))
    assert stages.latents(b)[2].digest == made[2].digest
    assert np.array_equal(loading.open_index(b).read_shard(3), loading.open_index(a).read_shard(3))
    assert encoded == [0, 64, 128, 192]


def test_other_tools_open_the_store(machines: Machines) -> None:
    """In object storage a store is a plain zarr v3 group."""
    a = machines("a")
    features = up_to_features(a)
    network: Any = {"client_options": {"allow_http": True}} if machines.url.startswith("s3") else {}
    place = from_url(f"{machines.url}/features/{features.fingerprint}/store.zarr", **network)
    group = zarr.open_group(ObjectStore(place, read_only=True), mode="r")
    assert np.array_equal(np.asarray(group["map"]), np.asarray(zarr.open_group(features.path / "store.zarr")["map"]))


def test_machines_share_the_work_of_one_store(machines: Machines, encoded: list[int]) -> None:
    """Each encodes some of the shards; whoever looks next has them all."""
    a, b = machines("a"), machines("b")
    for x in (a, b):
        stages.images(x)
        stages.encoder(x)
    assert stages.features(a, shards=["00000", "00002"])[0] is None
    sealed, _ = stages.features(b, shards=["00001", "00003"])
    assert sealed is not None and sorted(encoded) == [0, 64, 128, 192]
    again, _ = stages.features(a)
    assert again is not None and again.digest == sealed.digest and len(encoded) == 4
    alone = Experiment(toy(), machines.folder / "alone")
    alone.mirror = None
    assert up_to_features(alone).digest == sealed.digest


def test_of_two_writers_of_a_shard_one_wins_whole(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both encode the same shard, with other last bits, neither knowing of the other: the first's both arrays hold."""
    a, b = machines("a"), machines("b")
    for x in (a, b):
        stages.images(x)
        stages.encoder(x)
    stages.features(a, shards=["00001"])
    original = extract.extract_features

    def otherwise(*args: Any, **kwargs: Any) -> Any:
        return tuple(np.nextafter(values, np.float16(np.inf)) for values in original(*args, **kwargs))

    monkeypatch.setattr("nestdiff_core.stages.data.extract_features", otherwise)
    monkeypatch.setattr(mirror.Mirror, "part", _absent_once(mirror.Mirror.part))  # b began when there was none
    stages.features(b, shards=["00001"])
    monkeypatch.undo()
    monkeypatch.setenv("NESTDIFF_REMOTE", machines.url)
    sealed, _ = stages.features(b)
    assert sealed is not None
    for array in ("map", "vector"):
        ours = loading.open_features(b, array).read_shard(1)
        assert np.array_equal(ours, loading.open_features(a, array).read_shard(1))
    for name in sealed.manifest["files"]:
        sealed.fetch(name)
    sealed.verify()


def test_a_shard_that_a_dead_machine_began_is_written_again(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first file stands in object storage, its record does not come."""
    monkeypatch.setattr(mirror, "TAKE_OVER_SECONDS", 0.0)
    a = machines("a")
    stages.images(a)
    stages.encoder(a)
    address = a.header(FEATURES)["fingerprint"]
    store = mirror.Remote(f"{machines.url}/features/{address}")
    assert store.create("store.zarr/map/c.1.0.0.0.0", b"of a dead machine")
    sealed, _ = stages.features(a)
    assert sealed is not None and len(store.read("store.zarr/map/c.1.0.0.0.0") or b"") > 100
    b = machines("b")
    for name in (there := b.artifact(FEATURES)).manifest["files"]:
        there.fetch(name)
    there.verify()


@pytest.mark.parametrize("array", ["map", "vector"])
def test_damage_in_object_storage_is_named(machines: Machines, array: str) -> None:
    """A flipped bit is found when the shard is fetched; nothing of it stays on the machine."""
    features = up_to_features(machines("a"))
    name = next(n for n in features.manifest["files"] if n.startswith(f"store.zarr/{array}/c.2"))
    machines.damage(features, name)
    b = machines("b")
    with pytest.raises(IntegrityError, match=rf"{name.rpartition('/')[2]} has another content"):
        loading.open_features(b, array).read_shard(2)
    assert not (b.artifact(FEATURES).path / name).exists()
    assert loading.open_features(b, array).read_shard(1) is not None


def test_a_lost_object_is_made_again(machines: Machines, encoded: list[int]) -> None:
    """Only that shard, by whichever machine runs the stage next; one that has it puts it back."""
    features = up_to_features(machines("a"))
    name = next(n for n in features.manifest["files"] if n.startswith("store.zarr/map/c.2"))
    mirror.Remote(f"{machines.url}/features/{features.fingerprint}").remove(name)
    encoded.clear()
    b = machines("b")
    made, _ = stages.features(b)
    assert made is not None and encoded == [128] and made.digest == features.digest
    assert machines.object(features, name) == (features.path / name).read_bytes()


def test_a_small_disk_is_enough(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one shard, features are encoded, and bases and latents made from them, with the same bits."""
    a = Experiment(toy(), machines.folder / "a")
    a.mirror = None
    up_to_features(a)
    stages.bases(a)
    expected = stages.latents(a)[2].digest
    shard = max(r["size"] for n, r in a.artifact(FEATURES).manifest["files"].items() if is_bulk(n))
    monkeypatch.setenv("NESTDIFF_CACHE_GIB", str(1.2 * shard / 2**30))
    b = machines("b")
    features = up_to_features(b)
    assert size_here(features) <= 1.2 * shard
    stages.bases(b)
    assert stages.latents(b)[2].digest == expected
    assert 0 < size_here(features) <= 1.2 * shard


@pytest.mark.parametrize("packed", [True, False])
def test_two_machines_make_the_same_artifact(machines: Machines, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    """Encoders with other bits, made at the same time: the one sealed first is everybody's, be its weights in the tar
    or too large for it."""
    if not packed:
        monkeypatch.setattr(mirror, "LARGE", 1000)
    a, b = machines("a"), machines("b")
    stages.images(a), stages.images(b)
    first = stages.encoder(a)
    with monkeypatch.context() as patch:
        patch.setattr(mirror.Mirror, "pull", lambda *_: False)  # b began when there was none
        patch.setattr("torch.nn.Linear.forward", _louder)
        second = stages.encoder(b)
    assert second.digest == first.digest == b.artifact(Ref("encoder")).digest
    second.verify()
    assert {f: (second.path / f).read_bytes() for f in second.manifest["files"]} == {
        f: (first.path / f).read_bytes() for f in first.manifest["files"]
    }
    tar = mirror.Remote(machines.url).size(f"encoder/{first.path.name}/artifact.tar")
    assert tar is not None and (tar > sum(record["size"] for record in first.manifest["files"].values())) is packed


def _absent_once(original: Any) -> Any:
    asked: list[Path] = []

    def absent_once(self: mirror.Mirror, path: Path, *name: str) -> Any:
        asked.append(path)
        return None if len(asked) == 1 else original(self, path, *name)

    return absent_once


def _louder(self: Any, x: Any) -> Any:
    return torch.nn.functional.linear(x, self.weight, self.bias) * 1.5


def test_what_grew_on_one_machine_grows_on_all(machines: Machines, encoded: list[int], tmp_path: Path) -> None:
    """A shard of images more is one shard of features more, for whoever runs the stage first."""

    def write_images(numbers: range) -> None:
        for i in numbers:
            pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / f"{i:03d}.png")

    (tmp_path / "photos").mkdir()
    write_images(range(8))
    base = toy()
    config = replace(
        base,
        images=ImagesConfig(source="folder", path=str(tmp_path / "photos"), resolution=16, images_per_shard=4),
        encoder=EncoderConfig(kind="timm", name="test_vit", weights="random", input_size=160),
        evaluation=replace(base.evaluation, probe=False),
        levels=(base.level(1), replace(base.level(2), channels=2)),
    )
    a, b = machines("a", config), machines("b", config)
    up_to_features(a)
    up_to_features(b)
    assert encoded == [0, 4]
    write_images(range(8, 12))
    grown = up_to_features(a)
    assert up_to_features(b).digest == grown.digest and encoded == [0, 4, 8]
    assert np.array_equal(loading.open_features(b).read_shard(2), loading.open_features(a).read_shard(2))


def test_reference_statistics_are_made_once(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine has them without a pass over the images, and a stopped one's first split too."""
    a, b = machines("a"), machines("b")
    stages.images(a)
    stages.encoder(a)
    passes = []

    def counted(images: Any, spaces: Any, **about: Any) -> Any:
        passes.append(about["what"])
        if len(passes) == 2:
            raise KeyboardInterrupt
        return extract_all(images, spaces, **about)

    monkeypatch.setattr(sys.modules["nestdiff_core.stages.reference"], "extract_all", counted)
    with pytest.raises(KeyboardInterrupt):
        stages.reference(a)
    made = stages.reference(b)
    assert passes == ["reference (train)", "reference (held_out)", "reference (held_out)"]
    shutil.rmtree(machines.folder / "a")
    assert stages.reference(machines("a")).digest == made.digest and len(passes) == 3
    train = open_statistics(machines("a"), "train", extractors(machines("a")))
    assert train["pixels"].count == loading.open_index(b).splits.tolist().count("train")


def test_two_machines_watch_into_one_history(machines: Machines, toy_run: Any) -> None:
    """Each judges weights that the other has not; neither's numbers are lost, nor made twice, whoever comes last."""
    sampling = replace(toy().sampling, num_evaluations=2)
    config = replace(toy(), watch=WatchConfig(num_images=6, resamples=2), sampling=sampling)
    a, b = machines("a", config), machines("b", config)
    for x, steps in ((a, 10), (b, 15)):
        for stage in ("images", "encoder", "features", "moments", "svd_basis", "latents", "reference"):
            shutil.copytree(toy_run.root / stage, x.root / stage)
        stages.train(x, 2, until_step=steps)
        stages.watch(x)
    assert [record["step"] for record in history(b)] == [10, 15]
    stages.train(a, 2, until_step=18)
    stages.watch(a)
    assert [record["step"] for record in history(a)] == [10, 15, 18]
    stages.train(b, 2, until_step=18)
    made = stages.watch(b)
    assert made is not None and history(b) == history(a) and made.info["newest"]["2"]["step"] == 18


def test_digests_are_had_without_the_checkpoints(machines: Machines, toy_run: Any) -> None:
    """Which stay where they were written: what they alone hold has none, all else has what it has there."""
    a, b = machines("a"), machines("b")
    shutil.copytree(toy_run.root, a.root)
    for ref in a.refs():
        reuse(a, ref)  # puts it into object storage
    there, here = experiment_digests(a), experiment_digests(b)
    assert {name for name in there if here[name] != there[name]} == {
        f"denoiser_level_{level}_{part}" for level in (1, 2) for part in ("model", "optimizer")
    }


def test_a_stopped_sweep_goes_on(machines: Machines, toy_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was stopped, and on another machine; numbers of levels, which have no files, are no obstacle."""
    sampling = replace(toy().sampling, num_evaluations=2)
    settings = SweepConfig(guidance=(0.0, 1.0), num_images=8, short_list=2)
    config = replace(toy(), sweep=settings, sampling=sampling)
    a, b = machines("a", config), machines("b", config)
    made = ("images", "encoder", "features", "moments", "svd_basis", "latents", "denoiser")
    for x in (a, b):
        for name in made:
            shutil.copytree(toy_run.root / name, x.root / name)
    sampled: list[str] = []
    sample = sweeps._Sweep._sample

    def stopping(self: Any, settings: Any, file: str) -> None:
        if len(sampled) == 1:
            raise KeyboardInterrupt
        sample(self, settings, file)
        sampled.append(file)

    with monkeypatch.context() as patched:
        patched.setattr(sweeps._Sweep, "_sample", stopping)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                stages.sweep(a)
    monkeypatch.setattr(sweeps._Sweep, "_sample", lambda self, s, file: (sampled.append(file), sample(self, s, file)))
    done = stages.sweep(b)
    assert len(set(sampled)) == len(sampled) == 2
    assert stages.sweep(a).digest == done.digest and len(sampled) == 2
    shutil.rmtree(done.path)
    assert b.artifact(Ref("sweep")).digest == done.digest


def test_what_was_made_before_is_put_there(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts from before NESTDIFF_REMOTE was set are published when their stage runs again."""
    monkeypatch.delenv("NESTDIFF_REMOTE")
    made = up_to_features(machines("a"))
    monkeypatch.setenv("NESTDIFF_REMOTE", machines.url)
    up_to_features(machines("a"))
    shutil.rmtree(machines.folder / "a")
    assert machines("b").artifact(FEATURES).digest == made.digest
    assert loading.open_features(machines("b")).read_shard(0).shape[0] == 64


def test_no_file_leaves_the_artifact(machines: Machines, tmp_path: Path) -> None:
    """An artifact.tar that names a path outside is refused."""
    buffer = io.BytesIO()
    manifest = json.dumps({"files": {"../canary": {}}, "beside": {}}).encode()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("manifest.json", manifest), ("../canary", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    a = machines("a")
    path = a.path(Ref("images"))
    mirror.Remote(machines.url).create(f"images/{path.name}/artifact.tar", buffer.getvalue())
    with pytest.raises(IntegrityError, match="outside"):
        a.find(Ref("images"))
    assert not list(tmp_path.rglob("canary"))


def test_verify_names_every_damaged_file(machines: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    """Given a folder, its store, or a URL: exit code 0 when whole, else 4 and each file by its name."""
    features = up_to_features(machines("a"))
    url = f"{machines.url}/features/{features.fingerprint}"
    targets = [str(features.path), str(features.path / "store.zarr"), url, f"{url}/store.zarr"]
    for target in targets:
        assert main(["verify", target]) == 0
        assert "MiB  features" in capsys.readouterr().out
    names = ["store.zarr/map/c.1.0.0.0.0", "store.zarr/vector/c.3.0.0"]
    for name in names:
        machines.damage(features, name)
        data = bytearray((features.path / name).read_bytes())
        data[99] ^= 4
        (features.path / name).write_bytes(data)
    for target in targets:
        assert main(["verify", target]) == 4
        said = capsys.readouterr().err
        assert all(f"{name.rpartition('/')[2]} has another content" in said for name in names)


def test_doctor_tries_object_storage(
    machines: Machines, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that overwrites where it should refuse is found out, and nothing is left there."""
    monkeypatch.setenv("NESTDIFF_HOME", str(machines.folder / "a"))
    assert main(["doctor"]) == 0
    assert f"{machines.url}: creates an object once" in capsys.readouterr().out
    assert mirror.Remote(machines.url).sizes("doctor") == {}
    monkeypatch.setattr(mirror.Remote, "create", lambda self, key, data: self.replace(key, data) or True)
    assert main(["doctor"]) == 5
    assert "If-None-Match" in capsys.readouterr().err
