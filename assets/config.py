"""What all assets share: keys and groups, the launchpad's view of the configuration, and how errors are shown.

Module scope stays free of torch: Dagster imports it in every process that only looks at the graph.
"""

import contextlib
import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pydantic

from nestdiff_core.config import ExperimentConfig, RuntimeConfig
from nestdiff_core.config_io import from_dict
from nestdiff_core.errors import NestdiffError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.progress import LogProgress

POOL = "gpu"

BY_SHARD = ("features", "crops", "text")  # assets with a partition for each image shard

GROUPS = {
    "images": "data",
    "encoder": "data",
    "features": "data",
    "crops": "data",
    "text": "data",
    "svd_basis": "hierarchy",
    "design": "hierarchy",
    "latents": "hierarchy",
    "denoiser": "denoisers",
    "reference": "evaluation",
    "samples": "evaluation",
    "evaluation": "evaluation",
    "ladder": "evaluation",
    "pictures": "evaluation",
    "watch": "evaluation",
    "report": "evaluation",
    "neighbours": "evaluation",
    "sweep": "evaluation",
}


def asset_key(config: ExperimentConfig, ref: Ref) -> dg.AssetKey:
    """Such as `digits/features`, `digits/svd_basis_level_2`, `digits/latents/z_2`, `digits/denoiser_level_2`."""
    match ref.stage:
        case "denoiser":
            return dg.AssetKey([config.name, f"denoiser_level_{ref.level}"])
        case "latents":
            return dg.AssetKey([config.name, "latents", f"z_{ref.level}"])
        case "svd_basis" | "crops":
            return dg.AssetKey([config.name, f"{ref.stage}_level_{ref.level}"])
        case stage:
            return dg.AssetKey([config.name, stage])


def asset_spec(
    config: ExperimentConfig, ref: Ref, *, description: str, kinds: set[str], pool: str | None = None
) -> dg.AssetSpec:
    """The asset of a stage: its inputs as dependencies, its part of the configuration as code version and metadata.

    The code version hashes what the asset and its ancestors read of the configuration, so a changed setting shows
    as stale exactly where it matters (design decision 3).
    """
    x = Experiment(config)
    return dg.AssetSpec(
        asset_key(config, ref),
        deps=[
            dg.AssetDep(
                asset_key(config, i), partition_mapping=dg.AllPartitionMapping() if i.stage in BY_SHARD else None
            )
            for i in _visible_inputs(x, ref)
        ],
        description=description,
        group_name=GROUPS[ref.stage],
        code_version=x.config_hash(ref),
        kinds=kinds,
        metadata={"configuration": dg.MetadataValue.json(x.stage_config(ref))},
    )


def _visible_inputs(x: Experiment, ref: Ref) -> list[Ref]:
    """The inputs that are assets: second moments are part of the basis to a user."""
    seen: dict[Ref, None] = {}
    for i in x.inputs(ref):
        for j in x.inputs(i) if i.stage == "moments" else (i,):
            seen[j] = None
    return list(seen)


def launchpad_config(cls: type, preset: Any) -> type[dg.Config]:
    """A dagster.Config mirroring dataclass `cls`, with `preset` as its defaults and each knob's sentence below it."""
    hints = typing.get_type_hints(cls)
    knobs: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        knobs[f.name] = (hints[f.name], pydantic.Field(getattr(preset, f.name), description=f.metadata["doc"]))
    return pydantic.create_model(cls.__name__, __base__=dg.Config, __doc__=cls.__doc__, **knobs)


def runtime_config(config: ExperimentConfig) -> type[dg.Config]:
    """What the launchpad may edit: how the work is run. What decides a result is changed in the experiment."""
    return launchpad_config(RuntimeConfig, config.runtime)


def with_runtime(config: ExperimentConfig, runtime: dg.Config) -> ExperimentConfig:
    """The experiment, done as the launchpad says."""
    with refusals():
        plain = runtime.model_dump()
        return dataclasses.replace(config, runtime=from_dict(RuntimeConfig, plain, where="runtime"))


def elsewhere(runtime: RuntimeConfig) -> bool:
    """Whether images are made by other processes than the run's own."""
    return runtime.processes > 1 or runtime.launcher != "local"


def log_progress(context: dg.AssetExecutionContext) -> LogProgress:
    return LogProgress(context.log.info)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Show the core's refusals as a Dagster failure with the whole sentence, and never retry them."""
    try:
        yield
    except NestdiffError as error:
        record = {"code": error.code, "stage": error.stage, "level": error.level, "path": error.path, "key": error.key}
        metadata = {name: str(value) for name, value in record.items() if value is not None}
        raise dg.Failure(
            description=str(error), metadata={**metadata, "fix": error.fix}, allow_retries=False
        ) from error
