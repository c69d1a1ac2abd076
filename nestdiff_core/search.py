"""Greedy search for one level's condition noise: a candidate is the experiment with another sigma_l, and nothing else.

The paper tunes sigma one level at a time and keeps the values found for the others. Only denoisers that read z_l
differ between candidates; all other stages have the same address and are shared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nestdiff_core.config import ExperimentConfig
from nestdiff_core.errors import ConfigError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.latents.capacity import capacity_nats


def candidate(config: ExperimentConfig, sigma: float) -> ExperimentConfig:
    """The experiment with sigma as the condition noise of level `search.level`."""
    number = config.search.level
    levels = (replace(level, condition_noise=sigma) if level.level == number else level for level in config.levels)
    return replace(config, levels=tuple(levels))


def levels_to_train(config: ExperimentConfig) -> tuple[int, ...]:
    """The levels whose denoisers differ between candidates, from the top: those that read the searched level."""
    below = range(config.search.level - 1, 0, -1)
    return tuple(level for level in below if config.search.level in config.levels_above(level))


def search_table(x: Experiment) -> list[dict[str, Any]]:
    """A row for each candidate: sigma, what it lets through, each number of its evaluation; `best` marks the smallest
    `search.metric`. Candidates that have not been evaluated have no numbers.

    Raises ConfigError for a metric that the evaluations do not have.
    """
    search = x.config.search
    channels, height, width = x.config.latent_shape(search.level)
    rows: list[dict[str, Any]] = []
    for sigma in search.sigmas:
        found = Experiment(candidate(x.config, sigma), x.root).find(Ref("evaluation"))
        metrics = {name: n["value"] for name, n in found.info["metrics"].items()} if found else {}
        if metrics and search.metric not in metrics:
            raise ConfigError(
                "The search compares a number that the evaluation does not have",
                key="search.metric",
                expected=sorted(metrics),
                found=search.metric,
                fix="Name one of these.",
            )
        nats = round(capacity_nats(sigma, channels * height * width), 1)
        rows.append({"sigma": sigma, "nats": nats, "best": "", "evaluated": "yes" if found else "no", **metrics})
    done = [row for row in rows if row["evaluated"] == "yes"]
    if done:
        min(done, key=lambda row: row[search.metric])["best"] = "*"
    return rows
