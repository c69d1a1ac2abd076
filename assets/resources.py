"""Resources: where artifacts lie, and how a training job is started."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
from dagster._core.errors import DagsterPipesExecutionError

from assets.config import refusals
from assets.pipes import TrainerMessages
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.errors import ConfigError, EnvironmentFault
from nestdiff_core.experiment import Experiment, Ref, home
from nestdiff_core.recipes import save_experiment
from nestdiff_core.training.slurm import Job

TERMINATION_TIMEOUT_SECONDS = 45.0  # a trainer saves within 15; torchrun waits 30
POLL_SECONDS = 5.0  # between questions to Slurm


class ArtifactRoot(dg.ConfigurableResource):
    """The folder below which all artifacts lie."""

    root: str = ""

    def experiment(self, config: ExperimentConfig) -> Experiment:
        return Experiment(config, Path(self.root).expanduser().absolute() if self.root else home())


class Launcher(dg.ConfigurableResource):
    """Has levels trained, and samples made, in processes of their own, where `runtime.launcher` of the run says.

    What they report streams into the run's log. For another kind of cluster put a resource with these two methods in
    this one's place (docs/clusters.md).
    """

    def train(self, context: dg.AssetExecutionContext, x: Experiment, level: int) -> None:
        """Train the denoiser of `level` as `x.config.runtime` says; the same call resumes."""
        ref = Ref("denoiser", level)
        self._run(context, x, ref, "train", str(save_experiment(x.config, x.root)), f"--level={level}")

    def sample(self, context: dg.AssetExecutionContext, x: Experiment, stage: str = "samples") -> None:
        """Make the stage `samples`, or `ladder`."""
        self._run(context, x, Ref(stage), "run", str(save_experiment(x.config, x.root)), f"--stage={stage}")

    def _run(self, context: dg.AssetExecutionContext, x: Experiment, ref: Ref, *arguments: str) -> None:
        match x.config.runtime.launcher:
            case "local":
                run_here(context, x, arguments)
            case "slurm":
                run_on_slurm(context, x, ref, arguments)


def run_here(context: dg.AssetExecutionContext, x: Experiment, arguments: Sequence[str]) -> None:
    """On this machine; it ends with the run that started it."""
    with refusals():
        if x.config.runtime.hosts > 1:
            raise ConfigError(
                "A run on this machine cannot start the other hosts",
                key="runtime.hosts",
                expected=1,
                found=x.config.runtime.hosts,
                fix="Set runtime.launcher: slurm, or train by hand on every host (docs/clusters.md).",
            )
    messages = TrainerMessages(context)
    client = dg.PipesSubprocessClient(message_reader=messages, termination_timeout_seconds=TERMINATION_TIMEOUT_SECONDS)
    try:
        client.run(
            context=context,
            command=[sys.executable, "-m", "nestdiff_core", *arguments],
            env={**_environment(x), "NESTDIFF_DIE_WITH_PARENT": str(os.getpid())},
        )
    except DagsterPipesExecutionError as error:
        raise messages.failure() from error


def run_on_slurm(context: dg.AssetExecutionContext, x: Experiment, ref: Ref, arguments: Sequence[str]) -> None:
    """As a Slurm job. It ends with a run that is stopped, but outlives one that dies: the next run attaches to it."""
    with refusals():
        folder = x.root / "slurm" / f"{x.config.name}-{ref.stage}-{x.header(ref)['fingerprint']}"
        folder.mkdir(parents=True, exist_ok=True)
        job = Job(folder, arguments, x.config.runtime, several_hosts=ref.stage == "denoiser")
        with job.lock():
            messages = TrainerMessages(context, folder / "messages.jsonl")
            try:
                with dg.open_pipes_session(context, dg.PipesEnvContextInjector(), messages) as pipes:
                    environment = {**_environment(x), **pipes.get_bootstrap_env_vars()}
                    job.run(environment, log=context.log.info, said=print, poll_seconds=POLL_SECONDS)
            except EnvironmentFault as error:
                if messages.refusal is not None:
                    raise messages.failure() from error
                raise


def _environment(x: Experiment) -> dict[str, str]:
    """Where artifacts and this code are."""
    paths = (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))
    return {"NESTDIFF_HOME": str(x.root), "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
