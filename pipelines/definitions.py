"""The code location: the active experiment as assets, jobs, a schedule and a sensor.

NESTDIFF_EXPERIMENT names the experiment (a recipe, or the path of a YAML file); `digits` without it.
"""

import multiprocessing
import signal

import dagster as dg

from assets import checks, denoisers, encoder, evaluation, features, hierarchy, images, pages, search, sweep, watch
from assets.resources import ArtifactRoot, Launcher
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.recipes import load_experiment
from nestdiff_core.training.launch import die_with_parent
from pipelines.jobs import build_jobs
from pipelines.recover import noted
from pipelines.schedules import build_schedules
from pipelines.sensors import build_sensors


def build_definitions(config: ExperimentConfig) -> dg.Definitions:
    """Everything Dagster needs to know of one experiment."""
    jobs = build_jobs(config)
    return dg.Definitions(
        assets=[
            images.build(config),
            encoder.build(config),
            *features.build(config),
            *([hierarchy.build_bases(config)] if config.num_levels > 1 else []),
            hierarchy.build_design(config),
            hierarchy.build_latents(config),
            *(denoisers.build(config, level) for level in range(1, config.num_levels + 1)),
            evaluation.build_reference(config),
            evaluation.build_samples(config),
            evaluation.build_evaluation(config),
            evaluation.build_ladder(config),
            evaluation.build_neighbours(config),
            *sweep.build(config),
            pages.build_pictures(config),
            watch.build(config),
            pages.build_report(config),
            *search.build(config),
        ],
        asset_checks=checks.build(config),
        jobs=list(jobs.values()),
        schedules=build_schedules(jobs["watch"]),
        sensors=build_sensors(config, evaluate=jobs["evaluate"], encode=jobs["encode_images"], watch=jobs["watch"]),
        executor=noted(dg.multi_or_in_process_executor),
        resources={"artifacts": ArtifactRoot(), "launcher": Launcher()},
    )


if multiprocessing.parent_process() is not None:
    # A run, or a step of one, in a process of its own: without the code server (or the run) that started it nobody
    # could stop it any more. It is interrupted as by the UI: a trainer saves, and the run is marked.
    die_with_parent(signal.SIGINT)

defs = build_definitions(load_experiment())
