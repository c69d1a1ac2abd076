"""Moments: exact, mergeable, the same bits every time."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestdiff_core.errors import IntegrityError, NumericsError
from nestdiff_core.latents.moments import BLOCK_ROWS, Moments, merge


def two_pass(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scatter the textbook way, in the longest floats there are."""
    y = x.astype(np.longdouble)
    centred = y - y.mean(axis=0)
    return y.mean(axis=0).astype(np.float64), (centred.T @ centred).astype(np.float64)


def assert_close(moments: Moments, x: np.ndarray, tolerance: float = 1e-12) -> None:
    mean, scatter = two_pass(x)
    assert moments.count == len(x)
    np.testing.assert_allclose(moments.mean, mean, rtol=tolerance, atol=tolerance * np.abs(mean).max())
    np.testing.assert_allclose(moments.scatter, scatter, rtol=0, atol=tolerance * np.abs(scatter).max())


@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_agrees_with_two_passes(dtype: type, offset: float) -> None:
    """Mean and scatter equal the two-pass formula to 1e-12, over several blocks."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2 * BLOCK_ROWS + 77, 6)) * np.array([1, 2, 0.1, 5, 1, 1]) + offset).astype(dtype)
    assert_close(Moments.of(x), x)


@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_large_mean_does_not_collapse(ratio: float) -> None:
    """Variances survive a mean of 100 to 10,000 standard deviations (fp32 second moments lose them at 100)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3 * BLOCK_ROWS, 4)) + ratio
    assert_close(Moments.of(x), x)


def test_drifting_mean() -> None:
    """Sorted data, where every block has another mean, are no harder."""
    x = np.sort(np.random.default_rng(0).standard_normal((3 * BLOCK_ROWS, 3)) * 100, axis=0)
    assert_close(Moments.of(x), x)


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Sizes of parts (some empty), and which neighbours are joined at each step."""
    sizes = draw(st.lists(st.integers(0, 20), min_size=2, max_size=8).filter(any))
    return sizes, [draw(st.integers(0, len(sizes) - 2 - i)) for i in range(len(sizes) - 1)]


@given(trees(), st.integers(0, 2**31), st.floats(-1e3, 1e3))
@settings(max_examples=100, deadline=None)
def test_any_tree_of_merges(tree: tuple[list[int], list[int]], seed: int, offset: float) -> None:
    """Parts merged in any tree give the moments of the whole to 1e-12."""
    sizes, joints = tree
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((sum(sizes), 3)) + offset * np.arange(3)
    parts = [Moments.of(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    for joint in joints:
        parts[joint : joint + 2] = [merge(parts[joint], parts[joint + 1])]
    spread = np.abs(two_pass(x)[1]).max() + sum(sizes) * 1e-6 * abs(offset)
    np.testing.assert_allclose(
        parts[0].scatter, two_pass(x)[1], rtol=0, atol=1e-12 * max(spread, 1.0) * max(1.0, abs(offset) / 10)
    )
    np.testing.assert_allclose(parts[0].mean, x.mean(axis=0), rtol=1e-12, atol=1e-12)


def test_merge_commutes_and_has_a_zero() -> None:
    """merge(a, b) is merge(b, a) up to rounding; no rows change nothing."""
    rng = np.random.default_rng(0)
    a, b = Moments.of(rng.standard_normal((30, 4))), Moments.of(rng.standard_normal((7, 4)) + 3)
    np.testing.assert_allclose(merge(a, b).scatter, merge(b, a).scatter, rtol=1e-13)
    for joined in (merge(a, Moments.zero(4)), merge(Moments.zero(4), a)):
        assert joined.count == a.count
        np.testing.assert_array_equal(joined.mean, a.mean)
        np.testing.assert_array_equal(joined.scatter, a.scatter)


def test_zero_rows() -> None:
    """An empty shard has the moments of nothing, and merging two of them stays that."""
    empty = Moments.of(np.zeros((0, 3), np.float16))
    assert merge(empty, empty).count == 0 and not merge(empty, empty).scatter.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_is_named(value: float) -> None:
    """A NaN or infinity is refused with its row and channel, in whichever block it stands."""
    x = np.zeros((BLOCK_ROWS + 10, 5), np.float16)
    x[BLOCK_ROWS + 3, 2] = value
    with pytest.raises(NumericsError, match=f"Row {BLOCK_ROWS + 3}, channel 2"):
        Moments.of(x)


_BITS = """
import hashlib
from functools import reduce
import numpy as np
from nestdiff_core.latents.basis import fit_basis
from nestdiff_core.latents.moments import Moments, merge
rng = np.random.default_rng(0)
moments = reduce(merge, (Moments.of(rng.standard_normal((5000, 384)).astype(np.float16)) for _ in range(2)))
components = fit_basis(moments, 8, level=2).components.numpy()
print(hashlib.sha256(moments.mean.tobytes() + moments.scatter.tobytes() + components.tobytes()).hexdigest())
"""


def test_same_bits_in_every_process() -> None:
    """Merged in shard order, moments and basis have the same bits in another process and with more BLAS threads."""
    root = Path(__file__).resolve().parents[2]
    digests = set()
    for threads in ("1", "2"):
        environment = {
            **os.environ,
            "PYTHONPATH": str(root),
            "OPENBLAS_NUM_THREADS": threads,
            "OMP_NUM_THREADS": threads,
        }
        done = subprocess.run(
            [sys.executable, "-c", _BITS], capture_output=True, text=True, check=True, env=environment
        )
        digests.add(done.stdout)
    assert len(digests) == 1


def test_save_and_load(tmp_path: Path) -> None:
    """A saved file gives back the same bits, and saving twice gives the same file."""
    moments = reduce(merge, (Moments.of(np.random.default_rng(i).standard_normal((50, 3))) for i in range(3)))
    for name in ("a.npz", "b.npz"):
        moments.save(tmp_path / name)
    loaded = Moments.load(tmp_path / "a.npz")
    assert loaded.count == moments.count
    np.testing.assert_array_equal(loaded.mean, moments.mean)
    np.testing.assert_array_equal(loaded.scatter, moments.scatter)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("data", [None, b"", b"PK", b"\x80\x04N."])
def test_damaged_file_is_refused(tmp_path: Path, data: bytes | None) -> None:
    """A missing, empty or foreign file (a pickle too) is an IntegrityError that names it."""
    path = tmp_path / "moments.npz"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"moments\.npz"):
        Moments.load(path)
