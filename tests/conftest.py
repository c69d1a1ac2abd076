"""What several tests share: the toy experiment, run once through Dagster."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests and the processes that they start share two cores
os.environ.pop("NESTDIFF_EXPERIMENT", None)
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class DagsterRun:
    """The toy experiment after its `quickstart` job: the artifact root, the Dagster home, the result of the job."""

    root: Path
    dagster_home: Path
    result: object


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterRun]:
    import dagster as dg

    from nestdiff_core.recipes import toy
    from pipelines.definitions import build_definitions

    root, dagster_home = tmp_path_factory.mktemp("artifacts"), tmp_path_factory.mktemp("dagster")
    (dagster_home / "dagster.yaml").write_text((REPOSITORY / "pipelines" / "dagster.yaml").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NESTDIFF_HOME", str(root))
        patch.setenv("DAGSTER_HOME", str(dagster_home))
        with dg.DagsterInstance.get() as instance:
            job = build_definitions(toy()).resolve_job_def("quickstart")
            yield DagsterRun(root, dagster_home, job.execute_in_process(instance=instance))
