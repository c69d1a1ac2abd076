"""Encoder outputs in sharded zarr stores: of whole images, of crops, and of captions."""

from collections.abc import Callable
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
)

from assets.config import POOL, asset_spec, log_progress, refusals, runtime_config
from assets.images import shard_partitions
from assets.report import result
from assets.resources import ArtifactRoot
from nestdiff_core.artifacts import Artifact
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import fingerprint

Encoded = tuple[Artifact | None, dict[str, dict[str, Any]]]


def build(experiment: ExperimentConfig) -> list[dg.AssetsDefinition]:
    """`features`, and `crops_level_N` for each level cut from crops, unless features are not kept; `text` where
    captions condition the denoisers."""
    stores, needed = [], Experiment(experiment).refs()
    if Ref("features") in needed:
        what = "Feature map and vector of every image, in one sharded zarr v3 store."
        stores.append(_by_shard(experiment, Ref("features"), what, _encode_images))
    for level in experiment.levels:
        if Ref("crops", level.level) in needed:
            stores.append(
                _by_shard(
                    experiment,
                    Ref("crops", level.level),
                    f"The {level.grid}x{level.grid} crops of every image, each encoded to one vector.",
                    _encode_crops,
                )
            )
    if experiment.conditioning.labels == "text":
        stores.append(
            _by_shard(
                experiment,
                Ref("text"),
                "Token features of every caption, from the frozen text tower of a CLIP.",
                _encode_captions,
            )
        )
    return stores


def _encode_images(x: Experiment, ref: Ref, **options: Any) -> Encoded:
    from nestdiff_core import stages

    return stages.features(x, **options)


def _encode_crops(x: Experiment, ref: Ref, **options: Any) -> Encoded:
    from nestdiff_core import stages

    assert ref.level is not None
    return stages.crops(x, ref.level, **options)


def _encode_captions(x: Experiment, ref: Ref, **options: Any) -> Encoded:
    from nestdiff_core import stages

    return stages.text(x, **options)


def _by_shard(experiment: ExperimentConfig, ref: Ref, what: str, encode: Callable[..., Encoded]) -> dg.AssetsDefinition:
    spec = asset_spec(
        experiment,
        ref,
        kinds={"pytorch", "zarr"},
        description=f"{what} An image shard is a partition: committed or absent, and never encoded twice.",
    )

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(
        name=spec.key.path[-1],
        specs=[spec],
        partitions_def=dg.DynamicPartitionsDefinition(name=shard_partitions(experiment)),
        pool=POOL,
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def store(
        context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot
    ) -> dg.MaterializeResult | None:
        from nestdiff_core.devices import choose_device

        # A job that also holds unpartitioned assets runs this one without a partition: it then encodes every shard
        # and logs the partitions itself (design decision 4).
        asked = list(context.partition_keys) if context.has_partition_key or context.has_partition_key_range else None
        with refusals():
            artifact, records = encode(
                artifacts.experiment(experiment),
                ref,
                shards=asked,
                device=choose_device(config.device),
                progress=log_progress(context),
            )
        if asked is not None:
            version = records[asked[0]]["digest"] if len(asked) == 1 else fingerprint(records)
            return dg.MaterializeResult(
                asset_key=spec.key,
                data_version=dg.DataVersion(version),
                metadata={"rows": sum(r["rows"] for r in records.values()), "complete": artifact is not None},
            )
        assert artifact is not None  # every shard was asked for
        for name, record in records.items():
            versions = {DATA_VERSION_TAG: record["digest"], DATA_VERSION_IS_USER_PROVIDED_TAG: "true"}
            context.log_event(
                dg.AssetMaterialization(
                    spec.key,
                    partition=name,
                    metadata={"rows": record["rows"]},
                    tags={**versions, CODE_VERSION_TAG: str(spec.code_version)},
                )
            )
        shapes = {name: str(shape) for name, shape in artifact.info["arrays"].items()}
        return result(artifact, spec.key, rows=artifact.info["rows"], **shapes)

    return store
