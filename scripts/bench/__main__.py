"""Measure against peers: both in this run, in turn, with a null control (the peer against itself).

    python -m scripts.bench                  # all, about ten minutes
    python -m scripts.bench reads codecs     # some

CPU time of the process, one thread; memory is that of processes of its own; sampling uses a GPU where there is one, and
its clock. Prints Markdown tables.
"""

from __future__ import annotations

import argparse

import torch
import webdataset.utils
from threadpoolctl import threadpool_limits

from scripts.bench import bases, codecs, extraction, latents, launching, memory, reads, sampling, training

MODULES = (reads, extraction, bases, latents, codecs, training, sampling, launching, memory)
BENCHES = {module.__name__.split(".")[-1]: module for module in MODULES}


def main() -> None:
    about = "\n".join(f"{name:12} {(module.__doc__ or '').splitlines()[0]}" for name, module in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bench",
        description=__doc__,
        epilog=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bench", nargs="*", metavar="BENCH", help="default: all")
    chosen = parser.parse_args().bench or list(BENCHES)
    if unknown := set(chosen) - set(BENCHES):
        parser.error(f"no bench is called {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    # nestdiff_core turns this on; here the peer opens the tars that a bench has just written.
    webdataset.utils.enforce_security = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(1)
    with threadpool_limits(1):
        for name in chosen:
            BENCHES[name].run()


if __name__ == "__main__":
    main()
