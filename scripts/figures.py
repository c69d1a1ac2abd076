"""The picture of the README, from an experiment that has been sampled.

python scripts/figures.py digits docs/figures/quickstart.png
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nestdiff_core import loading
from nestdiff_core.evaluation.samples import load_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import write_bytes
from nestdiff_core.recipes import load_experiment

COUNT, SIDE, MARGIN, TITLE = 6, 288, 16, 26  # images a side of a panel; pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    x = Experiment(load_experiment(arguments.experiment))
    samples = x.artifact(Ref("samples")).path
    held_out = loading.SplitImages(loading.open_index(x), "held_out")
    panels = {
        "real images, held out": np.stack([held_out[i] for i in range(COUNT**2)]),
        "samples of the cascade": load_samples(samples / "samples.npz")[: COUNT**2],
        "level 1 without the levels above": load_samples(samples / "without_conditions.npz")[: COUNT**2],
    }
    write_bytes(arguments.out, side_by_side(panels))


def side_by_side(panels: dict[str, np.ndarray]) -> bytes:
    """Square panels of images next to each other, each below its title; PNG. Small images are enlarged smoothly."""
    sheet = Image.new("RGB", (len(panels) * (SIDE + MARGIN) - MARGIN, TITLE + SIDE), "white")
    draw, font, cell = ImageDraw.Draw(sheet), ImageFont.load_default(size=15), SIDE // COUNT
    for number, (title, images) in enumerate(panels.items()):
        left = number * (SIDE + MARGIN)
        draw.text((left, 2), title, fill="#333333", font=font)
        for i, pixels in enumerate(images):
            image = (
                Image.fromarray(pixels.squeeze()).convert("RGB").resize((cell - 1, cell - 1), Image.Resampling.BICUBIC)
            )
            sheet.paste(image, (left + i % COUNT * cell, TITLE + i // COUNT * cell))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
