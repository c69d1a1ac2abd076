"""Every knob of an experiment: frozen dataclasses that validate themselves.

An `ExperimentConfig` is what a recipe returns and what a YAML file changes (recipes/), and what is recorded beside
every result (config_io.py turns it into plain data and back). Which part of it a stage reads is said in lineage.py.
"""

from nestdiff_core.config.data import (
    AutoencoderConfig,
    EncoderConfig,
    FeaturesConfig,
    ImagesConfig,
    MoCoConfig,
    ViTConfig,
)
from nestdiff_core.config.experiment import ExperimentConfig, RuntimeConfig
from nestdiff_core.config.judging import (
    DesignConfig,
    EvaluationConfig,
    JudgeConfig,
    LadderConfig,
    NeighboursConfig,
    SamplingConfig,
    SearchConfig,
    SweepConfig,
    WatchConfig,
)
from nestdiff_core.config.knobs import knob
from nestdiff_core.config.levels import (
    ConditioningConfig,
    DiffusionConfig,
    LevelConfig,
    TextConfig,
    TrainConfig,
    UViTConfig,
)

__all__ = [
    "AutoencoderConfig",
    "ConditioningConfig",
    "DesignConfig",
    "DiffusionConfig",
    "EncoderConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "FeaturesConfig",
    "ImagesConfig",
    "JudgeConfig",
    "LadderConfig",
    "LevelConfig",
    "MoCoConfig",
    "NeighboursConfig",
    "RuntimeConfig",
    "SamplingConfig",
    "SearchConfig",
    "SweepConfig",
    "TextConfig",
    "TrainConfig",
    "UViTConfig",
    "ViTConfig",
    "WatchConfig",
    "knob",
]
