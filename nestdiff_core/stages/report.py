"""The report: one page of everything that there is to see of an experiment, finished or not.

A section for each kind of result; one that has not been made says which job makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact, code_version
from nestdiff_core.config_io import to_dict
from nestdiff_core.evaluation.figures import (
    history_plot,
    image_grid,
    ladder_plot,
    loss_curve,
    noise_level_curves,
    power_plot,
    spectrum_plot,
)
from nestdiff_core.evaluation.ladder import ladder_table, verdicts
from nestdiff_core.evaluation.ladder import level_table as latent_table
from nestdiff_core.evaluation.neighbours import neighbour_table
from nestdiff_core.evaluation.neighbours import verdicts as copy_verdicts
from nestdiff_core.evaluation.page import Figure, Rows, Section, flat, render
from nestdiff_core.evaluation.power import frequency_power
from nestdiff_core.evaluation.samples import StoredSamples
from nestdiff_core.evaluation.sweep import level_table as setting_table
from nestdiff_core.evaluation.sweep import short_table, sweep_plots, verdict
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import write_bytes, write_json
from nestdiff_core.newest import newest_weights
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stages.common import reuse
from nestdiff_core.stages.neighbours import neighbour_pictures
from nestdiff_core.stages.watch import IMAGES, MARGIN, best, from_the_top, history, is_worse
from nestdiff_core.tables import HELD_OUT, TRAINING, floor_name, level_table, number_table, stage_table, total_row

PAGE = "report.html"
PARTS = "parts.json"
SHOWN = 48  # images of a sample set
COUNTED = 500  # images of a power spectrum
SWEPT = {  # captions
    "level": "Every setting of a level that was tried. The line: none is better at no higher cost; grey: within twice "
    "what noise makes of the best.",
    "images": "The short list, by images; grey: within twice what noise makes of the best.",
    "recall": "The short list, by images and by how much of the real ones they cover.",
}
SMALL = 16  # pixels a side, below which images are enlarged smoothly


def report(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """report.html of what has been made so far; made again only when some of that has changed (parts.json)."""
    del device
    ref, parts = Ref("report"), _parts(x)
    if (made := reuse(x, ref)) is not None and made.info["parts"] == parts:
        return made
    html = page(x, progress=progress).encode()
    with x.writing(ref) as writer:
        write_bytes(writer.path / PAGE, html)
        write_json(writer.path / PARTS, parts)
        # Beside: times and rates in it differ from machine to machine, and make no other report of it.
        return writer.seal(beside=(PAGE,), parts=parts, bytes=len(html))


def page(x: Experiment, *, progress: Progress = silent) -> str:
    """The page as text, of what there is."""
    config, sections = x.config, []
    makers: list[Callable[[Experiment], Section]] = [
        _samples,
        _levels,
        _pictures,
        _ladder,
        _numbers,
        _losses,
        _watch,
        _spectra,
        _sweep,
        _neighbours,
        _origin,
    ]
    for done, make in enumerate(makers):
        progress(done, len(makers), "report")
        sections.append(make(x))
    progress(len(makers), len(makers), "report")
    count = f"{config.num_levels} level" + ("s" if config.num_levels > 1 else "")
    side, channels = config.images.resolution, "RGB" if config.images.channels == 3 else "grey-scale"
    lines = [
        f"Hierarchical latent diffusion in {count}; images from {config.images.source}, {side}x{side} {channels}.",
        f"nestdiff {code_version()}, {datetime.now(UTC):%d %B %Y, %H:%M} UTC.",
    ]
    return render(config.name, lines, _facts(x), sections)


def _parts(x: Experiment) -> dict[str, str | None]:
    """What the page is of: digests of all that it shows, None for what has not been made."""
    shown = [ref for ref in x.refs() if ref.stage != "report"]
    shown += [Ref(stage) for stage in ("watch", "sweep") if Ref(stage) not in shown]
    parts = {str(ref): found.digest if (found := x.find(ref)) else None for ref in shown}
    for level in x.config.levels:
        weights = newest_weights(x, level.level)
        parts[f"weights of level {level.level}"] = weights.digest if weights else None
    return parts


def _missing(x: Experiment, ref: Ref, what: str = "Not made yet.") -> str:
    return f"{what} It is made by: {x.command(ref)}"


def _facts(x: Experiment) -> dict[str, str]:
    """What somebody wants to know first."""
    facts = {}
    if images := x.find(Ref("images")):
        facts["training images"] = f"{len(loading.open_index(x).rows('train')):,}"
        facts["held out"] = f"{images.info['num_images'] - len(loading.open_index(x).rows('train')):,}"
    facts["parameters"] = _short(sum(row["parameters"] for row in level_table(x)))
    real = floor_name(x.config)
    for row in number_table(x):
        value, floor = row["samples"], row[real]
        told = row["number"].startswith(("fd", "fid", "confidence")) and "infinity" not in row["number"]
        if told and None not in (value, floor):
            facts[f"{row['number']} ({real} {floor:.3g})"] = f"{value:.3g}"
    return facts


def _short(number: int) -> str:
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)


def _samples(x: Experiment) -> Section:
    section = Section("Samples", abreast=3)
    made = x.find(Ref("samples"))
    figures = []
    if x.find(Ref("images")) is not None:
        figures.append(("Real images, held out.", _real(x, "held_out", SHOWN)))
    if made is not None:
        figures.append(("Samples of the cascade, from the first on: not chosen.", _stored(made, "samples", SHOWN)))
        if (made.path / "without_conditions.npz").is_file():
            images = _stored(made, "without_conditions", SHOWN)
            figures.append(("What level 1 makes when its conditions are withheld.", images))
    grids = [Figure(_grid(images), caption) for caption, images in figures]
    return replace(section, figures=grids, missing="" if made else _missing(x, Ref("samples")))


def _stored(made: Artifact, name: str, count: int) -> np.ndarray:
    return StoredSamples(made.path / f"{name}.npz").read(0, count)


def _real(x: Experiment, split: str, count: int) -> np.ndarray:
    images = loading.SplitImages(loading.open_index(x), split).subset(count, seed=0)
    return np.stack([images[i] for i in range(len(images))])


def _grid(images: np.ndarray) -> bytes:
    return image_grid(images, columns=8, smooth=images.shape[1] <= SMALL)


def _levels(x: Experiment) -> Section:
    """The level table: what each latent is, how its denoiser is, and how far it has been trained."""
    levels, costs = level_table(x), {}
    if found := x.find(Ref("ladder")):
        costs = found.info["costs"]
    what, denoisers = [], []
    for row in levels:
        level = row["level"]
        weights = newest_weights(x, level)
        trained = "not yet" if weights is None else f"{weights.step:,} of {row['steps']:,} steps"
        if weights is not None and weights.finished:
            trained = f"{weights.step:,} steps"
        what.append(
            {
                "level": level,
                "latent": row["z"],
                "from": row["source"],
                "reads": row["reads"],
                "σ": row["sigma"],
                "nats": row["nats"],
                "guidance": row["guidance"],
                "trained": trained,
                **{
                    f"cost in {name}": f"{c['levels'][str(level)]:.3g} ± {2 * c['errors'][str(level)]:.2g}"
                    for name, c in costs.items()
                },
            }
        )
    names = ("level", "tokens", "condition tokens", "parameters", "MACs", "GFlops cvpr")
    denoisers = [{name: row.get(name) for name in names} for row in [*levels, total_row(levels)]]
    notes = ["σ is the noise on the level as a condition, nats what it can tell the levels below."]
    if costs:
        notes.append("Costs: what generating a level adds instead of knowing it (± two bootstrap errors).")
    return Section(
        "Levels",
        notes=notes,
        tables={"The hierarchy, from the top": what, "The denoisers": denoisers},
    )


def _pictures(x: Experiment) -> Section:
    section, made = Section("What each level decides"), x.find(Ref("pictures"))
    if made is None:
        return replace(section, missing=_missing(x, Ref("pictures")))
    figures = [Figure(made.fetch(f["file"]).read_bytes(), f["caption"]) for f in made.info["figures"]]
    return replace(section, figures=figures)


def _sweep(x: Experiment) -> Section:
    section, made = Section("Sweeps", abreast=2), x.find(Ref("sweep"))
    if not x.config.sweep.anything:
        return replace(section, missing="Nothing is swept: `sweep:` of the experiment says what is to be tried.")
    if made is None:
        return replace(section, missing=_missing(x, Ref("sweep")))
    return replace(
        section,
        notes=[verdict(made.info)],
        figures=[Figure(plot, SWEPT.get(name, SWEPT["level"])) for name, plot in sweep_plots(made.info).items()],
        tables={"Settings of the whole cascade, compared by their images": short_table(made.info)},
        folded={"Settings of each level, compared by its latents": setting_table(made.info)},
    )


def _neighbours(x: Experiment) -> Section:
    section, made = Section("Nearest training images", abreast=2), x.find(Ref("neighbours"))
    if made is None:
        return replace(section, missing=_missing(x, Ref("neighbours")))
    return replace(
        section,
        notes=copy_verdicts(made.info),
        figures=[
            Figure(
                drawn,
                "The same samples' neighbours, by the encoder and by the code."
                if name == "encoder_and_z_1"
                else f"Samples that look most like copies in {name}, and their nearest training images.",
            )
            for name, drawn in neighbour_pictures(x).items()
        ],
        tables={"Samples and held-out images against training images": neighbour_table(made.info)},
    )


def _ladder(x: Experiment) -> Section:
    section, made = Section("What each level costs", abreast=2), x.find(Ref("ladder"))
    if made is None:
        return replace(section, missing=_missing(x, Ref("ladder")))
    info = made.info
    figures = [
        Figure(
            ladder_plot(
                {int(k): value for k, value in info["metrics"][name]["rungs"].items()},
                title=f"Rungs, {name}",
                xlabel=f"{name}, {info['num_images']:,} images",
                floor=("held-out images", info["metrics"][name]["held_out"]),
            ),
            f"True latents of held-out images from some level up, the levels below generated ({name}).",
        )
        for name in info["costs"]
    ]
    rungs = ladder_table(info)
    short = {"true latents", "adds", *(f"{what}{name}" for what in ("", "cost in ", "± ") for name in info["costs"])}
    return replace(
        section,
        notes=verdicts(info),
        figures=figures,
        tables={"Rungs": [{name: row[name] for name in row if name in short} for row in rungs]},
        folded={
            "Rungs, all numbers": rungs,
            "Latents of each level against as many training ones": latent_table(info),
            **({"What to know before believing them": _sentences(info["warnings"])} if info["warnings"] else {}),
        },
    )


def _numbers(x: Experiment) -> Section:
    section, made = Section("Numbers"), x.find(Ref("evaluation"))
    if made is None:
        return replace(section, missing=_missing(x, Ref("evaluation")))
    info, real = made.info, floor_name(x.config)
    against = TRAINING if real == HELD_OUT else "held-out"
    cards = {f"Metric card of {name}": flat(n["card"]) for name, n in info["metrics"].items() if n.get("card")}
    return replace(
        section,
        notes=[
            "Each number is named for the feature space that it was measured in. Beside it stands the same number of "
            f"real images ({real}), and of as many samples as these (matched): those two compare."
        ],
        tables={f"Samples against {against} images": number_table(x)},
        folded={
            **({"What to know before believing them": _sentences(info["warnings"])} if info["warnings"] else {}),
            **cards,
        },
    )


def _sentences(warnings: list[str]) -> Rows:
    return [{"": text} for text in warnings]


def _losses(x: Experiment) -> Section:
    figures, notes = [], []
    for level in reversed(x.config.levels):
        weights = newest_weights(x, level.level)
        lines = [] if weights is None else weights.history()
        if weights is None or not lines:
            notes.append(f"Level {level.level}: {_missing(x, Ref('denoiser', level.level), 'not trained yet.')}")
            continue
        last = {name for line in lines for name in line}
        names = [name for name in ("loss", "held_out_loss", "held_out_loss_without_conditions") if name in last]
        state = "" if weights.finished else f" So far: step {weights.step:,} of {level.train.num_steps:,}."
        steps = [int(line["step"]) for line in lines]
        curves = {name.replace("_", " "): [line.get(name) for line in lines] for name in names}
        figures += [
            Figure(loss_curve(steps, curves, title=f"Level {level.level}"), f"Losses of level {level.level}.{state}"),
            Figure(
                noise_level_curves(lines, title=f"Level {level.level}, by noise level"),
                "By quarters of t, from little noise to all noise; dashed on held-out images.",
            ),
        ]
    return Section("Losses", notes=notes, figures=figures, abreast=2)


def _watch(x: Experiment) -> Section:
    section = Section("Numbers over time")
    made = x.find(Ref("watch"))
    if made is None:
        return replace(section, missing=_missing(x, Ref("watch")))
    newest = made.info["newest"]
    newest = {what: newest[what] for what in from_the_top(newest)}
    levels = [what for what in newest if what != IMAGES]
    plot = history_plot(
        {int(what): [(r["step"], r["fd"], r["error"]) for r in history(x, what)] for what in levels},
        {int(what): newest[what]["floor"] for what in levels},
        title="Latents of each level, given true ones above",
        ylabel="Frechet distance",
    )
    rows: list[dict[str, Any]] = []
    for what, record in newest.items():
        before = best(history(x, what), record)
        rows.append(
            {
                "what": f"z_{what}" if what != IMAGES else f"images, {record['name']}",
                "step": list(record["step"].values()) if what == IMAGES else record["step"],
                "distance": record["fd"],
                "± bootstrap error": record["error"],
                "held out": record["floor"],
                "best": before["fd"],
                "worse than its best": is_worse(record, before),
            }
        )
    note = (
        "The Frechet distance of the newest weights, at fixed seeds. Dotted: what held-out latents score. A number is "
        f"worse than its best when it is above it by more than {MARGIN:g} combined bootstrap errors."
    )
    return replace(
        section, notes=[note], figures=[Figure(plot, "Bars: two bootstrap errors.")], tables={"Newest weights": rows}
    )


def _spectra(x: Experiment) -> Section:
    figures, notes = [], []
    levels = [level.level for level in x.config.levels[1:]]
    bases = {level: loading.open_basis(x, level) for level in levels if x.find(Ref("svd_basis", level)) is not None}
    if bases:
        plot = spectrum_plot({m: b.eigenvalues for m, b in bases.items()}, {m: b.channels for m, b in bases.items()})
        figures.append(Figure(plot, "Singular spectrum of the features that each level is cut from."))
    elif levels:
        notes.append(_missing(x, Ref("svd_basis"), "The bases have not been fitted yet."))
    if (made := x.find(Ref("samples"))) is not None:
        sets = {"real, held out": _real(x, "held_out", COUNTED), "samples": _stored(made, "samples", COUNTED)}
        if (made.path / "without_conditions.npz").is_file():
            sets["level 1 alone"] = _stored(made, "without_conditions", COUNTED)
        plot = power_plot({name: frequency_power(images) for name, images in sets.items()})
        caption = "Power spectra: samples below the real line lack detail of that size, above it are too rough."
        figures.append(Figure(plot, caption))
    return Section("Spectra", notes=notes, figures=figures, abreast=2)


def _origin(x: Experiment) -> Section:
    stages = [
        {"stage": row["stage"], "level": row["level"], "artifact": row["artifact"], "digest": digest}
        for row, digest in zip(stage_table(x), _digests(x), strict=True)
        if row["stage"] != "report"
    ]
    return Section(
        "How it was made",
        folded={"Artifacts": stages, "Configuration": flat(to_dict(x.config))},
    )


def _digests(x: Experiment) -> Iterator[str | None]:
    return (found.digest if (found := x.find(ref)) else None for ref in x.refs())
