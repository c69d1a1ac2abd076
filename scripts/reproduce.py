"""A table of docs/results.md: trains, samples and measures every arm that is not there yet, and writes it down.

python -m scripts.reproduce --dry-run
python -m scripts.reproduce --images data/cifar10 --encoder squeezenet1_0.safetensors --out results
python -m scripts.reproduce --arms l1_class_guided l2_class_guided l3_class_guided --out results/class
python -m scripts.reproduce --scale tinyimagenet20 --autoencoder data/taef2 --out results/tinyimagenet20

Says first what is left to do and how long that takes here. Stopped, it goes on from the last checkpoint; what is there,
of whatever run, is used. --images: WebDataset shards of two splits, as scripts/cifar10.py makes them from the public
archive. The arms are recipes (nestdiff_core/recipes/depth.py), so Dagster runs them too, with the same artifacts:
NESTDIFF_EXPERIMENT=experiments/cifar10.yaml dagster job execute -m pipelines.definitions -j quickstart
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nestdiff_core.cli import main as nestdiff
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.devices import choose_device
from nestdiff_core.errors import ConfigError, NestdiffError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import read_json, write_bytes
from nestdiff_core.models.nested import build_denoiser, count_macs
from nestdiff_core.progress import duration
from nestdiff_core.recipes import save_experiment
from nestdiff_core.recipes.depth import ARMS, EVERY, SCALES, Scale, judges
from nestdiff_core.tables import format_table
from nestdiff_core.training.estimate import estimate
from scripts.depth_table import Run, conditions, curves, network, pictures, real, row, write
from scripts.judges import CLASSIFIER, MOCO, RECORD

JUDGES_SEED = 1000  # no arm's


def runs(arguments: argparse.Namespace) -> list[Run]:
    """Seed by seed, so that a part of the table is useful already."""
    scale, folder = scale_of(arguments), judges_folder(arguments)
    images = arguments.images or scale.images
    images = images if "://" in images else str(Path(images).expanduser().absolute())
    autoencoder = scale.autoencoder
    if arguments.autoencoder and autoencoder.kind != "identity":
        autoencoder = replace(autoencoder, weights=arguments.autoencoder)
    found = []
    for seed in arguments.seeds:
        for arm in arguments.arms:
            config = EVERY[arm](scale)
            weights = arguments.encoder if config.encoder.weights == "hub" else config.encoder.weights
            config = replace(
                config,
                images=replace(config.images, path=images),
                autoencoder=autoencoder,
                encoder=replace(config.encoder, weights=weights),
                evaluation=replace(config.evaluation, judges=judges(folder, scale)),
                levels=tuple(replace(level, train=replace(level.train, seed=seed)) for level in config.levels),
                name=f"{scale.name}_{arm}" + (f"_seed{seed}" if seed else ""),
            )
            found.append(Run(arm, seed, Experiment(config)))
    return found


def scale_of(arguments: argparse.Namespace) -> Scale:
    """The scale asked for, its arms trained for as long as was asked for."""
    scale = SCALES[arguments.scale]
    if arguments.tflops is None:
        return scale
    return replace(scale, name=f"{scale.name}_{arguments.tflops:g}tflop", tflops=arguments.tflops)


def judges_folder(arguments: argparse.Namespace) -> str:
    """Where the judges are, or will be: part of an evaluation's address, so by default as the recipes spell it."""
    return arguments.judges or f"data/judges_{arguments.scale}"


# --- how long ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Something that is not there yet, and its TFLOPs."""

    what: str
    tflops: float


def left(todo: Sequence[Run], macs: Mapping[tuple[str, int], int]) -> Iterator[Work]:
    """Denoisers, sweeps, samples and ladders that have not been made, each named once. macs: by network, as `network`
    names it."""
    seen: set[str] = set()
    for run in todo:
        config, x = run.x.config, run.x
        own = {level.level: macs[network(run, level.level)] for level in config.levels}
        for level in config.levels:
            ref = Ref("denoiser", level.level)
            if (key := x.config_hash(ref)) not in seen and x.find(ref) is None:
                images = level.train.num_steps * level.train.batch_size
                yield Work(f"{run.name}, level {level.level}", 6e-12 * own[level.level] * images)
            seen.add(key)

        def passes(guided: bool, own: Mapping[int, int] = own, config: ExperimentConfig = config) -> float:
            """TFLOPs of an image of the cascade."""
            doubled = {m: 2 if guided and config.can_be_guided(m) else 1 for m in own}
            return 2e-12 * sum(config.num_evaluations(m) * own[m] * doubled[m] for m in own)

        swept = config.sampling.chosen_by == "sweep"
        if swept and x.find(Ref("sweep")) is None:
            tried = len(config.sweep.guidance) + min(config.sweep.short_list, len(config.sweep.guidance) ** len(own))
            yield Work(f"{run.name}, sweep", passes(guided=True) * tried * config.sweep.num_images)
        if x.find(Ref("samples")) is None:
            yield Work(f"{run.name}, samples", passes(swept) * config.sampling.num_images)
        if has_ladder(run) and x.find(Ref("ladder")) is None:
            rungs = config.num_levels * config.ladder.num_images
            yield Work(f"{run.name}, ladder, at most", passes(guided=False) * rungs)


def has_ladder(run: Run) -> bool:
    """Guided arms share their networks, and what each level loses, with the same arm without guidance."""
    return run.x.config.num_levels > 1 and run.x.config.sampling.chosen_by == "config"


def plan(todo: Sequence[Run], scale: Scale, device: torch.device) -> list[Work]:
    """What is left, printed with the hours that it takes here, from the rate of a few steps of level 1."""
    macs: dict[tuple[str, int], int] = {}

    def told(run: Run) -> int:
        """Number of the classes that its denoisers are told."""
        return scale.num_classes if run.x.config.conditioning.labels == "class" else 0

    for run in todo:
        for level in run.x.config.levels:
            if (key := network(run, level.level)) not in macs:
                macs[key] = count_macs(build_denoiser(run.x.config, level.level, told(run)))
    work = list(left(todo, macs))
    config = todo[0].x.config
    one = estimate(config, 1, device=device, num_classes=told(todo[0]))
    rate = 6e-12 * one.macs * config.level(1).train.batch_size / one.seconds_per_step
    rows = [{"left": w.what, "TFLOP": w.tflops, "here": duration(w.tflops / rate)} for w in work]
    total = sum(w.tflops for w in work)
    rows.append({"left": "together", "TFLOP": total, "here": duration(total / rate)})
    print(format_table(rows))
    print(f"at {rate:.3g} TFLOP/s of training, measured now; judges and encoder passes come on top")
    return work


# --- the runs ----------------------------------------------------------------------------------------------------


def make(run: Run, device: str) -> int:
    """All stages of one row that are not there yet; the exit code of the first that fails."""
    file = save_experiment(run.x.config, run.x.root)
    nested = run.x.config.num_levels > 1
    wanted = ["images", "encoder", "features", "bases"] if nested else ["images"]
    wanted += ["latents", "train", *(["sweep"] if run.x.config.sampling.chosen_by == "sweep" else [])]
    wanted += ["reference", "samples", "evaluation", *(["ladder"] if has_ladder(run) else [])]
    stages = [word for stage in wanted for word in ("--stage", stage)]
    return nestdiff(["run", str(file), *stages, "--device", device])


def make_judges(run: Run, scale: Scale, folder: Path, device: str) -> None:
    """Unless somebody has: those that are there are taken as they are, however long they were trained.

    Raises ConfigError where the classifier there is another one than the rows are judged by.
    """
    record = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    if CLASSIFIER in record and (difference := _unlike(record[CLASSIFIER]["made_of"], run)) is not None:
        key, expected, found = difference
        raise ConfigError(
            "The classifier in the folder of judges is not this table's",
            path=folder / RECORD,
            key=key,
            expected=expected,
            found=found,
            fix="Name another folder with --judges, in which they are made.",
        )
    if {CLASSIFIER, MOCO} <= record.keys():
        return
    file = save_experiment(run.x.config, run.x.root)
    options = {
        "--out": folder,
        "--seed": JUDGES_SEED,
        "--device": device,
        "--input-size": scale.judge_size,
        "--epochs": scale.judge_epochs,
        "--moco-epochs": scale.moco_epochs,
        "--precision": "bfloat16" if device.startswith("cuda") else "float32",
    }
    words = [str(word) for option in options.items() for word in option]
    done = subprocess.run([sys.executable, "-m", "scripts.judges", str(file), *words], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def _unlike(made_of: Mapping[str, Any], run: Run) -> tuple[str, Any, Any] | None:
    """The first setting in which the classifier that was made is not the one that judges: key, wanted, found."""
    judge = next(judge for judge in run.x.config.evaluation.judges if judge.name == CLASSIFIER)
    images = run.x.find(Ref("images"))
    wanted = {key: getattr(judge.encoder, key) for key in made_of["encoder"]} | {"num_classes": judge.num_classes}
    found = {**made_of["encoder"], "num_classes": made_of["num_classes"]}
    if images is not None:
        wanted, found = wanted | {"images": images.digest}, found | {"images": made_of["images"]}
    return next(((key, wanted[key], found[key]) for key in wanted if wanted[key] != found[key]), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", metavar="SHARDS", help="default: data/cifar10, or data/tinyimagenet20")
    parser.add_argument(
        "--encoder", default="hub", metavar="FILE", help="SqueezeNet's weights (default: torchvision's)"
    )
    parser.add_argument(
        "--autoencoder", default="", metavar="FOLDER", help="of tinyimagenet20: taef2's weights (default: data/taef2)"
    )
    parser.add_argument(
        "--judges", metavar="FOLDER", help="made there unless there are some; default: data/judges_SCALE"
    )
    parser.add_argument("--scale", choices=SCALES, help="default: cifar10_32px where there is a GPU, else cifar10_16px")
    parser.add_argument("--tflops", type=float, metavar="N", help="training of an arm; default: the scale's")
    parser.add_argument(
        "--arms", nargs="+", choices=EVERY, default=list(ARMS), help="default: those of the first table"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="default: 0 1")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="FOLDER", help="default: results")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dry-run", action="store_true", help="say what is left and how long that takes")
    arguments = parser.parse_args()
    try:
        raise SystemExit(reproduce(arguments))
    except NestdiffError as error:
        raise SystemExit(f"{error}") from None


def reproduce(arguments: argparse.Namespace) -> int:
    device = choose_device(arguments.device)
    arguments.scale = arguments.scale or f"cifar10_{32 if device.startswith('cuda') else 16}px"
    todo, scale = runs(arguments), scale_of(arguments)
    plan(todo, scale, torch.device(device))
    if arguments.dry_run:
        return 0
    make_judges(todo[0], scale, Path(judges_folder(arguments)).expanduser(), device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for i, run in enumerate(todo):
        print(f"\n{run.name} ({i + 1} of {len(todo)})", flush=True)
        if code := make(run, device):
            return code
        done = todo[: i + 1]
        write([real(done[0]), *map(row, done)], conditions(done), pictures(done), arguments.out)
        write_bytes(arguments.out / "curves.png", curves(done))
    return 0


if __name__ == "__main__":
    main()
