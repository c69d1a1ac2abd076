"""Train the denoiser of one level. The same command resumes after a stop; a finished level is only checked.

Training runs in processes of its own under torchrun. With --dry-run nothing is trained: the level's configuration is
printed, and what training it will take, measured on a few steps with noise in place of latents.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta

import yaml

from nestdiff_core.cli.workers import reporting
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.config_io import to_dict
from nestdiff_core.errors import ConfigError, Interrupted, NestdiffError, NumericsError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.progress import duration
from nestdiff_core.recipes import load_experiment
from nestdiff_core.training import launch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from nestdiff_core.cli import add_device, add_experiment

    add_experiment(parser)
    parser.add_argument(
        "--level", type=int, required=True, metavar="N", help="1 is the image, the largest number the top"
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="worker processes on each host, one per GPU (default: the experiment's)",
    )
    parser.add_argument(
        "--hosts",
        type=int,
        metavar="N",
        help="machines that train together: run the same command on each (default: the experiment's)",
    )
    parser.add_argument(
        "--rendezvous",
        metavar="HOST:PORT",
        help="where several hosts meet: an address of one of them, and a port that is free there",
    )
    parser.add_argument("--until-step", type=int, metavar="STEP", help="save and stop at this step; resume later")
    parser.add_argument("--dry-run", action="store_true", help="say what would be trained, how long, in what memory")
    add_device(parser)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line without the verb."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> int:
    config = load_experiment(arguments.experiment)
    config.level(arguments.level)
    device = arguments.device or config.runtime.device
    processes = config.runtime.processes if arguments.processes is None else arguments.processes
    hosts = config.runtime.hosts if arguments.hosts is None else arguments.hosts
    for name, value in (("--processes", processes), ("--hosts", hosts), ("--until-step", arguments.until_step)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} cannot be used", key=name, expected=">= 1", found=value, fix="Change it.")
    if arguments.dry_run:
        return _dry_run(config, arguments.level, device, processes * hosts)
    if launch.DIE_WITH_PARENT in os.environ:
        launch.end_with_parent()
    if launch.under_torchrun():
        return _work(Experiment(config), arguments)
    for ref in Experiment(config).inputs(Ref("denoiser", arguments.level)):
        Experiment(config).artifact(ref)  # what is missing is said before torchrun is started
    command = [
        "train",
        *([arguments.experiment] if arguments.experiment else []),
        f"--level={arguments.level}",
        f"--device={device}",
    ]
    if arguments.until_step is not None:
        command.append(f"--until-step={arguments.until_step}")
    restarts = config.runtime.restarts if processes * hosts > 1 else 0  # one alone is started again by who waits for it
    return launch.run_torchrun(
        command, num_processes=processes, hosts=_hosts(config, arguments, hosts), restarts=restarts
    )


def _hosts(config: ExperimentConfig, arguments: argparse.Namespace, count: int) -> launch.Hosts | None:
    if count == 1:
        return None
    if not arguments.rendezvous:
        raise ConfigError(
            "Several hosts need a place to meet",
            key="--rendezvous",
            expected="HOST:PORT, the same on every host",
            fix="Give an address of one of the hosts and a free port, and run the same command on each (or let "
            "runtime.launcher: slurm do that).",
        )
    name = f"{config.name}-level-{arguments.level}"
    return launch.Hosts(count, arguments.rendezvous, name, join_seconds=config.runtime.join_seconds)


def _dry_run(config: ExperimentConfig, level: int, device: str, processes: int) -> int:
    import torch

    from nestdiff_core.devices import choose_device
    from nestdiff_core.models.nested import LatentTokens
    from nestdiff_core.training.estimate import estimate

    plain, own = to_dict(config), config.level(level)
    shown = {"conditioning": plain["conditioning"], "diffusion": plain["diffusion"], "level": to_dict(own)}
    print(yaml.safe_dump(shown, sort_keys=False))
    device = choose_device(device)
    classes = 1000 if config.conditioning.labels == "class" else 0  # how many changes next to nothing
    found = estimate(config, level, device=torch.device(device), processes=processes, num_classes=classes)
    shapes = {f"z_{m}": config.latent_shape(m) for m in (*config.levels_above(level), level)}
    seconds = found.seconds_per_step * own.train.num_steps
    images = own.train.num_steps * own.train.batch_size
    tokens = LatentTokens(shapes[f"z_{level}"], own.patch_size).num_tokens
    print("reads           " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
    print(f"network         {found.parameters / 1e6:.2f} M parameters, {found.macs / 1e9:.3f} GMACs an image")
    print(f"sees            {images:,} images of {tokens} tokens: {images * tokens / found.parameters:.1f} a parameter")
    print(f"a step          {found.seconds_per_step:.3f} s on {device}, {own.train.batch_size} images")
    print(f"all {own.train.num_steps} steps  {duration(seconds)}, {processes} process(es)")
    print(f"memory          {found.memory / 2**30:.2f} GiB in each process")
    return 0


def _work(experiment: Experiment, arguments: argparse.Namespace) -> int:
    """One worker. A refusal that all workers share ends without torchrun's noise; after one that is this worker's
    alone torchrun starts them all again, as others may wait for it, and all then end with it."""
    from nestdiff_core import stages
    from nestdiff_core.devices import choose_device, process_group
    from nestdiff_core.training import group

    rank, alone = int(os.environ["RANK"]), os.environ["WORLD_SIZE"] == "1"
    hang = timedelta(seconds=experiment.config.runtime.hang_seconds)
    try:
        device = choose_device(arguments.device or experiment.config.runtime.device)
        with process_group(device, patience=hang), reporting(rank) as progress:
            group.begin()
            stages.train(experiment, arguments.level, device=device, progress=progress, until_step=arguments.until_step)
    except NestdiffError as error:
        shared = alone or error.shared or isinstance(error, (Interrupted, NumericsError))
        said = f"{error}\n{error.to_json()}"
        if launch.EXIT_FILE not in os.environ:  # a torchrun of somebody else's
            print(said, file=sys.stderr, flush=True)
        # torchrun stops this worker where another has refused
        if (group.first_here() or not shared) and not (isinstance(error, Interrupted) and launch.has_reported()):
            launch.report_exit(error.code, said)
        if not shared:
            raise SystemExit(error.code) from None
        return 0
    if group.first_here():
        launch.report_exit(0)
    return 0
