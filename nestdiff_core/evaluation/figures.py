"""Pictures for reports and the web UI: grids of images, spectra, loss curves, bars.

Every function returns the bytes of a picture about 600 pixels wide. A level has the same colour in all of them.
Nothing here touches matplotlib's global state (pyplot), so threads and notebooks are safe.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from PIL import Image

WIDTH = 600  # pixels of a metadata panel
LARGE = 100_000  # bytes; a larger grid is stored as JPEG, since pictures are kept in Dagster's event log
GAP = 110  # grey level
INK, MUTED, LINES = "#1f2a37", "#5f6c7b", "#e5e8ec"
COLOURS = ("#2f6db3", "#d9792b", "#2f9e7d", "#a64d8c", "#7c6fc4", "#8c6d46")


def level_colour(level: int) -> str:
    return COLOURS[(level - 1) % len(COLOURS)]


def to_data_url(picture: bytes) -> str:
    """The picture as a data: URL, for `![](...)` in Markdown."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def image_grid(
    images: UInt8[np.ndarray, "N H W C"],
    *,
    columns: int = 10,
    scale: int | None = None,
    gap: int = 2,
    smooth: bool = False,
) -> bytes:
    """Images row by row, `columns` abreast. Pixels become squares of `scale`; by default the grid fits `WIDTH`.

    `smooth` interpolates instead, which is how a person reads a digit of eight pixels.
    Images too large to fit are averaged down. The last row may be incomplete. Between images is a grey `gap`, which
    shows where dark and bright ones end. PNG, or JPEG where that would be large.
    """
    num, height, width = images.shape[:3]
    columns = min(columns, num)
    room = (WIDTH - gap * (columns - 1)) / columns / width
    factor = scale if scale is not None else (max(1, int(room)) if room >= 1 else room)
    tile = max(1, round(width * factor)), max(1, round(height * factor))
    enlarge = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    filter_ = enlarge if factor >= 1 else Image.Resampling.BOX
    rows = -(-num // columns)
    size = columns * (tile[0] + gap) - gap, rows * (tile[1] + gap) - gap
    grid = Image.new("L", size, GAP) if images.shape[3] == 1 else Image.new("RGB", size, (GAP, GAP, GAP))
    for i, image in enumerate(images):
        picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).resize(tile, filter_)
        grid.paste(picture, (i % columns * (tile[0] + gap), i // columns * (tile[1] + gap)))
    png = _bytes(grid, "PNG", optimize=True)
    return png if len(png) <= LARGE else _bytes(grid, "JPEG", quality=90)


def spectrum_plot(
    eigenvalues: Mapping[int, Float[np.ndarray, " C"]],
    kept: Mapping[int, int],
    *,
    title: str = "Spectrum of the pooled features",
) -> bytes:
    """Share of variance of each principal component, per level, on logarithmic axes.

    eigenvalues: of the covariance, in descending order, by level. kept: how many components each basis keeps; they
    are drawn solid with a dot at the last one, and the legend says what they hold.
    """
    figure, axes = _panel(title, "component", "share of variance", height=330)
    lowest = 1.0
    for level in sorted(eigenvalues, reverse=True):
        share = np.maximum(np.asarray(eigenvalues[level], dtype=np.float64), 0) / np.sum(eigenvalues[level])
        k, colour, component = min(kept[level], len(share)), level_colour(level), np.arange(1, len(share) + 1)
        held = share[:k].sum()
        axes.plot(component, share, color=colour, linewidth=1.0, alpha=0.4)
        axes.plot(
            component[:k],
            share[:k],
            color=colour,
            linewidth=2.2,
            marker="o",
            markevery=[k - 1],
            markersize=6,
            label=f"level {level}: {k} of {len(share)} components, {held:.1%} of variance",
        )
        lowest = min(lowest, max(share.min(), 1e-6))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(lowest / 2, 1.3)
    axes.set_xlim(0.9, max(map(len, eigenvalues.values())) * 1.15)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"{np.format_float_positional(100 * y, trim='-', precision=6)}%")
    )
    _legend(axes, "lower left")
    return _png(figure)


def loss_curve(
    steps: Sequence[int], losses: Mapping[str, Sequence[float | None]], *, title: str = "Loss", ylabel: str = "loss"
) -> bytes:
    """Losses over training steps: the measured values faint, their local mean strong, its last value in the legend.

    A curve may have gaps (None or NaN: not measured at that step); one of at most 30 points is drawn as it is.
    """
    figure, axes = _panel(title, "step", ylabel, height=300)
    smallest, largest = np.inf, 0.0
    for colour, (name, values) in zip(COLOURS, losses.items(), strict=False):
        y = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
        there = np.isfinite(y)
        if not there.any():
            continue
        x, y = np.asarray(steps)[there], y[there]
        mean = y if len(y) <= 30 else _local_mean(y)
        if len(y) > 30:
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(
            x,
            mean,
            color=colour,
            linewidth=2,
            label=f"{name}: {mean[-1]:.4g}",
            marker="o" if len(y) <= 12 else None,
            markersize=4,
        )
        smallest, largest = min(smallest, y.min()), max(largest, y.max())
    if smallest > 0 and largest / smallest > 5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    _legend(axes, "upper right")
    return _png(figure)


def bar_plot(
    values: Mapping[str, float],
    *,
    title: str,
    xlabel: str,
    baseline: tuple[str, float] | None = None,
    form: Callable[[float], str] = "{:.3g}".format,
) -> bytes:
    """Horizontal bars from the top down, each with its value. `baseline` is a named dashed line (chance, the floor)."""
    figure, axes = _panel(title, xlabel, "", height=95 + 32 * len(values))
    places = range(len(values))
    axes.barh(places, list(values.values()), height=0.62, color=COLOURS[0])
    largest = max([*values.values(), baseline[1] if baseline else 0.0])
    for place, value in zip(places, values.values(), strict=True):
        axes.text(value + largest * 0.012, place, form(value), va="center", color=INK, fontsize=9)
    if baseline is not None:
        axes.axvline(baseline[1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(
            baseline[1],
            -0.62,
            f" {baseline[0]}: {form(baseline[1])}",
            color=MUTED,
            fontsize=8.5,
            va="center",
            ha="left",
        )
    axes.set_yticks(places, list(values))
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.set_ylim(len(values) - 0.45, -0.95 if baseline is not None else -0.55)
    axes.set_xlim(0, largest * 1.12)
    axes.grid(False, axis="y")
    axes.spines["bottom"].set_visible(False)
    return _png(figure)


def ladder_plot(distances: Mapping[int, float], *, title: str, xlabel: str, floor: tuple[str, float]) -> bytes:
    """A bar for each rung k of the oracle ladder, from D_{L+1} down to D_1: true latents from level k up.

    What rung l + 1 has beyond rung l, the cost of level l, is in the level's colour. `floor` is a named dashed line.
    """
    rungs = sorted(distances, reverse=True)
    figure, axes = _panel(title, xlabel, "", height=110 + 36 * len(rungs))
    largest = max([*distances.values(), floor[1], 1e-12])
    for place, k in enumerate(rungs):
        value, below = distances[k], distances.get(k - 1, distances[k])
        axes.barh(place, min(value, below), height=0.62, color="#c4cbd3")
        axes.barh(place, max(value - below, 0.0), left=below, height=0.62, color=level_colour(max(k - 1, 1)))
        axes.text(max(value, below) + largest * 0.012, place, f"{value:.3g}", va="center", color=INK, fontsize=9)
    axes.axvline(floor[1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(floor[1], -0.65, f" {floor[0]}: {floor[1]:.3g}", color=MUTED, fontsize=8.5, va="center", ha="left")
    names = {k: f"true z_{k} up" for k in rungs[1:]} | {rungs[0]: "all generated", rungs[1]: f"true z_{rungs[1]}"}
    axes.set_yticks(range(len(rungs)), [names[k] for k in rungs])
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.set_ylim(len(rungs) - 0.45, -0.98)
    axes.set_xlim(0, largest * 1.12)
    axes.grid(False, axis="y")
    axes.spines["bottom"].set_visible(False)
    return _png(figure)


# --- house style --------------------------------------------------------------------------------------------------


def _panel(title: str, xlabel: str, ylabel: str, *, height: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.09, h_pad=0.09)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(xlabel, fontsize=9.5, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=9.5, color=MUTED)
    axes.tick_params(which="both", labelsize=9, colors=MUTED, length=0, pad=5)
    axes.grid(True, color=LINES, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c4cbd3")
    return figure, axes


def _legend(axes: Axes, place: Literal["lower left", "upper right"]) -> None:
    axes.legend(
        loc=place,
        fontsize=9,
        labelcolor=INK,
        frameon=True,
        facecolor="white",
        edgecolor="none",
        framealpha=0.85,
        handlelength=1.4,
        borderaxespad=0.3,
    )


def _local_mean(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Mean over a window of a twelfth of the curve, centred so that it does not lag behind a fall."""
    window = np.hanning(len(values) // 12 * 2 + 3)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
