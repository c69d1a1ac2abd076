"""The command line: `python -m nestdiff_core VERB EXPERIMENT`, a file a verb.

A verb module has `add_arguments(parser)` and `run(arguments) -> int`; its docstring is its help. Heavy imports
happen inside `run`, so that `--help` and a wrong argument cost nothing. Exit codes are errors.EXIT_CODES; a
refusal leaves a sentence and, as the last line, one JSON object on stderr.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from nestdiff_core.errors import EXIT_CODES, ConfigError, Interrupted, NestdiffError, memory_faults

VERBS = ("run", "train", "sample", "score", "search", "design", "inspect", "verify", "gc", "digest", "doctor")


_LESS = (
    "Lower features.batch_size (or the batch_size of the stage that ran), or free some memory, and run the same "
    "command again; committed work is kept."
)


class _Parser(argparse.ArgumentParser):
    """argparse whose usage errors are ConfigErrors like every other refusal."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{self.prog}: {message}", fix=f"See: {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    codes = "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
    parser = _Parser(
        prog="python -m nestdiff_core",
        description="Hierarchical latent diffusion, stage by stage, without Dagster.",
        epilog="EXPERIMENT is a recipe (digits, toy, ...) or the path of a .yaml file; "
        "default: NESTDIFF_EXPERIMENT, else digits. "
        f"Artifacts go to NESTDIFF_HOME (default: ./artifacts). Exit codes: {codes}.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        module = importlib.import_module(f"nestdiff_core.cli.{verb}")
        description = " ".join((module.__doc__ or "").split())
        sub = verbs.add_parser(verb, help=description.split(". ")[0].rstrip("."), description=description)
        sub.set_defaults(run=module.run)
        module.add_arguments(sub)
    return parser


def add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", nargs="?", metavar="EXPERIMENT", help="a recipe, or the path of a .yaml file")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default: the experiment's)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        with memory_faults(fix=_LESS):
            parsed = make_parser().parse_args(arguments)
            return int(parsed.run(parsed))
    except NestdiffError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        _flush()
        stopped = Interrupted("Stopped by the keyboard", fix="Run the same command again: finished work is kept.")
        print(stopped.to_json(), file=sys.stderr)
        return stopped.code
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        _discard()
        return 0


def _flush() -> None:
    """What was printed comes before what stderr says next, wherever both go."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard()


def _discard() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(error: NestdiffError) -> int:
    _flush()
    # a key of a hostile image may hold newlines and terminal commands
    print("".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error)), file=sys.stderr)
    print(error.to_json(), file=sys.stderr, flush=True)
    return error.code
