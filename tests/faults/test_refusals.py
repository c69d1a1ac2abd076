"""What does not belong or is not what was written is refused by name; the cure that the refusal gives works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from harness import Forks, Outcome, Pipeline, assert_recovered, committed, contents, write_pipeline
from safetensors.torch import save_file

from nestdiff_core.cli.digest import experiment_digests
from nestdiff_core.experiment import Ref
from nestdiff_core.files import MANIFEST, PARTS


@pytest.fixture
def made(undisturbed: Pipeline, tmp_path: Path) -> Pipeline:
    """A copy of the finished pipeline, to be damaged."""
    shutil.copytree(undisturbed.home, tmp_path / "home")
    return undisturbed.at(tmp_path / "home")


def assert_refused(outcome: Outcome, code: int, **expected: Any) -> dict[str, Any]:
    """A refusal with this exit code and these fields, with a cure and without a traceback."""
    assert outcome.code == code and "Traceback" not in outcome.said, outcome.said
    refusal = outcome.refusal
    assert {name: refusal[name] for name in expected} == expected
    assert refusal["fix"]
    return refusal


def with_settings(pipeline: Pipeline, name: str, **settings: Any) -> Pipeline:
    """Another experiment on the same artifacts: settings are dotted, with `__` for the dots."""
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    file = pipeline.home.with_name(f"{name}.yaml")
    plain = json.loads(pipeline.experiment.read_text())
    plain["images"]["path"] = str(pipeline.experiment.parent / "photos")
    file.write_text(json.dumps({**plain, "name": "small", **changes}))
    return Pipeline(pipeline.forks, file, pipeline.home)


def follow_the_cure(pipeline: Pipeline, outcome: Outcome) -> None:
    """A run has ended well, or it has refused a store that is to be removed; the next one does."""
    if outcome.code != 0:
        refusal = assert_refused(outcome, 4)
        assert refusal["fix"] == "Remove the store and materialise its stage again."
        [store] = {p for p in (Path(refusal["path"]), *Path(refusal["path"]).parents) if p.name == "store.zarr"}
        shutil.rmtree(store)
        outcome = pipeline.run()
    assert outcome.code == 0, outcome.said


# --- files that are not what was written --------------------------------------------------------------------------

Damage = Callable[[Path, Path], None]


def flip(file: Path, _: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def swap(file: Path, other: Path) -> None:
    mine, its = file.read_bytes(), other.read_bytes()
    file.write_bytes(its)
    other.write_bytes(mine)


# The second file is another of the same kind: of a swap the partner, for a stale one what stood there before.
DAMAGES: dict[str, Damage] = {
    "missing": lambda file, _: file.unlink(),
    "empty": lambda file, _: file.write_bytes(b"") and None,
    "cut in half": lambda file, _: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]) and None,
    "cut at the end": lambda file, _: file.write_bytes(file.read_bytes()[:-2]) and None,
    "flipped": flip,
    "swapped": swap,
    "stale": lambda file, other: shutil.copyfile(other, file) and None,
    "appended": lambda file, _: file.write_bytes(file.read_bytes() + b"\0") and None,
}


def shards(pipeline: Pipeline, stage: str, level: int | None = None) -> list[Path]:
    return sorted((pipeline.x.path(Ref(stage, level)) / "store.zarr").glob("[mz]*/c.*"))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_shard_is_named_and_alone_made_again(made: Pipeline, undisturbed: Pipeline, kind: str) -> None:
    """Of features: their reader refuses with exit code 4, stage and file; features then encodes that shard only."""
    before = {file: file.stat().st_mtime_ns for file in (made.home / "features").glob("*/store.zarr/*/c.*")}
    first, second, _ = shards(made, "features")
    DAMAGES[kind](second, first)
    shutil.rmtree(made.home / "moments")
    named, again = (first, {"0", "1"}) if kind == "swapped" else (second, {"1"})
    assert_refused(made.run("bases"), 4, stage="features", path=str(named))
    assert made.run().code == 0
    assert {file.name.split(".")[1] for file, time in before.items() if file.stat().st_mtime_ns != time} == again
    assert_recovered(made, undisturbed, {})


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGES)
def test_any_damage_to_any_file(undisturbed: Pipeline, tmp_path: Path, kind: str) -> None:
    """Every file of every artifact: `verify` names it (or the artifact whose manifest is no longer one), and a run ends
    as before or refuses with exit code 4 and the place."""
    expected, repaired = experiment_digests(undisturbed.x), 0
    names = [Path(name) for name in contents(undisturbed.home) if f"/{PARTS}/" not in name]
    for number, name in enumerate(names):
        siblings = [other for other in names if other.parent == name.parent and other.suffix == name.suffix]
        if kind in ("swapped", "stale") and siblings == [name]:
            continue
        pipeline = undisturbed.at(tmp_path / str(number))
        shutil.copytree(undisturbed.home, pipeline.home)
        other = next((sibling for sibling in siblings if sibling != name), name)
        DAMAGES[kind](pipeline.home / name, pipeline.home / other)
        outcome = pipeline.run(verb="verify")
        if kind == "missing" and name.name == MANIFEST:
            assert outcome.code == 0 and "not made" in outcome.said
        else:
            named = name.parent if MANIFEST in (name.name, other.name) else name
            assert outcome.code == 4 and str(named) in outcome.said, f"{name}: {outcome.said}"
        outcome = pipeline.run()
        if outcome.code == 0:
            assert experiment_digests(pipeline.x) == expected, name
            repaired += 1
        else:
            assert_refused(outcome, 4)
            assert str(name.parent) in outcome.said, f"{name}: {outcome.said}"
        shutil.rmtree(pipeline.home)
    print(f"{kind}: {repaired} of {len(names)} repaired")


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "shape": lambda m: {**m, "shape": [8, *m["shape"][1:]]},
    "dtype": lambda m: {**m, "data_type": "int16"},
    "codec": lambda m: {**m, "codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]},
    "unknown codec": lambda m: {**m, "codecs": [{"name": "rot13"}]},
    "gone": lambda m: None,
}


@pytest.mark.parametrize("kind", EDITS)
def test_edited_zarr_metadata(made: Pipeline, undisturbed: Pipeline, kind: str) -> None:
    """Exit code 4 with the file; features then repair it, or say what to remove so that they can."""
    file = made.x.path(Ref("features")) / "store.zarr" / "map" / "zarr.json"
    edited = EDITS[kind](json.loads(file.read_text()))
    file.unlink() if edited is None else file.write_text(json.dumps(edited))
    shutil.rmtree(made.home / "moments")
    assert_refused(made.run("bases"), 4, stage="features", path=str(file))
    follow_the_cure(made, made.run())
    assert_recovered(made, undisturbed, {})


# --- artifacts that were made from something else -----------------------------------------------------------------


@pytest.mark.parametrize("stage", ["moments", "svd_basis", "latents"])
def test_an_artifact_of_other_features_is_refused(made: Pipeline, undisturbed: Pipeline, stage: str) -> None:
    """A basis fitted on (or latents of) another encoder's features, put where ours should be: both fingerprints are
    named, and a run makes the right one, or does once the store is removed."""
    other = with_settings(made, "other", encoder__mean=[0.3])
    assert other.run().code == 0
    ours, theirs = (pipeline.x.path(Ref(stage, 2)) for pipeline in (made, other))
    assert ours != theirs
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    assert_refused(made.run(verb="verify"), 4, stage=stage, level=2, path=str(ours), key="fingerprint",
                   expected=ours.name, found=theirs.name)  # fmt: skip
    follow_the_cure(made, made.run())
    assert experiment_digests(made.x) == experiment_digests(undisturbed.x)


@pytest.mark.parametrize(
    ("setting", "value", "differs"),
    [
        ("encoder__moco", {"seed": 1}, "identity"),
        ("encoder__mean", [0.3], "identity"),
        ("images__resolution", 12, "identity"),
        ("features__dtype", "float32", "dtype"),
        ("features__flip", True, "flip"),
    ],
)
def test_features_of_something_else_are_not_taken(made: Pipeline, setting: str, value: Any, differs: str) -> None:
    """Other weights, preprocessing, resolution or precision: exit code 4, and what the nearest features differ in."""
    other = with_settings(made, "other", **{setting: value})
    assert other.run("images", "encoder").code == 0
    refusal = assert_refused(other.run("bases"), 4, stage="features")
    assert refusal["expected"].keys() == refusal["found"].keys() and refusal["expected"] != refusal["found"]
    assert any(name.endswith(differs) for name in refusal["expected"])


def test_a_level_that_is_missing_is_named(made: Pipeline) -> None:
    """Training does not begin without the latents of every level that it reads."""
    shutil.rmtree(made.x.path(Ref("latents", 2)))
    assert_refused(made.run("train"), 4, stage="latents", level=2)
    assert not list(made.home.glob(f"denoiser/*/{MANIFEST}"))


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "not finite"), (1e6, "not finite as float16")])
def test_features_that_are_not_numbers(forks: Forks, tmp_path: Path, value: float, words: str) -> None:
    """NaN, or too large for float16: exit code 6 with image and channel, and nothing is committed."""
    torch.manual_seed(0)
    state = timm.create_model("test_vit", num_classes=0, img_size=32).state_dict()
    state["norm.bias"][5] = value
    save_file(state, tmp_path / "vit.safetensors")
    encoder = {"kind": "timm", "name": "test_vit", "weights": str(tmp_path / "vit.safetensors"), "input_size": 32}
    pipeline = write_pipeline(forks, tmp_path / "x", encoder=encoder)
    assert pipeline.run("images", "encoder").code == 0
    refusal = assert_refused(pipeline.run("features"), 6, stage="features", key="0000%2Epng (row 0), channel 5")
    assert words in refusal["error"]
    assert [name for name in committed(pipeline.home) if "features" in name.parts] == []
    assert shards(pipeline, "features") == []


@pytest.mark.parametrize(
    ("channels", "code", "stage"), [(0, 2, None), (-3, 2, None), (17, 2, None), (16, 6, "svd_basis")]
)
def test_more_directions_than_there_are(
    forks: Forks, tmp_path: Path, channels: int, code: int, stage: str | None
) -> None:
    """No component, more than the encoder has channels: refused before any work; more than the tokens' rank: before
    any latent. Level and limit are named."""
    pipeline = write_pipeline(forks, tmp_path, num_images=4, **{"levels.2.channels": channels, "levels.2.grid": 1})
    refusal = assert_refused(pipeline.run(), code, stage=stage, level=2, key="levels.channels", found=channels)
    assert refusal["expected"]
    made = {path.name for path in pipeline.home.glob("*") if list(path.glob(f"*/{MANIFEST}"))}
    assert (
        made == {None: set(), "encoder": {"images"}, "svd_basis": {"images", "encoder", "features", "moments"}}[stage]
    )


@pytest.mark.parametrize("num_images", [1, 2, 3, 8, 9])
def test_few_images(forks: Forks, tmp_path: Path, num_images: int) -> None:
    """One is too few; from two on there is a row for each, whether or not the last shard is full."""
    levels = {"levels.2.channels": 1, "levels.2.grid": 2}
    pipeline = write_pipeline(forks, tmp_path, num_images=num_images, **levels)
    outcome = pipeline.run()
    if num_images == 1:
        assert_refused(outcome, 3, stage="images")
        return
    assert outcome.code == 0, outcome.said
    for ref in (Ref("features"), Ref("latents", 1), Ref("latents", 2)):
        assert pipeline.x.artifact(ref).info["rows"] == num_images
