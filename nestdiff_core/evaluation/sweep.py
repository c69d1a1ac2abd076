"""How to sample, without training anything: guidance, gamma, network evaluations and average of the weights by level.

From the top down, as the paper searches its sigma: the settings of one level are all tried, with the same noise, given
the latents that the settings found for the levels above it generate. Their number is the Frechet distance of the z_l
that they generate to training z_l; nothing is decoded. Generated conditions, not true ones, since they are what is
sampled with: noise on a condition repairs what is wrong with it, of which a true one shows nothing.

What is best level by level need not be best in images. So a few settings of the whole cascade are compared by their
images: the configured one, the best of each level, and those that differ from that in one level where the second is
next to as good. They are judged by real images that are not the reference of the final numbers, and have another seed
than the final samples: who chooses by a number, and then reports it, reports too good a one.

A distance is not exact: `halves` are those of every second image to every second real one, and of the others to the
others. Since all settings have the same noise and the same judges, what counts is how much their difference varies
between the halves (`noise_of_differences`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from nestdiff_core.config import ExperimentConfig

Settings = Mapping[int, "Setting"]  # of the whole cascade, by level
KNOBS = {"w": "guidance", "gamma": "noise_gamma", "evaluations": "num_evaluations", "decay": "sampled_decay"}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How one level is sampled; the names are those of its knobs."""

    guidance: float
    noise_gamma: float
    num_evaluations: int
    sampled_decay: float


def configured(config: ExperimentConfig) -> dict[int, Setting]:
    """How the experiment samples each level as it is configured."""
    return {
        level.level: Setting(
            guidance=level.guidance,
            noise_gamma=config.noise_gamma(level.level),
            num_evaluations=config.num_evaluations(level.level),
            sampled_decay=level.decay,
        )
        for level in config.levels
    }


def with_settings(config: ExperimentConfig, settings: Settings) -> ExperimentConfig:
    """The experiment, these levels sampled so."""
    levels = (
        replace(level, **asdict(settings[level.level])) if level.level in settings else level for level in config.levels
    )
    return replace(config, levels=tuple(levels))


def to_plain(settings: Settings) -> dict[str, Any]:
    """As JSON data, from the top level down."""
    return {"levels": {str(level): asdict(settings[level]) for level in sorted(settings, reverse=True)}}


def from_plain(data: Mapping[str, Any]) -> dict[int, Setting]:
    """What `to_plain` gave."""
    return {int(level): Setting(**knobs) for level, knobs in data["levels"].items()}


def candidates(config: ExperimentConfig, level: int) -> list[Setting]:
    """What is tried at a level: the configured setting, then all combinations of what is swept and makes a difference.

    Guidance needs something to contrast with; gamma conditions with noise; the average of the weights one that
    training kept.
    """
    own, sweep, knobs = configured(config)[level], config.sweep, config.level(level)
    noised = any(config.level(m).condition_noise for m in config.levels_above(level))
    grid = product(
        (sweep.guidance if config.can_be_guided(level) else ()) or (own.guidance,),
        (sweep.noise_gammas if noised else ()) or (own.noise_gamma,),
        sweep.num_evaluations or (own.num_evaluations,),
        knobs.kept_decays if sweep.decays else (own.sampled_decay,),
    )
    found = (
        Setting(guidance=guidance, noise_gamma=gamma, num_evaluations=int(count), sampled_decay=decay)
        for guidance, gamma, count, decay in grid
    )
    return list(dict.fromkeys([own, *found]))


def passes(config: ExperimentConfig, level: int, setting: Setting) -> int:
    """Passes of the level's network that an image takes; guidance doubles them (in an interval: fewer than this)."""
    return setting.num_evaluations * (2 if setting.guidance and config.can_be_guided(level) else 1)


# --- choosing -----------------------------------------------------------------------------------------------------


def best(rows: Sequence[Mapping[str, Any]], name: str = "fd") -> int:
    """Index of the row with the smallest number; of equal ones the one with fewer passes, then the first."""
    return min(range(len(rows)), key=lambda i: (rows[i][name], rows[i]["passes"]))


def noise_of_differences(halves: Sequence[Sequence[float]], chosen: int) -> float:
    """Standard deviation of the difference between a setting's distance and the chosen one's, from both halves.

    If d_1 and d_2 are the differences on the halves, |d_1 - d_2| / 2 estimates that of the whole; this is the root of
    its mean square over all other settings. 0 where there is no other.
    """
    first, second = halves[chosen]
    others = [((a - first) - (b - second)) / 2 for i, (a, b) in enumerate(halves) if i != chosen]
    return (sum(d * d for d in others) / len(others)) ** 0.5 if others else 0.0


def short_list(
    config: ExperimentConfig, levels: Mapping[int, Sequence[tuple[Setting, float]]], size: int
) -> dict[str, dict[int, Setting]]:
    """At most `size` different settings of the whole cascade by what they are, the configured one first.

    levels: the settings of each level and their distances. After the configured one come the best of each level and
    those with another setting at one level, least loss first: distance over the level's smallest.
    """
    ranked = {level: sorted(tried, key=lambda pair: pair[1]) for level, tried in levels.items()}
    greedy = {level: tried[0][0] for level, tried in ranked.items()}
    others = [
        (distance / max(tried[0][1], 1e-12), -level, rank, {**greedy, level: setting})
        for level, tried in ranked.items()
        for rank, (setting, distance) in enumerate(tried[1:], start=2)
    ]
    named = [("configured", configured(config)), ("best of each level", greedy)]
    named += [(f"level {-level}: number {rank}", settings) for _, level, rank, settings in sorted(others, key=_order)]
    chosen: dict[str, dict[int, Setting]] = {}
    for name, settings in named:
        if settings not in chosen.values() and len(chosen) < size:
            chosen[name] = settings
    return chosen


def _order(other: tuple[float, int, int, dict[int, Setting]]) -> tuple[float, int, int]:
    return other[:3]


def pareto(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Indices, by cost, of the points that none other beats: smaller in both is better."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
        if not front or losses[i] < losses[front[-1]]:
            front.append(i)
    return front


# --- what people read ---------------------------------------------------------------------------------------------


def level_table(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per level and setting that was tried, from the top level, the best first; `chosen` marks the best, `beyond
    noise` says by how many standard deviations of a difference the others are worse."""
    table = []
    for level, found in sorted(record["levels"].items(), key=lambda item: -int(item[0])):
        smallest = found["rows"][found["best"]]["fd"]
        for i, row in sorted(enumerate(found["rows"]), key=lambda pair: pair[1]["fd"]):
            table.append(
                {
                    "level": int(level),
                    **{name: row[knob] for name, knob in KNOBS.items()},
                    "passes": row["passes"],
                    "fd": row["fd"],
                    "worse by": _deviations(row["fd"] - smallest, found["noise"]),
                    **{name: row[name] for name in ("density", "coverage") if name in row},
                    "": _mark(i == found["best"], i == found["configured"]),
                }
            )
    return table


def short_table(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per setting of the whole cascade that was compared by images, the chosen one first."""
    table, found = [], record["short_list"]
    smallest = found[record["chosen"]]["metrics"][record["metric"]]
    for i, row in sorted(enumerate(found), key=lambda pair: pair[1]["metrics"][record["metric"]]):
        settings = from_plain(row["settings"])
        order = sorted(settings, reverse=True)
        values = {
            f"{name}, z_{order[0]} to z_1": " ".join(f"{getattr(settings[m], knob):g}" for m in order)
            for name, knob in KNOBS.items()
        }
        table.append(
            {
                "setting": row["name"],
                **values,
                "GMACs an image": row["macs"] / 1e9,
                **row["metrics"],
                "worse by": _deviations(row["metrics"][record["metric"]] - smallest, record["noise"]),
                "": _mark(i == record["chosen"], row["name"] == "configured"),
            }
        )
    return table


def verdict(record: Mapping[str, Any]) -> str:
    """What was chosen, whether it beats the configured setting by more than noise, and which other distances would have
    chosen otherwise, by more than noise."""
    found, metric = record["short_list"], record["metric"]
    chosen, before = found[record["chosen"]], found[0]
    value, old = chosen["metrics"][metric], before["metrics"][metric]
    if chosen is before:
        said = f"{metric}: the configured setting is the best of {len(found)} ({value:.4g}); it stays."
    else:
        apart = old - value
        sure = "more than" if apart > 2 * record["noise"] else "not more than"
        said = (
            f"{metric}: {chosen['name']} has {value:.4g} where the configured setting has {old:.4g} "
            f"({record['num_images']:,} images each, against {record['num_reference']:,} of the {record['reference']} "
            f"split); the difference of {apart:.3g} is {sure} twice what noise makes ({record['noise']:.3g})."
        )
    return " ".join([said, *_others_prefer(record)])


def _others_prefer(record: Mapping[str, Any]) -> list[str]:
    """A sentence for each distance that did not choose, and that another setting makes smaller by more than noise."""
    rows, chosen = record["short_list"], record["chosen"]
    said = []
    for name in rows[chosen]["halves"]:
        values = [row["metrics"][name] for row in rows]
        other = best([{"passes": row["passes"], **row["metrics"]} for row in rows], name)
        noise = noise_of_differences([row["halves"][name] for row in rows], chosen)
        if name != record["metric"] and values[chosen] - values[other] > 2 * noise:
            said.append(f"{name} prefers another, {rows[other]['name']}: {values[other]:.4g} for {values[chosen]:.4g}.")
    return said


def sweep_plots(record: Mapping[str, Any]) -> dict[str, bytes]:
    """Pictures by name: of each level the distance of each setting's latents over its passes, with the Pareto front; of
    the short list the distance of its images over GMACs, and over recall."""
    from nestdiff_core.evaluation.figures import level_colour, pareto_plot

    plots = {}
    for level, found in sorted(record["levels"].items(), key=lambda item: -int(item[0])):
        costs, losses = ([float(row[name]) for row in found["rows"]] for name in ("passes", "fd"))
        plots[f"level_{level}"] = pareto_plot(
            costs,
            losses,
            front=pareto(costs, losses),
            marked={"best": found["best"], "configured": found["configured"]},
            title=f"How level {level} may be sampled",
            xlabel="passes of the network for an image (guidance doubles them)",
            ylabel=f"Frechet distance of z_{level}",
            noise=found["noise"],
            colour=level_colour(int(level)),
        )
    rows, metric = record["short_list"], record["metric"]
    losses = [row["metrics"][metric] for row in rows]
    marked = {"chosen": record["chosen"], "configured": 0}
    recall = "recall" if metric == "fid" else metric.replace("fd_", "recall_", 1)
    costs = [row["macs"] / 1e9 for row in rows]
    plots["images"] = pareto_plot(
        costs, losses, front=pareto(costs, losses), marked=marked, noise=record["noise"],
        title="Settings of the whole cascade",
        xlabel="GMACs for an image", ylabel=metric,
    )  # fmt: skip
    if all(recall in row["metrics"] for row in rows):
        found = [row["metrics"][recall] for row in rows]
        plots["recall"] = pareto_plot(
            found, losses, front=pareto([-value for value in found], losses), marked=marked,
            noise=record["noise"],
            title="Quality and diversity of the same settings", xlabel=recall, ylabel=metric,
        )  # fmt: skip
    return plots


def _deviations(apart: float, noise: float) -> str:
    return "-" if apart == 0 else f"{apart / noise:.1f} sd" if noise > 0 else "?"


def _mark(chosen: bool, configured: bool) -> str:
    return " ".join([*(["chosen"] if chosen else []), *(["configured"] if configured else [])])
