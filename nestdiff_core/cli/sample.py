"""Sample images from the trained cascade, into a picture (.png) or an array (.npz).

Image number i depends on the seed and on i only, not on how many are asked for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nestdiff_core.errors import ConfigError
from nestdiff_core.experiment import Experiment
from nestdiff_core.progress import TerminalProgress
from nestdiff_core.recipes import load_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nestdiff_core.cli import add_device, add_experiment

    add_experiment(parser)
    parser.add_argument("--num-images", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        metavar="FILE",
        help="a .png grid or an .npz (arr_0, uint8 NHWC)",
    )
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if out.suffix not in (".png", ".npz"):
        raise ConfigError(
            "The output file has an unknown kind",
            key="--out",
            expected=".png or .npz",
            found=str(out),
            fix="Change --out.",
        )
    for name, value, least in (("--num-images", arguments.num_images, 1), ("--seed", arguments.seed, 0)):
        if value < least:
            raise ConfigError(f"{name} cannot be used", key=name, expected=f">= {least}", found=value, fix="Change it.")
    experiment = Experiment(load_experiment(arguments.experiment))
    from nestdiff_core import loading
    from nestdiff_core.devices import choose_device
    from nestdiff_core.evaluation.figures import image_grid
    from nestdiff_core.evaluation.samples import save_samples
    from nestdiff_core.files import write_bytes

    device = choose_device(arguments.device or experiment.config.runtime.device)
    with TerminalProgress() as progress:
        z = loading.generate(
            experiment, range(arguments.num_images), seed=arguments.seed, device=device, progress=progress
        )
    pictures = loading.decode(experiment, z[1], device=device)
    if out.suffix == ".npz":
        save_samples(out, pictures)
    else:
        write_bytes(out, image_grid(pictures, smooth=pictures.shape[1] <= 16))
    print(f"{len(pictures)} images in {out}")
    return 0
