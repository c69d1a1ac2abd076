"""Dagster's history in PostgreSQL, configured as docs/clusters.md says."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from clusters import REPOSITORY
from processes import free_port

from nestdiff_core.recipes import toy
from pipelines.definitions import build_definitions


@pytest.fixture
def server() -> Iterator[dict[str, str]]:
    """A server of Debian's on loopback, and the variables of the documented block."""
    pytest.importorskip("dagster_postgres", reason="needs dagster-postgres")
    programs = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
    if not programs or os.geteuid() != 0:
        pytest.skip("a real PostgreSQL needs Debian's postgresql, and root")
    with tempfile.TemporaryDirectory(prefix="nestdiff-postgres-") as folder:
        port = str(free_port())
        shutil.chown(folder, "postgres")
        programs_at, data = Path(programs[-1]).parent, f"{folder}/data"

        def server_does(*command: str) -> None:
            done = subprocess.run(["su", "postgres", "-s", "/bin/sh", "-c", " ".join(command)], cwd=folder, timeout=60)
            assert done.returncode == 0

        server_does(f"{programs_at}/initdb", "-D", data, "-A", "trust", "-U", "dagster", "--no-sync", ">/dev/null")
        options = f"'-h 127.0.0.1 -p {port} -k {folder} -F'"
        server_does(
            f"{programs_at}/pg_ctl", "-D", data, "-l", f"{folder}/log", "-o", options, "-w", "start", ">/dev/null"
        )
        try:
            values = {"HOST": "127.0.0.1", "PORT": port, "DB": "postgres", "USERNAME": "dagster", "PASSWORD": "none"}
            yield {f"DAGSTER_PG_{name}": value for name, value in values.items()}
        finally:
            server_does(f"{programs_at}/pg_ctl", "-D", data, "-m", "immediate", "stop", ">/dev/null")


def test_runs_and_events_are_kept_in_postgres(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the block of docs/clusters.md below pipelines/dagster.yaml a job runs, another instance knows
    it, and nothing is written to SQLite."""
    for name, value in {**server, "DAGSTER_HOME": str(tmp_path), "NESTDIFF_HOME": str(tmp_path / "artifacts")}.items():
        monkeypatch.setenv(name, value)
    block = re.search(r"```yaml\n(storage:.*?)```", (REPOSITORY / "docs" / "clusters.md").read_text(), re.DOTALL)
    assert block is not None
    (tmp_path / "dagster.yaml").write_text((REPOSITORY / "pipelines" / "dagster.yaml").read_text() + block[1])
    job = build_definitions(toy()).resolve_job_def("build_latents")
    with dg.DagsterInstance.get() as instance:
        result = job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey(["toy", "images"])])
        assert result.success
    with dg.DagsterInstance.get() as other:
        (run,) = other.get_runs()
        assert (run.run_id, run.status) == (result.run_id, dg.DagsterRunStatus.SUCCESS)
        assert other.get_latest_materialization_event(dg.AssetKey(["toy", "images"])) is not None
    assert not list(tmp_path.rglob("*.db"))
