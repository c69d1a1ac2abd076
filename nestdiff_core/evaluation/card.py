"""The metric card: everything that a number depends on, in JSON beside it.

Two numbers may be put side by side when their cards differ in nothing but what is being compared (`differences`): in
how the samples were made, and not in how they were measured (`compare`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from nestdiff_core.artifacts import code_version
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.evaluation.samples import ROUNDING


@dataclass(frozen=True, kw_only=True)
class SampleOrigin:
    """How a sample set was made. Dictionaries are keyed by level; `checkpoints` holds the denoisers' digests."""

    seed: int
    label_sampling: str  # "none", or how class labels were drawn
    sampler: str
    spacing: str  # of the sampling times
    num_evaluations: dict[int, int]
    precision: str  # of the denoisers
    noise_gamma: dict[int, float]
    noise_decay: str
    noise_draw: str
    null_branch: str  # what guidance contrasts with
    guidance: dict[int, float]
    guidance_interval: dict[int, tuple[float, ...]]
    condition_noise: dict[int, float]
    ema_decay: dict[int, float]  # of the average of the weights that sampled; 0 is the weights themselves
    checkpoints: dict[int, str]
    guide_step: dict[int, int] = field(default_factory=dict)  # of levels that are guided by their own earlier weights
    contrast: float = 1.0
    terminal_step: bool = False
    rounding: str = ROUNDING

    @classmethod
    def of(
        cls, config: ExperimentConfig, checkpoints: Mapping[int, str], *, label_sampling: str = "none"
    ) -> SampleOrigin:
        """The origin of the samples that `config` (loading.sampled_config) describes, made with these checkpoints."""
        sampling, numbers = config.sampling, [level.level for level in config.levels]
        return cls(
            seed=sampling.seed,
            label_sampling=label_sampling,
            sampler=sampling.sampler,
            spacing=sampling.spacing,
            num_evaluations={level: config.num_evaluations(level) for level in numbers},
            precision=sampling.precision,
            noise_gamma={level: config.noise_gamma(level) for level in numbers},
            noise_decay=sampling.noise_decay,
            noise_draw=sampling.noise_draw,
            null_branch=sampling.null_branch,
            guidance={level.level: level.guidance for level in config.levels},
            guidance_interval={level.level: level.guidance_interval for level in config.levels},
            condition_noise={level.level: level.condition_noise for level in config.levels},
            ema_decay={level.level: level.decay for level in config.levels},
            checkpoints=dict(checkpoints),
            guide_step={
                level.level: level.guide_step for level in config.levels if level.guidance and level.guide_step
            },
            contrast=sampling.contrast,
            terminal_step=sampling.terminal_step,
        )


def _packages() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "torch-fidelity")}


@dataclass(frozen=True, kw_only=True)
class MetricCard:
    """What one number depends on. Digests are sha256 over pixels in order, or of a file of statistics."""

    metric: str
    extractor: str
    weights_sha256: str
    preprocessing: dict[str, Any]  # how images enter the extractor
    reference_digest: str
    num_reference: int | None  # None: statistics that do not say it
    samples_digest: str
    num_samples: int
    resize_filter: str  # of the reference's preparation; the samples are not resized
    settings: dict[str, Any]  # the metric's own: seed, neighbours, subsets
    origin: SampleOrigin | None  # None: images that came without a record of how they were made
    code_version: str = field(default_factory=code_version)
    packages: dict[str, str] = field(default_factory=_packages)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; level numbers become text, as JSON has it."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MetricCard:
        if data["origin"] is None:
            return cls(**data)
        origin = dict(data["origin"])
        for name, by_level in origin.items():
            if isinstance(by_level, dict):
                origin[name] = {int(level): value for level, value in by_level.items()}
        origin["guidance_interval"] = {level: tuple(ends) for level, ends in origin["guidance_interval"].items()}
        return cls(**{**data, "origin": SampleOrigin(**origin)})


def differences(card_a: MetricCard, card_b: MetricCard) -> list[str]:
    """Dotted names of the fields in which two cards differ, such as `num_reference` or `origin.guidance.2`."""
    return _differing(card_a.to_dict(), card_b.to_dict(), "")


_OF_SAMPLES = ("samples_digest", "origin")  # all other fields say how a number was measured


def compare(metrics_a: Mapping[str, Any], metrics_b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each number that both evaluations have: number, one, other, and in which fields of their cards the
    samples differ and the measurement does. Only numbers without the second kind may be put side by side.

    Both as `report.evaluate` has them in `metrics`: {name: {value, card, ...}}.
    """
    rows = []
    for name in (name for name in metrics_a if name in metrics_b):
        one, other = metrics_a[name], metrics_b[name]
        fields = _differing(one["card"], other["card"], "")
        samples = [field for field in fields if field.split(".")[0] in _OF_SAMPLES]
        measured = [field for field in fields if field not in samples]
        rows.append(
            {
                "number": name,
                "one": one["value"],
                "other": other["value"],
                "comparable": "no" if measured else "yes",
                "measured differently": ", ".join(measured),
                "samples differ in": ", ".join(samples),
            }
        )
    return rows


def _differing(a: Any, b: Any, where: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        names = [*a, *(name for name in b if name not in a)]
        return [
            path
            for name in names
            for path in _differing(a.get(name), b.get(name), f"{where}.{name}" if where else name)
        ]
    return [] if a == b else [where]


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return {str(k): _plain(v) for k, v in value.items()} if isinstance(value, dict) else value
