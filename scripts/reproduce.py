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

from nestdiff_core import loading
from nestdiff_core.cli import main as nestdiff
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.devices import choose_device
from nestdiff_core.errors import ConfigError, NestdiffError
from nestdiff_core.evaluation.figures import loss_curve
from nestdiff_core.evaluation.samples import load_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import read_json, write_bytes, write_json
from nestdiff_core.models.nested import build_denoiser, count_macs
from nestdiff_core.progress import duration
from nestdiff_core.recipes import save_experiment
from nestdiff_core.recipes.depth import ARMS, CLASS_ARMS, SCALES, Scale, judges
from nestdiff_core.tables import format_table
from nestdiff_core.training.estimate import estimate
from scripts.figures import side_by_side
from scripts.judges import CLASSIFIER, MOCO, RECORD

DISTANCES = ("fd_classifier", "fd_moco", "fd_pixels")
NUMBERS = (*DISTANCES, "precision_classifier", "recall_classifier", "class_entropy_classifier")
OWN = ("code_version", "origin", "samples_digest")  # fields of a card in which the rows of one table may differ
QUARTERS = ("_t0.00", "_t0.25", "_t0.50", "_t0.75", "")
JUDGES_SEED = 1000  # no arm's
HISTORY = "history.json"
SHOWN = ("l1", "l1_autoguided", "l2_autoguided", "l3_autoguided"), ("l1", "l2", "l3")  # side by side, one or the other


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
    scale, folder = scale_of(arguments), judges_folder(arguments)
    images = arguments.images or scale.images
    images = images if "://" in images else str(Path(images).expanduser().absolute())
    autoencoder = scale.autoencoder
    if arguments.autoencoder and autoencoder.kind != "identity":
        autoencoder = replace(autoencoder, weights=arguments.autoencoder)
    found = []
    for seed in arguments.seeds:
        for arm in arguments.arms:
            config = (ARMS | CLASS_ARMS)[arm](scale)
            config = replace(
                config,
                images=replace(config.images, path=images),
                autoencoder=autoencoder,
                encoder=replace(config.encoder, weights=arguments.encoder),
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


def network(run: Run, level: int) -> tuple[str, int]:
    """Arms with the same networks share their name up to how they are sampled."""
    return run.arm.removesuffix("_contrast").removesuffix("_autoguided").removesuffix("_guided"), level


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


# --- what is written down ----------------------------------------------------------------------------------------


def row(run: Run) -> dict[str, Any]:
    """The numbers of one row, with the bootstrap errors of the distances and the metric cards."""
    x = run.x
    metrics, config = x.artifact(Ref("evaluation")).info["metrics"], loading.sampled_config(x)
    order = [level.level for level in reversed(config.levels) if config.can_be_guided(level.level)]
    passes = {
        m.level: config.num_evaluations(m.level) * (2 if m.guidance and config.can_be_guided(m.level) else 1)
        for m in config.levels
    }
    macs = sum(x.artifact(Ref("denoiser", level)).info["macs"] * count for level, count in passes.items())
    told = {"arm": run.arm, "seed": str(run.seed), "w": " ".join(f"{config.level(m).guidance:g}" for m in order) or "-"}
    numbers = {name: metrics[name]["value"] for name in NUMBERS}
    errors = {name: metrics[name]["deviation"] for name in DISTANCES}
    cards = {name: metrics[name]["card"] for name in NUMBERS}
    return {**told, "sampling_gmacs": macs / 1e9, **numbers, "errors": errors, "cards": cards}


def real(run: Run) -> dict[str, Any]:
    """As many training images in the place of samples (which the judges were trained on)."""
    metrics = run.x.artifact(Ref("evaluation")).info["metrics"]
    numbers = {name: metrics[name]["floor"] for name in NUMBERS}
    return {"arm": "training images", "seed": "", "w": "", "sampling_gmacs": None, **numbers, "errors": {}, "cards": {}}


def conditions(done: Sequence[Run]) -> list[dict[str, Any]]:
    """Held-out loss of each told level at the end of its training: the share that its condition takes off it, by
    quarter of t. A denoiser that two arms share is there once."""
    found: dict[str, dict[str, Any]] = {}
    for run in done:
        for level in run.x.config.levels:
            denoiser = run.x.artifact(Ref("denoiser", level.level))
            line = read_json(denoiser.path / HISTORY)[-1]
            if "held_out_loss_without_conditions" in line and denoiser.fingerprint not in found:
                lower = {
                    f"t{name.removeprefix('_t')}" if name else "all": 1
                    - line[f"held_out_loss{name}"] / line[f"held_out_loss_without_conditions{name}"]
                    for name in QUARTERS
                }
                found[denoiser.fingerprint] = {"arm": run.arm, "seed": str(run.seed), "level": level.level, **lower}
    return list(found.values())


def curves(done: Sequence[Run]) -> bytes:
    """PNG: held-out loss of each level 1 over the FLOPs of its training, of the first training seed; of a told one also
    with its condition withheld, which is what L = 1 has to do."""
    measured: dict[str, dict[float, float]] = {}
    seen = set()
    for run in (run for run in done if run.seed == done[0].seed):
        denoiser = run.x.artifact(Ref("denoiser", 1))
        if denoiser.fingerprint in seen:
            continue
        seen.add(denoiser.fingerprint)
        tflops = 6e-12 * denoiser.info["macs"] * run.x.config.level(1).train.batch_size
        arm, _ = network(run, 1)
        for line in read_json(denoiser.path / HISTORY):
            for name, key in ((arm, "held_out_loss"), (f"{arm}, told nothing", "held_out_loss_without_conditions")):
                if key in line:
                    measured.setdefault(name, {})[tflops * line["step"]] = line[key]
    spent = sorted({x for curve in measured.values() for x in curve})
    return loss_curve(
        spent,
        {name: [curve.get(x) for x in spent] for name, curve in measured.items()},
        title="Level 1, held-out images",
        xlabel="TFLOP of its training",
    )


def write(rows: Sequence[dict[str, Any]], told: Sequence[dict[str, Any]], panels: dict[str, Any], out: Path) -> None:
    """table.md, table.json and samples.png, of what there is so far."""
    shared, own = split_cards(rows)
    numbers = [{key: value for key, value in row.items() if key != "cards"} for row in rows]
    kept = [{**row, "card": card} for row, card in zip(numbers, own, strict=True)]
    write_json(out / "table.json", {"rows": kept, "cards": shared, "conditions": list(told)})
    text = [format_table([_with_errors(row) for row in numbers])]
    unlike = [
        {"arm": row["arm"], "seed": row["seed"], "differs in": " ".join(card["differs"])}
        for row, card in zip(rows, own, strict=True)
        if card["differs"]
    ]
    if unlike:
        text += ["Measured otherwise than the first row, so not to be compared with it:", format_table(unlike)]
    if told:
        text += ["Share of the held-out loss that the condition takes off it:", format_table(list(told))]
    (out / "table.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    if panels:
        write_bytes(out / "samples.png", side_by_side(panels))
    print(text[0])


def split_cards(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the cards of a table say: of each number once, and of each row what is its own; `differs` lists the fields
    in which a row was measured otherwise than the first one that has cards, as NUMBER.FIELD."""
    shared: dict[str, Any] = {}
    own = []
    for row in rows:
        cards: dict[str, dict[str, Any]] = row["cards"]
        common = {name: {k: v for k, v in card.items() if k not in OWN} for name, card in cards.items()}
        shared = shared or common
        differs = [f"{n}.{k}" for n in common for k in shared[n] if common[n].get(k) != shared[n][k]]
        card = {k: v for k, v in cards[DISTANCES[0]].items() if k in OWN} if cards else {}
        own.append({**card, "differs": differs})
    return shared, own


def _with_errors(row: dict[str, Any]) -> dict[str, Any]:
    """Its distances as value ± bootstrap error."""
    shown = {key: value for key, value in row.items() if key != "errors"}
    return shown | {name: f"{row[name]:.3f} ± {error:.3f}" for name, error in row["errors"].items()}


def pictures(done: Sequence[Run]) -> dict[str, Any]:
    """The same seeds side by side, of the first training seed: of the arms in SHOWN of which more are done."""
    first = {run.arm: run.x for run in done if run.seed == done[0].seed}
    shown = max(([arm for arm in arms if arm in first] for arms in SHOWN), key=len)
    return {arm: load_samples(first[arm].artifact(Ref("samples")).path / "samples.npz")[:36] for arm in shown}


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
        "--arms", nargs="+", choices=ARMS | CLASS_ARMS, default=list(ARMS), help="default: all without class"
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
