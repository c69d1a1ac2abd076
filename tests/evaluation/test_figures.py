"""Figures: right pixels, small files, no global state."""

from __future__ import annotations

import base64
import io
import sys

import numpy as np
import pytest
from PIL import Image

from nestdiff_core.evaluation.figures import GAP, WIDTH, image_grid, loss_curve, spectrum_plot, to_data_url


def opened(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)))


def images(n: int, side: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_enlarges_by_squares(channels: int) -> None:
    """Image i stands in row i // columns, every pixel is a square, and gaps and missing images are grey."""
    pictures = images(5, 4, channels)
    grid = opened(image_grid(pictures, columns=3, scale=5, gap=2))
    assert grid.shape[:2] == (2 * 20 + 2, 3 * 20 + 4)
    for i, picture in enumerate(pictures):
        y, x = i // 3 * 22, i % 3 * 22
        tile = picture.repeat(5, axis=0).repeat(5, axis=1)
        assert np.array_equal(grid[y : y + 20, x : x + 20], tile[..., 0] if channels == 1 else tile)
    assert (grid[20:22] == GAP).all()
    assert (grid[:, 20:22] == GAP).all()
    assert (grid[22:, 44:] == GAP).all()


@pytest.mark.parametrize(("n", "side", "columns"), [(100, 8, 10), (64, 64, 8), (8, 256, 4), (3, 32, 10)])
def test_grid_fits_its_panel_and_stays_small(n: int, side: int, columns: int) -> None:
    """Small images are enlarged, large ones averaged down; even noise stays below 250 kB."""
    picture = image_grid(images(n, side, 3), columns=columns)
    assert WIDTH / 2 < opened(picture).shape[1] <= WIDTH + columns
    assert len(picture) < 250_000


def test_plots_are_small_pngs_and_repeatable() -> None:
    """Each plot is about 600 pixels wide, below 60 kB, not blank, and the same bytes the second time."""
    x = np.arange(1, 65.0)
    plots = [
        lambda: spectrum_plot({2: 1 / x, 3: np.exp(-x)}, {2: 16, 3: 64}),
        lambda: spectrum_plot({2: np.array([2.0, 1.0, 0.0, -1e-12])}, {2: 2}),
        lambda: loss_curve(range(200), {"train": np.geomspace(1, 0.1, 200).tolist(), "held out": [None] * 199 + [0.2]}),
        lambda: loss_curve([0], {"train": [0.5]}),
    ]
    for plot in plots:
        picture = plot()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 60_000
        assert picture == plot()
        assert opened(picture).shape[1] == WIDTH
        assert opened(picture).std() > 5


def test_a_curve_that_was_never_measured_is_left_out() -> None:
    """Only the held-out loss is missing: the training loss is drawn all the same."""
    assert loss_curve([0, 1], {"train": [1.0, 0.5], "held out": [None, float("nan")]}) == loss_curve(
        [0, 1], {"train": [1.0, 0.5]}
    )


def test_data_url_holds_the_picture() -> None:
    """The URL names the kind of picture and decodes to its bytes."""
    for picture, kind in ((image_grid(images(4, 8, 1)), "png"), (image_grid(images(16, 256, 3), columns=4), "jpeg")):
        head, data = to_data_url(picture).split(",")
        assert head == f"data:image/{kind};base64"
        assert base64.b64decode(data) == picture


def test_pyplot_is_not_used() -> None:
    """Nothing here imports pyplot, whose figures are global and leak."""
    image_grid(images(4, 8, 1))
    module = sys.modules["nestdiff_core.evaluation.figures"]
    assert not any(getattr(value, "__name__", "") == "matplotlib.pyplot" for value in vars(module).values())
