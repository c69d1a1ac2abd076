"""Check every file of an experiment's artifacts against its manifest, byte by byte.

Damaged or missing files are named; the exit code is then 4.
"""

from __future__ import annotations

import argparse
import sys

from nestdiff_core.errors import IntegrityError
from nestdiff_core.experiment import Experiment
from nestdiff_core.recipes import load_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nestdiff_core.cli import add_experiment

    add_experiment(parser)


def run(arguments: argparse.Namespace) -> int:
    experiment = Experiment(load_experiment(arguments.experiment))
    first: IntegrityError | None = None
    for ref in experiment.refs():
        artifact = experiment.find(ref)
        if artifact is None:
            print(f"{'not made':>10}  {ref}")
            continue
        try:
            size = artifact.verify()
            print(f"{size / 2**20:>6.1f} MiB  {ref}  {artifact.path}")
        except IntegrityError as error:
            first = first or error
            print(f"{'DAMAGED':>10}  {ref}: {error}", file=sys.stderr)
    if first is not None:
        raise first
    return 0
