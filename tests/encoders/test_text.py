"""Text towers against open_clip's own models, and tokens against those of Hugging Face's CLIPTokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import torch

from nestdiff_core.config import TextConfig
from nestdiff_core.encoders.extract import encode_captions
from nestdiff_core.encoders.text import TextTower, build_text_tower
from nestdiff_core.errors import ConfigError, IntegrityError

NAME = "ViT-S-32-alt"
RANDOM = TextConfig(name=NAME, weights="random", width=256)
CAPTIONS = ["a photo of a cat", "", "Two dogs,  sleeping!", "many words " * 60]


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    """A whole CLIP with weights that are no initialisation of ours."""
    torch.manual_seed(3)
    return open_clip.create_model(NAME, pretrained=None).eval()


@pytest.fixture(scope="module")
def file(model: open_clip.CLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def tower(file: Path) -> TextTower:
    return build_text_tower(dataclasses.replace(RANDOM, weights=str(file)))


def test_tokens_are_hugging_faces(tower: TextTower) -> None:
    """CLIPTokenizer(..., padding="max_length") of openai/clip-vit-large-patch14 pads with the end token."""
    found = tower.tokens(CAPTIONS)
    assert found[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert found[1].tolist() == [49406] + [49407] * 76
    assert found[3, -1] == 49407 and 49407 not in found[3, :-1]
    own = open_clip.get_tokenizer(NAME)(CAPTIONS)
    assert torch.equal(found.where(own != 0, 0), own)


def test_states_are_those_that_open_clip_pools(tower: TextTower, model: open_clip.CLIP) -> None:
    """The state at the end token, projected, is encode_text; those before it are the states of open_clip's padding."""
    found, tokens = tower.encode(CAPTIONS), tower.tokens(CAPTIONS)
    own = open_clip.get_tokenizer(NAME)(CAPTIONS)
    end = own.argmax(1)
    with torch.no_grad():
        torch.testing.assert_close(found[range(4), end] @ model.text_projection, model.encode_text(own))
        states = {
            name: model.ln_final(
                model.transformer(model.token_embedding(t) + model.positional_embedding, attn_mask=model.attn_mask)
            )
            for name, t in (("ends", tokens), ("zeros", own))
        }
    torch.testing.assert_close(found, states["ends"])
    torch.testing.assert_close(found[0, : end[0] + 1], states["zeros"][0, : end[0] + 1])
    assert not torch.allclose(found[0, end[0] + 1 :], states["zeros"][0, end[0] + 1 :], atol=1e-2)


def test_shape_device_and_precision(tower: TextTower) -> None:
    """(B, length, width) in float32, frozen; stored tokens are the same whatever the batch."""
    found = tower.encode(["a"])
    assert found.shape == (1, RANDOM.length, RANDOM.width) and found.dtype == torch.float32
    assert not found.requires_grad and not any(p.requires_grad for p in tower.parameters())
    stored = encode_captions(tower.encode, CAPTIONS, 3, "float32")
    torch.testing.assert_close(torch.from_numpy(stored), tower.encode(CAPTIONS), atol=1e-5, rtol=1e-5)


def test_the_hash_tells_the_weights(tower: TextTower, file: Path, tmp_path: Path) -> None:
    """Same weights, same hash, also from a file of the text tower alone; other weights, another one."""
    state = {k: v for k, v in safetensors.torch.load_file(file).items() if not k.startswith(("visual.", "logit"))}
    alone = tmp_path / "text.pt"
    torch.save({f"text.{k}": v for k, v in state.items()}, alone)
    assert build_text_tower(dataclasses.replace(RANDOM, weights=str(alone))).weights_sha256 == tower.weights_sha256
    random = build_text_tower(RANDOM).weights_sha256
    assert random == build_text_tower(RANDOM).weights_sha256 != tower.weights_sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "ViT-L-41"}, "ViT-L-14"),
        ({"width": 768}, r"'width': 256.*'width': 768"),
        ({"length": 64}, r"'length': 77.*'length': 64"),
        ({"name": "ViT-B-16-SigLIP"}, "CLIP's own tokeniser"),
        ({"name": "MobileCLIP-S1"}, "causal"),
        ({"name": "ViT-L-14", "weights": "hub:openia"}, "hub:openai"),
        ({"weights": "absent.pt"}, r"conditioning\.text\.weights"),
    ],
)
def test_what_cannot_be_is_told(changes: dict[str, object], message: str) -> None:
    """Names, tags and shapes that cannot be used bring those that can."""
    with pytest.raises(ConfigError, match=message):
        build_text_tower(dataclasses.replace(RANDOM, **changes))


def test_an_image_tower_is_no_text_tower(file: Path, tmp_path: Path) -> None:
    """A file without the text tower is refused by its missing keys."""
    state = {k: v for k, v in safetensors.torch.load_file(file).items() if k.startswith("visual.")}
    path = tmp_path / "visual.safetensors"
    safetensors.torch.save_file(state, path)
    with pytest.raises(IntegrityError, match=r"conditioning\.text\.name.*missing"):
        build_text_tower(dataclasses.replace(RANDOM, weights=str(path)))
