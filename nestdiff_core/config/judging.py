"""Sampling, the numbers that judge samples, and the searches that they steer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nestdiff_core.config.data import EncoderConfig
from nestdiff_core.config.knobs import knob, require

SPACES = ("encoder", "pixels", "inception")  # feature spaces that need no judge


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the cascade is sampled."""

    sampler: Literal["dpm_solver_pp", "dpm_solver", "ddim", "ddpm"] = knob(
        "dpm_solver_pp",
        "dpm_solver_pp: DPM-Solver++ 2M; dpm_solver: the single-step solver of order 3 that the paper uses; ddim: "
        "deterministic DDIM; ddpm: ancestral sampling.",
    )
    spacing: Literal["lambda", "time"] = knob(
        "lambda", "Even steps in half the log signal-to-noise ratio, or in time (the paper, for dpm_solver)."
    )
    num_evaluations: int = knob(50, "Network evaluations per level (guidance doubles the batch, not this number).")
    num_images: int = knob(1_000, "Images that the `samples` stage generates.")
    batch_size: int = knob(250, "Images generated together; changes an image by rounding only.")
    noise_gamma: float = knob(
        0.0, "gamma: while sampling, a condition's noise variance is (t/T)^gamma sigma_m^2; inf is none."
    )
    noise_decay: Literal["variance", "deviation"] = knob(
        "variance",
        "Whether (t/T)^gamma scales the variance (the paper's text) or the standard deviation (its caption).",
    )
    noise_draw: Literal["call", "once"] = knob(
        "call", "Whether a condition's noise is drawn anew at every network call or once for an image and level."
    )
    terminal_step: bool = knob(
        False,
        "Whether a latent starts with the signal that is left at t = 1, for which two of its network evaluations go, "
        "instead of as pure noise: the more its conditions tell, the more is lost by the latter.",
        decides="if_changed",
    )
    null_branch: Literal["all", "conditions"] = knob(
        "all", "What guidance contrasts with: neither label nor conditions, or the label alone."
    )
    seed: int = knob(0, "Seed; image i depends on (seed, i) only.")
    precision: Literal["float32", "bfloat16"] = knob(
        "float32",
        "Arithmetic of the denoisers: float32, or mixed precision, several times faster on a GPU; the solver's stays "
        "float32.",
        decides="if_changed",
    )
    compile: bool = knob(
        False,
        "Whether the denoisers are compiled (torch.compile): faster after a minute for each level, with other last "
        "bits.",
        decides="if_changed",
    )
    without_conditions: bool = knob(
        True,
        "Whether level 1 makes as many images again with its conditions withheld, to compare; unguided, half of the "
        "work of `samples` or more.",
        decides="if_changed",
    )
    contrast: float = knob(
        1.0,
        "Factor on each image's deviation from its mean, after decoding: a control, for judges that reward contrast.",
        decides="if_changed",
    )
    chosen_by: Literal["config", "sweep"] = knob(
        "config",
        "Whose guidance, gamma, evaluations and average of the weights are sampled with: this configuration's, or what "
        "the stage `sweep` chose.",
        decides="if_changed",
    )

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            require(getattr(self, name) >= 1, f"sampling.{name}", ">= 1", getattr(self, name))
        self.require_evaluations("sampling.num_evaluations", self.num_evaluations)
        require(0 < self.contrast < float("inf"), "sampling.contrast", "a number > 0", self.contrast)
        require(self.noise_gamma >= 0, "sampling.noise_gamma", ">= 0", self.noise_gamma)
        require(self.seed >= 0, "sampling.seed", ">= 0", self.seed)

    def require_evaluations(self, name: str, count: int, level: int | None = None) -> None:
        """Raise a ConfigError unless `count` network evaluations can sample a latent."""
        least = 3 if self.terminal_step else 1
        why = f">= {least}, as sampling.terminal_step takes two" if self.terminal_step else ">= 1"
        require(count >= least, name, why, count, level=level)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """An encoder that is foreign to the experiment, as a feature space of its numbers."""

    name: str = knob("", "What its numbers are called after: dinov2 gives fd_dinov2.")
    encoder: EncoderConfig = knob(
        EncoderConfig(weights="random"),
        "The network: timm, open_clip or torchvision with its weights; moco with the folder of an `encoder` artifact.",
    )
    num_classes: int = knob(
        0,
        "For torchvision: classes that the head of these weights tells apart, to be asked which ones it sees; 0: it "
        "is not asked.",
        decides="if_changed",
    )
    unit_length: bool = knob(
        False,
        "Whether its vectors are scaled to length 1: where a few images have far longer ones than all others, nothing "
        "else would count in a Frechet distance.",
        decides="if_changed",
    )

    def __post_init__(self) -> None:
        where = "evaluation.judges"
        plain = self.name.isascii() and self.name.isalnum() and self.name == self.name.lower()
        require(plain, f"{where}.name", "lower-case letters and digits", self.name)
        require(self.name not in SPACES, f"{where}.name", f"none of {SPACES}", self.name)
        kinds = ("timm", "open_clip", "torchvision", "moco")
        require(self.encoder.kind in kinds, f"{where}.encoder.kind", f"one of {kinds}", self.encoder.kind)
        require(bool(self.encoder.weights), f"{where}.encoder.weights", "a file, `hub` or `random`", "")
        require(self.num_classes == 0 or self.num_classes >= 2, f"{where}.num_classes", "0, or >= 2", self.num_classes)
        if self.num_classes:
            kind, weights = self.encoder.kind, self.encoder.weights
            require(kind == "torchvision", f"{where}.num_classes", "0, as only torchvision's heads are read", kind)
            require(weights != "random", f"{where}.num_classes", "0, as a random head tells nothing apart", weights)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Which numbers are computed on the samples."""

    extractors: tuple[str, ...] = knob(
        ("encoder",), "Feature spaces of the Frechet distance: encoder (this experiment's own), pixels, inception."
    )
    judges: tuple[JudgeConfig, ...] = knob(
        (), "Further feature spaces, of encoders that are foreign to the experiment.", decides="if_changed"
    )
    reference: Literal["train", "held_out"] = knob("train", "The real images that samples are compared with.")
    reference_statistics: str = knob(
        "",
        "An .npz that takes their place in its space: mu and sigma, or images as arr_0, as ADM's evaluator has them "
        "(inception, unless the file names another space).",
        decides="if_changed",
    )
    inception_weights: str = knob("", "For inception: a local .pth, or `download` to let torch-fidelity fetch it.")
    num_neighbours: int = knob(3, "k of precision and recall.")
    resamples: int = knob(
        0, "Draws of the samples for the bootstrap errors of their Frechet distances; 0: none.", decides="if_changed"
    )
    probe: bool = knob(False, "Judge the samples with a classifier trained on the real labelled images.")
    clip_score: bool = knob(
        False,
        "Whether images are compared with their captions, by the CLIP whose text tower is conditioning.text.",
        decides="if_changed",
    )

    @property
    def spaces(self) -> tuple[str, ...]:
        """Names of all feature spaces: the extractors, then the judges."""
        return (*self.extractors, *(judge.name for judge in self.judges))

    def __post_init__(self) -> None:
        require(self.num_neighbours >= 1, "evaluation.num_neighbours", ">= 1", self.num_neighbours)
        require(self.resamples == 0 or self.resamples >= 2, "evaluation.resamples", "0, or >= 2", self.resamples)
        for name in self.extractors:
            require(name in SPACES, "evaluation.extractors", f"each one of {SPACES}", name)
        require(bool(self.spaces), "evaluation.extractors", "at least one, or a judge", self.extractors)
        names = [judge.name for judge in self.judges]
        require(len(set(names)) == len(names), "evaluation.judges", "different names", names)
        if "inception" in self.extractors:
            require(
                bool(self.inception_weights),
                "evaluation.inception_weights",
                "a file or `download`",
                self.inception_weights,
            )


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """The oracle ladder, which tells the level that loses the quality (evaluation/ladder.py)."""

    num_images: int = knob(1_000, "Held-out images whose true latents are given level by level, at most.")
    resamples: int = knob(100, "Draws of the images for the bootstrap errors of costs and of latents' distances.")

    def __post_init__(self) -> None:
        require(self.num_images >= 2, "ladder.num_images", ">= 2", self.num_images)
        require(self.resamples >= 2, "ladder.resamples", ">= 2", self.resamples)


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Numbers of the newest weights, while levels train (stages/watch.py)."""

    num_images: int = knob(200, "Images for each number, at most: as many as are held out.")
    resamples: int = knob(100, "Draws of the images for their bootstrap errors.")

    def __post_init__(self) -> None:
        require(self.num_images >= 2, "watch.num_images", ">= 2", self.num_images)
        require(self.resamples >= 2, "watch.resamples", ">= 2", self.resamples)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What is tried to find how to sample, without training (evaluation/sweep.py). A list that is empty is not swept;
    the configured setting is always among those tried."""

    guidance: tuple[float, ...] = knob((), "w of each level that is told something.")
    noise_gammas: tuple[float, ...] = knob((), "gamma of each level whose conditions are noised; inf is no noise.")
    num_evaluations: tuple[int, ...] = knob((), "Network evaluations of each level.")
    decays: bool = knob(
        False, "Whether the weights as training left them, and each average that it kept, are tried at each level."
    )
    num_images: int = knob(500, "Images that each setting generates.")
    short_list: int = knob(4, "Settings of the whole cascade that are compared by their images.")
    metric: str = knob(
        "", "The number of their images that is to be small; empty: the Frechet distance of the first extractor."
    )

    def __post_init__(self) -> None:
        require(self.num_images >= 4, "sweep.num_images", ">= 4", self.num_images)
        require(self.short_list >= 2, "sweep.short_list", ">= 2", self.short_list)
        for name, least in (("guidance", 0.0), ("noise_gammas", 0.0), ("num_evaluations", 1)):
            values = getattr(self, name)
            require(
                len(set(values)) == len(values) and all(value >= least for value in values),
                f"sweep.{name}",
                f"different numbers >= {least:g}",
                values,
            )

    @property
    def anything(self) -> bool:
        """Whether there is something to try."""
        return bool(self.guidance or self.noise_gammas or self.num_evaluations or self.decays)


@dataclass(frozen=True, kw_only=True)
class NeighboursConfig:
    """Whether samples are copies (evaluation/neighbours.py)."""

    num_images: int = knob(1_000, "Samples, and held-out images, whose nearest training images are sought, at most.")
    quantile: float = knob(
        0.05, "A sample counts as a copy where it is nearer than this share of held-out images, in two respects."
    )
    num_shown: int = knob(8, "Nearest training images that are kept, and shown, of each sample.")

    def __post_init__(self) -> None:
        require(self.num_images >= 2, "neighbours.num_images", ">= 2", self.num_images)
        require(0 < self.quantile < 0.5, "neighbours.quantile", "between 0 and 0.5", self.quantile)
        require(self.num_shown >= 2, "neighbours.num_shown", ">= 2", self.num_shown)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A greedy search for one level's condition noise (sigma_l), the others held."""

    level: int = knob(0, "Whose sigma is searched; 0 is no search.")
    sigmas: tuple[float, ...] = knob((0.0, 0.5, 1.0, 1.5), "The candidates.")
    metric: str = knob("fd_encoder", "The number of the evaluation that is to be small.")

    def __post_init__(self) -> None:
        require(self.level >= 0, "search.level", ">= 0", self.level)
        require(
            bool(self.sigmas) and min(self.sigmas) >= 0 and len(set(self.sigmas)) == len(self.sigmas),
            "search.sigmas",
            "different numbers >= 0",
            self.sigmas,
        )


@dataclass(frozen=True, kw_only=True)
class DesignConfig:
    """What `design` proposes levels for: how much each should tell the levels below it."""

    nats: float = knob(200.0, "Information of the top level, 1/2 log(1 + 1/sigma^2) for each of its numbers.")
    growth: float = knob(2.0, "How many times as much the next level tells (the paper's sizes grow by 2).")
    variance: float = knob(0.9, "Share of the pooled features' variance that a level's channels keep at least.")
    grids: tuple[int, ...] = knob((), "Sides of the grids to try; empty: 1, 2, 4, ... below the feature map's side.")

    def __post_init__(self) -> None:
        require(self.nats > 0, "design.nats", "> 0", self.nats)
        require(self.growth >= 1, "design.growth", ">= 1", self.growth)
        require(0 < self.variance < 1, "design.variance", "between 0 and 1", self.variance)
        require(all(grid >= 1 for grid in self.grids), "design.grids", "numbers >= 1", self.grids)
