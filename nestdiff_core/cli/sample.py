"""Sample images from the trained cascade: into a picture (.png), an array (.npz), or a folder of shards.

Image number i depends on the seed and on i only: not on how many are asked for, on shards or processes. A folder or an
.npz may be large and take long: the same command resumes one that was stopped, and a folder goes on when more images
are asked for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nestdiff_core.cli import workers
from nestdiff_core.errors import ConfigError
from nestdiff_core.experiment import Experiment
from nestdiff_core.progress import Progress
from nestdiff_core.recipes import load_experiment

KINDS = ("npz", "webdataset")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nestdiff_core.cli import add_device, add_experiment

    add_experiment(parser)
    parser.add_argument("--num-images", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--first", type=int, default=0, metavar="I", help="number of the first image (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        metavar="PATH",
        help="a .png grid, an .npz (arr_0, uint8 NHWC), or a folder for shards",
    )
    parser.add_argument("--format", choices=KINDS, default="npz", help="of a folder's shards (default npz)")
    parser.add_argument(
        "--shard-size", type=int, metavar="N", help="images in a shard, a multiple of the batch (default: about 1,000)"
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes that sample, one per GPU (default: the experiment's)"
    )
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    experiment = Experiment(load_experiment(arguments.experiment))
    runtime, picture = experiment.config.runtime, arguments.out.suffix == ".png"
    if not picture and arguments.out.suffix not in (".npz", "") and not arguments.out.is_dir():
        raise ConfigError(
            "The output has an unknown kind",
            key="--out",
            expected=".png, .npz, or a folder",
            found=str(arguments.out),
            fix="Change --out.",
        )
    processes = arguments.processes or (1 if picture else runtime.processes)
    for name, value, least in (
        ("--num-images", arguments.num_images, 1),
        ("--seed", arguments.seed, 0),
        ("--first", arguments.first, 0),
        ("--processes", processes if arguments.processes is None else arguments.processes, 1),
    ):
        if value < least:
            raise ConfigError(f"{name} cannot be used", key=name, expected=f">= {least}", found=value, fix="Change it.")
    if picture and processes > 1:
        raise ConfigError(
            "A picture is made by one process",
            key="--processes",
            expected=1,
            found=processes,
            fix="Leave it out, or let --out be an .npz or a folder.",
        )
    device = arguments.device or runtime.device
    return workers.share(
        _command(arguments, device),
        lambda device, progress: _sample(experiment, arguments, device, progress),
        device=device,
        processes=processes,
    )


def _command(arguments: argparse.Namespace, device: str) -> list[str]:
    return [
        "sample",
        *([arguments.experiment] if arguments.experiment else []),
        f"--num-images={arguments.num_images}",
        f"--first={arguments.first}",
        f"--seed={arguments.seed}",
        f"--out={arguments.out}",
        f"--format={arguments.format}",
        *([] if arguments.shard_size is None else [f"--shard-size={arguments.shard_size}"]),
        f"--device={device}",
    ]


def _sample(x: Experiment, arguments: argparse.Namespace, device: str, progress: Progress) -> None:
    from nestdiff_core import sampling

    out: Path = arguments.out
    if out.suffix == ".png":
        count = _picture(x, arguments, device, progress)
    else:
        request = {
            "seed": arguments.seed,
            "num_images": arguments.num_images,
            "first": arguments.first,
            "shard_size": arguments.shard_size,
            "device": device,
            "progress": progress,
        }
        if out.suffix == ".npz" and not out.is_dir():
            count = sampling.write_npz_file(x, out, **request)
        else:
            count = sampling.write_folder(x, out, kind=arguments.format, **request).info["images"]
    if sampling.rank() == 0:
        print(f"{count} images in {out}")


def _picture(x: Experiment, arguments: argparse.Namespace, device: str, progress: Progress) -> int:
    from nestdiff_core.evaluation.figures import image_grid
    from nestdiff_core.files import write_bytes
    from nestdiff_core.loading import Cascade

    cascade, indices = Cascade(x, device=device), range(arguments.first, arguments.first + arguments.num_images)
    pictures = cascade.images(indices, cascade.latents(indices, seed=arguments.seed, progress=progress)[1])
    write_bytes(arguments.out, image_grid(pictures, smooth=pictures.shape[1] <= 16))
    return len(pictures)
