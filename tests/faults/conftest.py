"""The forking server, and the undisturbed run that every disturbed one is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Forks, Pipeline, write_pipeline


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.stop()


@pytest.fixture(scope="session")
def undisturbed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """22 images in three shards, all stages up to the latents; only to be read."""
    pipeline = write_pipeline(forks, tmp_path_factory.mktemp("undisturbed"))
    outcome = pipeline.run()
    assert outcome.code == 0, outcome.said
    return pipeline


@pytest.fixture
def pipeline(undisturbed: Pipeline, tmp_path: Path) -> Pipeline:
    """The same experiment with an empty artifact root."""
    return undisturbed.at(tmp_path / "home")
