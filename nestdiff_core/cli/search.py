"""Search the condition noise of one level: one training per candidate, the rest held, one table at the end.

Candidates that are there already are kept; the same command continues.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from nestdiff_core.experiment import Experiment
from nestdiff_core.recipes import load_experiment, save_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nestdiff_core.cli import add_device, add_experiment

    add_experiment(parser)
    parser.add_argument("--level", type=int, metavar="N", help="whose sigma; default: search.level of the experiment")
    parser.add_argument("--sigmas", type=float, nargs="+", metavar="S", help="candidates; default: search.sigmas")
    parser.add_argument("--metric", help="the number to compare, such as fd_encoder; default: search.metric")
    parser.add_argument("--table", action="store_true", help="only show the table of what has been evaluated")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    from nestdiff_core.cli import run as run_verb
    from nestdiff_core.search import candidate, search_table
    from nestdiff_core.tables import format_table

    config = load_experiment(arguments.experiment)
    given = {"level": arguments.level, "sigmas": arguments.sigmas and tuple(arguments.sigmas)}
    given["metric"] = arguments.metric
    config = replace(config, search=replace(config.search, **{k: v for k, v in given.items() if v is not None}))
    config.require_search()
    x = Experiment(config)
    for sigma in () if arguments.table else config.search.sigmas:
        print(f"sigma_{config.search.level} = {sigma:g}", flush=True)
        path = save_experiment(candidate(config, sigma), x.root)
        code = run_verb.run(
            argparse.Namespace(experiment=str(path), stage=None, processes=None, device=arguments.device)
        )
        if code:
            return code
    print(format_table(search_table(x)))
    return 0
