"""The jobs: selections of assets under the names that users type."""

import dagster as dg
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from assets.config import asset_key
from assets.search import needed_denoisers, search_keys
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, Ref
from pipelines.recover import noted

ENCODE = ("images", "encoder", "features", "crops", "text")
BUILD = (*ENCODE, "svd_basis", "latents")
# A sweep only where samples are made with what it chooses.
JUDGE = ("sweep", "reference", "samples", "evaluation", "ladder", "neighbours", "pictures", "report")


def build_jobs(config: ExperimentConfig) -> dict[str, UnresolvedAssetJobDefinition]:
    """quickstart, build_latents, train_level_1 .. train_level_L, train_all_levels, evaluate, watch; by name."""
    levels = range(1, config.num_levels + 1)
    refs = Experiment(config).refs()

    def keys(stage: str) -> list[dg.AssetKey]:
        return [asset_key(config, ref) for ref in refs if ref.stage == stage]

    def job(name: str, description: str, selected: list[dg.AssetKey]) -> UnresolvedAssetJobDefinition:
        # In one process: steps are short or have a process of their own, and the multiprocess executor would import
        # everything again for each (about 6 seconds).
        return dg.define_asset_job(
            name,
            dg.AssetSelection.assets(*selected),
            description=description,
            executor_def=noted(dg.in_process_executor),
        )

    build = [key for stage in BUILD for key in keys(stage)]
    train = keys("denoiser")
    judge = [key for stage in JUDGE for key in keys(stage)]
    jobs = [
        job("quickstart", f"The whole experiment {config.name!r}, from images to numbers.", build + train + judge),
        job("encode_images", "Index the images and encode those that are new.", [k for s in ENCODE for k in keys(s)]),
        job("build_latents", "From images to the latents of every level.", build),
        job("design_levels", "Propose levels from the spectra of the features.", [asset_key(config, Ref("design"))]),
        *(
            job(
                f"train_level_{level}",
                f"Train (or resume) the denoiser of level {level}.",
                [asset_key(config, Ref("denoiser", level))],
            )
            for level in levels
        ),
        job("train_all_levels", "Train (or resume) every denoiser; they do not depend on one another.", train),
        job("evaluate", "Sample the cascade, compute its numbers with fixed seeds, write the report.", judge),
        job(
            "watch",
            "Judge the newest weights of each level, while they train or afterwards; write the report.",
            # Nothing of a pool, or it would wait for the training that it looks at; it makes the reference itself.
            [asset_key(config, Ref("watch")), *keys("report")],
        ),
    ]
    if config.sweep.anything:
        swept = [asset_key(config, Ref("sweep"))]
        jobs.append(job("sweep", "Find how the trained cascade is best sampled, without training anything.", swept))
    if level := config.search.level:
        jobs.append(
            job(
                f"search_sigma_level_{level}",
                f"Train and evaluate each candidate for sigma_{level}, the other levels held, and compare them.",
                [*needed_denoisers(config), *search_keys(config)],
            )
        )
    return {j.name: j for j in jobs}
