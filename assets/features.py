"""Encoder outputs in a sharded zarr store, one partition per image shard."""

import dagster as dg

from assets.config import POOL, asset_spec, log_progress, refusals, runtime_config
from assets.images import shard_partitions
from assets.report import result
from assets.resources import ArtifactRoot
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Ref


def build(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    spec = asset_spec(
        experiment,
        Ref("features"),
        kinds={"pytorch", "zarr"},
        description=(
            "Feature map and vector of every image, in one sharded zarr v3 store. An image shard is a "
            "partition: committed or absent, "
            "and never encoded twice."
        ),
    )

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(
        name="features",
        specs=[spec],
        partitions_def=dg.DynamicPartitionsDefinition(name=shard_partitions(experiment)),
        pool=POOL,
        backfill_policy=dg.BackfillPolicy.single_run(),
    )
    def features(
        context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot
    ) -> dg.MaterializeResult | None:
        from nestdiff_core import stages
        from nestdiff_core.devices import choose_device

        # A job that also holds unpartitioned assets runs this one without a partition: it then encodes every shard
        # and logs the partitions itself (design decision 4).
        asked = list(context.partition_keys) if context.has_partition_key or context.has_partition_key_range else None
        with refusals():
            artifact, records = stages.features(
                artifacts.experiment(experiment),
                shards=asked,
                device=choose_device(config.device),
                progress=log_progress(context),
            )
        rows = {name: record["rows"] for name, record in records.items()}
        if artifact is None or asked is not None:
            return dg.MaterializeResult(
                asset_key=spec.key, metadata={"rows": sum(rows.values()), "complete": artifact is not None}
            )
        for name, record in records.items():
            context.log_event(dg.AssetMaterialization(spec.key, partition=name, metadata={"rows": record["rows"]}))
        return result(
            artifact,
            spec.key,
            rows=artifact.info["rows"],
            map=str(artifact.info["map"]),
            vector=str(artifact.info["vector"]),
        )

    return features
