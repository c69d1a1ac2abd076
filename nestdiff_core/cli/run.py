"""Run the pipeline, or some of its stages. What is there already is checked and kept.

Stages: images, encoder, features, crops (for levels cut from crops), text (for captions), bases, latents, train,
sweep (where sampling.chosen_by asks for it, or it is named), reference, samples, evaluation, ladder, neighbours,
pictures, report; all that the experiment has by default. And watch, when asked for: numbers of the newest weights,
while levels train.
"""

from __future__ import annotations

import argparse

from nestdiff_core.cli import workers
from nestdiff_core.errors import ConfigError
from nestdiff_core.experiment import Experiment
from nestdiff_core.progress import TerminalProgress
from nestdiff_core.recipes import load_experiment
from nestdiff_core.training import launch

STAGES = (
    "images",
    "encoder",
    "features",
    "crops",
    "text",
    "bases",
    "latents",
    "train",
    "sweep",
    "reference",
    "samples",
    "evaluation",
    "ladder",
    "neighbours",
    "pictures",
    "report",
)
EXTRA = ("watch",)
SHARED = ("samples", "ladder")  # by several processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nestdiff_core.cli import add_device, add_experiment

    add_experiment(parser)
    parser.add_argument(
        "--stage", action="append", choices=(*STAGES, *EXTRA), help="only this stage; may be given several times"
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes that train and sample (default: the experiment's)"
    )
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    experiment = Experiment(load_experiment(arguments.experiment))
    if arguments.processes is not None and arguments.processes < 1:
        raise ConfigError(
            "--processes cannot be used",
            key="--processes",
            expected=">= 1",
            found=arguments.processes,
            fix="Change it.",
        )
    if launch.under_torchrun() and arguments.stage in [[stage] for stage in SHARED]:
        return _share(experiment, arguments.stage[0], arguments)
    from nestdiff_core.devices import choose_device

    device = choose_device(arguments.device or experiment.config.runtime.device)
    optional = {"features", "crops", "text", "sweep"} - {ref.stage for ref in experiment.refs()}
    optional -= {"sweep"} & set(arguments.stage or ())
    for stage in arguments.stage or STAGES:
        if stage in optional:
            continue
        if stage in SHARED:
            code = _share(experiment, stage, arguments)
        else:
            with TerminalProgress() as progress:
                code = _run_stage(experiment, stage, arguments, device, progress)
        if code:
            return code
        print(f"{stage}: done", flush=True)
    return 0


def _run_stage(
    experiment: Experiment, stage: str, arguments: argparse.Namespace, device: str, progress: TerminalProgress
) -> int:
    from nestdiff_core import stages
    from nestdiff_core.cli import train

    match stage:
        case "train":
            for level in range(1, experiment.config.num_levels + 1):
                given = {"--processes": arguments.processes, "--device": arguments.device}
                words = [f"{name}={value}" for name, value in given.items() if value is not None]
                if code := train.run(train.parse([*_named(arguments), f"--level={level}", *words])):
                    return code
        case "images":
            stages.images(experiment, progress=progress)
        case "crops":
            for level in range(1, experiment.config.num_levels + 1):
                if experiment.config.has_crops(level):
                    stages.crops(experiment, level, device=device, progress=progress)
        case "report":
            print(stages.report(experiment, progress=progress).path / "report.html")
        case _:
            getattr(stages, stage)(experiment, device=device, progress=progress)
    return 0


def _share(experiment: Experiment, stage: str, arguments: argparse.Namespace) -> int:
    from nestdiff_core import stages

    runtime = experiment.config.runtime
    device = arguments.device or runtime.device
    return workers.share(
        ["run", *_named(arguments), f"--stage={stage}", f"--device={device}"],
        lambda device, progress: getattr(stages, stage)(experiment, device=device, progress=progress),
        device=device,
        processes=arguments.processes or runtime.processes,
    )


def _named(arguments: argparse.Namespace) -> list[str]:
    return [arguments.experiment] if arguments.experiment else []
