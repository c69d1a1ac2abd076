"""A whole experiment, and what its parts must agree on; how work is run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from nestdiff_core.config.data import AutoencoderConfig, EncoderConfig, FeaturesConfig, ImagesConfig
from nestdiff_core.config.judging import (
    DesignConfig,
    EvaluationConfig,
    LadderConfig,
    NeighboursConfig,
    SamplingConfig,
    SearchConfig,
    SweepConfig,
    WatchConfig,
)
from nestdiff_core.config.knobs import knob, require
from nestdiff_core.config.levels import ConditioningConfig, DiffusionConfig, LevelConfig


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How work is run. Nothing here changes a result or enters a fingerprint; the launchpad may edit it."""

    device: str = knob("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    processes: int = knob(1, "Processes on each host that train a level or sample, one per GPU (torchrun).")
    hosts: int = knob(1, "Machines that train a level together (docs/clusters.md).")
    launcher: Literal["local", "slurm"] = knob(
        "local", "Where training is started. local: on this machine; slurm: as a job of a Slurm cluster."
    )
    slurm_options: str = knob(
        "", "Options of sbatch (such as --partition=gpu --account=mine --time=24:00:00 --gpus-per-node=4)."
    )
    slurm_setup: str = knob("", "Shell lines that a Slurm job begins with (such as module load cuda).")
    restarts: int = knob(
        3, "How often several processes are started again from their last checkpoint after one has died."
    )
    hang_seconds: float = knob(
        600.0, "A process that waits longer for another takes it for hung; all are then started again."
    )
    join_seconds: float = knob(600.0, "How long hosts wait for one another: at the start, and for one that was lost.")

    def __post_init__(self) -> None:
        for name in ("processes", "hosts"):
            require(getattr(self, name) >= 1, f"runtime.{name}", ">= 1", getattr(self, name))
        require(self.restarts >= 0, "runtime.restarts", ">= 0", self.restarts)
        for name in ("hang_seconds", "join_seconds"):
            require(getattr(self, name) > 0, f"runtime.{name}", "> 0", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One experiment, complete: everything that decides its numbers."""

    name: str = knob("unnamed", "Name of the experiment: prefix of its Dagster assets.")
    images: ImagesConfig = knob(ImagesConfig(source="digits"), "The images.")
    encoder: EncoderConfig = knob(EncoderConfig(weights="random"), "The frozen encoder.")
    features: FeaturesConfig = knob(FeaturesConfig(), "The feature and latent stores.")
    autoencoder: AutoencoderConfig = knob(AutoencoderConfig(), "The space of z_1.")
    levels: tuple[LevelConfig, ...] = knob((LevelConfig(),), "Levels 1..L in order.")
    conditioning: ConditioningConfig = knob(ConditioningConfig(), "What denoisers are told.")
    diffusion: DiffusionConfig = knob(DiffusionConfig(), "The diffusion process.")
    sampling: SamplingConfig = knob(SamplingConfig(), "The cascade.")
    evaluation: EvaluationConfig = knob(EvaluationConfig(), "The numbers.")
    ladder: LadderConfig = knob(LadderConfig(), "Which level loses the quality.")
    watch: WatchConfig = knob(WatchConfig(), "Numbers of the newest weights, while levels train.")
    neighbours: NeighboursConfig = knob(NeighboursConfig(), "Whether samples are copies.")
    sweep: SweepConfig = knob(SweepConfig(), "A search for how to sample, without training.")
    search: SearchConfig = knob(SearchConfig(), "A search for one level's condition noise.")
    design: DesignConfig = knob(DesignConfig(), "What `design` proposes levels for.")
    runtime: RuntimeConfig = knob(RuntimeConfig(), "How work is run; in no fingerprint.")

    def __post_init__(self) -> None:
        require(
            self.name.replace("_", "").isalnum() and self.name.isascii(),
            "name",
            "letters, digits and underscores (it becomes a Dagster asset prefix)",
            self.name,
        )
        numbers = [level.level for level in self.levels]
        require(
            numbers == list(range(1, len(numbers) + 1)) and bool(numbers),
            "levels",
            "levels numbered 1, 2, ..., L in this order",
            numbers,
        )
        for level in self.levels:
            self._check_level(level)
            self._check_guidance(level)
        down = 1 if self.autoencoder.kind == "identity" else 8
        require(
            down == 1 or self.autoencoder.channels == self.images.channels,
            "autoencoder.channels",
            f"{self.images.channels}, which images.channels is",
            self.autoencoder.channels,
        )
        require(
            self.images.resolution % down == 0,
            "images.resolution",
            f"a multiple of {down}, by which the autoencoder {self.autoencoder.kind!r} shrinks it",
            self.images.resolution,
        )
        if self.search.level:
            self.require_search()
        self._check_sweep()
        if self.conditioning.labels == "class":
            require(
                self.images.labels, "conditioning.labels", "images.labels: true when it is `class`", self.images.labels
            )
        require(
            not self.evaluation.clip_score or self.conditioning.labels == "text",
            "evaluation.clip_score",
            "conditioning.labels: text when it is on",
            self.conditioning.labels,
        )
        if self.evaluation.probe:
            require(
                self.images.labels and self.evaluation.reference == "train",
                "evaluation.probe",
                "images.labels: true and evaluation.reference: train when the probe is on",
                {"images.labels": self.images.labels, "evaluation.reference": self.evaluation.reference},
            )

    def _check_sweep(self) -> None:
        require(
            self.sampling.chosen_by == "config" or self.sweep.anything,
            "sampling.chosen_by",
            "config, unless something is swept (sweep.guidance, noise_gammas, num_evaluations or decays)",
            self.sampling.chosen_by,
        )
        for count in self.sweep.num_evaluations:
            self.sampling.require_evaluations("sweep.num_evaluations", count)
        if any(self.sweep.guidance):
            for level in self.levels:
                self._check_guidance(replace(level, guidance=max(self.sweep.guidance)))
        names = ["fid" if name == "inception" else f"fd_{name}" for name in self.evaluation.spaces]
        require(
            not self.sweep.metric or self.sweep.metric in names,
            "sweep.metric",
            f"empty, or a Frechet distance of the evaluation: {names}",
            self.sweep.metric,
        )

    def _check_guidance(self, level: LevelConfig) -> None:
        """What guidance contrasts with must have been seen in training."""
        told = self.is_told(level.level) and not level.guide_step
        require(
            not level.guidance or not told or level.train.condition_drop > 0,
            "levels.train.condition_drop",
            "> 0 where levels.guidance is on, which contrasts with a network that was told nothing",
            level.train.condition_drop,
            level=level.level,
        )
        require(
            self.sampling.null_branch == "all"
            or self.conditioning.labels == "none"
            or self.conditioning.drop == "each",
            "sampling.null_branch",
            "all, unless conditioning.drop is `each`: a label without its conditions is never trained otherwise",
            self.sampling.null_branch,
            level=level.level,
        )

    def _check_level(self, level: LevelConfig) -> None:
        if level.num_evaluations:
            self.sampling.require_evaluations("levels.num_evaluations", level.num_evaluations, level.level)
        channels, grid = self.latent_shape(level.level)[:2]
        for given, right, name in ((level.grid, grid, "grid"), (level.channels, channels, "channels")):
            require(
                level.level > 1 or given in (0, right),
                f"levels.{name}",
                f"{right}, which the autoencoder gives",
                given,
                level=1,
            )
        require(
            grid % level.patch_size == 0,
            "levels.patch_size",
            f"a divisor of the grid {grid}",
            level.patch_size,
            level=level.level,
        )
        values = channels * level.patch_size**2
        require(
            self.diffusion.prediction == "x" or values <= level.model.width,
            "levels.patch_size",
            f"patches of at most {level.model.width} values, the width of the network, which must carry their noise",
            f"{values} values in a patch of {level.patch_size}",
            level=level.level,
            fix="Choose smaller patches, a wider network, or diffusion.prediction: x.",
        )
        if level.level == 1:
            return
        if level.level > 2:
            below = self.levels[level.level - 2]
            require(
                (level.grid, level.channels, level.source) != (below.grid, below.channels, below.source),
                "levels.grid",
                f"another grid, channels or source than level {below.level}, of which it is a copy",
                grid,
                level=level.level,
            )
            require(
                grid <= below.grid,
                "levels.grid",
                f"at most {below.grid}, the grid of level {below.level} below it",
                grid,
                level=level.level,
            )
        if level.source == "patch":
            require(
                self.images.resolution % grid == 0,
                "levels.grid",
                f"a divisor of images.resolution = {self.images.resolution}, which is cut into so many crops a side",
                grid,
                level=level.level,
            )
        elif self.encoder.kind == "moco":
            side = self.encoder.input_size // self.encoder.vit.patch_size
            require(
                grid <= side,
                "levels.grid",
                f"at most {side}, the side of the encoder's feature map",
                grid,
                level=level.level,
            )
        if self.encoder.kind == "moco":
            require(
                level.channels <= self.encoder.vit.width,
                "levels.channels",
                f"at most {self.encoder.vit.width}, the channels of the encoder's features",
                level.channels,
                level=level.level,
            )

    def require_search(self) -> None:
        """Raise a ConfigError unless `search.level` is a level that conditions others."""
        require(
            2 <= self.search.level <= self.num_levels,
            "search.level",
            f"a level that conditions others, 2 to {self.num_levels}",
            self.search.level,
        )
        require(
            any(self.search.metric.endswith(f"_{name}") for name in self.evaluation.spaces)
            or ("inception" in self.evaluation.extractors and self.search.metric in ("fid", "kid", "fid_infinity")),
            "search.metric",
            f"a number of one of {self.evaluation.spaces}, such as fd_{''.join(self.evaluation.spaces[:1])}",
            self.search.metric,
        )

    @property
    def num_levels(self) -> int:
        return len(self.levels)

    def level(self, number: int) -> LevelConfig:
        """The configuration of level `number` (1 is the image)."""
        require(
            1 <= number <= self.num_levels,
            "level",
            f"1 to {self.num_levels}, as {self.name!r} has that many levels",
            number,
        )
        return self.levels[number - 1]

    def num_evaluations(self, number: int) -> int:
        """Network evaluations that sample level `number`."""
        return self.level(number).num_evaluations or self.sampling.num_evaluations

    def noise_gamma(self, number: int) -> float:
        """gamma while level `number` is sampled."""
        own = self.level(number).noise_gamma
        return self.sampling.noise_gamma if own == -1 else own

    def is_told(self, number: int) -> bool:
        """Whether level `number` has a label or a level above, which guidance can exaggerate."""
        return self.conditioning.labels != "none" or bool(self.levels_above(number))

    def can_be_guided(self, number: int) -> bool:
        """Whether there is something that guidance of level `number` contrasts with."""
        return self.is_told(number) or self.level(number).guide_step > 0

    def latent_shape(self, number: int) -> tuple[int, int, int]:
        """(channels, height, width) of z_l."""
        if number == 1:
            return self.autoencoder.latent_shape(self.images.channels, self.images.resolution)
        level = self.level(number)
        return level.channels, level.grid, level.grid

    def has_crops(self, number: int) -> bool:
        """Whether level `number` has a feature store of its own: the vectors of more crops than the whole image."""
        level = self.level(number)
        return number > 1 and level.source == "patch" and level.grid > 1

    def levels_above(self, number: int) -> tuple[int, ...]:
        """Numbers of the levels that condition level `number`, from the top down."""
        top = self.num_levels if self.conditioning.levels == "all_above" else min(number + 1, self.num_levels)
        return tuple(range(top, number, -1))
