"""Show an experiment: its levels, what they cost and carry, which stages have been made, and its numbers.

Nothing is computed and nothing is written.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from nestdiff_core.config import ExperimentConfig
from nestdiff_core.config_io import to_dict
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import load_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nestdiff_core.cli import add_experiment

    add_experiment(parser)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout: levels, stages and the whole configuration"
    )


def run(arguments: argparse.Namespace) -> int:
    experiment = Experiment(load_experiment(arguments.experiment))
    levels, stages, numbers = level_table(experiment.config), stage_table(experiment), number_table(experiment)
    if arguments.json:
        config = to_dict(experiment.config)
        print(json.dumps({"levels": levels, "stages": stages, "numbers": numbers, "config": config}, indent=1))
        return 0
    print(
        f"experiment {experiment.config.name!r}, {experiment.config.num_levels} levels, artifacts in "
        f"{experiment.root}\n"
    )
    print(*(format_table(table) for table in (levels, stages, numbers) if table), sep="\n\n")
    if samples := experiment.find(Ref("samples")):
        print(f"\nsamples: {samples.path / 'samples.npz'}")
    return 0


def level_table(config: ExperimentConfig) -> list[dict[str, Any]]:
    """A row per level, from the top: shape, tokens, size and cost of its denoiser, noise and information of its latent.

    MACs are those of one forward pass for one image, attention included. nats: what z_l can tell as a condition,
    1/2 log(1 + 1/sigma^2) per standardised dimension (infinite without noise).
    """
    import torch

    from nestdiff_core.latents.capacity import capacity_nats
    from nestdiff_core.models import build_denoiser, count_macs, count_parameters

    rows = []
    for level in reversed(config.levels):
        with torch.device("meta"):
            model = build_denoiser(config, level.level, num_classes=10 if config.conditioning.labels == "class" else 0)
        channels, height, width = config.latent_shape(level.level)
        rows.append(
            {
                "level": level.level,
                "z": f"{height}x{width}x{channels}",
                "patch": level.patch_size,
                "tokens": model.num_tokens,
                "parameters": count_parameters(model),
                "MACs": count_macs(model),
                "reads": ", ".join(f"z_{m}" for m in config.levels_above(level.level)) or "-",
                "sigma": level.condition_noise if level.level > 1 else None,
                "nats": round(capacity_nats(level.condition_noise, channels * height * width), 1)
                if level.level > 1
                else None,
                "guidance": level.guidance,
                "steps": level.train.num_steps,
            }
        )
    return rows


def stage_table(experiment: Experiment) -> list[dict[str, Any]]:
    """A row per artifact, in the order in which they are made: where it lies, or that it has not been made."""
    rows = []
    for ref in experiment.refs():
        artifact = experiment.find(ref)
        place = str(artifact.path.relative_to(experiment.root)) if artifact else "not made"
        rows.append({"stage": ref.stage, "level": ref.level, "artifact": place})
    return rows


def number_table(experiment: Experiment) -> list[dict[str, Any]]:
    """A row per number of the evaluation, none before it has been made.

    samples: all of them. matched: as many as there are real held-out images, whose own number is beside it, since
    distances shrink with more images. Further columns: other sample sets. confidence: the probe's, where it is on.
    """
    artifact = experiment.find(Ref("evaluation"))
    if artifact is None:
        return []
    metrics, probe = artifact.info["metrics"], artifact.info["probe"]
    rows = [
        {"number": name, "samples": n["value"], "matched": n["value_at_floor"], "held out": n["floor"], **n["others"]}
        for name, n in metrics.items()
    ]
    if probe:
        others = {name: seen["confidence"] for name, seen in probe["others"].items()}
        confidence = {
            "samples": probe["samples"]["confidence"],
            "matched": None,
            "held out": probe["held_out"]["confidence"],
        }
        rows.append({"number": "confidence", **confidence, **others})
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as aligned text; numbers to the right."""
    cells = [[_format(value) for value in row.values()] for row in rows]
    headers = list(rows[0])
    widths = [max(len(headers[i]), *(len(row[i]) for row in cells)) for i in range(len(headers))]
    right = [all(isinstance(row[h], (int, float, type(None))) for row in rows) for h in headers]

    def line(values: list[str]) -> str:
        return "  ".join(
            v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)
        ).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *(line(row) for row in cells)])


def _format(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
