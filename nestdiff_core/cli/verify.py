"""Check every file of an experiment's artifacts against its manifest, byte by byte, checkpoints included.

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
    from nestdiff_core.stages import CHECKPOINTS
    from nestdiff_core.training.checkpoint import list_checkpoints, read_checkpoint

    experiment = Experiment(load_experiment(arguments.experiment))
    first: IntegrityError | None = None
    for ref in experiment.refs():
        try:
            artifact = experiment.find(ref)
            if artifact is None:
                print(f"{'not made':>10}  {ref}")
                continue
            size = artifact.verify()
            if ref.stage == "denoiser":
                for checkpoint in list_checkpoints(artifact.path / CHECKPOINTS):
                    read_checkpoint(checkpoint, level=ref.level or 0, expected=artifact.fingerprint)
            print(f"{size / 2**20:>6.1f} MiB  {ref}  {artifact.path}")
        except IntegrityError as error:
            first = first or error
            print(f"{'DAMAGED':>10}  {ref}: {error}", file=sys.stderr)
    if first is not None:
        raise first
    return 0
