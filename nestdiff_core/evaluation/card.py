"""The metric card: everything that a number depends on, in JSON beside it.

Two numbers may be put side by side when their cards differ in nothing but what is being compared (`differences`).
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
    num_evaluations: int  # per level
    noise_gamma: float
    guidance: dict[int, float]
    condition_noise: dict[int, float]
    ema_decay: dict[int, float]
    checkpoints: dict[int, str]
    rounding: str = ROUNDING

    @classmethod
    def of(
        cls, config: ExperimentConfig, checkpoints: Mapping[int, str], *, label_sampling: str = "none"
    ) -> SampleOrigin:
        """The origin of the samples that `config` describes, made with these checkpoints."""
        return cls(
            seed=config.sampling.seed,
            label_sampling=label_sampling,
            sampler=config.sampling.sampler,
            num_evaluations=config.sampling.num_evaluations,
            noise_gamma=config.sampling.noise_gamma,
            guidance={level.level: level.guidance for level in config.levels},
            condition_noise={level.level: level.condition_noise for level in config.levels},
            ema_decay={level.level: level.train.ema_decay for level in config.levels},
            checkpoints=dict(checkpoints),
        )


def _packages() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "torch-fidelity")}


@dataclass(frozen=True, kw_only=True)
class MetricCard:
    """What one number depends on. Digests are sha256 over pixels in order."""

    metric: str
    extractor: str
    weights_sha256: str
    preprocessing: dict[str, Any]  # how images enter the extractor
    reference_digest: str
    num_reference: int
    samples_digest: str
    num_samples: int
    resize_filter: str  # of the reference's preparation; the samples are not resized
    settings: dict[str, Any]  # the metric's own: seed, neighbours, subsets
    origin: SampleOrigin
    code_version: str = field(default_factory=code_version)
    packages: dict[str, str] = field(default_factory=_packages)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; level numbers become text, as JSON has it."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MetricCard:
        origin = dict(data["origin"])
        for name in ("guidance", "condition_noise", "ema_decay", "checkpoints"):
            origin[name] = {int(level): value for level, value in origin[name].items()}
        return cls(**{**data, "origin": SampleOrigin(**origin)})


def differences(card_a: MetricCard, card_b: MetricCard) -> list[str]:
    """Dotted names of the fields in which two cards differ, such as `num_reference` or `origin.guidance.2`."""
    return _differing(card_a.to_dict(), card_b.to_dict(), "")


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
    return {str(k): _plain(v) for k, v in value.items()} if isinstance(value, dict) else value
