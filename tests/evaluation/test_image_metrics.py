"""Frechet distance, precision, recall, kernel distance and Inception score, against closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity

from nestdiff_core.errors import InputError, IntegrityError, NumericsError
from nestdiff_core.evaluation.extractors import Extractor, pixel_extractor
from nestdiff_core.evaluation.features import FeatureSet
from nestdiff_core.evaluation.image_metrics import feature_metrics, floor, image_metrics

SPACE = Extractor("encoder", "none", {}, lambda images: (torch.zeros(1), None))


def features(values: np.ndarray, logits: np.ndarray | None = None) -> FeatureSet:
    return FeatureSet(
        torch.from_numpy(values).double(), None if logits is None else torch.from_numpy(logits).double(), "", (8, 8, 1)
    )


def correlated(n: int, dimension: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dimension)) @ rng.normal(size=(dimension, dimension)) + shift


def random_images(n: int, seed: int, side: int = 8, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(s + t - 2 * root))


@pytest.mark.parametrize(("n", "dimension", "shift"), [(300, 16, 0.0), (400, 64, 0.3), (200, 2, 5.0)])
def test_frechet_distance_is_the_closed_form(n: int, dimension: int, shift: float) -> None:
    """The Frechet distance agrees with scipy's matrix square root within 1e-3."""
    a, b = correlated(n, dimension, 0), correlated(n + 17, dimension, 1, shift)
    assert feature_metrics(features(a), features(b), SPACE).values["fd_encoder"] == pytest.approx(
        frechet(a, b), rel=1e-3
    )


def test_frechet_distance_of_known_gaussians() -> None:
    """Moments 0, I and 2, 9 I in 4 dimensions, met exactly by whitening, are 4 (2^2 + (3 - 1)^2) = 32 apart."""
    a = np.random.default_rng(0).normal(size=(90, 4))
    a = (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(a, rowvar=False))).T
    assert feature_metrics(features(a), features(2 + 3 * a), SPACE).values["fd_encoder"] == pytest.approx(32)


def test_identical_sets_have_no_distance() -> None:
    """A set is at distance 0 from itself, and inside its own manifold."""
    a = features(correlated(400, 32, 0))
    found = feature_metrics(a, a, SPACE).values
    assert abs(found["fd_encoder"]) < 1e-6 * float(a.values.var(dim=0).sum())
    assert found["precision_encoder"] == found["recall_encoder"] == 1.0


def test_images_get_the_number_that_torch_fidelity_gives_them() -> None:
    """Handing features to torch-fidelity gives what it computes when it reads the images itself."""

    class Images(torch.utils.data.Dataset):
        def __init__(self, images: np.ndarray) -> None:
            self.images = torch.from_numpy(images).permute(0, 3, 1, 2)

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> torch.Tensor:
            return self.images[index]

    class Flat(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: object) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("flat",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "flat"

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            assert images.dtype == torch.uint8
            return (images.flatten(1).double() / 255,)

    torch_fidelity.register_feature_extractor("test-flat", Flat)
    a, b = random_images(150, 0), (random_images(180, 1) * 0.8).astype(np.uint8)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(a),
        input2=Images(b),
        feature_extractor="test-flat",
        fid=True,
        prc=True,
        kid=True,
        kid_subset_size=75,
        cuda=False,
        verbose=False,
        save_cpu_ram=True,
        rng_seed=3,
    )
    ours = image_metrics(a, b, pixel_extractor(), seed=3)
    assert ours.values == pytest.approx(
        {
            "fd_pixels": theirs["frechet_inception_distance"],
            "precision_pixels": theirs["precision"],
            "recall_pixels": theirs["recall"],
            "kd_pixels": theirs["kernel_inception_distance_mean"],
        },
        rel=1e-9,
    )
    assert ours.deviations["kd_pixels"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_those_of_brute_force(k: int) -> None:
    """Precision: samples within the k-th neighbour's radius of a real image; recall: the other way round."""
    rng = np.random.default_rng(k)
    fake, real = rng.normal(size=(120, 3)) * 0.5, rng.normal(size=(200, 3))

    def covered(points: np.ndarray, manifold: np.ndarray) -> float:
        radius = np.sort(distances(manifold, manifold), axis=1)[:, k]  # column 0 is the point itself
        return float((distances(points, manifold) <= radius).any(axis=1).mean())

    found = feature_metrics(features(fake), features(real), SPACE, num_neighbours=k).values
    assert found["precision_encoder"] == pytest.approx(covered(fake, real), abs=1e-6)
    assert found["recall_encoder"] == pytest.approx(covered(real, fake), abs=1e-6)
    assert found["precision_encoder"] > found["recall_encoder"]  # samples of less variety


def test_kernel_distance_is_the_unbiased_mmd() -> None:
    """The mean over subsets meets the unbiased MMD^2 of the whole sets under the kernel (x.y / D + 1)^3."""
    a, b = correlated(400, 8, 0) / 4, correlated(400, 8, 0) / 4 + 1.0

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / 8 + 1) ** 3

    n = len(a)
    within = sum((kernel(x, x).sum() - np.trace(kernel(x, x))) / (n * (n - 1)) for x in (a, b))
    exact = within - 2 * kernel(a, b).mean()
    found = feature_metrics(features(a), features(b), SPACE)
    assert found.values["kd_encoder"] == pytest.approx(exact, abs=4 * found.deviations["kd_encoder"] / 10)
    assert found.settings["kernel_subset_size"] == 200


def test_inception_score_of_certain_and_of_blind_logits() -> None:
    """Certain logits spread over 5 classes score 5, logits that never change 1; only inception has a score."""
    inception = Extractor("inception", "none", {}, SPACE.embed)
    values = np.random.default_rng(0).random((1000, 4))
    certain = features(values, 50.0 * np.eye(5)[np.arange(1000) % 5])
    blind = features(values, np.tile(np.arange(5.0), (1000, 1)))
    real = features(values)
    found = feature_metrics(certain, real, inception)
    assert set(found.values) == {"fid", "kid", "precision", "recall", "inception_score"}
    assert found.values["inception_score"] == pytest.approx(5, rel=0.03)
    assert feature_metrics(blind, real, inception).values["inception_score"] == pytest.approx(1, abs=1e-9)
    assert "inception_score_encoder" not in feature_metrics(real, real, SPACE).values


def test_a_singular_covariance_is_said() -> None:
    """As many images as feature dimensions or fewer: the number comes with a warning that names both."""
    few = feature_metrics(features(correlated(30, 32, 0)), features(correlated(500, 32, 1)), SPACE)
    assert any("fd_encoder" in text and "30 images" in text and "32" in text for text in few.warnings)
    assert not feature_metrics(features(correlated(200, 32, 0)), features(correlated(500, 32, 1)), SPACE).warnings


def test_metrics_that_need_more_images_are_left_out_by_name() -> None:
    """Three images give a Frechet distance, and warnings instead of neighbours and subsets."""
    found = feature_metrics(features(correlated(3, 2, 0)), features(correlated(50, 2, 1)), SPACE)
    assert set(found.values) == {"fd_encoder"}
    assert [text.split(":")[0] for text in found.warnings] == ["precision and recall", "kd_encoder"]


def test_one_image_is_no_distribution() -> None:
    """Fewer than two images are refused."""
    with pytest.raises(InputError, match="at least two"):
        image_metrics(random_images(1, 0), random_images(50, 1), pixel_extractor())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_number_that_is_not_finite_is_refused() -> None:
    """An overflow is an error that names the metric, never a printed inf or nan."""
    huge = features(correlated(50, 4, 0) * 1e200)
    with pytest.raises(NumericsError, match="fd_encoder"):
        feature_metrics(huge, features(correlated(50, 4, 1)), SPACE)


def test_another_resolution_is_refused() -> None:
    """Samples and a reference of another size or colour are not compared."""
    for other in (random_images(60, 1, side=16), random_images(60, 1, channels=3)):
        with pytest.raises(IntegrityError, match="different shapes"):
            image_metrics(random_images(60, 0), other, pixel_extractor())


def test_only_len_and_getitem_are_needed() -> None:
    """A data set that is read image by image gives the numbers of the array."""

    class Streamed:
        def __init__(self, images: np.ndarray) -> None:
            self.images, self.read = images, []

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> np.ndarray:
            self.read.append(index)
            return self.images[index]

    a, b = random_images(120, 0), random_images(130, 1)
    streamed = Streamed(a)
    found = image_metrics(streamed, b, pixel_extractor(), batch_size=32)
    whole = image_metrics(a, b, pixel_extractor())
    assert found.values == pytest.approx(whole.values)
    assert found.samples.digest == whole.samples.digest
    assert streamed.read == list(range(120))


def test_neither_network_nor_cache_is_touched(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """No socket is opened, nothing is written to torch's home, and new data gives a new number."""
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    reference = random_images(120, 1)
    first = image_metrics(random_images(120, 0), reference, pixel_extractor()).values
    second = image_metrics(random_images(120, 0) // 2, reference, pixel_extractor()).values
    assert second["fd_pixels"] > first["fd_pixels"] + 0.1
    assert not list(tmp_path.iterdir())


def test_floor_is_below_worse_samples() -> None:
    """Real unseen images are nearer to the reference than the same images with noise, and more noise is further."""
    rng = np.random.default_rng(0)
    real = (np.cumsum(rng.normal(size=(600, 8, 8, 1)), axis=1) * 20 + 128).clip(0, 255).astype(np.uint8)
    held_out, reference = real[:200], real[200:]
    low = floor(held_out, reference, pixel_extractor()).values["fd_pixels"]
    numbers = []
    for strength in (20, 60):
        noisy = (held_out + rng.normal(size=held_out.shape) * strength).clip(0, 255).astype(np.uint8)
        numbers.append(image_metrics(noisy, reference, pixel_extractor()).values["fd_pixels"])
    assert low < numbers[0] < numbers[1]
