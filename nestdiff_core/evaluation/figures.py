"""Pictures for reports and the web UI: grids of images, spectra, loss curves, bars.

Every function returns the bytes of a picture about 600 pixels wide. A level has the same colour in all of them.
Nothing here touches matplotlib's global state (pyplot), so threads and notebooks are safe.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
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
    width: int = WIDTH,
) -> bytes:
    """Images row by row, `columns` abreast. Pixels become squares of `scale`; by default the grid fits `width` pixels.

    `smooth` interpolates instead, which is how a person reads a digit of eight pixels.
    Images too large to fit are averaged down. The last row may be incomplete. Between images is a grey `gap`, which
    shows where dark and bright ones end. PNG, or JPEG where that would be large.
    """
    num, high, wide = images.shape[:3]
    columns = min(columns, num)
    room = (width - gap * (columns - 1)) / columns / wide
    factor = scale if scale is not None else (max(1, int(room)) if room >= 1 else room)
    tile = max(1, round(wide * factor)), max(1, round(high * factor))
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
    steps: Sequence[int | float],
    losses: Mapping[str, Sequence[float | None]],
    *,
    title: str = "Loss",
    xlabel: str = "step",
    ylabel: str = "loss",
) -> bytes:
    """Losses over training steps, or over what `xlabel` says: the measured values faint, their local mean strong, its
    last value in the legend.

    A curve may have gaps (None or NaN: not measured at that step); one of at most 30 points is drawn as it is.
    """
    figure, axes = _panel(title, xlabel, ylabel, height=300)
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
    _log_if_wide(axes, smallest, largest)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    _legend(axes, "upper right")
    return _png(figure)


def noise_level_curves(history: Sequence[Mapping[str, int | float]], *, title: str) -> bytes:
    """Losses over steps for each quarter of t, from the log of a training (training/report.py): thin on what it
    trained on, dots on held-out images, with the last of both in the legend."""
    figure, axes = _panel(title, "step", "loss", height=360)
    quarters = sorted({name.rpartition("_t")[2] for line in history for name in line if name.startswith("loss_t")})
    smallest, largest = np.inf, 0.0
    for colour, quarter in zip(COLOURS, quarters, strict=False):
        last = []
        for name in ("loss", "held_out_loss"):
            points = [(line["step"], line.get(f"{name}_t{quarter}", np.nan)) for line in history]
            x, y = np.array([p for p in points if np.isfinite(p[1])], dtype=np.float64).reshape(-1, 2).T
            if not len(y):
                continue
            if name == "loss":
                axes.plot(x, y, color=colour, linewidth=1.2, alpha=0.55)
            else:
                axes.plot(x, y, color=colour, linewidth=1.6, linestyle=(0, (4, 2)), marker="o", markersize=4)
            smallest, largest = min(smallest, y.min()), max(largest, y.max())
            last.append(f"{y[-1]:.3g}")
        axes.plot(
            [], [], color=colour, linewidth=3, label=f"t from {float(quarter):g}: {', held out '.join(last) or '-'}"
        )
    _log_if_wide(axes, smallest, largest)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if quarters:  # below: four curves leave no corner free
        figure.legend(loc="outside lower center", ncols=2, fontsize=9, labelcolor=INK, frameon=False, handlelength=1.4)
    return _png(figure)


def history_plot(
    series: Mapping[int, Sequence[tuple[int, float, float]]], floors: Mapping[int, float], *, title: str, ylabel: str
) -> bytes:
    """A number of each level over training steps, (step, value, bootstrap error) each, with bars of two errors.

    floors: what held-out latents score, a dotted line in the level's colour.
    """
    figure, axes = _panel(title, "step", ylabel, height=330)
    seen = [*floors.values()]
    for level in sorted(series, reverse=True):
        points = sorted(series[level])
        x, y, e = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
        colour, last = level_colour(level), f"{y[-1]:.3g} ± {2 * e[-1]:.2g}"
        axes.errorbar(
            x, y, 2 * e, color=colour, linewidth=1.8, marker="o", markersize=4, capsize=3, label=f"z_{level}: {last}"
        )
        if level in floors:
            axes.axhline(floors[level], color=colour, linewidth=1.2, linestyle=(0, (1, 2)))
        seen += y.tolist()
    _log_if_wide(axes, min(seen), max(seen))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    _legend(axes, "upper right")
    return _png(figure)


def power_plot(
    sets: Mapping[str, Float[np.ndarray, " F"]], *, title: str = "Power over spatial frequency of the images"
) -> bytes:
    """Spectra (power.frequency_power) of sets of images, on a logarithmic axis; the first one is drawn strong."""
    figure, axes = _panel(title, "sum of both frequencies, half cycles per image (0: brightness)", "power", height=300)
    for colour, (place, (name, power)) in zip(COLOURS, enumerate(sets.items()), strict=False):
        style = {"linewidth": 2.6, "color": MUTED} if place == 0 else {"linewidth": 1.6, "color": colour}
        axes.plot(range(len(power)), power, marker="o", markersize=3.5, label=name, **style)
    _log_scale(axes)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _legend(axes, "upper right")
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


def pareto_plot(
    costs: Sequence[float],
    losses: Sequence[float],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    front: Sequence[int] = (),
    marked: Mapping[str, int] | None = None,
    noise: float = 0.0,
    colour: str = COLOURS[0],
) -> bytes:
    """A point for each setting, a line through those of `front`, rings with a name around those `marked`.

    noise: the band of losses up to twice that above the smallest is shaded.
    """
    figure, axes = _panel(title, xlabel, ylabel, height=330)
    if noise:
        axes.axhspan(min(losses), min(losses) + 2 * noise, color=LINES, zorder=0, linewidth=0)
    axes.scatter(costs, losses, s=26, color=colour, alpha=0.45, linewidths=0)
    axes.plot([costs[i] for i in front], [losses[i] for i in front], color=colour, linewidth=1.6)
    names: dict[int, list[str]] = {}
    for name, i in (marked or {}).items():
        names.setdefault(i, []).append(name)
    for place, (i, said) in enumerate(sorted(names.items(), key=lambda item: losses[item[0]])):
        axes.scatter([costs[i]], [losses[i]], s=80, facecolors="none", edgecolors=INK, linewidths=1.3)
        right = costs[i] > (min(costs) + max(costs)) / 2
        axes.annotate(
            ", ".join(said),
            (costs[i], losses[i]),
            xytext=(-8 if right else 8, 8 + 12 * place),  # one above the other: they may mark the same place
            textcoords="offset points",
            ha="right" if right else "left",
            color=INK,
            fontsize=9,
        )
    axes.margins(0.06, 0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    return _png(figure)


def neighbour_grid(
    rows: Sequence[tuple[str, UInt8[np.ndarray, "k H W C"]]], *, title: str, xlabel: str = "", gap: float = 0.35
) -> bytes:
    """A labelled row for each query: the query, a gap (in images), and its neighbours. All images have one shape."""
    height, width = rows[0][1].shape[1:3]
    scale = max(1, round(44 / height))  # pixels that a pixel of a small image becomes
    tile = max(height * scale, 1), max(width * scale, 1)
    columns, space = max(len(images) for _, images in rows), round(gap * tile[1])
    canvas = np.full((len(rows) * (tile[0] + 2) - 2, columns * (tile[1] + 2) + space - 2, 3), 255, np.uint8)
    for place, (_, images) in enumerate(rows):
        for i, image in enumerate(images):
            x, y = i * (tile[1] + 2) + (space if i else 0), place * (tile[0] + 2)
            picture = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)
            canvas[y : y + tile[0], x : x + tile[1]] = picture  # grey ones in all three channels
    room = (WIDTH - 150) * canvas.shape[0] / canvas.shape[1]
    figure, axes = _panel(title, xlabel, "", height=round(75 + room))
    axes.imshow(canvas, interpolation="antialiased", aspect="equal")
    axes.set_xticks([])
    axes.set_yticks([(place + 0.5) * (tile[0] + 2) for place in range(len(rows))], [label for label, _ in rows])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    png = _png(figure)
    if len(png) <= LARGE:
        return png
    return _bytes(Image.open(io.BytesIO(png)).convert("RGB"), "JPEG", quality=90)


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


def _log_if_wide(axes: Axes, smallest: float, largest: float) -> None:
    if smallest > 0 and largest / smallest > 5:
        _log_scale(axes)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _legend(axes: Axes, place: Literal["lower left", "upper right"]) -> None:
    if not axes.get_legend_handles_labels()[0]:
        return
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
