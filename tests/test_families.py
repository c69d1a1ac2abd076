"""Both families of the paper through the whole pipeline on real images, with real weights, at a size for a CPU.

`iclr`: pooled SqueezeNet features, Markov conditions by fusion, class labels. `cvpr`: crops and a pooled level mixed,
all levels above as tokens, captions. z_1 is the code of the tiny autoencoder in both.
"""

from __future__ import annotations

import itertools
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import dagster as dg
import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file

from nestdiff_core import loading, stages
from nestdiff_core.config import (
    AutoencoderConfig,
    ConditioningConfig,
    EncoderConfig,
    EvaluationConfig,
    ExperimentConfig,
    FeaturesConfig,
    ImagesConfig,
    LevelConfig,
    SamplingConfig,
    TextConfig,
    TrainConfig,
    UViTConfig,
)
from nestdiff_core.evaluation.samples import load_samples
from nestdiff_core.experiment import Experiment, Ref
from pipelines.definitions import build_definitions

SHARED = Path(os.environ.get("NESTDIFF_SHARED", "../shared")).absolute()
needs_shared = pytest.mark.skipif(
    not (SHARED / "weights" / "taef2_encoder.safetensors").is_file(),
    reason=f"no images and weights in {SHARED} (NESTDIFF_SHARED)",
)

MODEL = UViTConfig(width=64, depth=2, num_heads=2, position_init="sincos")
TRAIN = TrainConfig(
    num_steps=12, batch_size=16, warmup_steps=2, ema_decay=0.9, log_every=4, checkpoint_every=6, condition_drop=0.5
)
SQUEEZENET = EncoderConfig(
    kind="torchvision",
    name="squeezenet1_0",
    weights=str(SHARED / "weights" / "squeezenet1_0_imagenet_fp16.safetensors"),
    input_size=64,
    mean=(123 / 255, 117 / 255, 104 / 255),
    std=(1 / 255,),
)
TAEF2 = AutoencoderConfig(kind="taef2", weights=str(SHARED / "weights"))


def level(number: int, **settings: object) -> LevelConfig:
    common = {"model": MODEL, "train": TRAIN, "condition_noise": 0.5 if number > 1 else 0.0, "guidance": 0.5}
    return LevelConfig(**{"level": number, **common, **settings})  # pyright: ignore[reportArgumentType]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A shard of 120 labelled photographs."""
    return first_samples(120, SHARED / "data/tinyimagenet20/tin20-val-00000.tar.gz", tmp_path / "photographs.tar")


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """A shard of 120 photographs, five captions each."""
    return first_samples(120, SHARED / "data/coco_captions/coco256-open-00000.tar", tmp_path / "captioned.tar")


def first_samples(count: int, source: Path, shard: Path) -> Path:
    """The first samples, of three members each, of a shard."""
    with tarfile.open(source) as whole, tarfile.open(shard, "w") as part:
        for member in itertools.islice(whole, 3 * count):
            part.addfile(member, whole.extractfile(member))
    return shard


def iclr(path: Path) -> ExperimentConfig:
    return ExperimentConfig(
        name="tiny_iclr",
        images=ImagesConfig(source="webdataset", path=str(path), resolution=64, labels=True),
        encoder=SQUEEZENET,
        autoencoder=TAEF2,
        features=FeaturesConfig(flip=True),
        levels=(level(1), level(2, grid=3, channels=16), level(3, grid=2, channels=8)),
        conditioning=ConditioningConfig(levels="markov", injection="fusion", labels="class"),
        sampling=SamplingConfig(
            sampler="dpm_solver", spacing="time", num_evaluations=7, num_images=40, batch_size=20, noise_draw="once"
        ),
        evaluation=EvaluationConfig(extractors=("encoder",)),
    )


def cvpr(path: Path) -> ExperimentConfig:
    return ExperimentConfig(
        name="tiny_cvpr",
        images=ImagesConfig(source="webdataset", path=str(path), resolution=64),
        encoder=SQUEEZENET,
        autoencoder=TAEF2,
        levels=(
            level(1, patch_size=2, model=replace(MODEL, width=128)),
            level(2, grid=3, channels=16),
            level(3, grid=2, channels=12, source="patch"),
            level(4, grid=1, channels=24, source="patch", guidance_interval=(0.1, 0.9)),
        ),
        conditioning=ConditioningConfig(
            levels="all_above",
            injection="tokens",
            labels="text",
            text=TextConfig(name="RN50", weights="random", width=512, captions_per_image=2, batch_size=64),
            drop="each",
        ),
        sampling=SamplingConfig(
            sampler="ddpm", num_evaluations=6, num_images=24, batch_size=12, noise_gamma=0.3, null_branch="conditions"
        ),
        evaluation=EvaluationConfig(extractors=("encoder",), reference="held_out", clip_score=True),
    )


def check_samples(x: Experiment) -> None:
    """Pictures of the right number and size that are neither flat nor alike, and a number for them."""
    pictures = load_samples(x.artifact(Ref("samples")).path / "samples.npz")
    resolution = x.config.images.resolution
    assert pictures.shape == (x.config.sampling.num_images, resolution, resolution, 3)
    assert pictures.std(axis=(1, 2, 3)).min() > 1 and pictures.std(axis=0).mean() > 1
    assert np.isfinite(x.artifact(Ref("evaluation")).info["metrics"]["fd_encoder"]["value"])


@needs_shared
def test_iclr_family_through_the_stages(tmp_path: Path, photographs: Path) -> None:
    """Every stage, called as from a notebook; two views stored, and labels in the samples."""
    x = Experiment(iclr(photographs), tmp_path)
    stages.images(x)
    stages.encoder(x)
    stages.features(x)
    stages.bases(x)
    stages.latents(x)
    z_1 = loading.open_latents(x, 1)
    assert z_1.shape[1:] == (2, 32, 8, 8)
    index, autoencoder = loading.open_index(x), loading.open_autoencoder(x)
    pixels = index.read_shard(0)[:2]
    for view, images in enumerate((pixels, pixels[:, :, ::-1].copy())):
        np.testing.assert_allclose(z_1.read(np.arange(2), np.full(2, view)), autoencoder.encode(images), atol=2e-3)
    for number in (2, 3):
        info = x.artifact(Ref("latents", number)).info
        assert max(map(abs, info["mean"])) < 0.01 and max(abs(s - 1) for s in info["std"]) < 0.01
    for number in (1, 2, 3):
        stages.train(x, number)
    denoiser = loading.open_denoiser(x, 1)
    assert denoiser.fusion is not None and denoiser.levels_above == (2,) and denoiser.num_classes == 20
    stages.reference(x)
    stages.samples(x)
    stages.evaluation(x)
    check_samples(x)
    guided = loading.generate(x, [0, 1], seed=0)[1]
    assert not torch.equal(guided[0], guided[1])


@needs_shared
@pytest.mark.timeout(900)  # five levels, each trained, judged and drawn
def test_cvpr_family_through_dagster(tmp_path: Path, captioned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart job makes crops, caption tokens, a mixed hierarchy, four denoisers, samples and a number."""
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path / "artifacts"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    config = cvpr(captioned)
    with dg.DagsterInstance.get() as instance:
        result = build_definitions(config).resolve_job_def("quickstart").execute_in_process(instance=instance)
        assert result.success
        shards = instance.get_materialized_partitions(dg.AssetKey(["tiny_cvpr", "crops_level_3"]))
        assert shards and shards == instance.get_materialized_partitions(dg.AssetKey(["tiny_cvpr", "text"]))
    x = Experiment(config, tmp_path / "artifacts")
    check_samples(x)
    score = x.artifact(Ref("evaluation")).info["metrics"]["clip_score"]
    assert 0 <= score["value"] <= 100 and score["card"]["num_samples"] == 24
    assert any("random weights" in text for text in x.artifact(Ref("evaluation")).info["warnings"])
    crops = zarr.open_array(x.artifact(Ref("crops", 3)).path / "store.zarr" / "map", mode="r")
    assert crops.shape[1:] == (1, 512, 2, 2)
    vectors = loading.open_features(x, "vector")
    level_4 = loading.open_level_features(x, 4).read_shard(0)
    np.testing.assert_array_equal(level_4[..., 0, 0], vectors.read_shard(0))
    weights = load_file(x.artifact(Ref("denoiser", 1)).path / "ema.safetensors")
    empty = load_file(x.artifact(Ref("text")).path / loading.EMPTY_CAPTION)[loading.TOKENS]
    torch.testing.assert_close(weights["null_context"], empty)
