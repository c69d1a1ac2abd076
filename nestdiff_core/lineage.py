"""What every stage reads: which part of the configuration, and which other artifacts.

Where a stage's artifact lies follows from both (experiment.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from nestdiff_core.config import ExperimentConfig
from nestdiff_core.config_io import deciding


class Ref(NamedTuple):
    """A stage of the pipeline, with the level's number where it has one key per level."""

    stage: str
    level: int | None = None

    def __str__(self) -> str:
        return self.stage if self.level is None else f"{self.stage} of level {self.level}"


@dataclass(frozen=True)
class Stage:
    """What a stage reads: the part of the configuration, and the artifacts (see module docstring)."""

    config: Callable[[ExperimentConfig, int], dict[str, Any]]
    inputs: Callable[[ExperimentConfig, int], tuple[Ref, ...]]
    job: str  # the job that makes it; {level} is filled in
    # Whether it stays what it is when images are added, and is then at most extended: addressed by the fingerprint of
    # the images, not by their digest.
    grows: Callable[[ExperimentConfig], bool] = lambda _: False


def _denoiser_config(c: ExperimentConfig, level: int) -> dict[str, Any]:
    """Own shape and training, and what the conditions are: listed from the top, not keyed by number, so that a
    level inserted below does not change the denoisers above it."""
    own = deciding(c.level(level))
    conditions = [
        {"patch_size": c.level(m).patch_size, "condition_noise": c.level(m).condition_noise}
        for m in c.levels_above(level)
    ]
    return {
        "patch_size": own["patch_size"],
        "model": own["model"],
        "train": own["train"],
        "conditions": conditions,
        "injection": c.conditioning.injection if conditions else None,
        "labels": c.conditioning.labels,
        "drop": c.conditioning.drop,
        "diffusion": deciding(c.diffusion),
    }


def _tokens(c: ExperimentConfig, level: int) -> dict[str, Any]:
    """What decides a level's tokens, beside its inputs."""
    own = {"source": c.level(level).source, "grid": c.level(level).grid}
    return own if c.features.keep else {**own, "features": deciding(c.features)}


def _token_inputs(c: ExperimentConfig, level: int) -> tuple[Ref, ...]:
    """What a level's tokens are made from: a store of features, or without one the images and the encoder."""
    return (level_features(c, level),) if c.features.keep else (Ref("images"), Ref("encoder"))


def _denoiser_inputs(c: ExperimentConfig, level: int) -> tuple[Ref, ...]:
    text = (Ref("text"),) if c.conditioning.labels == "text" else ()
    return Ref("images"), *text, *(Ref("latents", m) for m in (*c.levels_above(level), level))


def level_features(c: ExperimentConfig, level: int) -> Ref:
    """Where a level's tokens come from: the crops' own store, or the features of whole images."""
    return Ref("crops", level) if c.has_crops(level) else Ref("features")


def _latents_config(c: ExperimentConfig, level: int) -> dict[str, Any]:
    store = {"chunk_rows": c.features.chunk_rows, "dtype": c.features.dtype}
    if level == 1:
        return {"autoencoder": deciding(c.autoencoder), "flip": c.features.flip, **store}
    return {**_tokens(c, level), **store}


def _encoder_config(c: ExperimentConfig, _: int) -> dict[str, Any]:
    plain = deciding(c.encoder)
    kind = c.encoder.kind
    used = {"kind", "input_size", "mean", "std"} | {
        "moco": {"vit", "moco"},
        "torchvision": {"name", "weights", "layer"},
        "autoencoder": {"fold"},
    }.get(kind, {"name", "weights"})
    autoencoder = {"autoencoder": deciding(c.autoencoder)} if kind == "autoencoder" else {}
    return {k: v for k, v in plain.items() if k in used} | autoencoder


def _reference_config(c: ExperimentConfig, _: int) -> dict[str, Any]:
    config = deciding(c.evaluation)
    names = ["extractors", "inception_weights", "judges", "reference_statistics"]
    if c.evaluation.reference_statistics:
        names.append("reference")
    return {name: config[name] for name in names if name in config}


def _judging_inputs(c: ExperimentConfig) -> tuple[Ref, ...]:
    """What judging images reads beside them: the encoder where it is one of the judges, and the reference."""
    encoder = (Ref("encoder"),) if "encoder" in c.evaluation.extractors else ()
    return Ref("images"), *encoder, Ref("reference")


def _cascade_config(c: ExperimentConfig) -> dict[str, Any]:
    """How the cascade is sampled, whatever is made of it."""
    knobs = ("guide_step", "noise_gamma", "num_evaluations", "sampled_decay")
    own = [{k: v for k, v in deciding(level).items() if k in knobs} for level in c.levels]
    return {
        "sampling": deciding(c.sampling),
        "guidance": [[level.guidance, *level.guidance_interval] for level in c.levels],
        **({"levels": own} if any(own) else {}),
    }


def _chosen(c: ExperimentConfig) -> tuple[Ref, ...]:
    return (Ref("sweep"),) if c.sampling.chosen_by == "sweep" else ()


def _ladder_config(c: ExperimentConfig, _: int) -> dict[str, Any]:
    cascade = _cascade_config(c)
    return {
        **deciding(c.ladder),
        **cascade,
        "sampling": {k: v for k, v in cascade["sampling"].items() if k != "num_images"},
        "num_neighbours": c.evaluation.num_neighbours,
    }


def _ladder_inputs(c: ExperimentConfig, _: int) -> tuple[Ref, ...]:
    return *_judging_inputs(c), *_trained_inputs(c), *_chosen(c)


def _pictures_config(c: ExperimentConfig, _: int) -> dict[str, Any]:
    cascade = _cascade_config(c)
    unread = ("num_images", "batch_size", "compile")
    return {**cascade, "sampling": {k: v for k, v in cascade["sampling"].items() if k not in unread}}


def _pictures_inputs(c: ExperimentConfig, level: int) -> tuple[Ref, ...]:
    return tuple(ref for ref in _ladder_inputs(c, level) if ref.stage not in ("encoder", "reference"))


def _watch_config(c: ExperimentConfig, level: int) -> dict[str, Any]:
    """The yardstick: what must be the same for two numbers of the history to be compared. A sweep chooses for finished
    weights, so nothing here follows it."""
    config = _ladder_config(c, level)
    return {
        **config,
        "sampling": {k: v for k, v in config["sampling"].items() if k != "chosen_by"},
        "space": c.evaluation.spaces[0],  # of the images' distance; statistics of several do not tell their order
        **deciding(c.watch),
    }


def _watch_inputs(c: ExperimentConfig, level: int) -> tuple[Ref, ...]:
    """Of the ladder's all but the denoisers, whose weights are what is watched, and what only follows from them."""
    return tuple(ref for ref in _ladder_inputs(c, level) if ref.stage not in ("denoiser", "sweep"))


def _sweep_config(c: ExperimentConfig, _: int) -> dict[str, Any]:
    cascade, evaluation = _cascade_config(c), deciding(c.evaluation)
    unread, judging = ("num_images", "chosen_by"), ("extractors", "inception_weights", "judges", "num_neighbours")
    return {
        **cascade,
        "sampling": {k: v for k, v in cascade["sampling"].items() if k not in unread},
        "evaluation": {k: v for k, v in evaluation.items() if k in (*judging, "reference")},
        "sweep": deciding(c.sweep),
    }


def _trained_inputs(c: ExperimentConfig) -> tuple[Ref, ...]:
    """Denoisers and the latents and captions that they were trained on."""
    text = (Ref("text"),) if c.conditioning.labels == "text" else ()
    numbers = [level.level for level in c.levels]
    return *text, *(Ref("latents", m) for m in numbers), *(Ref("denoiser", m) for m in numbers)


def _neighbours_inputs(c: ExperimentConfig, _: int) -> tuple[Ref, ...]:
    latents = (Ref("latents", level.level) for level in c.levels)
    features = (Ref("features"),) if c.features.keep else ()
    return Ref("images"), Ref("encoder"), *features, *latents, Ref("samples")


STAGES: dict[str, Stage] = {
    "images": Stage(lambda c, _: deciding(c.images), lambda c, _: (), "build_latents"),
    "encoder": Stage(
        _encoder_config, lambda c, _: (Ref("images"),), "build_latents", grows=lambda c: c.encoder.kind != "moco"
    ),
    "features": Stage(
        lambda c, _: deciding(c.features),
        lambda c, _: (Ref("images"), Ref("encoder")),
        "build_latents",
        grows=lambda _: True,
    ),
    "crops": Stage(
        lambda c, level: {"grid": c.level(level).grid, **deciding(c.features)},
        lambda c, _: (Ref("images"), Ref("encoder")),
        "build_latents",
        grows=lambda _: True,
    ),
    "text": Stage(
        lambda c, _: {**deciding(c.conditioning.text), "chunk_rows": c.features.chunk_rows, "dtype": c.features.dtype},
        lambda c, _: (Ref("images"),),
        "build_latents",
        grows=lambda _: True,
    ),
    "moments": Stage(
        _tokens,
        lambda c, level: tuple(dict.fromkeys((Ref("images"), *_token_inputs(c, level)))),
        "build_latents",
    ),
    "svd_basis": Stage(
        lambda c, level: {"channels": c.level(level).channels},
        lambda c, level: (Ref("moments", level),),
        "build_latents",
    ),
    "design": Stage(
        lambda c, _: (
            deciding(c.design) if c.features.keep else {**deciding(c.design), "features": deciding(c.features)}
        ),
        lambda c, _: (Ref("images"), Ref("features") if c.features.keep else Ref("encoder")),
        "design_levels",
    ),
    "latents": Stage(
        _latents_config,
        lambda c, level: (Ref("images"),) if level == 1 else (*_token_inputs(c, level), Ref("svd_basis", level)),
        "build_latents",
    ),
    "denoiser": Stage(
        _denoiser_config,
        _denoiser_inputs,
        "train_level_{level}",
    ),
    "sweep": Stage(_sweep_config, lambda c, _: (*_judging_inputs(c)[:-1], *_trained_inputs(c)), "sweep"),
    "samples": Stage(
        lambda c, _: _cascade_config(c),
        lambda c, _: (*(Ref("denoiser", level.level) for level in c.levels), *_chosen(c)),
        "evaluate",
    ),
    "reference": Stage(_reference_config, lambda c, _: _judging_inputs(c)[:-1], "evaluate"),
    "evaluation": Stage(
        lambda c, _: deciding(c.evaluation), lambda c, _: (*_judging_inputs(c), Ref("samples")), "evaluate"
    ),
    "ladder": Stage(_ladder_config, _ladder_inputs, "evaluate"),
    "neighbours": Stage(
        lambda c, _: {**deciding(c.neighbours), "coverage": c.evaluation.num_neighbours}, _neighbours_inputs, "evaluate"
    ),
    "pictures": Stage(_pictures_config, _pictures_inputs, "evaluate"),
    "watch": Stage(_watch_config, _watch_inputs, "watch"),
    # It shows what there is: what that was, it says itself (stages/report.py).
    "report": Stage(
        lambda c, _: {name: value for name, value in deciding(c).items() if name != "runtime"},
        lambda c, _: (),
        "evaluate",
    ),
}

PER_LEVEL = ("crops", "moments", "svd_basis", "latents", "denoiser")
