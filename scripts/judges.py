"""Judges for an experiment's images that no part of it has seen: a classifier, and a self-supervised encoder.

python -m scripts.judges experiments/my_images.yaml --out judges
python -m scripts.judges experiments/my_images.yaml --out judges --precision bfloat16 --device cuda --epochs 30

Both are trained on the training split of the experiment's labelled images: a network of torchvision, and MoCo v3 of a
shape and seed of its own. FOLDER then holds classifier.safetensors, moco/ (an `encoder` artifact) and judges.json: how
good they are on held-out images, what they cost, hashes. The same command goes on where it was stopped, judge by judge.
What it prints at the end goes into the experiment.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from nestdiff_core import loading, stages
from nestdiff_core.artifacts import open_artifact, writing
from nestdiff_core.config import EncoderConfig, ExperimentConfig, LevelConfig, MoCoConfig
from nestdiff_core.config_io import to_dict
from nestdiff_core.devices import choose_device
from nestdiff_core.encoders import build_encoder
from nestdiff_core.encoders.classifier import ClassifierTraining, accuracy, train_classifier
from nestdiff_core.encoders.moco import labelled_batches, train_moco
from nestdiff_core.errors import ConfigError, IntegrityError, NestdiffError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import is_sealed, read_json, replacing, sha256_file, write_json
from nestdiff_core.images.index import ImageIndex
from nestdiff_core.progress import Progress, TerminalProgress, duration
from nestdiff_core.recipes import load_experiment
from nestdiff_core.recipes.depth import small_moco

logger = logging.getLogger("nestdiff")
CLASSIFIER, MOCO = "classifier", "moco"
FILE, RECORD = f"{CLASSIFIER}.safetensors", "judges.json"
DECIDING = {CLASSIFIER: ("kind", "name", "layer", "input_size"), MOCO: ("kind", "input_size", "vit", "moco")}


def cost_of_a_step(train: Callable[[int, Progress], object]) -> tuple[float, float]:
    """FLOPs and seconds of one step, from short trainings: `train` is given their steps and who listens to them."""
    times: list[float] = []
    with FlopCounterMode(display=False) as counter:
        train(1, lambda *_, **__: None)
    train(3, lambda *_, **__: times.append(time.monotonic()))
    return float(counter.get_total_flops()), (times[-1] - times[0]) / 2


def make_classifier(
    config: EncoderConfig,
    training: ClassifierTraining,
    index: ImageIndex,
    *,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """Train the classifier and write `config.weights`; returns what it is."""
    shape = (training.batch_size, index.resolution, index.resolution, index.channels)
    trial = np.random.default_rng(0).integers(0, 256, shape, np.uint8), np.arange(shape[0]) % index.num_classes

    def steps(num: int, listener: Progress) -> None:
        short = replace(training, num_steps=num)
        train_classifier(config, index.num_classes, repeat(trial), short, device=device, progress=listener)

    flops, seconds = cost_of_a_step(steps)
    logger.info("classifier: %s steps, %s", f"{training.num_steps:,}", duration(seconds * training.num_steps))
    batches, began = labelled_batches(index, training.batch_size, training.seed), time.monotonic()
    network, losses = train_classifier(config, index.num_classes, batches, training, device=device, progress=progress)
    seconds = time.monotonic() - began
    path = Path(config.weights)
    with replacing(path) as temporary:
        state = network.get_submodule("network").state_dict()
        safetensors.torch.save_file({k: v.cpu() for k, v in state.items()}, temporary)
    return {
        "held_out_accuracy": accuracy(network, index),
        "train_loss": float(np.mean(losses[-len(losses) // 20 :])),
        "sha256": sha256_file(path),
        "seconds": seconds,
        "training_flops": flops * training.num_steps,
    }


def make_moco(x: Experiment, index: ImageIndex, folder: Path, *, device: str, progress: Progress) -> dict[str, Any]:
    """Train MoCo v3 as the stage `encoder` does, with the artifact at `folder`; returns what it is."""
    config, moco = x.config.encoder, x.config.encoder.moco
    shape = (moco.batch_size, index.resolution, index.resolution, index.channels)
    trial = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def steps(num: int, listener: Progress) -> None:
        short, half = replace(config, moco=replace(moco, num_steps=num)), (0.5,) * index.channels
        train_moco(short, repeat(trial), half, half, device=device, progress=listener)

    flops, seconds = cost_of_a_step(steps)
    logger.info("moco: %s steps, %s", f"{moco.num_steps:,}", duration(seconds * moco.num_steps))
    began = time.monotonic()
    with writing(folder, x.header(Ref("encoder"))) as writer:
        made = build_encoder(config, index, writer, device=device, progress=progress)
        artifact = writer.seal(weights_source=None, **made)
    return {
        "held_out_knn_accuracy": made["knn"],
        "digest": artifact.digest,
        "seconds": time.monotonic() - began,
        "training_flops": flops * moco.num_steps,
    }


def make_judges(arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Both judges, those that are there already as they are; returns what judges.json holds."""
    out, device = arguments.out.expanduser().absolute(), choose_device(arguments.device)
    x = Experiment(load_experiment(arguments.experiment))
    images, index = stages.images(x, progress=progress), loading.open_index(x)
    if index.num_classes < 2:
        raise ConfigError(
            "A classifier needs images of several classes",
            key="images.labels",
            expected="true, and two classes or more",
            found=f"{index.num_classes} classes",
            fix="Set images.labels to true in the experiment, and give each image its class.",
        )
    num_train, flip = len(index.rows("train")), not arguments.no_flip
    network = EncoderConfig(
        kind="torchvision",
        name=arguments.network,
        layer=arguments.layer,
        weights=str(out / FILE),
        input_size=arguments.input_size or 2 * index.resolution,
    )
    training = ClassifierTraining(
        num_steps=-(-arguments.epochs * num_train // ClassifierTraining.batch_size),
        horizontal_flip=flip,
        precision=arguments.precision,
        seed=arguments.seed,
    )
    steps = -(-arguments.moco_epochs * num_train // MoCoConfig.batch_size)
    moco = small_moco(index.resolution, num_steps=steps, flip=flip, seed=arguments.seed)
    # Only images and encoder matter: levels of the experiment's own might ask more of its features than it has.
    own = ExperimentConfig(images=x.config.images, encoder=moco, levels=(LevelConfig(patch_size=1),))
    record: dict[str, Any] = read_json(out / RECORD) if (out / RECORD).is_file() else {}

    def keep(
        name: str, config: EncoderConfig, further: dict[str, Any], whole: bool, make: Callable[[], dict[str, Any]]
    ) -> None:
        encoder = {key: value for key, value in to_dict(config).items() if key in DECIDING[name]}
        made_of = {"images": images.digest, "encoder": encoder, **further}
        if not whole or record.get(name, {}).get("made_of") != made_of:
            record[name] = {**make(), "made_of": made_of}
            write_json(out / RECORD, record)

    file, folder = Path(network.weights), out / MOCO
    keep(
        CLASSIFIER,
        network,
        {"num_classes": index.num_classes, "training": asdict(training)},
        file.is_file() and sha256_file(file) == record.get(CLASSIFIER, {}).get("sha256"),
        lambda: make_classifier(network, training, index, device=device, progress=progress),
    )
    keep(
        MOCO,
        moco,
        {},
        _is_whole(folder),
        lambda: make_moco(Experiment(own, x.root), index, folder, device=device, progress=progress),
    )
    return record


def judges_of(record: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """What `evaluation.judges` of an experiment says, to have these."""
    out, classifier = out.expanduser().absolute(), record[CLASSIFIER]["made_of"]
    encoder = {key: classifier["encoder"][key] for key in DECIDING[CLASSIFIER]} | {"weights": str(out / FILE)}
    return [
        {"name": CLASSIFIER, "num_classes": classifier["num_classes"], "unit_length": True, "encoder": encoder},
        {"name": MOCO, "encoder": {"kind": "moco", "weights": str(out / MOCO)}},
    ]


def _is_whole(folder: Path) -> bool:
    try:
        return is_sealed(folder) and open_artifact(folder, stage="encoder").verify() > 0
    except IntegrityError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="a recipe, or the path of a .yaml file, with images.labels: true")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--network", default="resnet18", help="torchvision's name (default: resnet18)")
    parser.add_argument("--layer", default="layer4", help="whose averaged output is its vector (default: layer4)")
    parser.add_argument("--input-size", type=int, help="side to which images are resized (default: twice theirs)")
    parser.add_argument("--epochs", type=int, default=8, help="of the classifier (default: 8)")
    parser.add_argument("--moco-epochs", type=int, default=5, help="of MoCo v3 (default: 5)")
    parser.add_argument("--no-flip", action="store_true", help="no mirror images: for digits and text")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the classifier")
    parser.add_argument("--seed", type=int, default=1, help="let it be no arm's (default: 1)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        with TerminalProgress() as progress:
            record = make_judges(arguments, progress)
    except NestdiffError as error:
        raise SystemExit(f"{error}") from None
    knn = record[MOCO]["held_out_knn_accuracy"]
    print(f"# classifier: {record[CLASSIFIER]['held_out_accuracy']:.1%} of held-out images")
    print(f"# moco: {knn['encoder']:.1%} by its {knn['k']} nearest neighbours (pixels {knn['pixels']:.1%}, "
          f"untrained {knn['untrained']:.1%})")  # fmt: skip
    print(yaml.safe_dump({"evaluation": {"judges": judges_of(record, arguments.out)}}, sort_keys=False), end="")


if __name__ == "__main__":
    main()
