"""MoCo v3: the loss in closed form, views with the geometry that was asked for, training that repeats."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from nestdiff_core.artifacts import writing
from nestdiff_core.config import EncoderConfig, ImagesConfig, MoCoConfig, ViTConfig
from nestdiff_core.encoders.moco import (
    augment,
    contrastive_loss,
    key_momentum,
    lr_factor,
    pixel_statistics,
    train_moco,
    training_batches,
    untrained,
)
from nestdiff_core.errors import NumericsError
from nestdiff_core.images.build import build_images
from nestdiff_core.images.index import ImageIndex

MOCO = MoCoConfig(
    num_steps=12,
    batch_size=64,
    lr=2e-3,
    warmup_steps=3,
    projection_dim=16,
    hidden_dim=32,
    min_crop_scale=0.7,
    horizontal_flip=False,
)
CONFIG = EncoderConfig(
    kind="moco", input_size=8, vit=ViTConfig(patch_size=2, width=16, depth=1, num_heads=2), moco=MOCO
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    header = {"stage": "images", "level": None, "fingerprint": "0", "config": {}, "inputs": [], "experiment": "test"}
    with writing(tmp_path_factory.mktemp("images") / "a", header) as writer:
        info = build_images(
            ImagesConfig(source="toy", resolution=8, channels=1, labels=True, images_per_shard=50), writer
        )
        return ImageIndex(writer.seal(**info))


def plain(**settings: object) -> MoCoConfig:
    """No change but those of geometry."""
    return MoCoConfig(**{"horizontal_flip": False, "jitter": 0.0, "noise": 0.0, **settings})


def test_loss_in_closed_form() -> None:
    """Orthonormal keys, each query its key: 2 tau log(1 + (B - 1) exp(-1 / tau)); scale of q and k is of no matter."""
    q, tau = torch.eye(6), 0.3
    expected = 2 * tau * math.log(1 + 5 * math.exp(-1 / tau))
    assert float(contrastive_loss(3 * q, 0.1 * q, tau)) == pytest.approx(expected, rel=1e-5)


def test_views_have_the_asked_geometry() -> None:
    """From two ramps the crop of each view is recovered: its area, aspect ratio, angle, and that it lies inside."""
    side, n = 64, 400
    ramp = (torch.arange(side) + 0.5) * 2 / side - 1  # image coordinates, -1 to 1
    x = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side)])[None].repeat(n, 1, 1, 1)
    moco = plain(min_crop_scale=0.3, max_rotation_degrees=20.0, horizontal_flip=True)
    view = augment((x + 1) / 2, moco, torch.Generator().manual_seed(0)) * 2 - 1
    c, step = side // 2, 2 / side
    along = (view[:, :, c, c + 12] - view[:, :, c, c - 12]) / (24 * step)  # d(x, y) / du
    down = (view[:, :, c + 12, c] - view[:, :, c - 12, c]) / (24 * step)
    width, height = along.norm(dim=1), down.norm(dim=1)
    angle = torch.rad2deg(torch.atan2(-down[:, 0], down[:, 1]))
    assert angle.abs().max() <= 20.5 and angle.std() == pytest.approx(40 / math.sqrt(12), rel=0.1)
    unclamped = (width < 0.999) & (height < 0.999)
    area, ratio = (width * height)[unclamped], (width / height)[unclamped]
    assert area.min() >= 0.299 and area.max() > 0.85 and ratio.min() >= 0.749 and ratio.max() <= 1.34
    centre = view[:, :, c - 1 : c + 1, c - 1 : c + 1].mean((2, 3))
    assert (centre[:, 0].abs() + width).max() <= 1.01 and (centre[:, 1].abs() + height).max() <= 1.01
    mirrored = (torch.linalg.det(torch.stack([along, down], dim=2)) < 0).float().mean()
    assert float(mirrored) == pytest.approx(0.5, abs=0.1)


def test_jitter_and_noise_have_the_asked_strength() -> None:
    """On flat grey images brightness alone is left, uniform in 1 -+ jitter; noise has its standard deviation."""
    flat = torch.full((4000, 1, 4, 4), 0.5)
    bright = augment(flat, plain(jitter=0.4), torch.Generator().manual_seed(0)) / 0.5
    assert bright.min() >= 0.599 and bright.max() <= 1.401
    assert float(bright[:, 0, 0, 0].std()) == pytest.approx(0.8 / math.sqrt(12), rel=0.05)
    noisy = augment(flat, plain(noise=0.05), torch.Generator().manual_seed(0))
    assert float(noisy.std()) == pytest.approx(0.05, rel=0.02) and float(noisy.mean()) == pytest.approx(0.5, abs=1e-3)


def test_views_come_from_the_generator() -> None:
    """The same generator state gives the same view, another one another; values stay in [0, 1]."""
    x, moco = (
        torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        MoCoConfig(noise=0.3, max_rotation_degrees=10.0),
    )
    a, b, c = (augment(x, moco, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.min() >= 0 and a.max() <= 1


def test_schedules() -> None:
    """The rate rises to its peak in the warm-up and falls to nothing; the momentum rises from its value to 1."""
    moco = MoCoConfig(num_steps=100, warmup_steps=10, momentum=0.9)
    assert lr_factor(0, moco) == 0.1 and lr_factor(9, moco) == lr_factor(10, moco) == 1
    assert lr_factor(55, moco) == pytest.approx(0.5) and lr_factor(99, moco) < 0.001
    assert key_momentum(0, moco) == pytest.approx(0.9) and key_momentum(50, moco) == pytest.approx(0.95)
    assert 0.999 < key_momentum(99, moco) < 1


@pytest.mark.parametrize("pool_bytes", [2**30, 7000, 1])
def test_an_epoch_holds_every_train_image_once(index: ImageIndex, pool_bytes: int) -> None:
    """However little is held in memory, and whatever the batch size; two epochs have different orders."""
    rows = index.rows("train")
    everything = np.concatenate([x for _, x in index.iterate("train")]).reshape(len(rows), -1)
    batches = training_batches(index, 32, seed=0, pool_bytes=pool_bytes)
    stream = np.concatenate(list(itertools.islice(batches, 2 * len(rows) // 32 + 1)))
    epochs = [stream[e * len(rows) : (e + 1) * len(rows)].reshape(-1, 64) for e in range(2)]
    for epoch in epochs:
        if len(epoch) == len(rows):
            np.testing.assert_array_equal(np.unique(epoch, axis=0), np.unique(everything, axis=0))
    assert not np.array_equal(epochs[0][: len(epochs[1])], epochs[1])


def test_small_set_recurs_within_a_batch(index: ImageIndex) -> None:
    """A batch larger than the set is still full."""
    assert [len(b) for b in itertools.islice(training_batches(index, 1000, seed=0), 3)] == [1000] * 3


def test_pixel_statistics_are_the_train_splits(index: ImageIndex) -> None:
    """Mean and standard deviation as numpy finds them on all train pixels at once."""
    pixels = np.concatenate([x for _, x in index.iterate("train")]) / 255
    mean, std = pixel_statistics(index)
    np.testing.assert_allclose((mean[0], std[0]), (pixels.mean(), pixels.std()), rtol=1e-9)


def test_training_repeats_to_the_bit_and_learns(index: ImageIndex) -> None:
    """Two runs give equal weights; the loss falls; patch projection and positions stay as they were drawn."""
    runs = [train_moco(CONFIG, training_batches(index, 64, 0), (0.3,), (0.4,)) for _ in range(2)]
    (a, losses), (b, _) = runs
    start = untrained(CONFIG, (0.3,), (0.4,)).network.state_dict()
    for key, value in a.network.state_dict().items():
        assert torch.equal(value, b.network.state_dict()[key])
        frozen = key.startswith("patch_embed") or key == "pos_embed"
        assert torch.equal(value, start[key]) == frozen or not start[key].any(), key
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_diverged_training_is_refused(index: ImageIndex) -> None:
    """A loss that is not finite ends the stage with its step."""
    config = dataclasses.replace(CONFIG, moco=dataclasses.replace(MOCO, lr=1e30, warmup_steps=0))
    with pytest.raises(NumericsError, match="not finite at step"):
        train_moco(config, training_batches(index, 64, 0), (0.3,), (0.4,))
