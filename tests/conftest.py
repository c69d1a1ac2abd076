"""What several tests share: the toy experiment, run once through Dagster."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests and the processes that they start share two cores
os.environ.pop("NESTDIFF_EXPERIMENT", None)
REPOSITORY = Path(__file__).resolve().parents[1]
# Files of few but slow tests. They come first, so that no worker is left alone with one at the end (xdist would take
# files by their number of tests).
FIRST = (
    "test_families.py",
    "test_quickstart.py",
    "faults/test_dagster.py",
    "cluster/",
    "test_launch.py",
    "test_mirror.py",
    "test_loop.py",
    "faults/test_training.py",
    "test_reproduce.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(name in item.nodeid for name in FIRST))


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


@pytest.fixture(scope="session")
def shuffle_newest() -> Callable[[Any, int], None]:
    """Puts the averaged weights of a level's newest checkpoint in disorder, with a record that vouches for them."""
    import torch
    from safetensors.torch import load_file, save_file

    from nestdiff_core.files import file_record, read_sealed_json, write_sealed_json
    from nestdiff_core.newest import newest_weights

    def shuffle(x: Any, level: int) -> None:
        weights = newest_weights(x, level)
        assert weights is not None and not weights.finished
        generator, tensors = torch.Generator().manual_seed(0), load_file(weights.path)
        for name, value in tensors.items():
            order = torch.randperm(value.numel(), generator=generator)
            tensors[name] = value.flatten()[order].view_as(value).contiguous()
        save_file(tensors, weights.path)
        state = weights.path.parent / "state.json"
        record = read_sealed_json(state)
        record["files"]["ema.safetensors"] = file_record(weights.path)
        write_sealed_json(state, record)

    return shuffle
