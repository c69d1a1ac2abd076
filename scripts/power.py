"""In what do samples vary too little, or too much? Variances of samples over those of training images.

python -m scripts.power digits
python -m scripts.power experiments/my_images.yaml

Of the images, by spatial frequency, and of each generated latent, along the principal components of the true ones.
The held-out images' ratios stand beside them: what their number alone makes of 1.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from nestdiff_core import loading
from nestdiff_core.errors import NestdiffError
from nestdiff_core.evaluation.power import component_ratios, frequency_power
from nestdiff_core.evaluation.samples import load_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import load_experiment
from nestdiff_core.tables import format_table

OCTAVES = (0, 1, 3, 6, 10, 14, 18, 24, 32, 48, 64, 96, 128, 192, 256)  # sums of two frequencies; from here to the next
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the principal components, from the largest
MOST_IMAGES = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="a recipe or a YAML file whose samples have been made")
    arguments = parser.parse_args()
    try:
        x = Experiment(load_experiment(arguments.experiment))
        sampled = x.artifact(Ref("samples")).path
        print(format_table(image_rows(x, load_samples(sampled / "samples.npz"))))
        for level in [level.level for level in x.config.levels if level.level > 1]:
            z_m = load_file(sampled / "latents.safetensors")[f"z_{level}"]
            print(format_table(latent_rows(x, level, z_m)))
    except NestdiffError as error:
        print(error, file=sys.stderr)
        return error.code
    return 0


def image_rows(x: Experiment, samples: np.ndarray) -> list[dict[str, Any]]:
    index = loading.open_index(x)

    def real(split: str) -> np.ndarray:
        chosen = loading.SplitImages(index, split).subset(MOST_IMAGES, 0)
        return frequency_power(np.stack([chosen[i] for i in range(len(chosen))]))

    training = real("train")
    starts = [s for s in OCTAVES if s < len(training)]
    ends = [*starts[1:], len(training)]

    def row(which: str, power: np.ndarray) -> dict[str, Any]:
        of = {_span(s, e - 1): float((power[s:e] / training[s:e]).mean()) for s, e in zip(starts, ends, strict=True)}
        return {"frequencies": which, **of}

    return [row("held out", real("held_out")), row("samples", frequency_power(samples))]


def latent_rows(x: Experiment, level: int, generated: np.ndarray) -> list[dict[str, Any]]:
    index = loading.open_index(x)

    def rows(split: str) -> np.ndarray:
        chosen = np.sort(np.random.default_rng(0).permutation(index.rows(split))[:MOST_IMAGES])
        z = loading.open_latents(x, level).read(chosen, np.zeros_like(chosen))
        return z.reshape(len(chosen), -1).astype(np.float64)

    training = rows("train")
    last = [round(share * training.shape[1]) for share in SHARES]
    names = [_span(first + 1, end) for first, end in zip([0, *last], last, strict=False)]

    def row(which: str, z: np.ndarray) -> dict[str, Any]:
        ratios = component_ratios(z.reshape(len(z), -1).astype(np.float64), training, SHARES)
        return {f"components of z_{level}": which, **dict(zip(names, map(float, ratios), strict=True))}

    return [row("held out", rows("held_out")), row("samples", generated)]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


if __name__ == "__main__":
    sys.exit(main())
