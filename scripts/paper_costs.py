"""What each row of the paper costs, computed from the recipes: disk, training FLOPs and GPU-hours, sampling FLOPs.

. .venv/bin/activate
python scripts/paper_costs.py            # a Markdown table
python scripts/paper_costs.py --tflops 400

FLOPs are 2 x MACs, attention included; training costs three forward passes. GPU-hours assume that the given rate is
sustained; they leave out data loading, encoding and evaluation. "new" are the levels that the row above it in the same
family does not have yet.
"""

from __future__ import annotations

import argparse
import math

from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import paper
from nestdiff_core.tables import level_table

HALF = 2  # bytes of a stored number


def training_flops(config: ExperimentConfig) -> dict[str, float]:
    """FLOPs of each denoiser's whole training, by the hash of everything it depends on."""
    x, flops = Experiment(config), {}
    for row in level_table(x):
        train = config.level(row["level"]).train
        flops[x.config_hash(Ref("denoiser", row["level"]))] = 6.0 * row["MACs"] * train.batch_size * train.num_steps
    return flops


def sampling_flops(config: ExperimentConfig) -> float:
    """FLOPs of one image, guidance included."""
    total = 0.0
    for row in level_table(Experiment(config)):
        branches = 2 if row["guidance"] and (row["reads"] != "-" or config.conditioning.labels != "none") else 1
        total += 2.0 * row["MACs"] * branches * config.sampling.num_evaluations
    return total


def disk_bytes(config: ExperimentConfig, images: int) -> float:
    """Feature, caption and latent stores of the training images."""
    code = config.encoder.kind == "autoencoder"
    channels, side = (64, 8) if code else (768, 14)
    vector = 64 if code else 512 if config.encoder.kind == "open_clip" else 768
    numbers = 0
    if config.num_levels > 1:
        numbers += channels * side**2 + vector
        numbers += sum(vector * level.grid**2 for level in config.levels if config.has_crops(level.level))
    numbers += sum(math.prod(config.latent_shape(level.level)) for level in config.levels)
    numbers *= 1 + config.features.flip
    if config.conditioning.labels == "text":
        text = config.conditioning.text
        numbers += text.captions_per_image * text.length * text.width
    return float(HALF * numbers * images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=300.0, help="sustained training rate of one GPU (default 300)")
    rate = parser.parse_args().tflops * 1e12
    print(f"| recipe | FID printed | disk, GB | training, 10^18 FLOPs | of them new | GPU-hours at {rate / 1e12:.0f} "
          "TFLOP/s, new | sampling, 10^12 FLOPs an image |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    known: set[str] = set()
    for name, recipe in paper.RECIPES.items():
        config = recipe()
        flops = training_flops(config)
        new = sum(value for key, value in flops.items() if key not in known)
        known |= flops.keys()
        disk = disk_bytes(config, paper.IMAGES[name]) / 1e9
        print(
            f"| `{name}` | {paper.PRINTED[name].fid} | {disk:,.0f} | {sum(flops.values()) / 1e18:,.0f} "
            f"| {new / 1e18:,.0f} | {new / rate / 3600:,.0f} | {sampling_flops(config) / 1e12:.1f} |"
        )


if __name__ == "__main__":
    main()
