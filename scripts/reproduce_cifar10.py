"""The table of docs/results.md: trains, samples and measures every arm that is not there yet, and writes it down.

python -m scripts.reproduce_cifar10 --dry-run
python -m scripts.reproduce_cifar10 --images data/cifar10 --encoder squeezenet1_0.safetensors --out results

Says first what is left to do and how long that takes here. Stopped, it goes on from the last checkpoint; what is there,
of whatever run, is used. --images: WebDataset shards of two splits, as scripts/cifar10.py makes them from the public
archive. The arms are recipes (nestdiff_core/recipes/cifar10.py), so Dagster runs them too, with the same artifacts:
NESTDIFF_EXPERIMENT=experiments/cifar10.yaml dagster job execute -m pipelines.definitions -j quickstart
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nestdiff_core import loading
from nestdiff_core.cli import main as nestdiff
from nestdiff_core.devices import choose_device
from nestdiff_core.errors import NestdiffError
from nestdiff_core.evaluation.gaussian import frechet_distance
from nestdiff_core.evaluation.samples import load_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import read_json, write_bytes, write_json
from nestdiff_core.models.nested import build_denoiser, count_macs
from nestdiff_core.progress import duration
from nestdiff_core.recipes import load_experiment, save_experiment
from nestdiff_core.recipes.cifar10 import ARMS, SCALES, judges
from nestdiff_core.stages.reference import extractors, open_statistics
from nestdiff_core.tables import format_table
from nestdiff_core.training.estimate import estimate
from scripts.figures import side_by_side

SPACES = ("classifier", "moco", "pixels")
HISTORY = "history.json"
SHOWN = ("l1", "l1_autoguided", "l2_guided", "l3_guided")  # in the picture, of the first seed


@dataclass(frozen=True)
class Run:
    """One row of the table: an arm as it is sampled, of one seed."""

    arm: str
    seed: int
    x: Experiment

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def runs(arguments: argparse.Namespace) -> list[Run]:
    """Seed by seed, so that a part of the table is useful already."""
    scale = SCALES[arguments.scale]
    folder = str(arguments.judges or arguments.images.parent / f"judges_{arguments.scale}")
    found = []
    for seed in arguments.seeds:
        for arm in arguments.arms:
            config = load_experiment(f"cifar10_{arguments.scale}_{arm}")
            config = replace(
                config,
                images=replace(config.images, path=str(arguments.images)),
                encoder=replace(config.encoder, weights=arguments.encoder),
                evaluation=replace(config.evaluation, judges=judges(folder, scale)),
                levels=tuple(replace(level, train=replace(level.train, seed=seed)) for level in config.levels),
                name=config.name if seed == 0 else f"{config.name}_seed{seed}",
            )
            found.append(Run(arm, seed, Experiment(config)))
    return found


# --- how long ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Something that is not there yet, and its TFLOPs."""

    what: str
    kind: str  # train, sample
    tflops: float


def left(todo: Sequence[Run], macs: dict[tuple[str, int], int]) -> Iterator[Work]:
    """Denoisers and samples that have not been made, each named once. macs: by network, as `network` names it."""
    seen: set[str] = set()
    for run in todo:
        config, x = run.x.config, run.x
        for level in config.levels:
            ref = Ref("denoiser", level.level)
            if (key := x.config_hash(ref)) not in seen and x.find(ref) is None:
                images = level.train.num_steps * level.train.batch_size
                yield Work(
                    f"{run.name}, level {level.level}", "train", 6e-12 * macs[network(run, level.level)] * images
                )
            seen.add(key)
        if x.find(Ref("samples")) is None:
            passes = sum(
                config.num_evaluations(level.level)
                * macs[network(run, level.level)]
                * (2 if config.sampling.chosen_by == "sweep" and config.can_be_guided(level.level) else 1)
                for level in config.levels
            )
            yield Work(f"{run.name}, samples", "sample", 2e-12 * passes * config.sampling.num_images)


def network(run: Run, level: int) -> tuple[str, int]:
    """Arms with the same networks share their name up to how they are sampled."""
    return run.arm.removesuffix("_contrast").removesuffix("_autoguided").removesuffix("_guided"), level


def plan(todo: Sequence[Run], device: torch.device) -> list[Work]:
    """What is left, printed with the hours that it takes here, from the rate of a few steps of level 1."""
    macs: dict[tuple[str, int], int] = {}
    for run in todo:
        for level in run.x.config.levels:
            if (key := network(run, level.level)) not in macs:
                macs[key] = count_macs(build_denoiser(run.x.config, level.level, 0))
    work = list(left(todo, macs))
    config = todo[0].x.config
    one = estimate(config, 1, device=device)
    rate = 6e-12 * one.macs * config.level(1).train.batch_size / one.seconds_per_step
    rows = [{"left": w.what, "TFLOP": w.tflops, "here": duration(w.tflops / rate)} for w in work]
    total = sum(w.tflops for w in work)
    rows.append({"left": "together", "TFLOP": total, "here": duration(total / rate)})
    print(format_table(rows))
    print(f"at {rate:.3g} TFLOP/s of training, measured now; sweeps, judges and encoder passes come on top")
    return work


# --- the runs ----------------------------------------------------------------------------------------------------


def make(run: Run, device: str) -> int:
    """All stages of one row that are not there yet; the exit code of the first that fails."""
    file = save_experiment(run.x.config, run.x.root)
    nested = run.x.config.num_levels > 1
    wanted = ["images", "encoder", "features", "bases"] if nested else ["images"]
    wanted += ["latents", "train", *(["sweep"] if run.x.config.sampling.chosen_by == "sweep" else [])]
    wanted += ["reference", "samples", "evaluation", *(["ladder"] if nested else [])]
    stages = [word for stage in wanted for word in ("--stage", stage)]
    return nestdiff(["run", str(file), *stages, "--device", device])


def make_judges(run: Run, folder: Path) -> None:
    file = save_experiment(run.x.config, run.x.root)
    done = subprocess.run([sys.executable, "-m", "scripts.judges", str(file), "--out", str(folder)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


# --- what is written down ----------------------------------------------------------------------------------------


def row(run: Run) -> dict[str, Any]:
    """The numbers of one row."""
    x = run.x
    metrics = x.artifact(Ref("evaluation")).info["metrics"]
    config = loading.sampled_config(x)
    numbers: dict[str, Any] = {"arm": run.arm, "seed": run.seed}
    order = [level.level for level in reversed(config.levels)]
    numbers["w"] = " ".join(f"{config.level(m).guidance:g}" for m in order if config.can_be_guided(m)) or "-"
    for space in SPACES:
        numbers[f"fd_{space}"] = metrics[f"fd_{space}"]["value"]
        numbers[f"fd_{space}_error"] = metrics[f"fd_{space}"]["deviation"]
    for name in ("precision_classifier", "recall_classifier", "class_entropy_classifier"):
        numbers[name] = metrics[name]["value"]
    return numbers


def real(run: Run) -> dict[str, Any]:
    """All training images in the place of samples: what there is to reach."""
    x, spaces = run.x, extractors(run.x)
    train, held_out = (open_statistics(x, split, spaces) for split in ("train", "held_out"))
    distances = {
        f"fd_{space.kind}": frechet_distance(train[space.kind].gaussian, held_out[space.kind].gaussian)
        for space in spaces
    }
    return {"arm": "training images", "seed": "", "w": "", **distances}


def conditions(run: Run) -> list[dict[str, Any]]:
    """Held-out loss of each told level at the end of training: what its condition takes off it, by quarter of t."""
    found = []
    for level in run.x.config.levels:
        line = read_json(run.x.artifact(Ref("denoiser", level.level)).path / HISTORY)[-1]
        if "held_out_loss_without_conditions" not in line:
            continue
        quarters = ("_t0.00", "_t0.25", "_t0.50", "_t0.75", "")
        lower = {
            name or "all": 1 - line[f"held_out_loss{name}"] / line[f"held_out_loss_without_conditions{name}"]
            for name in quarters
        }
        found.append({"arm": run.arm, "seed": run.seed, "level": level.level, **lower})
    return found


def write(done: Sequence[Run], out: Path) -> None:
    """table.md, table.json and the picture, from the rows that are there."""
    rows = [real(done[0]), *(row(run) for run in done)]
    told = [line for run in done if run.arm in ("l2", "l3") for line in conditions(run)]
    write_json(out / "table.json", {"rows": rows, "conditions": told})
    shown = [{key: value for key, value in r.items() if not key.endswith("_error")} | _with_errors(r) for r in rows]
    text = [format_table(shown), "Held-out loss, how much lower the condition makes it:", format_table(told)]
    (out / "table.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    first = {run.arm: run for run in done if run.seed == done[0].seed}
    panels = {
        arm: load_samples(first[arm].x.artifact(Ref("samples")).path / "samples.npz")[:36]
        for arm in SHOWN
        if arm in first
    }
    write_bytes(out / "samples.png", side_by_side(panels))
    print(text[0])


def _with_errors(row: dict[str, Any]) -> dict[str, str]:
    """Distances with their bootstrap errors."""
    return {
        f"fd_{space}": f"{row[f'fd_{space}']:.3f} ± {row[f'fd_{space}_error']:.3f}"
        for space in SPACES
        if row.get(f"fd_{space}_error") is not None
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=Path, default=Path("data/cifar10"), metavar="FOLDER", help="default: data/cifar10"
    )
    parser.add_argument(
        "--encoder", default="hub", metavar="FILE", help="SqueezeNet's weights (default: torchvision's)"
    )
    parser.add_argument(
        "--judges", type=Path, metavar="FOLDER", help="made there if need be; default: beside the images"
    )
    parser.add_argument("--scale", choices=SCALES, help="default: 32px where there is a GPU, else 16px")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
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
    arguments.scale = arguments.scale or ("32px" if device.startswith("cuda") else "16px")
    todo = runs(arguments)
    plan(todo, torch.device(device))
    if arguments.dry_run:
        return 0
    folder = Path(todo[0].x.config.evaluation.judges[-1].encoder.weights).parent
    make_judges(todo[0], folder)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for i, run in enumerate(todo):
        print(f"\n{run.name} ({i + 1} of {len(todo)})", flush=True)
        if code := make(run, device):
            return code
        write(todo[: i + 1], arguments.out)
    return 0


if __name__ == "__main__":
    main()
