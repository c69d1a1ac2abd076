"""What `gc` names and removes: only what is ours and belongs to nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nestdiff_core.cleaning import find_litter, remove
from nestdiff_core.cli import main
from nestdiff_core.cli.digest import experiment_digests
from nestdiff_core.config import EncoderConfig, JudgeConfig
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import DirectoryLock, read_json, write_json
from nestdiff_core.recipes import toy


@pytest.fixture
def made(toy_run: Any, tmp_path: Path) -> Experiment:
    """A copy of the toy experiment's artifacts."""
    shutil.copytree(toy_run.root, tmp_path / "artifacts")
    return Experiment(toy(), tmp_path / "artifacts")


def test_a_finished_experiment_has_no_litter(made: Experiment) -> None:
    """Nothing of it is named, checkpoints beside the exported weights included."""
    assert list(find_litter(made.root)) == [] == list(find_litter(made.root, [made]))


def test_litter_is_named_and_removed_alone(made: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files and a shard that the manifest does not know go; everything else has the content it had."""
    before = experiment_digests(made)
    store = made.artifact(Ref("features")).path / "store.zarr"
    stray = [
        made.artifact(Ref("denoiser", 1)).path / ".tmp-abc",
        store / "map" / "c" / "9" / "0" / "0" / "0" / "0",
        store / "map" / "0.partial",
    ]
    for path in stray:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)
    mine = made.root / "notes.txt"
    mine.write_text("not ours")
    assert sorted(litter.path for litter in find_litter(made.root)) == sorted(stray)
    monkeypatch.setenv("NESTDIFF_HOME", str(made.root))
    assert main(["gc"]) == 0 and all(path.exists() for path in stray)
    assert main(["gc", "--apply"]) == 0 and not any(path.exists() for path in stray)
    assert mine.exists() and experiment_digests(made) == before and list(find_litter(made.root)) == []


def test_what_is_being_written_is_passed_over(made: Experiment) -> None:
    """A locked artifact's temporary files belong to somebody."""
    folder = made.artifact(Ref("features")).path
    (folder / ".tmp-abc").write_bytes(b"x")
    with DirectoryLock(folder):
        assert list(find_litter(made.root)) == []
    assert [litter.path.name for litter in find_litter(made.root)] == [".tmp-abc"]


def test_only_unused_artifacts_go_with_keep(made: Experiment) -> None:
    """Another experiment's samples go; what the kept one has, or has begun, stays."""
    other = Experiment(replace(toy(), sampling=replace(toy().sampling, seed=7)), made.root)
    shutil.copytree(made.path(Ref("samples")), other.path(Ref("samples")))
    manifest = other.path(Ref("samples")) / "manifest.json"
    write_json(manifest, {**read_json(manifest), "config": other.stage_config(Ref("samples"))})
    begun = Experiment(replace(toy(), levels=(toy().level(1), replace(toy().level(2), condition_noise=0.1))), made.root)
    (begun.path(Ref("denoiser", 1)) / "checkpoints").mkdir(parents=True)
    with DirectoryLock(begun.path(Ref("denoiser", 1))):
        pass
    unused = list(find_litter(made.root, [made, begun]))
    assert [litter.path for litter in unused] == [other.path(Ref("samples"))] and unused[0].size > 0
    remove(unused[0])
    assert not other.path(Ref("samples")).exists() and made.artifact(Ref("samples")).verify() > 0
    assert begun.path(Ref("denoiser", 1)).is_dir()


def test_what_an_input_is_missing_for_stays(made: Experiment) -> None:
    """While features are made again nobody can tell what lies below them; once they are there it is valid as before."""
    features = made.artifact(Ref("features")).path
    manifest = (features / "manifest.json").read_bytes()
    (features / "manifest.json").unlink()
    assert list(find_litter(made.root, [made])) == []
    (features / "manifest.json").write_bytes(manifest)
    assert made.artifact(Ref("denoiser", 1)).verify() > 0


def test_what_a_setting_names_stays(made: Experiment) -> None:
    """A judge may be another experiment's encoder, given by its path."""
    judge = made.artifact(Ref("encoder")).path
    config = replace(toy(), images=replace(toy().images, resolution=16), encoder=replace(toy().encoder, mean=(0.4,)))
    named = EncoderConfig(kind="moco", weights=str(judge))
    judged = replace(config.evaluation, judges=(JudgeConfig(name="other", encoder=named),))
    for evaluation, kept in ((config.evaluation, False), (judged, True)):
        x = Experiment(replace(config, evaluation=evaluation), made.root)
        gone = {litter.path for litter in find_litter(made.root, [x])}
        assert made.artifact(Ref("images")).path in gone and (judge not in gone) == kept
