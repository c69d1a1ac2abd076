"""Training under Dagster: stopped, killed at every link, lied to; nothing is orphaned, leaked, lost or told abroad."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from harness import REPOSITORY
from processes import free_port, listening, parent, wait_for

from nestdiff_core.recipes import toy
from nestdiff_core.training.launch import GRACE_SECONDS
from pipelines.definitions import build_definitions
from pipelines.recover import PROCESS

CANARY = "canary-5ecret-that-nobody-may-write-down"
ENDED = GRACE_SECONDS + 5
MADE = ("images", "encoder", "features", "moments", "svd_basis", "latents")
FAILURE, STARTED, CANCELED = (getattr(dg.DagsterRunStatus, name) for name in ("FAILURE", "STARTED", "CANCELED"))


class Place:
    """A Dagster home and an artifact root with latents, in one folder, and all that runs with them."""

    def __init__(self, folder: Path, made: Path, num_steps: int) -> None:
        self.folder, self.root, self.home = folder, folder / "artifacts", folder / "dagster"
        self.home.mkdir(parents=True)
        for stage in MADE:
            shutil.copytree(made / stage, self.root / stage)
        (self.home / "dagster.yaml").write_text((REPOSITORY / "pipelines" / "dagster.yaml").read_text())
        self.experiment = folder / "long.yaml"
        train = {"num_steps": num_steps, "checkpoint_every": 50, "log_every": 25, "keep_last": 2}
        self.experiment.write_text(json.dumps({"recipe": "toy", "levels.2.train": train}))
        self.environment = {
            **os.environ,
            "DAGSTER_HOME": str(self.home),
            "NESTDIFF_HOME": str(self.root),
            "NESTDIFF_EXPERIMENT": str(self.experiment),
            "AWS_SECRET_ACCESS_KEY": CANARY,
        }
        self.log = folder / "log.txt"

    def dagster(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dagster", *arguments],
                cwd=REPOSITORY,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def train(self) -> subprocess.Popen[bytes]:
        return self.dagster("job", "execute", "-m", "pipelines.definitions", "-j", "train_level_2")

    def processes(self, *words: str) -> list[int]:
        """Living processes of this place whose command lines have all of the words."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                of_here = str(self.folder).encode() in (folder / "environ").read_bytes()
                if folder.name.isdigit() and of_here and line and all(word in line for word in words):
                    found.append(int(folder.name))
            except OSError:
                continue
        return sorted(found)

    def trainers(self) -> list[int]:
        return self.processes("nestdiff_core train")

    def newest_step(self) -> int:
        found = self.root.glob("denoiser/*/checkpoints/step_*")
        return max((int(path.name[5:]) for path in found), default=0)

    def trains_on(self) -> None:
        """Waits until a trainer has saved a checkpoint more."""
        before = self.newest_step()
        wait_for(lambda: self.trainers() and self.newest_step() > before, 90, "a checkpoint")

    def end(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture
def place(toy_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    place = Place(tmp_path / "here", toy_run.root, num_steps=1_000_000)
    monkeypatch.setenv("DAGSTER_HOME", str(place.home))
    try:
        yield place
    finally:
        place.end()


def slots(instance: dg.DagsterInstance) -> set[str]:
    return set(instance.event_log_storage.get_concurrency_run_ids())


def losses(instance: dg.DagsterInstance, run_id: str) -> list[tuple[int, float]]:
    """Steps and losses that the UI can plot."""
    events = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_OBSERVATION)
    seen = [e.dagster_event.asset_observation_data.asset_observation.metadata for e in events if e.dagster_event]
    return [(int(m["step"].value), float(m["loss"].value)) for m in seen]  # type: ignore[arg-type]


def said(instance: dg.DagsterInstance, run_id: str) -> str:
    return "\n".join(entry.user_message or entry.message or "" for entry in instance.all_logs(run_id))


def test_a_training_killed_at_every_link(place: Place) -> None:
    """kill -9 of `dagster job execute`: nobody is left GRACE_SECONDS later. The next run marks it, frees its slot and
    resumes; its worker, agent and parent are killed and started again; a SIGTERM saves and ends it."""
    with dg.DagsterInstance.get() as instance:
        instance.get_runs()  # the tables are made once, by one process
        first = place.train()
        place.trains_on()
        (run,) = instance.get_runs()
        wait_for(lambda: len(losses(instance, run.run_id)) >= 2, 30, "two points to plot while it trains")
        assert run.tags[PROCESS].split(" pid ")[1].startswith(f"{first.pid} ")
        first.kill()
        first.wait()
        wait_for(lambda: not place.trainers(), ENDED, "the end of every trainer")
        assert instance.get_runs()[0].status is STARTED and slots(instance) == {run.run_id}

        reached = place.newest_step()
        second = place.train()
        wait_for(lambda: len(instance.get_runs()) == 2, 60, "the second run")
        again = instance.get_runs()[0]
        wait_for(lambda: losses(instance, again.run_id), 60, "a point of the second run")
        assert losses(instance, again.run_id)[0][0] > reached
        dead = instance.get_run_by_id(run.run_id)
        assert dead is not None and dead.status is FAILURE and slots(instance) == {again.run_id}

        for link in ("-u -m nestdiff_core", "torch.distributed.run"):  # the worker; torchrun's agent
            place.trains_on()
            before = place.trainers()
            os.kill(place.processes("nestdiff_core train", link)[0], signal.SIGKILL)
            wait_for(lambda: place.trainers() and not set(place.trainers()) & set(before), 60, "another trainer")  # noqa: B023
        place.trains_on()
        assert instance.get_runs()[0].status is STARTED
        second.send_signal(signal.SIGTERM)
        second.wait(timeout=ENDED)
        assert not place.trainers() and slots(instance) == set()
        assert f"Stopped by a signal after step {place.newest_step()}" in said(instance, again.run_id)
        steps = [step for step, _ in losses(instance, again.run_id)]
        assert steps == sorted(set(steps))


def test_a_second_run_of_the_same_level(place: Place, tmp_path: Path, toy_run: Any) -> None:
    """Outside the first one's Dagster instance, where no pool knows of it: refused at once, with who holds the level,
    as a failure that is not tried again. Without a Dagster home of its own, too."""
    first = place.train()
    place.trains_on()
    other = Place(tmp_path / "other", toy_run.root, num_steps=1)
    other.environment |= {"NESTDIFF_HOME": str(place.root), "NESTDIFF_EXPERIMENT": str(place.experiment)}
    (other.home / "dagster.yaml").unlink()
    second = other.train()
    assert second.wait(timeout=60) == 1
    with dg.DagsterInstance.from_ref(dg.DagsterInstance.from_config(str(other.home)).get_ref()) as instance:
        (run,) = instance.get_runs()
        kinds = [entry.dagster_event.event_type_value for entry in instance.all_logs(run.run_id) if entry.dagster_event]
        (failure,) = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    assert run.status is FAILURE and "STEP_UP_FOR_RETRY" not in kinds
    assert failure.dagster_event is not None
    details = failure.dagster_event.step_failure_data.user_failure_data
    assert details is not None and details.description is not None
    assert "Another process is writing here" in details.description
    assert "locked by pid" in str(details.metadata["found"].value)
    assert first.poll() is None and place.trainers()


# --- a trainer that is not what it says ---------------------------------------------------------------------------

LIAR = """#!{python}
import base64, json, os, shutil, sys, zlib
messages = json.loads(zlib.decompress(base64.b64decode(os.environ["DAGSTER_PIPES_MESSAGES"])))["path"]
match "{lie}":
    case "silent":
        sys.exit(0)
    case "babble":
        with open(messages, "a") as file:
            file.write("not JSON\\n")
    case "deaf":
        shutil.rmtree(os.path.dirname(messages))
os.execv("{python}", ["{python}", *sys.argv[1:]])
"""


@pytest.mark.parametrize("lie", ["silent", "babble", "deaf"])
def test_what_counts_is_the_artifact(toy_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    """A trainer that exits with 0 and has made nothing is a failure; one whose messages are malformed or cannot be
    delivered is none."""
    for stage in MADE:
        shutil.copytree(toy_run.root / stage, tmp_path / "artifacts" / stage)
    liar = tmp_path / "python"
    liar.write_text(LIAR.format(python=sys.executable, lie=lie))
    liar.chmod(0o755)
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path / "artifacts"))
    with dg.DagsterInstance.ephemeral() as instance, monkeypatch.context() as patch:
        patch.setattr("assets.resources.sys.executable", str(liar))
        job = build_definitions(toy()).resolve_job_def("train_level_2")
        done = job.execute_in_process(instance=instance, raise_on_error=False)
    assert done.success is (lie != "silent")
    assert bool(done.get_asset_materialization_events()) is (lie != "silent")


OPEN = """
import sys, dagster as dg
sys.path.insert(0, {scripts!r})
import setup
from pathlib import Path
setup.ROOT, setup.INSTANCE = Path({root!r}), Path({root!r}) / ".dagster"
setup.PYTHON = Path(sys.executable)
if not setup.is_initialised():
    with setup.only_one_setup():
        if not setup.is_initialised():
            setup.initialise_instance()
with dg.DagsterInstance.from_config(str(setup.INSTANCE)) as instance:
    run = instance.add_run(dg.DagsterRun("a"))
    instance.report_run_failed(run)
"""


def test_eight_first_uses_at_once(tmp_path: Path) -> None:
    """Of a checkout that was just cloned: one makes the instance's tables, the others wait, and all eight write."""
    (tmp_path / "pipelines").mkdir()
    shutil.copy(REPOSITORY / "pipelines" / "dagster.yaml", tmp_path / "pipelines")
    code = OPEN.format(scripts=str(REPOSITORY / "scripts"), root=str(tmp_path))
    users = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    errors = [user.communicate(timeout=120)[1] for user in users]
    assert [user.returncode for user in users] == [0] * 8, "\n".join(errors)
    with dg.DagsterInstance.from_config(str(tmp_path / ".dagster")) as instance:
        assert [run.status for run in instance.get_runs()] == [FAILURE] * 8


# --- the web UI's services ----------------------------------------------------------------------------------------

LAUNCH = """mutation($p: ExecutionParams!) { launchPipelineExecution(executionParams: $p) {
    __typename ... on LaunchRunSuccess { run { runId } } } }"""
TERMINATE = "mutation($run: String!) { terminateRun(runId: $run) { __typename } }"


class Services:
    """`dagster dev` as `make dev` starts it: web server, daemon, code server."""

    def __init__(self, place: Place, port: int) -> None:
        self.place, self.port = place, port
        make = ["make", "--no-print-directory", "-n", "dev", f"PORT={port}"]  # `make test` may be its parent
        recipe = subprocess.run(make, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        self.command = recipe.stdout.splitlines()[-1].partition("dagster ")[2].split()
        assert self.command[0] == "dev", recipe.stdout
        self.process = place.dagster(*self.command)
        wait_for(self._answers, 90, "an answer of the web server")

    def _answers(self) -> bool:
        try:
            found = self.ask("{ workspaceOrError { ... on Workspace { locationEntries { loadStatus } } } }")
        except OSError:
            return False
        return [e["loadStatus"] for e in found["workspaceOrError"]["locationEntries"]] == ["LOADED"]

    def ask(self, query: str, **variables: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def launch(self, *, in_processes: bool = False) -> str:
        """The job train_level_2; in_processes: the asset alone, as by the button Materialize, each step a process."""
        selector = {"repositoryLocationName": "nestdiff", "repositoryName": "__repository__"}
        if in_processes:
            asset = {"path": ["long", "denoiser_level_2"]}
            selector |= {"pipelineName": "__ASSET_JOB", "assetSelection": [asset]}  # type: ignore[dict-item]
        else:
            selector["pipelineName"] = "train_level_2"
        parameters = {"selector": selector, "runConfigData": {}, "mode": "default"}
        run_id = self.ask(LAUNCH, p=parameters)["launchPipelineExecution"]["run"]["runId"]
        self.place.trains_on()
        return run_id


@pytest.fixture
def services(place: Place) -> Services:
    with dg.DagsterInstance.get() as instance:
        instance.get_runs()
    return Services(place, free_port())


def test_stopped_and_killed_from_the_web_ui(place: Place, services: Services) -> None:
    """Stop saves and ends within seconds, as CANCELED. kill -9 of the run's process, of the daemon and of the code
    server: no trainer lives GRACE_SECONDS later without a run that says so, slots are freed within two minutes. The
    services listen on this machine only, and a secret of the environment is in no file."""
    with dg.DagsterInstance.get() as instance:

        def status(run_id: str) -> dg.DagsterRunStatus:
            run = instance.get_run_by_id(run_id)
            assert run is not None
            return run.status

        stopped = services.launch()
        (address,) = listening([pid for pid in place.processes() if pid not in place.trainers()])
        assert address == f"0100007F:{services.port:04X}"
        assert listening(place.trainers()) == set()
        began = time.monotonic()
        services.ask(TERMINATE, run=stopped)
        wait_for(lambda: status(stopped) is CANCELED and not place.trainers(), ENDED, "the end after a stop")
        assert slots(instance) == set()
        print(f"stopped after {time.monotonic() - began:.1f} s")
        assert f"Stopped by a signal after step {place.newest_step()}" in said(instance, stopped)

        killed = services.launch(in_processes=True)
        (server,) = place.processes("dagster api grpc")
        workers = place.processes("spawn_main")
        (worker,) = [w for w in workers if parent(w) == server]
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: not place.trainers(), ENDED, "the end of every trainer")
        wait_for(lambda: status(killed) is FAILURE and not slots(instance), 120, "the mark, and the slot")

        left = services.launch()
        os.kill(place.processes("dagster._daemon")[0], signal.SIGKILL)
        os.kill(server, signal.SIGKILL)
        wait_for(lambda: not place.trainers(), ENDED, "the end of every trainer")
        wait_for(lambda: status(left) is FAILURE and not slots(instance), 120, "the mark, and the slot")
    place.end()
    files = [path for path in place.folder.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
