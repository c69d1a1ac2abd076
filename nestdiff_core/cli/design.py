"""Propose levels from the measured spectra of an experiment's features, beside its own and the paper's, or of a store.

For each grid the fewest channels that keep a share of the variance, and the noise with which the level tells a stated
number of nats; settings under `design:`. TARGET is an experiment, whose training images are measured, or the path of a
feature store, all of whose images are.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nestdiff_core.config import DesignConfig
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.progress import TerminalProgress
from nestdiff_core.recipes import load_experiment

PAPER = "cvpr_imagenet_l5"
STORE, GROUP_FILE = "store.zarr", "zarr.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nestdiff_core.cli import add_device

    parser.add_argument("target", nargs="?", metavar="TARGET", help="an experiment, or the path of a feature store")
    add_device(parser)
    parser.add_argument("--nats", type=float, help="information of the top level (default: design.nats)")
    parser.add_argument("--growth", type=float, help="how many times as much the next one has (default: design.growth)")
    parser.add_argument("--variance", type=float, help="share of variance kept at least (default: design.variance)")


def run(arguments: argparse.Namespace) -> int:
    import numpy as np

    from nestdiff_core import stages
    from nestdiff_core.devices import choose_device
    from nestdiff_core.stores.reader import StoreReader
    from nestdiff_core.tables import format_table

    given = {name: getattr(arguments, name) for name in ("nats", "growth", "variance")}
    changes = {name: value for name, value in given.items() if value is not None}
    if (store := _store(arguments.target)) is not None:
        reader, own = StoreReader(store, "map"), DesignConfig(**changes)
        with TerminalProgress() as progress:
            proposals, _ = stages.propose_levels(reader, np.arange(len(reader)), own, progress=progress)
        print("proposed\n" + format_table(proposal_table([asdict(p) for p in proposals])))
        print(f"\nthe paper ({PAPER})\n" + format_table(paper_table()))
        return 0
    config = load_experiment(arguments.target)
    x = Experiment(replace(config, design=replace(config.design, **changes)))
    device = choose_device(arguments.device or config.runtime.device)
    with TerminalProgress() as progress:
        artifact = stages.design(x, device=device, progress=progress)
    print("proposed\n" + format_table(proposal_table(artifact.info["proposals"])))
    if own := own_table(x):
        print(f"\n{config.name}\n" + format_table(own))
    print(f"\nthe paper ({PAPER})\n" + format_table(paper_table()))
    return 0


def _store(target: str | None) -> Path | None:
    """The store that a path names, or holds."""
    folders = (Path(target), Path(target) / STORE) if target else ()
    return next((folder for folder in folders if (folder / GROUP_FILE).is_file()), None)


def proposal_table(proposals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per level from the top, numbered as a hierarchy of these levels would be."""
    top = len(proposals) + 1
    return [
        _row(top - i, p["grid"], p["channels"], p["variance_share"], p["sigma"], p["nats"])
        for i, p in enumerate(proposals)
    ]


def paper_table() -> list[dict[str, Any]]:
    """The levels that the paper chose for ImageNet."""
    return own_table(Experiment(load_experiment(PAPER)))


def own_table(x: Experiment) -> list[dict[str, Any]]:
    """The levels that the experiment has; what share of variance they keep where their basis has been fitted."""
    from nestdiff_core.latents.capacity import capacity_nats

    rows = []
    for level in reversed(x.config.levels[1:]):
        basis = x.find(Ref("svd_basis", level.level))
        share = basis.info["variance_share"] if basis else None
        nats = capacity_nats(level.condition_noise, level.channels * level.grid**2)
        rows.append(_row(level.level, level.grid, level.channels, share, level.condition_noise, nats))
    return rows


def _row(level: int, grid: int, channels: int, share: float | None, sigma: float, nats: float) -> dict[str, Any]:
    return {
        "level": level,
        "grid": grid,
        "channels": channels,
        "numbers": channels * grid**2,
        "variance kept": share,
        "sigma": sigma,
        "nats": nats,
    }
