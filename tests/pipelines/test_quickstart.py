"""The whole pipeline at toy size: through Dagster, from the command line, again, and after changes."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest
from PIL import Image

from assets.config import asset_key
from nestdiff_core import stages
from nestdiff_core.cli.digest import experiment_digests
from nestdiff_core.config import EvaluationConfig, ExperimentConfig, ImagesConfig
from nestdiff_core.evaluation.samples import load_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import toy
from pipelines.definitions import build_definitions

REPOSITORY = Path(__file__).resolve().parents[2]
# What every change of a denoiser makes stale.
JUDGED = {"samples", "evaluation", "ladder", "neighbours", "pictures", "report"}


def command(*arguments: str, root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "NESTDIFF_HOME": str(root), **environment},
        capture_output=True,
        text=True,
    )


def refusal(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON line that a refusing command leaves on stderr."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("{")]
    assert len(lines) == 1, done.stderr
    assert json.loads(lines[0])["code"] == done.returncode
    return json.loads(lines[0])


@pytest.fixture(scope="module")
def experiment(toy_run: Any) -> Experiment:
    assert toy_run.result.success
    return Experiment(toy(), toy_run.root)


def test_every_stage_is_materialised(toy_run: Any, experiment: Experiment) -> None:
    """The quickstart job materialises every asset, each with the data version of the artifact on disk."""
    materialised = {e.asset_key.to_user_string(): e for e in toy_run.result.get_asset_materialization_events()}
    for ref in experiment.refs():
        artifact = experiment.artifact(ref)
        assert artifact.verify() > 0
        if ref.stage == "moments":
            continue
        event = materialised[asset_key(experiment.config, ref).to_user_string()]
        tags = event.step_materialization_data.materialization.tags
        assert tags["dagster/data_version"] == f"{artifact.fingerprint}.{artifact.digest}"


def test_what_stages_say_is_in_the_runs_log(toy_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates and warnings of the core, which knows nothing of Dagster."""
    monkeypatch.setenv("DAGSTER_HOME", str(toy_run.dagster_home))
    with dg.DagsterInstance.get() as instance:
        said = [(entry.level, entry.user_message or "") for entry in instance.all_logs(toy_run.result.run_id)]
    assert any(level == logging.INFO and text.startswith("samples: 256 images, about") for level, text in said)
    assert any(level == logging.WARNING and "left out, needs 100 images" in text for level, text in said)


def test_every_check_passes(toy_run: Any) -> None:
    """Each asset check ran, and the blocking ones hold even for a toy."""
    evaluations = toy_run.result.get_asset_check_evaluations()
    assert {e.check_name for e in evaluations if e.passed} >= {
        "index_complete",
        "features_finite",
        "standardised",
        "checkpoint_loads",
        "samples_finite_and_in_range",
    }
    assert len(evaluations) == 7


def test_each_image_shard_is_a_partition(toy_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one job, `features` records a materialisation for each shard."""
    monkeypatch.setenv("DAGSTER_HOME", str(toy_run.dagster_home))
    with dg.DagsterInstance.get() as instance:
        assert instance.get_materialized_partitions(dg.AssetKey(["toy", "features"])) == {
            "00000",
            "00001",
            "00002",
            "00003",
        }


def test_samples_are_readable_by_others(experiment: Experiment) -> None:
    """samples.npz holds arr_0, uint8 NHWC with three channels, one for each image asked for."""
    path = experiment.artifact(Ref("samples")).path / "samples.npz"
    with np.load(path) as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_0"].shape == (256, 8, 8, 3)
    assert load_samples(path).shape == (256, 8, 8, 1)


def test_the_command_line_makes_the_same(experiment: Experiment, tmp_path: Path) -> None:
    """`python -m nestdiff_core run` without Dagster gives the same content in every stage, to the bit."""
    done = command("nestdiff_core", "run", "toy", root=tmp_path)
    assert done.returncode == 0, done.stderr
    digests = experiment_digests(Experiment(toy(), tmp_path))
    assert None not in digests.values()
    assert digests == experiment_digests(experiment)


def test_again_is_a_check_not_work(experiment: Experiment) -> None:
    """Running everything again rewrites nothing."""
    files = [p for p in experiment.root.rglob("*") if p.is_file() and p.name != ".lock"]
    before = {p: p.stat().st_mtime_ns for p in files}
    done = command("nestdiff_core", "run", "toy", root=experiment.root)
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in experiment.root.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_the_literal_dagster_command(toy_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dagster job execute -j train_level_2`, in the environment that the set-up makes, succeeds."""
    done = command(
        *("dagster", "job", "execute", "-j", "train_level_2"),
        root=toy_run.root,
        DAGSTER_HOME=str(toy_run.dagster_home),
        NESTDIFF_EXPERIMENT="toy",
        DAGSTER_CLI_JOB_EXECUTE_MODULE_NAME="pipelines.definitions",
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("DAGSTER_HOME", str(toy_run.dagster_home))
    with dg.DagsterInstance.get() as instance:
        (run,) = instance.get_runs(dg.RunsFilter(job_name="train_level_2"))
    assert run.status is dg.DagsterRunStatus.SUCCESS


def test_training_without_latents_says_what_to_run(tmp_path: Path) -> None:
    """A missing input is exit code 4, before torchrun starts, with the command that makes it."""
    record = refusal(command("nestdiff_core", "train", "toy", "--level=2", root=tmp_path))
    assert record["code"] == 4
    told = "NESTDIFF_EXPERIMENT=toy dagster job execute -m pipelines.definitions -j build_latents"
    assert record["fix"] == f"Run: {told}"  # whatever experiment the shell has


def test_a_changed_setting_names_itself(experiment: Experiment) -> None:
    """Sampling with other channels than were trained is refused, and the refusal names the setting and both values."""
    path = experiment.root / "changed.yaml"
    path.write_text("recipe: toy\nname: toy\nlevels.2.channels: 3\n")
    record = refusal(command("nestdiff_core", "sample", str(path), root=experiment.root))
    assert record["code"] == 4
    assert record["expected"]["config.channels"] == 3
    assert record["found"]["config.channels"] == 4


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["train", "toy"], 2),
        (["train", "toy", "--level=9"], 2),
        (["train", "tpy", "--level=1"], 2),
        (["fly"], 2),
        (["sample", "toy", "--out", "x.gif"], 2),
        (["inspect", "/nowhere/x.yaml"], 2),
        (["sample", "toy", "--seed", "-1"], 2),
        (["train", "toy", "--level", "1", "--processes", "0"], 2),
        (["train", "toy", "--level", "1", "--until-step", "0"], 2),
        (["run", "toy", "--device", "cuda:7", "--stage", "encoder"], 5),
    ],
)
def test_refusals_leave_one_json_line(tmp_path: Path, arguments: list[str], code: int) -> None:
    """Each refusal has its exit code and one JSON line, never a traceback."""
    done = command("nestdiff_core", *arguments, root=tmp_path)
    assert refusal(done)["code"] == code
    assert "Traceback" not in done.stderr


def test_definitions_load_without_torch() -> None:
    """Looking at the graph does not import torch: that would cost every Dagster process seconds."""
    code = "import sys; import pipelines.definitions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize("name", ["toy", "digits", "images64", "images64_small"])
def test_definitions_of_every_recipe(name: str) -> None:
    """Each recipe gives loadable definitions with the promised jobs, schedule and sensor, off until switched on."""
    from nestdiff_core.recipes import RECIPES

    config = RECIPES[name]()
    definitions = build_definitions(config)
    dg.Definitions.validate_loadable(definitions)
    jobs = {job.name for job in definitions.resolve_all_job_defs()}
    levels = {f"train_level_{level}" for level in range(1, config.num_levels + 1)}
    assert jobs >= {"quickstart", "build_latents", "design_levels", "train_all_levels", "evaluate", "watch"} | levels
    repository = definitions.get_repository_def()
    schedule = repository.get_schedule_def("nightly_evaluation")
    sensor = repository.get_sensor_def("new_denoiser_evaluation")
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    assert sensor.default_status is dg.DefaultSensorStatus.STOPPED


def test_the_sensor_asks_once_for_the_same_weights(toy_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sensor's run key is a function of the denoisers' data versions; without a denoiser it waits."""
    monkeypatch.setenv("DAGSTER_HOME", str(toy_run.dagster_home))
    sensor = build_definitions(toy()).get_repository_def().get_sensor_def("new_denoiser_evaluation")
    with dg.DagsterInstance.get() as instance, dg.build_sensor_context(instance=instance) as context:
        first, second = sensor(context), sensor(context)
    assert isinstance(first, dg.RunRequest)
    assert isinstance(second, dg.RunRequest)
    assert first.run_key == second.run_key
    with dg.DagsterInstance.ephemeral() as empty, dg.build_sensor_context(instance=empty) as context:
        assert isinstance(sensor(context), dg.SkipReason)


def trained(config: ExperimentConfig, instance: dg.DagsterInstance, version: str) -> None:
    """Tell the instance that every denoiser has been trained."""
    x = Experiment(config)
    for ref in x.refs():
        if ref.stage == "denoiser":
            tags = {"dagster/code_version": x.config_hash(ref), "dagster/data_version": f"{version}{ref.level}"}
            instance.report_runless_asset_event(dg.AssetMaterialization(asset_key(config, ref), tags=tags))


def test_the_sensor_waits_for_this_configuration_and_tries_again() -> None:
    """New weights are another key; other settings, a running training and three failures are reasons to wait."""
    config = toy()
    level = replace(config.level(2), condition_noise=0.1)
    other = replace(config, levels=(config.level(1), level))
    with dg.DagsterInstance.ephemeral() as instance, dg.build_sensor_context(instance=instance) as context:
        sensor, of_other = (
            build_definitions(c).get_repository_def().get_sensor_def("new_denoiser_evaluation") for c in (config, other)
        )
        trained(config, instance, "a")
        first = sensor(context)
        assert isinstance(first, dg.RunRequest)
        skipped = of_other(context)
        assert isinstance(skipped, dg.SkipReason) and "other settings" in str(skipped.skip_message)
        for _ in range(3):
            request = sensor(context)
            assert isinstance(request, dg.RunRequest)
            run = instance.add_run(dg.DagsterRun("evaluate", tags=request.tags))
            instance.report_run_failed(run)
        skipped = sensor(context)
        assert isinstance(skipped, dg.SkipReason) and "failed 3 times" in str(skipped.skip_message)
        trained(config, instance, "b")
        again = sensor(context)
        assert isinstance(again, dg.RunRequest) and again.run_key != first.run_key
        instance.add_run(dg.DagsterRun("train_level_1", status=dg.DagsterRunStatus.STARTED))
        assert isinstance(sensor(context), dg.SkipReason)


def test_features_that_are_not_kept_are_no_asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """build_latents then goes from the encoder to the bases; latents are those of the toy."""
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path))
    config = replace(toy(), features=replace(toy().features, keep=False))
    definitions = build_definitions(config)
    keys = {key.to_user_string() for key in definitions.resolve_asset_graph().materializable_asset_keys}
    assert "toy/features" not in keys and "toy/svd_basis_level_2" in keys
    with dg.DagsterInstance.ephemeral() as instance:
        assert definitions.resolve_job_def("build_latents").execute_in_process(instance=instance).success
    assert Experiment(config, tmp_path).artifact(Ref("latents", 2)).verify() > 0


def test_a_changed_source_is_noticed_loses_partitions_and_a_rechecked_one_makes_nothing_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster's own staleness, after one partition of a complete store was materialised again without any work."""
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path / "artifacts"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(pictures / f"{i:02d}.png")
    images = ImagesConfig(source="folder", path=str(pictures), resolution=8, channels=1, images_per_shard=4)
    config = replace(toy(), name="own", images=images, evaluation=EvaluationConfig(extractors=("encoder",)))
    definitions = build_definitions(config)
    with dg.DagsterInstance.ephemeral() as instance:
        build = definitions.resolve_job_def("build_latents")
        sensor = definitions.get_repository_def().get_sensor_def("new_images")
        with dg.build_sensor_context(instance=instance) as context:
            assert isinstance(sensor(context), dg.SkipReason)  # nothing has been indexed
            assert build.execute_in_process(instance=instance).success
            assert isinstance(sensor(context), dg.SkipReason)  # nothing has changed
            for i in range(8, 12):
                (pictures / f"{i:02d}.png").unlink()
            asked = sensor(context)
            assert isinstance(asked, dg.RunRequest)
            run = instance.add_run(dg.DagsterRun("encode_images", tags=asked.tags, status=dg.DagsterRunStatus.STARTED))
            assert isinstance(sensor(context), dg.SkipReason)  # it is being seen to
            instance.report_run_canceled(run)
            assert sensor(context).run_key is None  # or what was asked for once would never be again
            stages.images(Experiment(config))
            unfinished = sensor(context)  # indexed, and not encoded
            assert isinstance(unfinished, dg.RunRequest) and unfinished.tags != asked.tags
            for _ in range(3):
                failed = dg.DagsterRun("encode_images", tags=unfinished.tags, status=dg.DagsterRunStatus.FAILURE)
                instance.add_run(failed)
            given_up = sensor(context)
            assert isinstance(given_up, dg.SkipReason) and "failed 3 times" in str(given_up.skip_message)
        assert build.execute_in_process(instance=instance).success
        assert set(instance.get_dynamic_partitions("own_image_shards")) == {"00000", "00001"}
        every = definitions.resolve_implicit_global_asset_job_def()
        features = dg.AssetKey(["own", "features"])
        assert every.execute_in_process(instance=instance, asset_selection=[features], partition_key="00001").success
        graph = definitions.resolve_asset_graph()
        resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
        made = [key for key in graph.materializable_asset_keys if instance.get_latest_materialization_event(key)]
        assert len(made) == 6
        assert {key.to_user_string(): resolver.get_status(key).value for key in made} == {
            key.to_user_string(): "FRESH" for key in made
        }


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        (
            "levels.2.channels: 3",
            {"svd_basis 2", "latents 2", "denoiser 1", "denoiser 2", *JUDGED},
        ),
        ("levels.2.condition_noise: 1.0", {"denoiser 1", *JUDGED}),
        ("levels.1.train.lr: 0.01", {"denoiser 1", *JUDGED}),
        ("levels.1.guidance: 2.0", JUDGED),
        ("sampling.batch_size: 7", JUDGED - {"pictures"}),
        ("runtime.device: cpu", set()),
        ("levels.1.train.log_every: 7", set()),
        ("sampling.num_images: 7", {"samples", "evaluation", "neighbours", "report"}),
        ("ladder.num_images: 7", {"ladder", "report"}),
        ("neighbours.quantile: 0.1", {"neighbours", "report"}),
        ("sweep.guidance: [1.0]", {"report"}),
        ("evaluation.num_neighbours: 5", {"evaluation", "ladder", "neighbours", "report"}),
    ],
)
def test_a_change_makes_stale_what_depends_on_it_and_nothing_else(tmp_path: Path, change: str, stale: set[str]) -> None:
    """The code version of exactly the affected assets changes, per level."""
    from nestdiff_core.recipes import load_experiment

    path = tmp_path / "x.yaml"
    path.write_text(f"recipe: toy\nname: toy\n{change}\n")
    old, new = Experiment(toy(), tmp_path), Experiment(load_experiment(path), tmp_path)
    changed = {
        " ".join(map(str, filter(None, ref))) for ref in old.refs() if old.config_hash(ref) != new.config_hash(ref)
    }
    assert changed == stale


def test_one_partition_can_be_materialised_alone(toy_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`features` runs for a single image shard, as the UI's partition page does; a whole one is only checked."""
    monkeypatch.setenv("DAGSTER_HOME", str(toy_run.dagster_home))
    monkeypatch.setenv("NESTDIFF_HOME", str(toy_run.root))
    key = dg.AssetKey(["toy", "features"])
    job = build_definitions(toy()).resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.get() as instance:
        done = job.execute_in_process(instance=instance, asset_selection=[key], partition_key="00001")
        assert done.success
        (event,) = done.get_asset_materialization_events()
    assert event.partition == "00001"
    assert event.step_materialization_data.materialization.metadata["rows"].value == 64


def test_a_refusal_is_a_failure_with_the_whole_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training without latents fails in Dagster with the core's sentence and cure, and is not retried."""
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path))
    with dg.DagsterInstance.ephemeral() as instance:
        job = build_definitions(toy()).resolve_job_def("train_level_1")
        done = job.execute_in_process(instance=instance, raise_on_error=False)
    assert not done.success
    (failure,) = [e for e in done.all_events if e.event_type_value == "STEP_FAILURE"]
    details = failure.step_failure_data.user_failure_data
    assert "images of experiment 'toy' has not been made" in details.description
    assert "-j build_latents" in details.metadata["fix"].value


def test_a_failing_trainer_is_a_failed_run(toy_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that ends with a refusal fails its asset, and its sentence stands in the run's log."""
    import shutil
    from dataclasses import replace

    for stage in ("images", "encoder", "features", "moments", "svd_basis", "latents"):
        shutil.copytree(toy_run.root / stage, tmp_path / stage)
    level = toy().level(1)
    exploding = replace(level, train=replace(level.train, lr=1e30, warmup_steps=1))
    config = replace(toy(), levels=(exploding, toy().level(2)))
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path))
    with dg.DagsterInstance.ephemeral() as instance:
        done = (
            build_definitions(config)
            .resolve_job_def("train_level_1")
            .execute_in_process(instance=instance, raise_on_error=False)
        )
        logged = [entry.user_message for entry in instance.all_logs(done.run_id)]
    assert not done.success
    assert any("has exploded" in message and "levels.train.lr" in message for message in logged)
