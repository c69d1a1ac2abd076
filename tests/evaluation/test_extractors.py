"""Feature spaces: what they compute, what names them, what they refuse."""

from __future__ import annotations

import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from nestdiff_core.errors import ConfigError, EnvironmentFault, InputError, IntegrityError, NumericsError
from nestdiff_core.evaluation.extractors import (
    build_extractor,
    encoder_extractor,
    inception_extractor,
    pixel_extractor,
    weights_sha256,
)
from nestdiff_core.evaluation.features import extract, extract_all


class TinyEncoder(nn.Module):
    input_size, mean, std = 8, (0.0,), (1.0,)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 6, generator=torch.Generator().manual_seed(seed)))

    def encode(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        vector = torch.from_numpy(images).flatten(1).float() @ self.weight
        return vector[:, :, None, None] * 0, vector


def images(n: int, side: int = 8, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def test_vectors_of_unit_length() -> None:
    """Each is the encoder's own, divided by its length, and the card can tell."""
    encoder, pictures = TinyEncoder(), images(70)
    space = encoder_extractor(encoder, kind="tiny", unit_length=True)
    own = encoder.encode(pictures)[1].detach().double().numpy()
    found = extract(pictures, space, batch_size=32).values.numpy()
    np.testing.assert_allclose(found, own / np.sqrt((own**2).sum(1, keepdims=True)), rtol=1e-5)
    assert space.preprocessing == {**encoder_extractor(encoder).preprocessing, "unit_length": True}


def test_encoder_space_is_the_class_vector() -> None:
    """Features are the encoder's vectors, in order and whatever the batch size."""
    encoder, pictures = TinyEncoder(), images(70)
    found = extract(pictures, encoder_extractor(encoder), batch_size=32)
    assert torch.allclose(found.values, encoder.encode(pictures)[1].detach().double(), rtol=1e-5)
    assert encoder_extractor(encoder).preprocessing == {"input_size": 8, "mean": [0.0], "std": [1.0]}
    assert found.values.dtype == torch.float64
    assert not found.values.requires_grad


def test_weights_name_the_encoder() -> None:
    """Equal weights have one hash; another value, name or type has another."""
    state = dict(TinyEncoder().state_dict())
    same = {"weight": state["weight"].clone()}
    others = [
        TinyEncoder(1).state_dict(),
        {"bias": state["weight"]},
        {"weight": state["weight"].double()},
        {"weight": state["weight"].T},
    ]
    assert weights_sha256(same) == weights_sha256(state)
    assert len({weights_sha256(s) for s in [state, *others]}) == 5
    assert weights_sha256({"steps": torch.tensor(3)}) != weights_sha256({"steps": torch.tensor(4)})


def test_pixel_space_is_the_mean_over_areas() -> None:
    """16x16 images give the 64 means of their 2x2 blocks in [0, 1], 8x8 images their pixels, RGB 192 at most."""
    large = images(3, side=16)
    blocks = large.reshape(3, 8, 2, 8, 2).mean(axis=(2, 4)).reshape(3, 64) / 255
    assert np.allclose(extract(large, pixel_extractor()).values, blocks)
    small = images(3, channels=3)
    assert np.allclose(extract(small, pixel_extractor()).values, small.transpose(0, 3, 1, 2).reshape(3, 192) / 255)
    assert extract(images(2, side=40, channels=3), pixel_extractor()).values.shape == (2, 192)


def test_digest_names_the_pixels_and_their_order() -> None:
    """The digest does not depend on the batch size, and changes with a pixel, the order or the shape."""
    pictures, space = images(40), pixel_extractor()
    digest = extract(pictures, space).digest
    changed = pictures.copy()
    changed[17, 3, 3, 0] ^= 1
    assert extract(pictures, space, batch_size=7).digest == digest
    others = (changed, pictures[::-1], pictures.reshape(40, 4, 16, 1), pictures[:39])
    assert digest not in {extract(other, space).digest for other in others}


def test_subset_is_drawn_once() -> None:
    """A subset is the same for one seed, without repeats, and says of what it is a part."""
    whole = extract(images(50), pixel_extractor())
    part = whole.subset(20, seed=1)
    assert torch.equal(part.values, whole.subset(20, seed=1).values)
    assert not torch.equal(part.values, whole.subset(20, seed=2).values)
    assert len(part.values.unique(dim=0)) == 20
    assert whole.digest in part.digest
    assert part.digest != whole.digest
    assert whole.subset(50, seed=1) is whole


@pytest.mark.parametrize(
    "pictures",
    [images(4).astype(np.float32), images(4)[..., 0], images(4, channels=2), [*images(3), *images(1, side=9)]],
    ids=["float", "no channels", "two channels", "two sizes"],
)
def test_what_are_not_images_is_refused(pictures) -> None:
    """Wrong type, rank, channels, or mixed sizes within or across batches: InputError."""
    for batch_size in (1, 256):
        with pytest.raises(InputError):
            extract(pictures, pixel_extractor(), batch_size=batch_size)


def test_one_image_is_refused_by_the_name_of_its_set() -> None:
    """Held-out images are another setting's business than samples."""
    with pytest.raises(InputError) as caught:
        extract_all(np.full((1, 4, 4, 3), 9, np.uint8), [pixel_extractor()], what="reference (held_out)")
    assert caught.value.key == "reference (held_out)" and "held_out_fraction" in caught.value.fix


def test_features_that_are_not_finite_are_refused() -> None:
    """A NaN weight is found before any metric is computed, and the first image is named."""
    encoder = TinyEncoder()
    encoder.weight.data[0] = torch.nan
    with pytest.raises(NumericsError, match="not finite"):
        extract(images(5), encoder_extractor(encoder))


def test_unknown_and_impossible_spaces_are_refused() -> None:
    """An unknown name, or the encoder's space without the encoder, is a configuration error."""
    with pytest.raises(ConfigError, match="feature space"):
        build_extractor("clip")
    with pytest.raises(ConfigError, match="encoder"):
        build_extractor("encoder")


# --- inception ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the right tensors and random values: no download."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_reads_a_local_file(inception_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 features and 1008 logits, grey repeated to RGB, named by the file's sha256, nothing downloaded."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloaded"))
    space = inception_extractor(str(inception_file))
    grey = images(2)
    found = extract(grey, space)
    assert found.values.shape == (2, 2048)
    assert found.logits is not None
    assert found.logits.shape == (2, 1008)
    assert torch.equal(found.values, extract(np.repeat(grey, 3, axis=3), space).values)
    assert len(space.weights_sha256) == 64


def test_inception_file_that_is_missing_or_unsafe(tmp_path: Path) -> None:
    """A missing file is named; a file that would run code when unpickled is refused and does not run."""
    missing = tmp_path / "absent.pth"
    with pytest.raises(IntegrityError) as caught:
        inception_extractor(str(missing))
    assert caught.value.path == str(missing)

    mark = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (mark,))

    bomb = tmp_path / "bomb.pth"
    bomb.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(IntegrityError):
        inception_extractor(str(bomb))
    assert not mark.exists()


def test_download_only_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`download` asks torch-fidelity's address, and says so when it cannot be reached."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def unreachable(url: str, *_: object, **__: object) -> None:
        asked.append(url)
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(EnvironmentFault, match="inception"):
        inception_extractor("download")
    assert len(asked) == 1
    assert "toshas/torch-fidelity" in asked[0]
