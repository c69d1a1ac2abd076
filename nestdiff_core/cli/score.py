"""Score images against real ones: distances, precision and recall, each with its metric card; an estimate first.

IMAGES and REFERENCE are a folder of pictures, an .npz, WebDataset shards, or the folder of a sample set; REFERENCE may
also be an experiment, whose stage `reference` has been made, or statistics: an .npz with mu and sigma as ADM's
evaluator has them, or a folder of those that --save-reference wrote. Prints a table and writes JSON with the cards;
--compare names the fields in which these differ from another's.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from nestdiff_core.config.judging import SPACES
from nestdiff_core.errors import ConfigError, IntegrityError
from nestdiff_core.experiment import Experiment
from nestdiff_core.progress import TerminalProgress, duration
from nestdiff_core.recipes import RECIPES, load_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nestdiff_core.cli import add_device

    parser.add_argument("images", metavar="IMAGES", help="a folder, an .npz, shards, or a sample set")
    parser.add_argument("--against", required=True, metavar="REFERENCE", help="the same, an experiment, or statistics")
    parser.add_argument(
        "--extractors", nargs="+", metavar="SPACE", help="feature spaces (default: the experiment's, else pixels)"
    )
    parser.add_argument(
        "--experiment", metavar="EXPERIMENT", help="whose encoder, judges and settings of evaluation are used"
    )
    parser.add_argument("--inception-weights", metavar="FILE", help="torch-fidelity's .pth, or `download`")
    parser.add_argument("--resolution", type=int, metavar="N", help="side to which pictures are resized and cropped")
    parser.add_argument("--num-images", type=int, metavar="N", help="how many IMAGES must be there")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="images of one pass (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the subsets that are compared (default 0)")
    parser.add_argument("--out", type=Path, default=Path("scores.json"), metavar="FILE", help="default: scores.json")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="another scores.json, or an evaluation's metrics")
    parser.add_argument("--save-reference", type=Path, metavar="FOLDER", help="keep REFERENCE's statistics there")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    for name, least in (("batch_size", 1), ("resolution", 1), ("num_images", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            key = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{key} cannot be used", key=key, expected=f">= {least}", found=value, fix="Change it.")
    from nestdiff_core.devices import choose_device
    from nestdiff_core.evaluation.card import compare
    from nestdiff_core.evaluation.image_metrics import require_same_shape
    from nestdiff_core.evaluation.picture_sets import made_with, open_images
    from nestdiff_core.evaluation.report import evaluate
    from nestdiff_core.files import write_json
    from nestdiff_core.tables import format_table

    earlier = _metrics(arguments.compare)
    against = _experiment(arguments.against)
    x = against or (Experiment(load_experiment(arguments.experiment)) if arguments.experiment else None)
    device = choose_device(arguments.device or (x.config.runtime.device if x else "auto"))
    resolution = arguments.resolution or (against.config.images.resolution if against else None)
    channels = against.config.images.channels if against else None
    images = open_images(arguments.images, resolution=resolution, channels=channels, num_images=arguments.num_images)
    with TerminalProgress() as progress:
        spaces = _spaces(arguments, x, against, device, progress)
        for space in spaces:  # before a network is given what it cannot read
            require_same_shape(images[0].shape, space.reference.image_shape)
        _estimate(arguments.images, images, [space.extractor for space in spaces], arguments.batch_size)
        record = evaluate(
            images,
            spaces,
            origin=None,
            num_neighbours=x.config.evaluation.num_neighbours if x else 3,
            resamples=x.config.evaluation.resamples if x else 0,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            progress=progress,
        )
    for warning in record["warnings"]:
        print(warning, file=sys.stderr)
    rows = [
        {"number": name, "value": n["value"], "deviation": n["deviation"], "floor": n["floor"]}
        for name, n in record["metrics"].items()
    ]
    print(f"{len(images):,} images of {arguments.images} against {arguments.against}\n" + format_table(rows))
    differing = compare(record["metrics"], earlier)
    if earlier:
        print(f"\nbeside {arguments.compare}\n" + (format_table(differing) if differing else "no number in common"))
    about = {"images": arguments.images, "against": arguments.against, "made_with": made_with(arguments.images)}
    write_json(arguments.out, {**about, **record, "compared": differing})
    print(f"\n{arguments.out}: the numbers with their cards")
    return 0


def _experiment(name: str) -> Experiment | None:
    """The experiment that a name is, unless it is a place of images."""
    known = name in RECIPES or Path(name).suffix in (".yaml", ".yml", ".json")
    return Experiment(load_experiment(name)) if known else None


def _spaces(
    arguments: argparse.Namespace, x: Experiment | None, against: Experiment | None, device: str, progress: Any
) -> list[Any]:
    """What is known of REFERENCE in every space."""
    from nestdiff_core.evaluation.features import extract_all
    from nestdiff_core.evaluation.picture_sets import open_images
    from nestdiff_core.evaluation.reference import AS_THEY_ARE, BICUBIC, Space, load_statistics, resize_filter_of
    from nestdiff_core.stages.reference import open_spaces

    if against is not None:
        spaces = [space for space in open_spaces(against, device=device) if _wanted(arguments, space.extractor.kind)]
        _require(arguments, [space.extractor.kind for space in spaces])
        _save(arguments, spaces)
        return spaces
    statistics = _statistics(arguments.against)
    if statistics and arguments.extractors is None:
        arguments.extractors = list(statistics)
    extractors = _extractors(arguments, x, device)
    if statistics:
        _require(arguments, list(statistics))
        files = [(e, statistics[e.kind]) for e in extractors]
        return [Space(e, load_statistics(file, e), None, resize_filter_of(file)) for e, file in files]
    images = open_images(arguments.against, resolution=arguments.resolution)
    _estimate(arguments.against, images, extractors, arguments.batch_size)
    sets = extract_all(images, extractors, batch_size=arguments.batch_size, progress=progress, what="reference")
    resized = AS_THEY_ARE if arguments.resolution is None else BICUBIC
    spaces = [Space(e, features, None, resized) for e, features in zip(extractors, sets, strict=True)]
    _save(arguments, spaces)
    return spaces


def _save(arguments: argparse.Namespace, spaces: list[Any]) -> None:
    from nestdiff_core.evaluation.reference import save_statistics

    for space in spaces if arguments.save_reference else ():
        path = arguments.save_reference / f"{space.extractor.kind}.npz"
        save_statistics(path, space.reference, space.extractor, resize_filter=space.resize_filter)


def _extractors(arguments: argparse.Namespace, x: Experiment | None, device: str) -> list[Any]:
    from nestdiff_core.config import EvaluationConfig
    from nestdiff_core.evaluation.extractors import build_extractor
    from nestdiff_core.stages.reference import extractors

    config = x.config.evaluation if x else EvaluationConfig(extractors=("pixels",))
    names = arguments.extractors or list(config.spaces)
    judges = {judge.name: judge for judge in config.judges}
    if unknown := [name for name in names if name not in (*SPACES, *judges)]:
        raise ConfigError(
            "There is no such feature space",
            key="--extractors",
            expected=[*SPACES, *judges],
            found=unknown,
            fix="Name one of these; judges come from --experiment.",
        )
    weights = arguments.inception_weights or config.inception_weights
    if x is not None:
        config = replace(
            config,
            extractors=tuple(name for name in names if name in SPACES),
            judges=tuple(judges[name] for name in names if name in judges),
            inception_weights=weights,
        )
        return extractors(Experiment(replace(x.config, evaluation=config), x.root), device=device)
    if "encoder" in names:
        raise ConfigError(
            "The encoder's space needs the experiment that it is of",
            key="--experiment",
            expected="an experiment",
            fix="Name it, or leave encoder out of --extractors.",
        )
    if "inception" in names and not weights:
        raise ConfigError(
            "Inception needs its weights",
            key="--inception-weights",
            expected="a file or `download`",
            fix="Give torch-fidelity's .pth, or leave inception out of --extractors.",
        )
    return [build_extractor(name, inception_weights=weights, device=device) for name in names]


def _statistics(place: str) -> dict[str, Path]:
    """Files of statistics by space, where REFERENCE is one or a folder of them."""
    from nestdiff_core.evaluation.reference import describe, is_statistics, space_of

    path = Path(place).expanduser()
    if path.is_dir():
        return {space_of(file): file for file in sorted(path.glob("*.npz")) if describe(file) is not None}
    return {space_of(path): path} if path.suffix == ".npz" and path.is_file() and is_statistics(path) else {}


def _wanted(arguments: argparse.Namespace, kind: str) -> bool:
    return arguments.extractors is None or kind in arguments.extractors


def _require(arguments: argparse.Namespace, there: list[str]) -> None:
    missing = [name for name in arguments.extractors or () if name not in there]
    if missing:
        raise IntegrityError(
            "The reference has no statistics in a space that was asked for",
            stage="reference",
            path=arguments.against,
            key="--extractors",
            expected=missing,
            found=there,
            fix="Leave the space out, or make the reference with it.",
        )


def _estimate(place: str, images: Any, extractors: list[Any], batch_size: int) -> None:
    from nestdiff_core.evaluation.features import estimate_seconds

    what, seconds = ", ".join(e.kind for e in extractors), estimate_seconds(images, extractors, batch_size=batch_size)
    print(f"{place}: {len(images):,} images in {what}, {duration(seconds)}", file=sys.stderr)


def _metrics(path: Path | None) -> dict[str, Any]:
    from nestdiff_core.files import read_json

    if path is None:
        return {}
    record = None
    with contextlib.suppress(IntegrityError):  # whose cure is for artifacts
        record = read_json(path)
    if not isinstance(record, dict) or "metrics" not in record:
        raise ConfigError(
            "The file to compare with holds no numbers",
            key="--compare",
            path=path,
            expected="a JSON object with `metrics`",
            fix="Give a scores.json, or the metrics.json of an evaluation.",
        )
    return record["metrics"]
