"""The validated image index."""

import dagster as dg

from assets.config import asset_spec, log_progress, refusals
from assets.report import grid, result, table
from assets.resources import ArtifactRoot
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Ref

REJECTS_SHOWN = 100  # in the web UI; rejects.jsonl has all


def shard_partitions(config: ExperimentConfig) -> str:
    """Name of the dynamic partitions that `images` adds: one per image shard."""
    return f"{config.name}_image_shards"


def build(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    spec = asset_spec(
        experiment,
        Ref("images"),
        kinds={"webdataset", "parquet"},
        description=(
            "Every image decoded and checked once: a parquet index (key, shard, row, split, label, captions, "
            "size, checksum) over "
            "WebDataset shards. All later stages read the images through it."
        ),
    )

    @dg.multi_asset(name="images", specs=[spec])
    def images(context: dg.AssetExecutionContext, artifacts: ArtifactRoot) -> dg.MaterializeResult:
        from nestdiff_core import stages
        from nestdiff_core.images.index import ImageIndex

        with refusals():
            artifact = stages.images(artifacts.experiment(experiment), progress=log_progress(context))
            index = ImageIndex(artifact)
            first = index.read_shard(0)
        partitions, shards = shard_partitions(experiment), [shard.name for shard in index.shards]
        for gone in set(context.instance.get_dynamic_partitions(partitions)) - set(shards):
            context.instance.delete_dynamic_partition(partitions, gone)
        context.instance.add_dynamic_partitions(partitions, shards)
        return result(
            artifact,
            spec.key,
            examples=grid(first),
            images=index.num_images,
            train=len(index.rows("train")),
            held_out=len(index.rows("held_out")),
            rejected=artifact.info["rejected"],
            rejects=table(rejects) if (rejects := index.rejects(REJECTS_SHOWN)) else None,
            shards=table([{"shard": s.name, "images": s.count, "sha256": s.sha256[:16]} for s in index.shards]),
        )

    return images
