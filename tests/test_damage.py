"""What is damaged or replaced is made again, or refused by name."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import save_file

from nestdiff_core import loading, stages
from nestdiff_core.cli import main
from nestdiff_core.cli.digest import experiment_digests
from nestdiff_core.config import AutoencoderConfig, EncoderConfig
from nestdiff_core.errors import IntegrityError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import toy


@pytest.fixture
def made(toy_run: Any, tmp_path: Path) -> Experiment:
    """A copy of the toy experiment's artifacts, to be damaged."""
    shutil.copytree(toy_run.root, tmp_path / "artifacts")
    return Experiment(toy(), tmp_path / "artifacts")


def flip(path: Path, position: int = 40) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def shard_files(store: Path) -> Iterator[Path]:
    yield from sorted(p for p in store.rglob("*") if p.is_file() and p.name != "zarr.json")


def test_a_damaged_shard_alone_is_encoded_again(made: Experiment) -> None:
    """One flipped bit in the feature store costs one shard, and the digests are as before."""
    before = experiment_digests(made)
    features = made.artifact(Ref("features")).path
    file = next(shard_files(features / "store.zarr"))
    others = {p: p.stat().st_mtime_ns for p in shard_files(features / "store.zarr")}
    flip(file)
    stages.features(made)
    touched = {p for p in others if p.stat().st_mtime_ns != others[p]}
    assert file in touched
    assert len(touched) == 2  # the shard's two arrays, map and vector
    assert experiment_digests(made) == before


@pytest.mark.parametrize("stage", ["encoder", "svd_basis", "denoiser", "evaluation"])
def test_a_damaged_artifact_is_made_again(made: Experiment, stage: str) -> None:
    """Materialising a stage whose file is damaged repairs it, to the same bits."""
    before = experiment_digests(made)
    level = 2 if stage in ("svd_basis", "denoiser") else None
    path = made.artifact(Ref(stage, level)).path
    name = {"encoder": "model.safetensors", "svd_basis": "basis.safetensors", "denoiser": "ema.safetensors"}.get(
        stage, "metrics.json"
    )
    flip(path / name, -5)
    match stage:
        case "encoder":
            stages.encoder(made)
        case "svd_basis":
            stages.bases(made)
        case "denoiser":
            stages.train(made, 2)
        case _:
            stages.evaluation(made)
    assert experiment_digests(made) == before


@pytest.mark.parametrize("stage", ["latents", "svd_basis", "features", "encoder", "images"])
def test_a_damaged_input_is_refused_by_name(made: Experiment, stage: str) -> None:
    """A stage never reads a damaged artifact of another: it names the file."""
    level = 2 if stage in ("latents", "svd_basis") else None
    path = made.artifact(Ref(stage, level)).path
    file = next(shard_files(path / "store.zarr")) if stage in ("latents", "features") else next(path.glob("*.[spt]*"))
    consumer = {"latents": Ref("denoiser", 2), "svd_basis": Ref("latents", 2), "features": Ref("moments", 2),
                "encoder": Ref("features"), "images": Ref("encoder")}[stage]  # fmt: skip
    shutil.rmtree(made.path(consumer))
    flip(file)
    with pytest.raises(IntegrityError) as caught:
        match consumer.stage:
            case "denoiser":
                stages.train(made, 2)
            case "latents":
                stages.latents(made, [2])
            case "moments":
                stages.bases(made)
            case "features":
                stages.features(made)
            case _:
                stages.encoder(made)
    assert caught.value.path == str(file)
    assert caught.value.fix


def test_replaced_weights_are_noticed(tmp_path: Path) -> None:
    """Other weights at the same path give another encoder; the same ones, or none any more, leave it."""
    weights = tmp_path / "vit.safetensors"

    def save(seed: int) -> None:
        torch.manual_seed(seed)
        save_file(timm.create_model("test_vit", num_classes=0, img_size=32).state_dict(), weights)

    encoder = EncoderConfig(kind="timm", name="test_vit", weights=str(weights), input_size=32)
    x = Experiment(replace(toy(), encoder=encoder), tmp_path / "artifacts")
    stages.images(x)
    save(1)
    first = stages.encoder(x).digest
    assert stages.encoder(x).digest == first
    save(2)
    second = stages.encoder(x).digest
    assert second != first
    weights.unlink()
    assert stages.encoder(x).digest == second


def test_another_autoencoder_does_not_decode(tmp_path: Path) -> None:
    """z_1 made with some weights is not decoded with others: both hashes are named."""
    folder = tmp_path / "vae"
    shape = {
        "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4, "norm_num_groups": 4,
    }  # fmt: skip
    AutoencoderKL(**shape).save_pretrained(folder)
    config = replace(
        toy(),
        images=replace(toy().images, resolution=16),
        autoencoder=AutoencoderConfig(kind="kl", weights=str(folder), channels=1),
        levels=(replace(toy().level(1), patch_size=1),),
    )
    x = Experiment(config, tmp_path / "artifacts")
    stages.images(x)
    first = stages.latents(x)[1].digest
    z_1 = torch.from_numpy(loading.open_latents(x, 1).read(np.arange(2))[:, 0])
    assert loading.decode(x, z_1).shape == (2, 16, 16, 1)
    AutoencoderKL(**shape).save_pretrained(folder)
    with pytest.raises(IntegrityError, match="others than z_1 was made with"):
        loading.decode(x, z_1)
    assert stages.latents(x)[1].digest != first
    assert loading.decode(x, z_1).shape == (2, 16, 16, 1)


def test_verify_finds_what_manifests_cannot_vouch_for(made: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint, the history of a training, and a manifest itself: one changed byte is exit code 4."""
    monkeypatch.setenv("NESTDIFF_HOME", str(made.root))
    assert main(["verify", "toy"]) == 0
    denoiser = made.artifact(Ref("denoiser", 2)).path
    newest = sorted((denoiser / "checkpoints").glob("step_*"))[-1]
    manifest = made.artifact(Ref("evaluation")).path / "manifest.json"
    for path in (newest / "model.safetensors", newest / "state.json", denoiser / "history.json", manifest):
        content = path.read_bytes()
        at = content.rindex(b"1")
        path.write_bytes(content[:at] + b"2" + content[at + 1 :])
        assert main(["verify", "toy"]) == 4, path.name
        path.write_bytes(content)
    assert main(["verify", "toy"]) == 0


def test_an_artifact_in_anothers_place_is_refused(made: Experiment) -> None:
    """A folder copied to the address of another seed says which fingerprint it has."""
    level = made.config.level(2)
    other = Experiment(
        replace(made.config, levels=(made.config.level(1), replace(level, train=replace(level.train, seed=5)))),
        made.root,
    )
    shutil.copytree(made.path(Ref("denoiser", 2)), other.path(Ref("denoiser", 2)))
    with pytest.raises(IntegrityError, match="something else than its place says"):
        other.artifact(Ref("denoiser", 2))


def test_damaged_samples_are_made_again(made: Experiment) -> None:
    """One flipped bit in the finished file: materialising the stage gives the same bytes as before."""
    path = made.artifact(Ref("samples")).path / "samples.npz"
    before = path.read_bytes()
    flip(path, 1000)
    stages.samples(made)
    assert path.read_bytes() == before
