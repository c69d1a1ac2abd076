"""The hierarchy: an SVD basis per level, and the latents z_1 .. z_L. One key per level, each can be made alone."""

from collections.abc import Iterator

import dagster as dg

from assets.config import POOL, asset_spec, log_progress, refusals, runtime_config
from assets.report import picture, result, table
from assets.resources import ArtifactRoot
from nestdiff_core.config import ExperimentConfig, LevelConfig
from nestdiff_core.experiment import Ref


def _selected(context: dg.AssetExecutionContext, levels: dict[int, dg.AssetKey]) -> list[int]:
    return [level for level, key in levels.items() if key in context.selected_asset_keys]


def _source(level: LevelConfig) -> str:
    grid = f"{level.grid}x{level.grid}"
    return f"the vectors of {grid} crops" if level.source == "patch" else f"the feature map pooled to {grid}"


def build_bases(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    specs = {
        level.level: asset_spec(
            experiment,
            Ref("svd_basis", level.level),
            kinds={"numpy"},
            description=(
                f"Centred SVD basis of level {level.level}: the {level.channels} leading components of "
                f"{_source(level)}, fitted on the training split from mergeable second moments, with fixed signs, "
                "spectrum and standardisation statistics."
            ),
        )
        for level in experiment.levels[1:]
    }
    keys = {level: spec.key for level, spec in specs.items()}

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(
        name="svd_basis",
        specs=[spec._replace(skippable=True) for spec in specs.values()],
        can_subset=True,
        pool=None if experiment.features.keep else POOL,
    )
    def svd_basis(
        context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot
    ) -> Iterator[dg.MaterializeResult]:
        from nestdiff_core import loading, stages
        from nestdiff_core.devices import choose_device
        from nestdiff_core.evaluation.figures import spectrum_plot

        x = artifacts.experiment(experiment)
        with refusals():
            made = stages.bases(
                x, _selected(context, keys), device=choose_device(config.device), progress=log_progress(context)
            )
        for level, artifact in made.items():
            basis = loading.open_basis(x, level)
            yield result(
                artifact,
                keys[level],
                spectrum=picture(spectrum_plot({level: basis.eigenvalues}, {level: basis.channels})),
                **artifact.info,
            )

    return svd_basis


def build_latents(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    specs = {}
    for level in experiment.levels:
        channels, height, width = experiment.latent_shape(level.level)
        what = (
            "the image in the autoencoder's space"
            if level.level == 1
            else f"{_source(level)}, projected on {channels} components, standardised per channel"
        )
        specs[level.level] = asset_spec(
            experiment,
            Ref("latents", level.level),
            kinds={"zarr"},
            description=f"z_{level.level}, {height}x{width}x{channels}: {what}. Stored clean; "
            "condition noise is drawn when it is read.",
        )
    keys = {level: spec.key for level, spec in specs.items()}

    class Runtime(runtime_config(experiment)):
        """How this run is done; what decides the result is changed in the experiment."""

    @dg.multi_asset(
        name="latents",
        specs=[spec._replace(skippable=True) for spec in specs.values()],
        can_subset=True,
        pool=None if experiment.autoencoder.kind == "identity" and experiment.features.keep else POOL,
    )
    def latents(
        context: dg.AssetExecutionContext, config: Runtime, artifacts: ArtifactRoot
    ) -> Iterator[dg.MaterializeResult]:
        from nestdiff_core import stages
        from nestdiff_core.devices import choose_device

        with refusals():
            made = stages.latents(
                artifacts.experiment(experiment),
                _selected(context, keys),
                device=choose_device(config.device),
                progress=log_progress(context),
            )
        for level, artifact in made.items():
            info = artifact.info
            yield result(
                artifact,
                keys[level],
                rows=info["rows"],
                shape=str(info["shape"]),
                largest_mean=max(map(abs, info["mean"])),
                smallest_std=min(info["std"]),
                largest_std=max(info["std"]),
            )

    return latents


def build_design(experiment: ExperimentConfig) -> dg.AssetsDefinition:
    spec = asset_spec(
        experiment,
        Ref("design"),
        kinds={"numpy"},
        description=(
            "Levels proposed from the measured spectra: grids, channels and noise for "
            f"{experiment.design.nats:g} nats at the top, {experiment.design.growth:g} times as many at each level "
            "below. Nothing reads it; it is for you."
        ),
    )

    @dg.multi_asset(name="design", specs=[spec])
    def design(context: dg.AssetExecutionContext, artifacts: ArtifactRoot) -> dg.MaterializeResult:
        import numpy as np

        from nestdiff_core import stages
        from nestdiff_core.cli.design import own_table, paper_table, proposal_table
        from nestdiff_core.evaluation.figures import spectrum_plot

        x = artifacts.experiment(experiment)
        with refusals():
            artifact = stages.design(x, progress=log_progress(context))
            own = own_table(x)
        proposals = proposal_table(artifact.info["proposals"])
        spectra = {row["level"]: np.asarray(artifact.info["eigenvalues"][str(row["grid"])]) for row in proposals}
        kept = {row["level"]: row["channels"] for row in proposals}
        return result(
            artifact,
            spec.key,
            spectra=picture(spectrum_plot(spectra, kept, title="Spectra of the proposed levels")),
            proposed=table(proposals),
            own_levels=table(own) if own else None,
            paper_levels=table(paper_table()),
        )

    return design
