"""List what can be removed below the artifact root, and remove it with --apply.

Without --keep: temporary files of stopped runs, and files that no manifest names. With it: whole artifacts, too, that
none of the kept experiments uses.
"""

from __future__ import annotations

import argparse

from nestdiff_core.cleaning import find_litter, remove
from nestdiff_core.experiment import Experiment, home
from nestdiff_core.recipes import load_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep", nargs="+", metavar="EXPERIMENT", help="experiments whose artifacts stay; those of others go"
    )
    parser.add_argument("--apply", action="store_true", help="remove; without it nothing is touched")


def run(arguments: argparse.Namespace) -> int:
    root = home()
    keep = None if arguments.keep is None else [Experiment(load_experiment(name), root) for name in arguments.keep]
    total = 0
    for litter in list(find_litter(root, keep)):
        size = litter.size
        total += size
        print(f"{size / 2**20:>9.1f} MiB  {litter.path.relative_to(root)}: {litter.reason}")
        if arguments.apply:
            remove(litter)
    print(f"{total / 2**20:>9.1f} MiB  {'removed' if arguments.apply else 'could be removed, with --apply'}")
    return 0
