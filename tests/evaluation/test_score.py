"""`python -m nestdiff_core score`: the same numbers from every kind of place, refusals by name, cards that compare."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from nestdiff_core.cli import main
from nestdiff_core.evaluation.card import MetricCard
from nestdiff_core.evaluation.extractors import pixel_extractor
from nestdiff_core.evaluation.features import extract
from nestdiff_core.evaluation.image_metrics import feature_metrics
from nestdiff_core.evaluation.picture_sets import open_images
from nestdiff_core.evaluation.samples import save_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.recipes import toy


def random_images(n: int, seed: int, side: int = 12, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def put(images: np.ndarray, place: Path, kind: str) -> str:
    """The images in a place of this kind; what to call it on the command line."""
    match kind:
        case "folder":
            place.mkdir()
            for i, image in enumerate(images):
                (place / f"{i:04d}.png").write_bytes(png(image))
            return str(place)
        case "tars":
            place.mkdir()
            for k in range(0, len(images), 50):
                with (place / f"{k:04d}.tar").open("wb") as file, TarWriter(file) as tar:
                    for i, image in enumerate(images[k : k + 50]):
                        tar.write({"__key__": f"{k + i:04d}", "png": png(image)})
            return str(place)
        case "npz":
            np.savez(place.with_suffix(".npz"), arr_0=images)
        case "compressed":
            np.savez_compressed(place.with_suffix(".npz"), arr_0=images)
    return str(place.with_suffix(".npz"))


def scores(place: Path) -> dict[str, Any]:
    return json.loads(place.read_text())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "scores.json"


@pytest.fixture
def real(tmp_path: Path) -> str:
    return put(random_images(160, 1) // 2, tmp_path / "real", "npz")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """The refusal of a command, with its exit code checked against the record."""
    capsys.readouterr()
    code = main(["score", *words])
    record = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert code == record["code"] and record["fix"]
    return record


@pytest.mark.parametrize("kind", ["folder", "tars", "npz", "compressed"])
def test_the_place_does_not_matter(tmp_path: Path, real: str, out: Path, kind: str, capsys: Any) -> None:
    """Pictures, shards and arrays of the same images have the numbers of the images themselves, and the same card."""
    images = random_images(120, 0)
    assert main(["score", put(images, tmp_path / "fake", kind), "--against", real, "--out", str(out)]) == 0
    space = pixel_extractor()
    exact = feature_metrics(extract(images, space), extract(np.load(real)["arr_0"], space), space).values
    found = scores(out)["metrics"]
    assert {name: n["value"] for name, n in found.items()} == pytest.approx(exact)
    card = MetricCard.from_dict(found["fd_pixels"]["card"])
    assert (card.num_samples, card.num_reference, card.origin) == (120, 160, None)
    assert card.samples_digest == extract(images, space).digest
    said = capsys.readouterr()
    assert "fd_pixels" in said.out and "120 images" in said.out
    assert "about" in said.err  # the estimate


def test_pictures_come_to_a_resolution_as_training_images_do(tmp_path: Path) -> None:
    """Short side resized, centre cropped; without a resolution they stay as they are."""
    Image.fromarray(random_images(1, 0, side=40)[0][:, :30]).save(tmp_path / "a.png")
    whole, small = open_images(str(tmp_path))[0], open_images(str(tmp_path), resolution=10)[0]
    assert whole.shape == (40, 30, 3) and small.shape == (10, 10, 3)
    picture = Image.open(tmp_path / "a.png").resize((10, 13), Image.Resampling.BICUBIC)
    assert np.array_equal(small, np.array(picture)[1:11])


def test_one_grey_picture_makes_no_set_grey(tmp_path: Path) -> None:
    """Of an experiment in colour: not even where it is the first. Without one the first decides."""
    for name, mode in (("a", "L"), ("b", "RGB")):
        Image.fromarray(random_images(1, 0)[0]).convert(mode).save(tmp_path / f"{name}.png")
    assert [image.shape[2] for image in open_images(str(tmp_path), channels=3)] == [3, 3]
    assert [image.shape[2] for image in open_images(str(tmp_path))] == [1, 1]


def test_statistics_that_were_kept_stand_for_their_images(tmp_path: Path, real: str, out: Path) -> None:
    """--save-reference, then the folder or its file as the reference: the same numbers and cards."""
    fake, kept = put(random_images(120, 0), tmp_path / "fake", "npz"), tmp_path / "kept"
    assert main(["score", fake, "--against", real, "--save-reference", str(kept), "--out", str(out)]) == 0
    first = scores(out)["metrics"]
    for reference in (kept, kept / "pixels.npz"):
        assert main(["score", fake, "--against", str(reference), "--out", str(out)]) == 0
        assert scores(out)["metrics"] == first


def test_comparing_names_what_differs(tmp_path: Path, real: str, out: Path, capsys: Any) -> None:
    """Other images of the same kind compare; another reference, or a seed where one is used, does not, and the field is
    printed."""
    places = [put(random_images(120, seed), tmp_path / f"fake{seed}", "npz") for seed in (0, 2)]
    other, first = put(random_images(90, 3), tmp_path / "other", "npz"), tmp_path / "first.json"
    assert main(["score", places[0], "--against", real, "--out", str(first)]) == 0
    compared = ["--compare", str(first), "--out", str(out)]
    assert main(["score", places[1], "--against", real, *compared]) == 0
    rows = {row["number"]: row for row in scores(out)["compared"]}
    assert rows["fd_pixels"]["comparable"] == "yes"
    assert rows["fd_pixels"]["samples differ in"] == "samples_digest"
    capsys.readouterr()
    assert main(["score", places[1], "--against", other, "--seed", "5", *compared]) == 0
    rows = {row["number"]: row for row in scores(out)["compared"]}
    assert rows["fd_pixels"]["comparable"] == rows["recall_pixels"]["comparable"] == "no"
    assert rows["fd_pixels"]["measured differently"] == "reference_digest, num_reference"
    fields = "reference_digest, num_reference, settings.seed, settings.neighbour_images"
    assert rows["recall_pixels"]["measured differently"] == fields
    assert "num_reference" in capsys.readouterr().out


def test_colours_against_a_grey_experiment(
    toy_run: Any, tmp_path: Path, monkeypatch: Any, out: Path, capsys: Any
) -> None:
    """Pictures are decoded as its own were; an array is what it is, and refused before a network chokes on it."""
    monkeypatch.setenv("NESTDIFF_HOME", str(toy_run.root))
    colours = random_images(60, 0, side=8)
    refusal = refused(capsys, put(colours, tmp_path / "array", "npz"), "--against", "toy")
    assert (refusal["code"], refusal["expected"], refusal["found"]) == (4, [8, 8, 1], [8, 8, 3])
    assert main(["score", put(colours, tmp_path / "pictures", "folder"), "--against", "toy", "--out", str(out)]) == 0
    assert "fd_encoder" in scores(out)["metrics"]


def test_an_experiment_is_a_reference(toy_run: Any, tmp_path: Path, monkeypatch: Any, out: Path) -> None:
    """Its own samples against it have the numbers of its evaluation; so has a sample set in a folder, once whole."""
    monkeypatch.setenv("NESTDIFF_HOME", str(toy_run.root))
    x = Experiment(toy(), toy_run.root)
    samples, evaluation = x.artifact(Ref("samples")).path, x.artifact(Ref("evaluation"))
    compare = ["--compare", str(evaluation.path / "metrics.json")]
    assert main(["score", str(samples / "samples.npz"), "--against", "toy", "--out", str(out), *compare]) == 0
    found, known = scores(out), evaluation.info["metrics"]
    assert {name: n["value"] for name, n in found["metrics"].items()} == {name: n["value"] for name, n in known.items()}
    assert found["metrics"]["fd_encoder"]["floor"] == known["fd_encoder"]["floor"]
    assert {row["measured differently"] for row in found["compared"]} == {""}
    assert {row["samples differ in"] for row in found["compared"]} == {"origin"}


@pytest.mark.parametrize("kind", ["npz", "webdataset"])
def test_a_sample_set_is_scored_when_it_is_whole(
    toy_run: Any, tmp_path: Path, monkeypatch: Any, out: Path, kind: str, capsys: Any
) -> None:
    """The folder that `sample` leaves: its images and what made them; before it is whole, exit code 4 with how many
    there are; a damaged shard by name."""
    monkeypatch.setenv("NESTDIFF_HOME", str(toy_run.root))
    folder = tmp_path / "set"
    assert (
        main(["sample", "toy", "--num-images", "128", "--out", str(folder), "--format", kind, "--shard-size", "64"])
        == 0
    )
    assert main(["score", str(folder), "--against", "toy", "--extractors", "pixels", "--out", str(out)]) == 0
    assert scores(out)["metrics"]["fd_pixels"]["card"]["num_samples"] == 128
    assert scores(out)["made_with"]["config"]["sampling"]["seed"] == 0
    shard = next(folder.glob("00001.*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")
    assert refused(capsys, str(folder), "--against", "toy")["path"] == str(shard)
    shard.write_bytes(content)
    (folder / "manifest.json").unlink()
    refusal = refused(capsys, str(folder), "--against", "toy")
    assert refusal["code"] == 4 and refusal["found"] == "128 images in 2 whole shards"


def test_what_cannot_be_scored_is_refused(tmp_path: Path, real: str, capsys: Any) -> None:
    """Each with its exit code: a missing place, other arrays, files that are no archives, floats, one image, another
    size, another number, a broken picture, an unknown space, statistics of another space."""
    against = ["--against", real]
    assert refused(capsys, str(tmp_path / "absent"), *against)["code"] == 3
    (tmp_path / "empty").mkdir()
    assert refused(capsys, str(tmp_path / "empty"), *against)["fix"] == "Correct the path."
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    assert refused(capsys, str(tmp_path / "other.npz"), *against)["found"] == ["x"]
    np.savez_compressed(tmp_path / "whole.npz", arr_0=random_images(20, 0))
    whole, broken = (tmp_path / "whole.npz").read_bytes(), tmp_path / "broken.npz"
    flipped = whole[:200] + bytes(200) + whole[400:]
    np.save(tmp_path / "array.npy", random_images(20, 0))
    for content in (b"PK123", whole[: len(whole) // 2], flipped, (tmp_path / "array.npy").read_bytes()):
        broken.write_bytes(content)
        refusal = refused(capsys, str(broken), *against)
        assert (refusal["code"], refusal["error"], refusal["path"]) == (3, "The file cannot be read", str(broken))
        assert refused(capsys, real, "--against", str(broken))["path"] == str(broken)
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((9, 12, 12, 3)))
    refusal = refused(capsys, str(tmp_path / "floats.npz"), *against)
    assert refusal["code"] == 3 and "float64" in refusal["found"]
    np.savez(tmp_path / "none.npz", arr_0=np.zeros((0, 12, 12, 3), np.uint8))
    for words in ((str(tmp_path / "none.npz"), *against), (real, "--against", str(tmp_path / "none.npz"))):
        refusal = refused(capsys, *words)
        assert (refusal["code"], refusal["found"], refusal["path"]) == (3, 0, str(tmp_path / "none.npz"))
    assert refused(capsys, put(random_images(1, 0), tmp_path / "one", "npz"), *against)["code"] == 3
    large = put(random_images(60, 0, side=20), tmp_path / "large", "folder")
    refusal = refused(capsys, large, *against)
    assert (refusal["code"], refusal["expected"], refusal["found"]) == (4, [12, 12, 3], [20, 20, 3])
    refusal = refused(capsys, large, *against, "--num-images", "100")
    assert (refusal["code"], refusal["expected"], refusal["found"]) == (4, 100, 60)
    mixed = put(random_images(20, 0), tmp_path / "mixed", "folder")
    (Path(mixed) / "0007.png").write_bytes(b"nothing")
    assert refused(capsys, mixed, *against)["path"].endswith("0007.png")
    assert refused(capsys, real, *against, "--extractors", "clip")["found"] == ["clip"]
    assert refused(capsys, real, *against, "--extractors", "inception")["key"] == "--inception-weights"
    assert refused(capsys, real, *against, "--extractors", "encoder")["key"] == "--experiment"
    assert refused(capsys, real, *against, "--batch-size", "0")["code"] == 2
    for place in (real, str(tmp_path / "absent.json")):
        refusal = refused(capsys, real, *against, "--compare", place)
        assert (refusal["code"], refusal["key"]) == (2, "--compare")
    np.savez(tmp_path / "moments.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    moments = ["--against", str(tmp_path / "moments.npz"), "--extractors", "pixels"]
    refusal = refused(capsys, real, *moments)
    assert (refusal["code"], refusal["expected"], refusal["found"]) == (4, ["pixels"], ["inception"])


def test_a_cut_tar_is_refused(tmp_path: Path, real: str, capsys: Any) -> None:
    """Half of the bytes of a shard: exit code 3 with its name, and no number."""
    place = put(random_images(50, 0), tmp_path / "tars", "tars")
    shard = next(Path(place).iterdir())
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    refusal = refused(capsys, place, "--against", real)
    assert refusal["code"] == 3 and refusal["path"] == str(shard)


def test_few_images_are_warned_of_with_their_number(tmp_path: Path, real: str, out: Path, capsys: Any) -> None:
    """Sixty images in 192 dimensions: a distance, no NaN, and a sentence that says how few they are."""
    fake = put(random_images(60, 0), tmp_path / "fake", "npz")
    assert main(["score", fake, "--against", real, "--out", str(out)]) == 0
    assert "fd_pixels: 60 images for 192 feature dimensions" in capsys.readouterr().err
    assert "NaN" not in out.read_text() and "fd_infinity_pixels" not in scores(out)["metrics"]


def test_an_experiment_without_its_reference_is_refused(
    toy_run: Any, tmp_path: Path, monkeypatch: Any, real: str, capsys: Any
) -> None:
    """The stage that is missing is named."""
    shutil.copytree(toy_run.root, tmp_path / "home")
    shutil.rmtree(tmp_path / "home" / "reference")
    monkeypatch.setenv("NESTDIFF_HOME", str(tmp_path / "home"))
    save_samples(tmp_path / "fake.npz", random_images(60, 0, side=8, channels=1))
    assert refused(capsys, str(tmp_path / "fake.npz"), "--against", "toy")["stage"] == "reference"
