"""Bases: principal components as scikit-learn and numpy find them, whitened without accidents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.decomposition import PCA

from nestdiff_core.errors import ConfigError, IntegrityError, NumericsError
from nestdiff_core.latents.basis import EIGENVALUE_FLOOR, Basis, fit_basis
from nestdiff_core.latents.moments import Moments


def features(n: int = 3000, channels: int = 12, offset: float = 5.0, seed: int = 0) -> np.ndarray:
    """Correlated features with a clear spectrum and a large mean."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(rng.standard_normal((channels, channels)))[0]
    return (rng.standard_normal((n, channels)) * 2.0 ** -np.arange(channels)) @ mixing + offset


def fit(x: np.ndarray, channels: int) -> Basis:
    return fit_basis(Moments.of(x), channels, level=3)


def test_agrees_with_scikit_learn() -> None:
    """Components (up to sign), spectrum and scores are those of scikit-learn's full PCA."""
    x = features()
    pca, basis = PCA(svd_solver="full").fit(x), fit(x, 5)
    signs = np.sign((pca.components_[:5] * basis.components.numpy()).sum(axis=1))
    np.testing.assert_allclose(basis.components.numpy(), pca.components_[:5] * signs[:, None], atol=1e-5)
    np.testing.assert_allclose(basis.eigenvalues, pca.explained_variance_ * (len(x) - 1) / len(x), rtol=1e-9)
    assert basis.variance_share == pytest.approx(pca.explained_variance_ratio_[:5].sum(), rel=1e-9)
    scores = basis.project(torch.from_numpy(x).float())
    np.testing.assert_allclose(scores * basis.std, pca.transform(x)[:, :5] * signs, atol=1e-4)


def test_agrees_with_singular_values() -> None:
    """Eigenvalues are squared singular values of the centred data over n; the projector onto the span is the same."""
    x = features()
    _, singular, rows = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    basis = fit(x, 4)
    np.testing.assert_allclose(basis.eigenvalues, singular**2 / len(x), rtol=1e-9)
    components = basis.components.numpy()
    np.testing.assert_allclose(components.T @ components, rows[:4].T @ rows[:4], atol=1e-6)


def test_captures_the_most_variance() -> None:
    """No other k-dimensional subspace, from a random sample of them, keeps more of the variance."""
    x = features()
    centred = x - x.mean(axis=0)
    kept = fit(x, 3).variance_share * centred.var(axis=0).sum()
    for seed in range(20):
        q = np.linalg.qr(np.random.default_rng(seed).standard_normal((12, 3)))[0]
        assert (centred @ q).var(axis=0).sum() < kept


def test_near_equal_eigenvalues_keep_the_subspace() -> None:
    """Where the spectrum is degenerate the kept projector still carries the optimal variance to 1e-6."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20000, 8)) * np.array([2, 2, 2, 2, 1, 1, 1, 1])
    basis = fit(x, 4)
    components = basis.components.double().numpy()
    kept = ((x - x.mean(axis=0)) @ components.T).var(axis=0).sum()
    best = np.linalg.eigvalsh(np.cov(x.T, ddof=0))[4:].sum()
    assert kept / best > 1 - 1e-6


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_scores_are_standardised(offset: float) -> None:
    """On the data of the fit every channel has mean 0 and variance 1, and channels are uncorrelated."""
    x = features(offset=offset) if offset == 0 else (features(offset=0) + offset)
    z = fit(x, 6).project(torch.from_numpy(x.astype(np.float64)).float()).double().numpy()
    tolerance = 1e-4 if offset == 0 else 1e-2  # float32 tokens resolve 1000 to 6e-5, the sixth component spreads 0.03
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=tolerance)
    np.testing.assert_allclose(np.cov(z.T, ddof=0), np.eye(6), atol=tolerance)


def test_reconstruction() -> None:
    """With all components `reconstruct` undoes `project`; with k, the error is the variance left out."""
    x = features()
    tokens = torch.from_numpy(x).float()
    full, some = fit(x, 12), fit(x, 5)
    np.testing.assert_allclose(full.reconstruct(full.project(tokens)), x, atol=1e-4)
    error = ((some.reconstruct(some.project(tokens)).numpy() - x) ** 2).sum(axis=1).mean()
    assert error == pytest.approx(some.eigenvalues[5:].sum(), rel=1e-5)


def test_leading_shape_is_kept() -> None:
    """Tokens may stand in any leading shape."""
    x = features()
    basis, tokens = fit(x, 4), torch.from_numpy(x[:24]).float()
    torch.testing.assert_close(basis.project(tokens.reshape(2, 3, 4, 12)).reshape(24, 4), basis.project(tokens))


def test_signs_are_fixed() -> None:
    """The largest entry of each component is positive, even with all channels negated; a refit has the same bits."""
    x = features()
    one, negated, again = fit(x, 6), fit(-x, 6), fit(x, 6)
    for basis in (one, negated):
        largest = basis.components.abs().argmax(dim=1, keepdim=True)
        assert (basis.components.gather(1, largest) > 0).all()
    torch.testing.assert_close(one.components, negated.components, atol=1e-6, rtol=0)
    assert torch.equal(one.components, again.components)


@pytest.mark.parametrize("rounding", [0.0, 1e-13, -1e-13])
def test_signs_on_ties(rounding: float) -> None:
    """Where two entries are equally large, up to rounding, the first is the positive one."""
    moments = Moments(100, np.zeros(2), 100 * np.array([[1.0, -0.9], [-0.9, 1.0 + rounding]]))
    component = fit_basis(moments, 1, level=2).components[0]
    assert component[0] > 0 > component[1]


def test_constant_channel_is_dead_and_harmless() -> None:
    """A channel that never changes is listed, weighs nothing in any component, and leaves scores finite."""
    x = features()
    x[:, 3], x[:, 7] = 0.1, 0.0
    basis = fit(x.astype(np.float16), 6)
    assert basis.dead_channels == (3, 7)
    assert basis.components[:, [3, 7]].abs().max() < 1e-12
    assert basis.project(torch.from_numpy(x).float()).isfinite().all()


def test_too_few_directions_are_refused() -> None:
    """More components than directions: refused by level, rank and number; as many as directions works."""
    x = features(n=9)
    assert fit(x, 8).rank == 8
    with pytest.raises(
        NumericsError, match="Level 3 keeps 9 components, but its 9 tokens vary in 8 directions"
    ) as error:
        fit(x, 9)
    assert (error.value.level, error.value.expected, error.value.found) == (3, "at most 8", 9)


def test_rounding_noise_is_not_a_direction() -> None:
    """What rounding to float16 adds to features of rank 4 lies below the floor, and is never whitened."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((5000, 4)) @ rng.standard_normal((4, 32))).astype(np.float16)
    basis = fit(x, 4)
    assert basis.eigenvalues[4] > 0
    assert basis.rank == 4


def test_gain_is_bounded() -> None:
    """Whitening never multiplies by more than the floor allows."""
    basis = fit(features(channels=30), 12)
    gain = basis.std.max() / basis.std.min()
    assert gain <= EIGENVALUE_FLOOR**-0.5


@pytest.mark.parametrize("channels", [0, -1, 13])
def test_impossible_number_of_components(channels: int) -> None:
    """Fewer than one component or more than the features have channels is a ConfigError that names the level."""
    with pytest.raises(ConfigError, match="Level 3") as error:
        fit(features(), channels)
    assert error.value.level == 3 and error.value.key == "levels.channels"


def test_nothing_to_fit() -> None:
    """No tokens, one token, and constant tokens are all refused."""
    for x in (np.zeros((0, 4)), np.ones((1, 4)), np.full((100, 4), 0.1)):
        with pytest.raises(NumericsError, match="0 directions"):
            fit(x, 1)


def test_non_finite_moments_are_refused() -> None:
    """eigh gives NaN without a word; the fit does not."""
    with pytest.raises(NumericsError, match="not finite"):
        fit_basis(Moments(10, np.zeros(3), np.full((3, 3), np.nan)), 1, level=2)


def test_summary_states_variance_and_nats() -> None:
    """The summary is plain JSON; variance and nats are those of the closed forms on a diagonal spectrum."""
    moments = Moments(100, np.zeros(4), 100 * np.diag([8.0, 4.0, 3.0, 1.0]))
    summary = fit_basis(moments, 2, level=2).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["variance_share"] == pytest.approx(12 / 16)
    assert summary["nats_kept"] == pytest.approx(0.5 * np.log(1 + 8 / 4) + 0.5 * np.log(1 + 4 / 4))
    assert summary["nats_total"] == pytest.approx(0.5 * sum(np.log(1 + v / 4) for v in (8, 4, 3, 1)))
    assert (summary["rank"], summary["tokens"], summary["width"], summary["channels"]) == (4, 100, 4, 2)


def test_save_and_load(tmp_path: Path) -> None:
    """One safetensors file holds all of it, to the bit; saving twice gives the same file."""
    x = features()
    x[:, 3] = 1.0
    basis = fit(x, 5)
    for name in ("a.safetensors", "b.safetensors"):
        basis.save(tmp_path / name)
    loaded = Basis.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.components, basis.components) and torch.equal(loaded.mean, basis.mean)
    np.testing.assert_array_equal(loaded.eigenvalues, basis.eigenvalues)
    assert loaded.summary() == basis.summary()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["nestdiff_basis"]) == basis.summary()


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_damaged_file_is_refused(tmp_path: Path, keep: int) -> None:
    """A cut or missing file is an IntegrityError that names it."""
    path = tmp_path / "basis.safetensors"
    with pytest.raises(IntegrityError, match=r"basis\.safetensors"):
        Basis.load(path)
    fit(features(), 5).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(IntegrityError, match=r"basis\.safetensors"):
        Basis.load(path)


def test_foreign_safetensors_is_refused(tmp_path: Path) -> None:
    """A safetensors file that is no basis is refused too."""
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError, match="holds no basis"):
        Basis.load(tmp_path / "model.safetensors")
