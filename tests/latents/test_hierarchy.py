"""The hierarchy: pooling, moments of every level from one pass, latents that are standardised as stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from nestdiff_core.errors import NumericsError
from nestdiff_core.latents import hierarchy
from nestdiff_core.latents.basis import Basis, fit_basis
from nestdiff_core.latents.hierarchy import encode_level, encode_levels, level_moments, pool, shard_moments, tokens_of
from nestdiff_core.latents.moments import Moments
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.stores.writer import create_store, write_shard

COUNTS = [160, 160, 53]
CHANNELS, SIDE = 10, 7
GRIDS = {2: 4, 3: 2, 4: 1}


def feature_maps(n: int = sum(COUNTS), seed: int = 0) -> np.ndarray:
    """Smooth, correlated maps (n, 10, 7, 7) with a mean, as float16."""
    rng = np.random.default_rng(seed)
    low = torch.from_numpy(rng.standard_normal((n, CHANNELS, 3, 3)).astype(np.float32))
    maps = torch.nn.functional.interpolate(low, SIDE, mode="bilinear", align_corners=True).numpy()
    mixing = rng.standard_normal((CHANNELS, CHANNELS)) / 3
    return (np.einsum("nchw,dc->ndhw", maps, mixing) + 2).astype(np.float16)


@pytest.fixture
def features(tmp_path: Path) -> StoreReader:
    """Two views of each image."""
    path, start = tmp_path / "store.zarr", 0
    maps = np.stack([feature_maps(seed=0), feature_maps(seed=1)], axis=1)
    create_store(path, {"map": maps.shape[1:]}, "float16", COUNTS, 32, {})
    for shard, count in enumerate(COUNTS):
        write_shard(path, shard, {"map": maps[start : start + count]})
        start += count
    return StoreReader(path, "map")


def maps_of(features: StoreReader, rows: np.ndarray) -> np.ndarray:
    """All views of the images `rows`, (2 n, C, S, S)."""
    return features.read(rows).reshape(-1, CHANNELS, SIDE, SIDE)


def bases(moments: dict[int, Moments], channels: int = 5) -> dict[int, tuple[int, Basis]]:
    return {level: (grid, fit_basis(moments[grid], channels, level)) for level, grid in GRIDS.items()}


# --- pooling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "grid"), [(14, 8), (14, 6), (14, 4), (7, 3), (8, 8), (5, 1)])
def test_pool_is_the_average_of_its_cells(side: int, grid: int) -> None:
    """Each cell is the mean of rows floor(i S / g) to ceil((i + 1) S / g), computed here by loops."""
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    edges = [(i * side // grid, -(-(i + 1) * side // grid)) for i in range(grid)]
    expected = torch.stack(
        [torch.stack([x[:, :, a:b, c:d].mean(dim=(2, 3)) for c, d in edges], -1) for a, b in edges], -2
    )
    torch.testing.assert_close(pool(x, grid), expected)


def test_levels_are_not_nested() -> None:
    """4x4 pooled from 14x14 is another map than 4x4 pooled from 8x8, so each level pools the full map."""
    x = torch.randn(1, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(pool(x, 4), pool(pool(x, 8), 4), atol=1e-2)


def test_token_order() -> None:
    """Tokens run over images, rows, columns; each holds the channels of one position."""
    z = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).float()
    tokens = tokens_of(z)
    assert tokens.shape == (40, 3)
    torch.testing.assert_close(tokens[1 * 20 + 2 * 5 + 3], z[1, :, 2, 3])


# --- moments ------------------------------------------------------------------------------------------------------


def test_level_moments_are_those_of_the_split(features: StoreReader) -> None:
    """One pass gives, for each grid, the moments of the pooled tokens of exactly the chosen rows."""
    rows = np.flatnonzero(np.random.default_rng(0).random(len(features)) < 0.8)
    moments = level_moments(features, [4, 2, 1], rows)
    chosen = torch.from_numpy(maps_of(features, rows)).double()
    for grid in (4, 2, 1):
        tokens = tokens_of(pool(chosen, grid)).numpy()
        centred = tokens - tokens.mean(axis=0)
        assert moments[grid].count == 2 * len(rows) * grid**2
        np.testing.assert_allclose(moments[grid].mean, tokens.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(
            moments[grid].scatter, centred.T @ centred, rtol=0, atol=1e-6 * np.abs(centred.T @ centred).max()
        )


def test_one_pass_serves_all_levels(features: StoreReader) -> None:
    """A grid's moments have the same bits alone or together with others, and on every repetition."""
    rows = np.arange(len(features))
    together, again = level_moments(features, [4, 2, 1], rows), level_moments(features, [1, 4], rows)
    for grid in (4, 1):
        np.testing.assert_array_equal(together[grid].scatter, again[grid].scatter)
        np.testing.assert_array_equal(together[grid].mean, again[grid].mean)


def test_shard_without_chosen_rows(features: StoreReader) -> None:
    """A shard that holds no row of the split adds nothing."""
    alone = level_moments(features, [2], np.arange(160, 200))[2]
    np.testing.assert_array_equal(alone.scatter, shard_moments(maps_of(features, np.arange(160, 200)), [2])[2].scatter)


def test_non_finite_names_shard_row_and_channel(features: StoreReader) -> None:
    """A NaN that some other writer stored is refused by shard, row and channel."""
    zarr.open_array(features.path / "map", mode="r+")[160 + 7, 1, 3, 0, 0] = np.nan
    with pytest.raises(NumericsError, match="Row 7 of shard 1, channel 3"):
        level_moments(features, [2], np.arange(len(features)))


def test_progress_counts_shards(features: StoreReader) -> None:
    """Progress is told after each shard."""
    told = []
    level_moments(
        features, [1], np.arange(10), progress=lambda done, total, what, **numbers: told.append((done, total))
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


# --- latents ------------------------------------------------------------------------------------------------------


def test_encode_is_pool_then_project(features: StoreReader) -> None:
    """z_l equals pooling and projecting in float64, written out."""
    maps = maps_of(features, np.arange(len(features)))
    levels = bases(level_moments(features, list(GRIDS.values()), np.arange(len(features))))
    for level, z_l in encode_levels(maps, levels).items():
        grid, basis = levels[level]
        pooled = pool(torch.from_numpy(maps).double(), grid).numpy() - basis.mean.double().numpy()[None, :, None, None]
        expected = (
            np.einsum("nchw,kc->nkhw", pooled, basis.components.double().numpy())
            / basis.std.double().numpy()[None, :, None, None]
        )
        assert z_l.shape == (len(maps), 5, grid, grid) and z_l.dtype == np.float32
        np.testing.assert_allclose(z_l, expected, atol=1e-3 * np.abs(expected).max())
        np.testing.assert_array_equal(encode_level(maps, grid, basis), z_l)


def test_latents_are_standardised_as_stored(features: StoreReader) -> None:
    """Rounded to float16, each channel of z_l has mean 0 and standard deviation 1 on the training split, to 1e-2."""
    train = np.flatnonzero(np.random.default_rng(0).random(len(features)) < 0.9)
    levels = bases(level_moments(features, list(GRIDS.values()), train))
    for z_l in encode_levels(maps_of(features, train), levels).values():
        stored = z_l.astype(np.float16).astype(np.float64)
        np.testing.assert_allclose(stored.mean(axis=(0, 2, 3)), 0, atol=1e-2)
        np.testing.assert_allclose(stored.std(axis=(0, 2, 3)), 1, atol=1e-2)


def test_condition_of_one_image_does_not_depend_on_its_shard() -> None:
    """An image's latent is the same (to float32 rounding) whichever images it is encoded with."""
    maps = feature_maps(300)
    basis = fit_basis(shard_moments(maps, [2])[2], 5, level=2)
    whole = encode_level(maps, 2, basis)
    np.testing.assert_allclose(encode_level(maps[140:143], 2, basis), whole[140:143], atol=1e-5)


def test_what_fits_a_cache_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments and latents have the same bits however few images are converted and pooled at a time."""
    maps, grids = feature_maps(150), list(GRIDS.values())
    moments = shard_moments(maps, grids)
    z = encode_levels(maps, bases(moments))
    for images in (1, 7, 200):
        monkeypatch.setattr(hierarchy, "CACHED_BYTES", images * 4 * maps[0].size)
        again = shard_moments(maps, grids)
        for grid in grids:
            np.testing.assert_array_equal(again[grid].scatter, moments[grid].scatter)
        for level, z_l in encode_levels(maps, bases(moments)).items():
            np.testing.assert_array_equal(z_l, z[level])


def test_constant_channel_stays_harmless_through_pooling() -> None:
    """A constant feature channel is dead after pooling over cells of different sizes, and latents are finite."""
    maps = feature_maps(300)
    maps[:, 4] = 0.1
    basis = fit_basis(shard_moments(maps, [4])[4], 5, level=2)
    assert basis.dead_channels == (4,)
    assert np.isfinite(encode_level(maps, 4, basis)).all()


def test_overflowing_latent_is_refused(tmp_path: Path) -> None:
    """A latent beyond float16 (an outlier far outside the training split) is refused where it is written."""
    maps = feature_maps(200) / np.float16(50)
    basis = fit_basis(shard_moments(maps, [1])[1], 5, level=2)
    maps[11] = 60000
    create_store(tmp_path / "z.zarr", {"z_2": (5, 1, 1)}, "float16", [200], 32, {})
    with pytest.raises(NumericsError, match=r"Array z_2, row 11 of shard 0, at .*, does not fit into float16"):
        write_shard(tmp_path / "z.zarr", 0, {"z_2": encode_level(maps, 1, basis)})
