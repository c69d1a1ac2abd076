"""Which artifact belongs to which part of an experiment, and where it lies.

Three questions are answered here and nowhere else, for every stage (and level):

    config    which part of the configuration does the stage read?
    inputs    which other artifacts does it read?
    address   where under the artifact root is its result?   root / stage / fingerprint(config, inputs' digests)

so two experiments that agree about images and encoder share one feature store, and a changed sigma_3 gives
new denoisers below level 3 and leaves everything else where it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nestdiff_core.artifacts import SCHEMA_VERSION, Artifact, ArtifactWriter, open_artifact, writing
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.config_io import deciding
from nestdiff_core.errors import IntegrityError, LockHeld
from nestdiff_core.files import MANIFEST, fingerprint, is_sealed, read_json
from nestdiff_core.mirror import Mirror


class Ref(NamedTuple):
    """A stage of the pipeline, with the level's number where it has one key per level."""

    stage: str
    level: int | None = None

    def __str__(self) -> str:
        return self.stage if self.level is None else f"{self.stage} of level {self.level}"


Known = dict[Ref, Artifact]


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
    return (_level_features(c, level),) if c.features.keep else (Ref("images"), Ref("encoder"))


def _denoiser_inputs(c: ExperimentConfig, level: int) -> tuple[Ref, ...]:
    text = (Ref("text"),) if c.conditioning.labels == "text" else ()
    return Ref("images"), *text, *(Ref("latents", m) for m in (*c.levels_above(level), level))


def _level_features(c: ExperimentConfig, level: int) -> Ref:
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


def home() -> Path:
    """The artifact root: NESTDIFF_HOME, else `artifacts` in the working directory."""
    return Path(os.environ.get("NESTDIFF_HOME") or "artifacts").expanduser().absolute()


class Experiment:
    """An experiment's configuration joined with the artifact root: resolves every stage's artifact.

    mirror: the object storage that holds artifacts for several machines, where NESTDIFF_REMOTE names one.
    """

    def __init__(self, config: ExperimentConfig, root: Path | None = None) -> None:
        self.config = config
        self.root = root if root is not None else home()
        self.mirror = Mirror.from_environment(self.root)
        self._seen: dict[Path, str | None] = {}  # digest of what `find` found last, None: nothing

    def refs(self) -> list[Ref]:
        """Every artifact that this experiment needs, in the order in which they are made."""
        return [
            ref
            for stage in STAGES
            for ref in (
                [Ref(stage, level.level) for level in self.config.levels] if stage in PER_LEVEL else [Ref(stage)]
            )
            if self._needs(ref)
        ]

    def _needs(self, ref: Ref) -> bool:
        match ref:
            case ("design" | "watch", _):
                return False  # a proposal, which nothing reads; a history, which never ends
            case ("sweep", _):
                return self.config.sampling.chosen_by == "sweep"
            case ("text", _):
                return self.config.conditioning.labels == "text"
            case ("features", _):
                return self.config.features.keep
            case ("crops", int(level)):
                return self.config.features.keep and self.config.has_crops(level)
            case ("moments" | "svd_basis", level):
                return level != 1
            case _:
                return True

    def stage_config(self, ref: Ref) -> dict[str, Any]:
        """The part of the configuration that decides the artifact, as plain JSON."""
        return STAGES[ref.stage].config(self.config, ref.level or 0)

    def inputs(self, ref: Ref) -> tuple[Ref, ...]:
        return STAGES[ref.stage].inputs(self.config, ref.level or 0)

    def level_features(self, level: int) -> Ref:
        """Which feature store the tokens of a level above 1 come from."""
        return _level_features(self.config, level)

    def config_hash(self, ref: Ref) -> str:
        """Hash of everything in the configuration that the artifact depends on, ancestors included.

        Known before anything has run; Dagster compares it to tell what went stale (design decision 3).
        """
        return fingerprint([ref.stage, self.stage_config(ref), [self.config_hash(i) for i in self.inputs(ref)]])

    def header(self, ref: Ref, *, _known: Known | None = None) -> dict[str, Any]:
        """What the artifact's manifest begins with: stage, level, fingerprint, config, inputs.

        Raises IntegrityError when an input has not been made.
        """
        stage, config, known = STAGES[ref.stage], self.stage_config(ref), {} if _known is None else _known
        inputs = []
        for i in self.inputs(ref):
            artifact = self.artifact(i, _known=known)
            grows = stage.grows(self.config) and i.stage == "images"
            inputs.append({"stage": i.stage, "identity": artifact.fingerprint if grows else artifact.digest})
        name = fingerprint({"schema_version": SCHEMA_VERSION, "stage": ref.stage, "config": config, "inputs": inputs})
        return {
            "stage": ref.stage,
            "level": ref.level,
            "fingerprint": name,
            "config": config,
            "inputs": inputs,
            "experiment": self.config.name,
        }

    def path(self, ref: Ref) -> Path:
        """Where the artifact lies, made or not; raises IntegrityError when an input has not been made."""
        return self.root / ref.stage / self.header(ref)["fingerprint"]

    def find(self, ref: Ref) -> Artifact | None:
        """The sealed artifact, or None when it (or something that it needs) has not been made."""
        try:
            path = self.path(ref)
        except IntegrityError:
            return None
        self._seen.pop(path, None)
        artifact = self._open(ref, path)
        self._seen[path] = None if artifact is None else artifact.digest
        return artifact

    def _open(self, ref: Ref, path: Path) -> Artifact | None:
        """The sealed artifact of `path`, brought here from object storage if need be."""
        if not is_sealed(path) and (self.mirror is None or not self.mirror.pull(path)):
            return None
        return open_artifact(path, stage=ref.stage, expected=path.name, mirror=self.mirror)

    def writing(self, ref: Ref, *, keep_parts: bool = False) -> AbstractContextManager[ArtifactWriter]:
        """Write the artifact under its lock; see `artifacts.writing`.

        Raises LockHeld where another process has made it since `find` looked: it was going to be made twice, and
        taken away from who has begun to read it.
        """
        path = self.path(ref)

        def check() -> None:
            if path not in self._seen:
                return
            seen, now = self._seen.pop(path), None
            if is_sealed(path):
                now = read_json(path / MANIFEST, stage=ref.stage).get("digest")
            if now is not None and now != seen:
                raise LockHeld(
                    f"Another process has just made {ref}",
                    stage=ref.stage,
                    level=ref.level,
                    path=path,
                    fix="Run the same command again: it goes on from there.",
                )

        return writing(path, self.header(ref), keep_parts=keep_parts, mirror=self.mirror, check=check)

    def artifact(self, ref: Ref, *, _known: Known | None = None) -> Artifact:
        """The sealed artifact; else an IntegrityError: what is missing, what differs from the nearest one, the cure."""
        known = {} if _known is None else _known  # within one question every manifest is read once
        if ref in known:
            return known[ref]
        path = self.root / ref.stage / self.header(ref, _known=known)["fingerprint"]
        if (sealed := self._open(ref, path)) is not None:
            known[ref] = sealed
            return sealed
        job = STAGES[ref.stage].job.format(level=ref.level)
        expected, found = self._nearest(ref, path)
        raise IntegrityError(
            f"{ref} of experiment {self.config.name!r} has not been made with this configuration",
            stage=ref.stage,
            level=ref.level,
            path=path,
            expected=expected,
            found=found,
            fix=f"Run: dagster job execute -m pipelines.definitions -j {job}",
        )

    def _nearest(self, ref: Ref, path: Path) -> tuple[Any, Any]:
        """The settings in which the most similar artifact of this stage differs: (expected, found), or (None, None)."""
        wanted, best = self.header(ref), None
        for manifest in sorted(path.parent.glob("*/manifest.json")):
            other = read_json(manifest, stage=ref.stage)
            if other["experiment"] != self.config.name or other["level"] != ref.level:
                continue
            differing = differences(
                {k: wanted[k] for k in ("config", "inputs")}, {k: other[k] for k in ("config", "inputs")}
            )
            if best is None or len(differing) < len(best):
                best = differing
        if not best:
            return None, None
        return {k: v[0] for k, v in best.items()}, {k: v[1] for k, v in best.items()}


def differences(a: Any, b: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Leaves in which two pieces of plain data differ, by dotted path: that of `a`, that of `b`."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = {}
        for key in sorted(set(a) | set(b)):
            found |= differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)
        return found
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        found = {}
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            found |= differences(x, y, f"{where}[{index}]")
        return found
    return {} if a == b else {where: (a, b)}
