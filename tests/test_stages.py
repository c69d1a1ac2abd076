"""Stages: what they make, what they share, and that a grown source costs only what is new."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nestdiff_core import loading, stages
from nestdiff_core.cli import main
from nestdiff_core.config import DesignConfig, EncoderConfig, ImagesConfig
from nestdiff_core.errors import ConfigError, InputError, IntegrityError
from nestdiff_core.evaluation.samples import load_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import read_json
from nestdiff_core.progress import NumbersProgress
from nestdiff_core.recipes import toy
from nestdiff_core.stages import hierarchy
from nestdiff_core.stages.data import read_ahead
from nestdiff_core.stores.reader import StoreReader


@pytest.fixture
def made(toy_run: Any, tmp_path: Path) -> Experiment:
    """A copy of the toy experiment's artifacts, to be damaged."""
    shutil.copytree(toy_run.root, tmp_path / "artifacts")
    return Experiment(toy(), tmp_path / "artifacts")


def write_images(folder: Path, names: range) -> None:
    folder.mkdir(exist_ok=True)
    for i in names:
        pixels = np.random.default_rng(i).integers(0, 256, (12, 10, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


@pytest.fixture
def own(tmp_path: Path) -> Experiment:
    """A user's folder of twelve images in shards of four, and an encoder that does not depend on them."""
    write_images(tmp_path / "photos", range(12))
    images = ImagesConfig(source="folder", path=str(tmp_path / "photos"), resolution=16, images_per_shard=4)
    encoder = EncoderConfig(kind="timm", name="test_vit", weights="random", input_size=160)
    config = toy()
    config = replace(config, images=images, encoder=encoder, evaluation=replace(config.evaluation, probe=False),
                     levels=(config.level(1), replace(config.level(2), channels=2)))  # fmt: skip
    return Experiment(config, tmp_path / "artifacts")


def test_a_grown_folder_costs_only_the_new_shard(own: Experiment) -> None:
    """Four more images are noticed without being asked, and only their shard is encoded."""
    stages.images(own)
    stages.encoder(own)
    stages.features(own)
    parts = own.artifact(Ref("features")).path / "_parts"
    before = {p.name: p.stat().st_mtime_ns for p in parts.iterdir()}
    write_images(Path(own.config.images.path), range(12, 16))
    stages.images(own)
    with pytest.raises(IntegrityError, match="does not cover"):
        loading.open_features(own)
    artifact, records = stages.features(own)
    assert artifact is not None
    assert set(records) == {"00000", "00001", "00002", "00003"}
    assert {p.name for p in parts.iterdir() if before.get(p.name) != p.stat().st_mtime_ns} == {"00003.json"}
    assert len(loading.open_features(own)) == 16


def test_a_bad_image_does_not_cost_the_index(own: Experiment) -> None:
    """A broken file added to the folder is refused by name, and what was there before still is."""
    before = stages.images(own)
    (Path(own.config.images.path) / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(InputError, match="broken"):
        stages.images(own)
    assert own.artifact(Ref("images")).manifest == before.manifest
    assert before.verify() > 0


def test_shards_can_be_encoded_one_at_a_time(own: Experiment) -> None:
    """Named shards are committed alone; the store is sealed when the last one is there, with the same content."""
    stages.images(own)
    stages.encoder(own)
    assert stages.features(own, shards=["00002"])[0] is None
    assert stages.features(own, shards=["00000"])[0] is None
    sealed, _ = stages.features(own, shards=["00001"])
    assert sealed is not None
    digest = sealed.digest
    shutil.rmtree(sealed.path)
    again, _ = stages.features(own)
    assert again is not None
    assert again.digest == digest


def test_the_manifest_says_what_made_it(made: Experiment) -> None:
    """Every artifact carries its configuration, the digests of its inputs, the code version and all hashes."""
    manifest = read_json(made.artifact(Ref("latents", 2)).path / "manifest.json")
    assert manifest["config"]["grid"] == 2
    assert [i["stage"] for i in manifest["inputs"]] == ["features", "svd_basis"]
    assert manifest["inputs"][0]["identity"] == made.artifact(Ref("features")).digest
    assert manifest["code_version"]
    assert all(len(record["sha256"]) == 64 for record in manifest["files"].values())


def test_a_level_that_the_encoder_cannot_serve_is_refused_at_the_encoder(tmp_path: Path) -> None:
    """Before any image is encoded: level, setting and both values. The map of this timm network is 2x2."""
    config = replace(
        toy(),
        encoder=EncoderConfig(kind="timm", name="test_vit", weights="random", input_size=32),
        levels=(toy().level(1), replace(toy().level(2), grid=3)),
    )
    x = Experiment(config, tmp_path)
    stages.images(x)
    with pytest.raises(ConfigError, match="found 3") as refusal:
        stages.encoder(x)
    assert (refusal.value.level, refusal.value.key, refusal.value.expected) == (2, "levels.grid", "at most 2")


def test_recorded_statistics_are_those_of_the_training_latents(
    made: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean and deviation by channel are numpy's over the training split, though a few images are held at a time."""
    monkeypatch.setattr(hierarchy, "STATISTICS_BYTES", 7 * 8 * 4 * 2 * 2)  # 7 images of z_2
    rows = loading.open_index(made).rows("train")
    for level in (1, 2):
        shutil.rmtree(made.path(Ref("latents", level)))
    for level, artifact in stages.latents(made).items():
        z = loading.open_latents(made, level).read(rows).astype(np.float64)
        np.testing.assert_allclose(artifact.info["mean"], z.mean(axis=(0, 1, 3, 4)), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(artifact.info["std"], z.std(axis=(0, 1, 3, 4)), rtol=1e-10)


def test_a_latent_is_shared_under_another_number(made: Experiment) -> None:
    """With a level inserted below, level 3 is the toy's level 2: its latents and denoiser are found and read."""
    levels = (made.config.level(1), replace(made.config.level(2), grid=4), replace(made.config.level(2), level=3))
    deeper = Experiment(replace(made.config, levels=levels), made.root)
    stages.bases(deeper)
    stages.latents(deeper)
    assert deeper.path(Ref("latents", 3)) == made.path(Ref("latents", 2))
    assert deeper.path(Ref("denoiser", 3)) == made.path(Ref("denoiser", 2))
    batches = loading.latent_batches(deeper, 1)
    rows = np.arange(3)
    np.testing.assert_array_equal(batches.readers[3].read(rows), loading.open_latents(made, 2).read(rows))
    stages.train(deeper, 2)
    stages.train(deeper, 1)
    assert deeper.artifact(Ref("denoiser", 1)).info["step"] == 20


def test_changed_settings_say_what_was_begun(made: Experiment, caplog: pytest.LogCaptureFixture) -> None:
    """A level that was trained for a while begins anew with a changed setting: the log names the setting, and where
    training could go on from; and from there it goes on."""

    def with_training(**changes: Any) -> Experiment:
        level = made.config.level(2)
        level = replace(level, train=replace(level.train, **changes))
        return Experiment(replace(made.config, levels=(made.config.level(1), level)), made.root)

    first = with_training(num_steps=1000, checkpoint_every=5)
    stages.train(first, 2, until_step=10)
    changed = {"num_steps": 30, "lr": 1e-4}
    assert stages.train(with_training(**changed), 2, until_step=5) is None
    assert "denoiser of level 2 was trained to step 10" in caplog.text and "train.lr: 0.001 -> 0.0001" in caplog.text
    source = first.path(Ref("denoiser", 2)) / "checkpoints" / "step_00000010"
    assert f"levels.2.train.fork_from: {source}" in caplog.text
    fork = stages.train(with_training(**changed, fork_from=str(source)), 2)
    assert fork is not None and [line["step"] for line in read_json(fork.path / "history.json")] == [15, 20, 25, 30]


def test_tensorboard_has_every_line(made: Experiment) -> None:
    """Its event files hold the history's numbers, each step once however often training stopped; the live plots get
    losses by noise level, too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    level = replace(made.config.level(2), train=replace(made.config.level(2).train, num_steps=40, log_every=5))
    x = Experiment(replace(made.config, levels=(made.config.level(1), level)), made.root)
    plotted: list[dict[str, float]] = []
    told = NumbersProgress(plotted.append, interval_seconds=0.0, share=0.0)
    for until in (12, 25, None):
        artifact = stages.train(x, 2, until_step=until, progress=told)
    assert artifact is not None
    history = read_json(artifact.path / "history.json")
    events = EventAccumulator(str(artifact.path / "tensorboard"))
    events.Reload()
    for name in ("loss", "gradient_norm", "loss_t0.75"):
        scalars = events.Scalars(f"level_2/{name}")
        assert [s.step for s in scalars] == [line["step"] for line in history] == list(range(5, 41, 5))
        np.testing.assert_allclose([s.value for s in scalars], [line[name] for line in history], rtol=1e-6)
    for name in ("loss", "loss_t0.00", "loss_t0.75", "held_out_loss_t0.25"):
        assert plotted[-1][name] == history[-1][name]
    assert artifact.verify()  # they are beside the artifact, not part of it


def test_a_denoisers_digest_depends_on_itself_alone(made: Experiment, tmp_path: Path) -> None:
    """The same denoiser, trained from an experiment with another name and other sampling, is the same artifact."""
    other = Experiment(
        replace(made.config, name="other", sampling=replace(made.config.sampling, seed=3)), tmp_path / "b"
    )
    for stage in ("images", "encoder", "features", "moments", "svd_basis", "latents"):
        shutil.copytree(made.root / stage, other.root / stage)
    stages.train(other, 2)
    assert other.artifact(Ref("denoiser", 2)).digest == made.artifact(Ref("denoiser", 2)).digest


def test_the_next_shard_is_read_while_one_is_encoded(made: Experiment, tmp_path: Path) -> None:
    """In order, one ahead; an error in reading comes where that shard's turn is, after what was before it."""
    started, release = [], threading.Event()

    def read(k: int) -> int:
        started.append(k)
        if k == 3:
            raise ValueError("no shard 3")
        if k == 2:
            release.set()
        return 10 * k

    seen = []
    with pytest.raises(ValueError, match="no shard 3"):
        for k, loaded in read_ahead(read, [1, 2, 3, 4]):
            if k == 1:
                assert release.wait(10), "shard 2 is not read before shard 1 is done"
            seen.append((k, loaded))
    assert seen == [(1, 10), (2, 20)] and started == [1, 2, 3]
    assert list(read_ahead(read, [])) == []


def test_mixed_precision_is_close_and_another_store(made: Experiment) -> None:
    """bfloat16 arithmetic changes features by its rounding, and the address."""
    config = replace(made.config, features=replace(made.config.features, precision="bfloat16"))
    mixed = Experiment(config, made.root)
    stages.features(mixed)
    assert mixed.path(Ref("features")) != made.path(Ref("features"))
    rows = np.arange(50)
    a, b = (loading.open_features(x).read(rows).astype(np.float64) for x in (made, mixed))
    error = np.abs(a - b).max() / np.abs(a).max()
    assert 1e-4 < error < 3e-2


@pytest.mark.parametrize("source", ["pooled", "patch"])
def test_without_kept_features_latents_are_the_same(made: Experiment, source: Any) -> None:
    """Encoded anew for bases and latents: the same bits as through the stores, which are then not there."""
    levels = (
        made.config.level(1),
        replace(made.config.level(2), source=source),
        replace(made.config.level(2), level=3, grid=1, source=source),
    )
    kept = Experiment(replace(made.config, levels=levels), made.root)
    bare = Experiment(replace(kept.config, features=replace(kept.config.features, keep=False)), made.root)
    for level in (2, 3):
        if kept.config.has_crops(level):
            stages.crops(kept, level)
    for x in (kept, bare):
        stages.bases(x)
        stages.latents(x)
    assert {ref.stage for ref in kept.refs()} - {ref.stage for ref in bare.refs()} >= {"features"}
    for level in (2, 3):
        assert bare.path(Ref("latents", level)) != kept.path(Ref("latents", level))
        assert bare.artifact(Ref("svd_basis", level)).digest == kept.artifact(Ref("svd_basis", level)).digest
        rows = np.arange(256)
        np.testing.assert_array_equal(*(loading.open_latents(x, level).read(rows) for x in (bare, kept)))
    one, other = (stages.design(x).info["eigenvalues"] for x in (bare, kept))
    assert one == other


def test_design_proposes_from_what_was_measured(
    made: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the toy's features: one level for each grid, spectra as its basis has, both tables printed, no work twice."""
    monkeypatch.setenv("NESTDIFF_HOME", str(made.root))
    artifact = stages.design(made)
    assert [p["grid"] for p in artifact.info["proposals"]] == [1, 2]
    basis = loading.open_basis(made, 2)  # of the map pooled to 2x2
    np.testing.assert_allclose(artifact.info["eigenvalues"]["2"], basis.eigenvalues, rtol=1e-9)
    assert stages.design(made).manifest == artifact.manifest
    assert main(["design", "toy", "--nats", "5"]) == 0
    said = capsys.readouterr().out
    assert "proposed" in said and "variance kept" in said and "toy" in said
    paper = said[said.index("the paper") :].splitlines()
    assert [line.split()[0] for line in paper[-4:]] == ["5", "4", "3", "2"]
    assert made.path(Ref("design")) == artifact.path and Ref("design") not in made.refs()


def test_design_reads_a_store_that_belongs_to_no_experiment(
    made: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of its images are measured; folder and store say the same."""
    rows = np.arange(256)
    stray = shutil.copytree(made.artifact(Ref("features")).path / "store.zarr", tmp_path / "stray.zarr")
    (made.path(Ref("features")) / "manifest.json").unlink()
    _, spectra = stages.propose_levels(StoreReader(stray, "map"), rows, DesignConfig(nats=5.0))
    maps = StoreReader(stray, "map").read(rows)[:, 0].astype(np.float64)
    tokens = maps.mean(axis=(2, 3))  # the grid of 1
    np.testing.assert_allclose(spectra[1], np.linalg.eigvalsh(np.cov(tokens.T, bias=True))[::-1], rtol=1e-3, atol=1e-7)
    said = []
    for target in (stray, made.path(Ref("features"))):
        assert main(["design", str(target), "--nats", "5"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].index("the paper") > said[0].index("proposed")


def test_samples_are_what_generate_and_decode_give(made: Experiment) -> None:
    """Images, latents of the levels above, and images without conditions: made in parts, to the bit those that are made
    at once; the parts are gone."""
    indices, artifact = range(made.config.sampling.num_images), made.artifact(Ref("samples"))
    z = loading.generate(made, indices, seed=made.config.sampling.seed)
    assert np.array_equal(load_samples(artifact.path / "samples.npz"), loading.decode(made, z[1]))
    assert torch.equal(load_file(artifact.path / "latents.safetensors")["z_2"], z[2].half())
    unread = {2: torch.zeros_like(z[2])}
    bare = loading.generate(made, indices, seed=made.config.sampling.seed, given=unread, null_conditions=True)
    assert np.array_equal(load_samples(artifact.path / "without_conditions.npz"), loading.decode(made, bare[1]))
    assert {path.name for path in artifact.path.iterdir()} >= {"samples.npz", "_parts"}
    assert not (artifact.path / "shards").exists()


def test_images_without_conditions_can_be_left_out(made: Experiment) -> None:
    """The same images without that set, and numbers of them alone."""
    x = Experiment(replace(made.config, sampling=replace(made.config.sampling, without_conditions=False)), made.root)
    ours, theirs = (stages.samples(y).path / "samples.npz" for y in (x, made))
    assert ours != theirs and np.array_equal(load_samples(ours), load_samples(theirs))
    assert not (ours.parent / "without_conditions.npz").exists()
    found = {y: stages.evaluation(y).info["metrics"] for y in (x, made)}
    assert found[x].keys() == found[made].keys()
    for name, metric in found[x].items():
        assert metric["value"] == found[made][name]["value"] and found[made][name]["others"] and not metric["others"]
