"""Resources: where artifacts lie, and how a training job is started."""

import os
import sys
from pathlib import Path

import dagster as dg
from dagster._core.errors import DagsterPipesExecutionError

from assets.pipes import TrainerMessages
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.experiment import Experiment, home
from nestdiff_core.recipes import save_experiment

TERMINATION_TIMEOUT_SECONDS = 45.0  # a trainer saves within 15; torchrun waits 30


class ArtifactRoot(dg.ConfigurableResource):
    """The folder below which all artifacts lie."""

    root: str = ""

    def experiment(self, config: ExperimentConfig) -> Experiment:
        return Experiment(config, Path(self.root).expanduser().absolute() if self.root else home())


class LocalLauncher(dg.ConfigurableResource):
    """Trains a level, or samples, with torchrun on this machine, under Dagster Pipes: what it reports streams into the
    run's log, and it ends with the run that started it. A launcher for a cluster is another resource with the same
    methods.
    """

    def train(
        self, context: dg.AssetExecutionContext, x: Experiment, level: int, *, device: str, processes: int
    ) -> None:
        self._run(context, x, "train", f"--level={level}", f"--device={device}", f"--processes={processes}")

    def sample(self, context: dg.AssetExecutionContext, x: Experiment, *, device: str, processes: int) -> None:
        """Make the stage `samples`."""
        self._run(context, x, "run", "--stage=samples", f"--device={device}", f"--processes={processes}")

    def _run(self, context: dg.AssetExecutionContext, x: Experiment, verb: str, *arguments: str) -> None:
        messages = TrainerMessages(context)
        client = dg.PipesSubprocessClient(
            message_reader=messages, termination_timeout_seconds=TERMINATION_TIMEOUT_SECONDS
        )
        command = [sys.executable, "-m", "nestdiff_core", verb, str(save_experiment(x.config, x.root)), *arguments]
        try:
            client.run(
                context=context,
                command=command,
                env={
                    "NESTDIFF_HOME": str(x.root),
                    "NESTDIFF_DIE_WITH_PARENT": str(os.getpid()),
                    "PYTHONPATH": os.pathsep.join(
                        p for p in (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")) if p
                    ),
                },
            )
        except DagsterPipesExecutionError as error:
            raise messages.failure() from error
