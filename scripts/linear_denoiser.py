"""Has a denoiser learnt more than a Gaussian? Its held-out loss beside that of the best linear denoiser.

python -m scripts.linear_denoiser digits
python -m scripts.linear_denoiser experiments/my_images.yaml --level 2

Reads the latents of each level (of at most 4,096 numbers together with what it is told); those that have been trained
show their own losses. A network whose loss is not well below the linear one needs longer or better training.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import numpy as np

from nestdiff_core import loading
from nestdiff_core.diffusion import make_schedule
from nestdiff_core.errors import ConfigError, NestdiffError
from nestdiff_core.evaluation.linear_denoiser import LinearDenoiser
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import read_json
from nestdiff_core.latents.moments import Moments, merge
from nestdiff_core.recipes import load_experiment
from nestdiff_core.tables import format_table
from nestdiff_core.training.data import validation_rows

MOST_NUMBERS = 4096  # of a covariance: 128 MB
BLOCK = 4096
NUM_TIMES = 1_000  # evenly spread, as those of validation
QUARTERS = ("", "_t0.00", "_t0.25", "_t0.50", "_t0.75")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="a recipe or a YAML file, as for nestdiff_core")
    parser.add_argument("--level", type=int, help="one level; by default all")
    arguments = parser.parse_args()
    try:
        x = Experiment(load_experiment(arguments.experiment))
        levels = [x.config.level(arguments.level)] if arguments.level else x.config.levels
        print(format_table([row for level in levels for row in rows(x, level.level)]))
    except NestdiffError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


def rows(x: Experiment, level: int) -> list[dict[str, Any]]:
    """The level's lines of the table: linear and trained, told nothing and told the levels above."""
    above = x.config.levels_above(level)
    found = [linear(x, level, ()), *([linear(x, level, above)] if above else [])]
    if (denoiser := x.find(Ref("denoiser", level))) is not None:
        last = next(line for line in reversed(read_json(denoiser.path / "history.json")) if "held_out_loss" in line)
        for told, name in (("nothing", "held_out_loss_without_conditions"), (_told(above), "held_out_loss")):
            if name in last:
                found.append(
                    _row(level, "trained", told, [last.get(f"{name}{part}", float("nan")) for part in QUARTERS])
                )
    return found


def linear(x: Experiment, level: int, above: tuple[int, ...]) -> dict[str, Any]:
    """Fitted to all training images, measured on those held-out ones on which training measures."""
    config, index = x.config, loading.open_index(x)
    sizes = [int(np.prod(config.latent_shape(m))) for m in (level, *above)]
    if sum(sizes) > MOST_NUMBERS:
        raise ConfigError(
            "A level is too large for a covariance",
            level=level,
            expected=f"at most {MOST_NUMBERS:,} numbers, those of the levels that it is told included",
            found=f"{sum(sizes):,}",
            fix="Ask for the levels above with --level.",
        )

    def read(images: np.ndarray) -> np.ndarray:
        parts = (loading.open_latents(x, m).read(images, np.zeros_like(images)) for m in (level, *above))
        return np.concatenate([part.reshape(len(images), -1).astype(np.float64) for part in parts], 1)

    train, held_out = index.rows("train"), validation_rows(index.rows("held_out"))
    blocks = (Moments.of(read(train[first : first + BLOCK])) for first in range(0, len(train), BLOCK))
    noise = np.repeat([config.level(m).condition_noise for m in above], sizes[1:])
    denoiser = LinearDenoiser.fit(functools.reduce(merge, blocks), sizes[0], noise)
    z = read(held_out)
    told = z[:, sizes[0] :] + noise * np.random.default_rng(0).standard_normal((len(z), sum(sizes[1:])))
    times = (np.arange(NUM_TIMES) + 0.5) / NUM_TIMES
    losses = denoiser.losses(
        z[:, : sizes[0]], told, times, make_schedule(config.diffusion), config.diffusion.prediction
    )
    parts = [losses, *np.split(losses, len(QUARTERS) - 1)]
    return _row(level, "linear", _told(above), [float(part.mean()) for part in parts])


def _told(above: tuple[int, ...]) -> str:
    return ", ".join(f"z_{m}" for m in above) or "nothing"


def _row(level: int, denoiser: str, told: str, losses: list[float]) -> dict[str, Any]:
    names = ("held-out loss", *(f"t from {part[2:]}" for part in QUARTERS[1:]))
    return {"level": level, "denoiser": denoiser, "told": told, **dict(zip(names, losses, strict=True))}


if __name__ == "__main__":
    sys.exit(main())
