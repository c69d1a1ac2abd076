"""What is stored: independent of the company, with views, crops in their places, and nothing that is not finite."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nestdiff_core import loading, stages
from nestdiff_core.config import EncoderConfig, ViTConfig
from nestdiff_core.encoders.base import Encoder
from nestdiff_core.encoders.extract import encode_captions, encode_crops, extract_crops, extract_features
from nestdiff_core.encoders.moco import untrained
from nestdiff_core.encoders.vit import ViTEncoder
from nestdiff_core.errors import ConfigError, NumericsError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import toy

SMALL = EncoderConfig(kind="moco", input_size=8, vit=ViTConfig(patch_size=2, width=16, depth=2, num_heads=2))


def called(i: int) -> str:
    return f"image {i}"


class Brightness(Encoder):
    """The map is the image at 4 x 4, the vector its mean colour, both `factor` times too bright."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(
            map_channels=3,
            map_side=4,
            vector_channels=3,
            input_size=4,
            in_channels=3,
            mean=(0.0,) * 3,
            std=(1 / factor,) * 3,
        )
        self.network = nn.Identity()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.sizes.append(len(x))
        return x, x.mean((2, 3))


@pytest.fixture
def encoder() -> ViTEncoder:
    return untrained(SMALL, (0.5,), (0.25,))


def images(n: int, side: int = 8, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, channels), np.uint8)


def test_extraction_does_not_depend_on_the_company(encoder: ViTEncoder) -> None:
    """Features of an image have the same bits in a full batch and in a padded tail."""
    x = images(11)
    whole = extract_features(encoder, x, 4, "float32")
    for start, stop in ((0, 1), (4, 11), (8, 10)):
        part = extract_features(encoder, x[start:stop], 4, "float32")
        for found, expected in zip(part, whole, strict=True):
            np.testing.assert_array_equal(found, expected[start:stop])
    torch.testing.assert_close(torch.from_numpy(whole[1][:, 0]), encoder.encode(x)[1])


def test_the_second_view_is_the_mirror_image(encoder: ViTEncoder) -> None:
    """View 0 is what it is without `flip`, view 1 the features of the images mirrored left to right."""
    x = images(5)
    mirrored = x[:, :, ::-1].copy()
    both, plain, flipped = (
        extract_features(encoder, pictures, 4, "float32", flip=flip)
        for pictures, flip in ((x, True), (x, False), (mirrored, False))
    )
    for two, first, second in zip(both, plain, flipped, strict=True):
        assert two.shape[1] == 2 and first.shape[1] == 1
        np.testing.assert_array_equal(two, np.concatenate([first, second], axis=1))
    assert not np.array_equal(both[0][:, 0], both[0][:, 1])


@pytest.mark.parametrize("flip", [False, True])
def test_crops_stand_at_their_places(encoder: ViTEncoder, flip: bool) -> None:
    """vector[:, i, j] is that of the crop in row i and column j, cut out by hand, resized like an image."""
    x = images(3, side=24)
    found = extract_crops(encoder, x, 3, 7, "float32", flip=flip)
    assert found.shape == (3, 1 + flip, 16, 3, 3)
    for view, pictures in enumerate([x, x[:, :, ::-1].copy()][: 1 + flip]):
        np.testing.assert_allclose(found[:, view], encode_crops(encoder, pictures, 3).numpy(), atol=1e-5)
        for i, j in ((0, 0), (0, 2), (2, 1)):
            crop = pictures[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            np.testing.assert_allclose(found[:, view, :, i, j], encoder.encode(crop)[1].numpy(), atol=1e-5)


def test_a_pass_has_exactly_the_batch_size() -> None:
    """Crops are batched as crops, whatever their number in an image; one crop is the image."""
    encoder, x = Brightness(), images(3, side=16, channels=3)
    extract_crops(encoder, x, 4, 10, "float16")
    assert encoder.sizes == [10] * 5  # 48 crops
    np.testing.assert_array_equal(
        extract_crops(encoder, x, 1, 10, "float16")[..., 0, 0], extract_features(encoder, x, 10, "float16")[1]
    )


def test_images_that_cannot_be_cut_are_refused(encoder: ViTEncoder) -> None:
    """A grid that does not divide the side is named."""
    with pytest.raises(ConfigError, match="divisor of the images' side 8") as caught:
        extract_crops(encoder, images(1), 3, 4, "float16")
    assert caught.value.key == "levels.grid"


@pytest.mark.parametrize(("value", "dtype"), [(1e6, "float16"), (float("nan"), "float32"), (float("inf"), "float32")])
def test_unusable_features_are_refused(encoder: ViTEncoder, value: float, dtype: str) -> None:
    """Overflow and non-finite values end the stage with the row and the channel."""
    with torch.no_grad():
        encoder.network.norm.bias[5] = value
    with pytest.raises(NumericsError, match="not finite as") as caught:
        extract_features(encoder, images(3), 2, dtype, name=called)
    assert caught.value.key == "image 0, channel 5"


def test_the_row_of_an_overflow() -> None:
    """The row is that of the image, in later batches and for crops too."""
    x = np.zeros((7, 8, 8, 3), np.uint8)
    x[5, 4:, 4:, 1] = 255
    encoder = Brightness(1e6)
    with pytest.raises(NumericsError, match=r"\(map\)") as caught:
        extract_features(encoder, x, 2, "float16", name=called, flip=True)
    assert caught.value.key == "image 5, channel 1"
    with pytest.raises(NumericsError, match="crop") as caught:
        extract_crops(encoder, x, 2, 3, "float16", name=called)
    assert caught.value.key == "image 5, channel 1"


def test_captions_are_encoded_in_full_passes() -> None:
    """Tokens (N, T, W) whatever the batch; a value that does not fit is named by caption and channel."""
    sizes: list[int] = []

    def encode(captions: list[str]) -> Tensor:
        sizes.append(len(captions))
        return torch.tensor([[[len(c), t, 10.0 ** len(c)] for t in range(4)] for c in captions], dtype=torch.float32)

    captions = ["a", "bb", "ccc", "", "dd"]
    found = encode_captions(encode, captions, 2, "float16")
    np.testing.assert_array_equal(found, encode(captions).numpy())
    assert sizes[:3] == [2, 2, 2] and found.dtype == np.float16
    with pytest.raises(NumericsError, match="caption") as caught:
        encode_captions(encode, [*captions, "x" * 6], 2, "float16", name=called)
    assert caught.value.key == "image 5, channel 2"


COMPILE = """
import torch
from dataclasses import replace
from nestdiff_core import stages
from nestdiff_core.experiment import Experiment
from nestdiff_core.recipes import toy
base = toy()
stages.features(Experiment(replace(base, features=replace(base.features, compile=True))))
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for a CPU needs g++")
def test_a_compiled_encoder_gives_the_same_features(tmp_path: Path) -> None:
    """To rounding, in one graph, compiled once however many shards there are."""
    base = toy()
    plain = Experiment(base, tmp_path)
    compiled = Experiment(replace(base, features=replace(base.features, compile=True)), tmp_path)
    stages.images(plain)
    stages.encoder(plain)
    stages.features(plain)
    assert plain.path(Ref("features")) != compiled.path(Ref("features"))
    # In a process without the runtime type checks of the tests, which cannot be compiled.
    environment = {**os.environ, "NESTDIFF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "1"
    for array in ("map", "vector"):
        a, b = (loading.open_features(x, array).read(np.arange(256)).astype(np.float32) for x in (plain, compiled))
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
