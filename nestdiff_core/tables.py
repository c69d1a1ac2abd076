"""Tables of an experiment: its levels and their costs, which stages have been made, its numbers.

Rows of equal keys, from plain JSON data; who shows them (`inspect`, the report) chooses columns. Tables of one stage's
record stand beside it (evaluation/ladder.py, neighbours.py, sweep.py).
"""

from __future__ import annotations

from typing import Any

from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import RECIPES
from nestdiff_core.recipes.paper import CLASSES, PRINTED

HELD_OUT, TRAINING = "held out", "training"


def level_table(experiment: Experiment) -> list[dict[str, Any]]:
    """A row per level, from the top: the latent, what it can tell, and size and cost of its denoiser.

    parameters: with and without position embeddings (the paper leaves them out). MACs: one forward pass for one image,
    attention included. GFlops iclr, cvpr: as the paper's two versions count them, 2 MACs of linear and convolution
    layers without attention, and MACs with attention and five operations for each number in a LayerNorm.
    guidance: as it is sampled with, which is what a sweep chose where `sampling.chosen_by` says so and one was made.
    nats: what z_l can tell as a condition, 1/2 log(1 + 1/sigma^2) per standardised dimension. KL nats: the paper's
    measure, KL(N(z_l, sigma^2 I) || N(0, I)) on standardised channels. Both are infinite without noise.
    """
    import numpy as np
    import torch

    from nestdiff_core import loading
    from nestdiff_core.latents.capacity import capacity_nats, kl_nats
    from nestdiff_core.models import build_denoiser, count_layer_norms, count_macs, count_parameters

    config, rows = experiment.config, []
    sampled = loading.sampled_config(experiment) if experiment.find(Ref("sweep")) else config
    for level in reversed(config.levels):
        with torch.device("meta"):
            model = build_denoiser(config, level.level, num_classes=_num_classes(experiment))
        channels, height, width = config.latent_shape(level.level)
        size, above = channels * height * width, level.level > 1
        sigma = level.condition_noise
        rows.append(
            {
                "level": level.level,
                "z": f"{height}x{width}x{channels}",
                "source": level.source if above else config.autoencoder.kind,
                "patch": level.patch_size,
                "reads": ", ".join(f"z_{m}" for m in config.levels_above(level.level)) or "-",
                "sigma": sigma if above else None,
                "nats": round(capacity_nats(sigma, size), 1) if above else None,
                "KL nats": round(kl_nats(np.ones((1, size)), sigma), 1) if above else None,
                "guidance": sampled.level(level.level).guidance,
                "steps": level.train.num_steps,
                "tokens": model.num_tokens,
                "condition tokens": model.num_condition_tokens,
                "parameters": count_parameters(model),
                "without positions": count_parameters(model, positions=False),
                "MACs": (macs := count_macs(model)),
                "GFlops iclr": 2 * count_macs(model, attention=False) / 1e9,
                "GFlops cvpr": (macs + count_layer_norms(model)) / 1e9,
            }
        )
    return rows


def total_row(levels: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the levels of what adds up."""
    summed = ("parameters", "without positions", "MACs", "GFlops iclr", "GFlops cvpr")
    return {"level": "all"} | {name: sum(row[name] for row in levels) for name in summed}


def paper_table(config: ExperimentConfig) -> list[dict[str, Any]]:
    """What the paper prints about size and cost of this recipe beside what is counted here; none for other recipes.

    Its first version prints the whole of L = 1 and what each further level adds, its second the whole.
    """
    printed = PRINTED.get(config.name)
    if printed is None:
        return []
    first_version = config.name.startswith("iclr")
    cost, decimals = ("GFlops iclr", 2) if first_version else ("GFlops cvpr", 1)
    total = total_row(level_table(Experiment(config)))
    rows = [
        ("parameters, millions", printed.parameters, total["without positions"] / 1e6, 2),
        ("GFlops", printed.gflops, total[cost], decimals),
    ]
    below = RECIPES.get(f"{config.name.removesuffix(str(config.num_levels))}{config.num_levels - 1}")
    if below is not None:
        before = total_row(level_table(Experiment(below())))
        added = (total["without positions"] - before["without positions"]) / 1e6
        rows.append(("parameters added, millions", printed.growth, added, 2))
        rows.append(("GFlops added", printed.gflops_growth, total[cost] - before[cost], decimals))
    return [
        {
            "paper": name,
            "printed": value,
            "counted": round(counted, digits),
            "reproduced": "yes" if round(counted, digits) == value else "no",
        }
        for name, value, counted, digits in rows
        if value is not None
    ]


def _num_classes(experiment: Experiment) -> int:
    """Of the images, where they have been read; else of the paper's data set, or ten."""
    if experiment.config.conditioning.labels != "class":
        return 0
    images = experiment.find(Ref("images"))
    return images.info["num_classes"] if images else CLASSES.get(experiment.config.name) or 10


def stage_table(experiment: Experiment) -> list[dict[str, Any]]:
    """A row per artifact, in the order in which they are made: where it lies, or that it has not been made."""
    rows = []
    for ref in experiment.refs():
        artifact = experiment.find(ref)
        place = str(artifact.path.relative_to(experiment.root)) if artifact else "not made"
        rows.append({"stage": ref.stage, "level": ref.level, "artifact": place})
    return rows


def floor_name(config: ExperimentConfig) -> str:
    """The real images whose numbers stand beside those of samples: those that samples are not compared with."""
    return HELD_OUT if config.evaluation.reference == "train" else TRAINING


def number_table(experiment: Experiment) -> list[dict[str, Any]]:
    """A row per number of the evaluation, none before it has been made.

    samples: all of them. matched: as many as there are real images of the split that nothing is compared with, whose
    own number is beside it (`floor_name`), since distances shrink with more images. Further columns: other sample
    sets. confidence: the probe's, where it is on.
    """
    floor = floor_name(experiment.config)
    artifact = experiment.find(Ref("evaluation"))
    if artifact is None:
        return []
    metrics, probe = artifact.info["metrics"], artifact.info["probe"]
    rows = [
        {"number": name, "samples": n["value"], "matched": n["value_at_floor"], floor: n["floor"], **n["others"]}
        for name, n in metrics.items()
    ]
    if probe:
        others = {name: seen["confidence"] for name, seen in probe["others"].items()}
        confidence = {
            "samples": probe["samples"]["confidence"],
            "matched": None,
            floor: probe["held_out"]["confidence"],
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
