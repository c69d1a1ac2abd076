"""The CLIP score against open_clip's own model, on weights from a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from torchvision.transforms.v2 import functional as transforms

from nestdiff_core.config import TextConfig
from nestdiff_core.errors import InputError, IntegrityError
from nestdiff_core.evaluation.clip_score import Clip, build_clip, clip_score
from nestdiff_core.evaluation.extractors import pixel_extractor
from nestdiff_core.evaluation.features import extract

CAPTIONS = ["a red square", "a dog that runs over a green field", "", "two people at a table"]


def random_images(n: int, side: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


@pytest.fixture(scope="module", params=["RN50", "ViT-S-32-alt"])
def model(request: pytest.FixtureRequest) -> tuple[str, open_clip.CLIP]:
    torch.manual_seed(0)
    return request.param, open_clip.create_model(request.param).eval()


def test_it_is_open_clips_own_cosine(model: tuple[str, open_clip.CLIP], tmp_path: Path) -> None:
    """Of a residual and of a transformer tower, read from one file of both: 100 times the mean positive cosine of
    open_clip's embeddings of the same pixels and captions."""
    name, network = model
    path = tmp_path / "clip.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    text = network.transformer.width
    clip = build_clip(TextConfig(name=name, weights=str(path), width=text))
    images = random_images(4, 224)
    found = clip_score(images, CAPTIONS, clip, batch_size=3)
    x = transforms.normalize(
        torch.from_numpy(images).permute(0, 3, 1, 2) / 255,
        list(open_clip.OPENAI_DATASET_MEAN),
        list(open_clip.OPENAI_DATASET_STD),
    )
    with torch.no_grad():
        seen, read = network.encode_image(x), network.encode_text(open_clip.get_tokenizer(name)(CAPTIONS))
    cosine = torch.nn.functional.cosine_similarity(seen, read).clamp(min=0)
    assert found.value == pytest.approx(100 * float(cosine.mean()), rel=1e-3)
    assert (found.count, found.digest) == (4, extract(images, pixel_extractor()).digest)


def test_a_file_without_the_image_tower_is_refused(model: tuple[str, open_clip.CLIP], tmp_path: Path) -> None:
    """The text tower alone conditions denoisers, and judges nothing."""
    name, network = model
    state = {k: v.contiguous() for k, v in network.state_dict().items() if not k.startswith("visual.")}
    safetensors.torch.save_file(state, tmp_path / "text.safetensors")
    with pytest.raises(IntegrityError, match="weights are missing"):
        build_clip(TextConfig(name=name, weights=str(tmp_path / "text.safetensors"), width=network.transformer.width))


def embedding(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def test_opposite_embeddings_score_nothing_and_equal_ones_a_hundred() -> None:
    """The mean of 100 max(0, cos) and its standard error, over embeddings that are known; another order of captions is
    another number and another hash."""
    directions = {"right": embedding(1, 0), "up": embedding(0, 1), "left": embedding(-2, 0)}
    clip = Clip(
        lambda images: embedding(1, 0).expand(len(images), -1),
        lambda captions: torch.cat([directions[c] for c in captions]),
        "none",
        {},
    )
    images = random_images(4, 8)
    found = clip_score(images, ["right", "up", "left", "right"], clip, batch_size=3)
    assert found.value == pytest.approx(50)
    assert found.standard_error == pytest.approx(np.std([100, 0, 0, 100], ddof=1) / 2)
    other = clip_score(images, ["right", "right", "right", "right"], clip)
    assert other.value == pytest.approx(100)
    assert other.captions_digest != found.captions_digest and other.digest == found.digest
    assert dataclasses.replace(found, digest="") != found
    with pytest.raises(InputError, match="captions"):
        clip_score(images, ["right"], clip)
