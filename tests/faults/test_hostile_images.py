"""Images and tars made to do harm: each is kept or listed with its reason; nothing is lost, run or put elsewhere."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import tarfile
import time
import unicodedata
import zipfile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import pytest
from harness import Forks, Pipeline, write_pipeline
from PIL import Image, ImageCms, PngImagePlugin

from nestdiff_core import loading
from nestdiff_core.artifacts import writing
from nestdiff_core.config import ImagesConfig
from nestdiff_core.errors import InputError
from nestdiff_core.experiment import Ref
from nestdiff_core.images.build import build_images
from nestdiff_core.images.pixels import load_pixels

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
FLIPPED = 8  # images of each format that have one byte changed at random


class Hostile(NamedTuple):
    """A file, and whether it is to be kept; None: either, as decoding may still give something."""

    name: str
    data: bytes
    kept: bool | None


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 18), seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(noise, "RGBA").convert(mode)


def hostile_images() -> list[Hostile]:
    """About a hundred, each with a name of its own."""
    found: list[Hostile] = []

    def add(name: str, data: bytes, kept: bool | None) -> None:
        found.append(Hostile(name, data, kept))

    rng = random.Random(0)
    for format in FORMATS:
        suffix, data = format.lower(), saved(picture(), format)
        add(f"whole.{suffix}", data, True)
        add(f"half.{suffix}", data[: len(data) // 2], False)
        add(f"three-bytes.{suffix}", data[:3], False)
        add(f"no-magic.{suffix}", b"\0" + data[1:], False)
        add(f"tail.{suffix}", data + rng.randbytes(100), True)
        for i in range(FLIPPED):
            broken = bytearray(data)
            broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            add(f"flipped-{i}.{suffix}", bytes(broken), False if format == "PNG" else None)

    for mode in ("1", "L", "LA", "P", "RGBA"):
        add(f"mode-{mode}.png", saved(picture(mode)), True)
    add("palette-alpha.png", saved(picture("P"), transparency=0), True)
    add("sixteen-bits.png", saved(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 163)), True)
    for mode, format in (("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("LAB", "TIFF")):
        add(f"mode-{mode}.{format.lower()}", saved(picture(mode), format), True)
    for mode in ("I", "F"):
        add(f"mode-{mode}.tiff", saved(picture("L").convert(mode), "TIFF"), False)
    for orientation in (*range(1, 9), 77):
        exif = Image.Exif()
        exif[0x0112] = orientation
        add(f"turned-{orientation}.jpg", saved(picture(), "JPEG", exif=exif), True)
    frames = [picture(seed=i) for i in range(3)]
    for format in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], format, save_all=True, append_images=frames[1:])
        add(f"animated.{format.lower()}", data, True)
    add(
        "profile.png",
        saved(picture(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        True,
    )
    add("no-profile.jpg", saved(picture(), "JPEG", icc_profile=b"nothing of the kind"), True)

    for name, size in {"dot": (1, 1), "line": (1, 900), "ribbon": (60_000, 1), "odd": (7, 501)}.items():
        add(f"{name}.png", saved(picture("L", size)), True)
    add("bomb.png", saved(Image.new("1", (12_000, 12_000))), False)
    add("bomb.tiff", saved(Image.new("1", (12_000, 12_000)), "TIFF", compression="group4"), False)
    add(
        "claims-much.gif",
        b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
        False,
    )
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 2**27, zip=True)
    add("text-bomb.png", saved(picture(), pnginfo=text), False)

    add("really-a-png.jpg", saved(picture()), True)
    add("ppm.png", saved(picture(), "PPM"), False)
    add("empty.png", b"", False)
    add("zeros.jpg", bytes(4000), False)
    add("text.png", b"not an image at all\n" * 50, False)
    add("page.jpg", b"<!DOCTYPE html><title>404 Not Found</title>", False)
    add("vector.png", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', False)
    add("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file closefile\n", False)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.png", saved(picture()))
    add("archive.png", packed.getvalue(), False)
    add("pickled.png", pickle.dumps([1, 2, 3]), False)
    return found


def tar_of(files: dict[str, bytes], **options: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def with_images(forks: Forks, folder: Path, **images: object) -> Pipeline:
    """The small experiment, reading other images."""
    plain = {"labels": False, "resolution": 8, "channels": 1, "images_per_shard": 32}
    return write_pipeline(forks, folder, images={**plain, **images})


@pytest.fixture(scope="module")
def hostile() -> list[Hostile]:
    return hostile_images()


@pytest.fixture
def sources(forks: Forks, tmp_path: Path, hostile: list[Hostile]) -> dict[str, Pipeline]:
    """The hostile images in a folder and in a tar."""
    (tmp_path / "folder").mkdir()
    for file in hostile:
        (tmp_path / "folder" / file.name).write_bytes(file.data)
    members = {f"{file.name.replace('.', '-')}.{file.name.split('.')[1]}": file.data for file in sorted(hostile)}
    (tmp_path / "0.tar").write_bytes(tar_of(members))
    everything = {"max_bad_samples": len(hostile)}
    return {
        "folder": with_images(forks, tmp_path / "a", source="folder", path=str(tmp_path / "folder"), **everything),
        "tar": with_images(forks, tmp_path / "b", source="webdataset", path=str(tmp_path / "0.tar"), **everything),
    }


def rejected(pipeline: Pipeline) -> dict[str, str]:
    """Reason by key, of everything that was set aside."""
    lines = (pipeline.x.artifact(Ref("images")).path / "rejects.jsonl").read_text().splitlines()
    return {(record := json.loads(line))["key"]: record["reason"] for line in lines}


def test_a_hundred_hostile_images(sources: dict[str, Pipeline], hostile: list[Hostile], forks: Forks) -> None:
    """In a folder and in a tar: read = kept + rejected, the right ones are kept, each reject has its reason, the same
    pixels come from both, later stages read what was kept, and no bomb takes more than 200 MiB."""
    pixels = []
    assert len(hostile) >= 100
    plain = write_pipeline(forks, sources["tar"].home.parent / "plain").run("images")
    for name, pipeline in sources.items():
        outcome = pipeline.run("images")
        assert outcome.code == 0, outcome.said
        assert outcome.peak < plain.peak + 200
        info, index = pipeline.x.artifact(Ref("images")).info, loading.open_index(pipeline.x)
        reasons = rejected(pipeline)
        assert info["read"] == info["kept"] + info["rejected"] == len(hostile)
        assert len(reasons) == info["rejected"] and all(reasons.values())
        kept = {unquote(key) for key in index.keys}
        names = {(file.name if name == "folder" else file.name.replace(".", "-")): file.kept for file in hostile}
        assert kept | {unquote(key) for key in reasons} == set(names)
        assert [name for name, expected in names.items() if expected is not None and (name in kept) != expected] == []
        order = np.argsort([unquote(key).replace(".", "-") for key in index.keys])
        pixels.append(np.concatenate([index.read_shard(k) for k in range(len(index.shards))])[order])
        outcome = pipeline.run()
        assert outcome.code == 0, outcome.said
    np.testing.assert_array_equal(*pixels)


def test_the_first_hostile_image_is_named(forks: Forks, tmp_path: Path, hostile: list[Hostile]) -> None:
    """Without a budget: exit code 3, the first of them, and a list of all beside the artifact, which is not there."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in hostile:
        (folder / file.name).write_bytes(file.data)
    pipeline = with_images(forks, tmp_path / "x", source="folder", path=str(folder))
    outcome = pipeline.run("images")
    assert outcome.code == 3 and "Traceback" not in outcome.said, outcome.said
    first = min(file.name for file in hostile if file.kept is False)
    assert outcome.refusal["path"] == str(folder / first) and unquote(outcome.refusal["key"]) == first
    assert "images.max_bad_samples" in outcome.refusal["fix"]
    [listed] = (pipeline.home / "images").glob("*.rejects.jsonl")
    assert str(listed) in outcome.refusal["fix"]
    assert len(listed.read_text().splitlines()) >= sum(file.kept is False for file in hostile)
    assert pipeline.x.find(Ref("images")) is None


def test_what_is_no_file_is_not_opened(forks: Forks, tmp_path: Path) -> None:
    """A pipe, an endless device, links to nothing and to themselves: set aside without waiting for them; a folder is
    no image, and a folder linked into itself is read once."""
    folder = tmp_path / "folder"
    (folder / "folder.png").mkdir(parents=True)
    for i in range(12):
        (folder / f"{i}.png").write_bytes(saved(picture(seed=i)))
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "dangling.png").symlink_to("nothing")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "again").symlink_to(folder)
    pipeline = with_images(forks, tmp_path / "x", source="folder", path=str(folder), max_bad_samples=9)
    outcome = pipeline.run("images")
    assert outcome.code == 0, outcome.said
    assert {unquote(key) for key in rejected(pipeline)} == {
        f"{n}.png" for n in ("pipe", "endless", "dangling", "itself")
    }
    assert len(loading.open_index(pipeline.x).keys) == 12


# --- names --------------------------------------------------------------------------------------------------------

ODD = {
    "composed": unicodedata.normalize("NFC", "café"),
    "decomposed": unicodedata.normalize("NFD", "café"),
    "spaces": "  two  spaces ",
    "newline": "a\nb",
    "terminal": "\x1b[2J\x1b[31mred",
    "right to left": "\u202egnp",
    "quotes": "'\"`$(touch canary)",
    "percent": "%2e%2e%2f",
    "emoji": "🖼️",
    "long": "k" * 200,
}


def outside(pipeline: Pipeline, folder: Path) -> dict[Path, int]:
    """Every file of the test's folder that is not the pipeline's own, and when it was written."""
    files = (path for path in folder.rglob("*") if not path.is_dir() and not path.is_relative_to(pipeline.home))
    return {path: path.lstat().st_mtime_ns for path in files}


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_odd_names_are_kept_byte_for_byte(forks: Forks, tmp_path: Path, source: str) -> None:
    """Accents in two forms, spaces, newlines, terminal commands, 200 characters; and 300 in a tar."""
    images = {name: saved(picture(seed=i)) for i, name in enumerate(ODD.values())}
    if source == "folder":
        (tmp_path / "odd").mkdir()
        for name, data in images.items():
            (tmp_path / "odd" / f"{name}.png").write_bytes(data)
        pipeline = with_images(forks, tmp_path / "x", source="folder", path=str(tmp_path / "odd"))
    else:
        images["x" * 300] = saved(picture(seed=99))
        (tmp_path / "odd.tar").write_bytes(tar_of({f"{name}.png": data for name, data in images.items()}))
        pipeline = with_images(forks, tmp_path / "x", source="webdataset", path=str(tmp_path / "odd.tar"))
    before = outside(pipeline, tmp_path)
    outcome = pipeline.run()
    assert outcome.code == 0, outcome.said
    index = loading.open_index(pipeline.x)
    names = [unquote(key).removesuffix(".png") for key in index.keys] if source == "folder" else index.keys
    assert sorted(names) == sorted(images)
    expected = {name: load_pixels(data, 8, 1) for name, data in images.items()}
    found = np.concatenate([index.read_shard(k) for k in range(len(index.shards))])
    np.testing.assert_array_equal(found, np.stack([expected[name] for name in names]))
    assert outside(pipeline, tmp_path) == before


def test_a_refusal_does_not_speak_to_the_terminal(forks: Forks, tmp_path: Path) -> None:
    """A bad image whose name holds a newline and terminal commands: these are escaped, and the last line is JSON."""
    (tmp_path / "0.tar").write_bytes(tar_of({f"{ODD['terminal']}\n.png": b"x", "a.png": saved(picture())}))
    outcome = with_images(forks, tmp_path / "x", source="webdataset", path=str(tmp_path / "0.tar")).run("images")
    assert outcome.code == 3 and outcome.refusal["key"] == f"{ODD['terminal']}\n"
    assert "\x1b" not in outcome.said


def test_names_that_point_outside_write_nothing_there(forks: Forks, tmp_path: Path) -> None:
    """`..`, absolute names, links that lead outside and members below them, from images to latents."""
    names = ["../../up", str(tmp_path / "absolute"), "a/../../../b", "..\\..\\c", "link/inside", "nul\0hidden"]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
        data = saved(picture())
        for name in [*names, *(f"good-{i}" for i in range(20))]:
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "0.tar").write_bytes(buffer.getvalue())
    pipeline = with_images(
        forks, tmp_path / "x", source="webdataset", path=str(tmp_path / "0.tar"), max_bad_samples=len(names) + 1
    )
    before = outside(pipeline, tmp_path)
    outcome = pipeline.run("images")
    assert outcome.code == 0, outcome.said
    assert outside(pipeline, tmp_path) == before
    expected = {"../../up", str(tmp_path / "absolute"), "a/../../../b", "..\\..\\c.png", "link"}
    assert expected <= rejected(pipeline).keys()
    info = pipeline.x.artifact(Ref("images")).info
    assert info["read"] == info["kept"] + info["rejected"]


# --- code that must not run ---------------------------------------------------------------------------------------


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_members_that_are_programs_do_not_run(forks: Forks, tmp_path: Path) -> None:
    """Pickles under every suffix that a WebDataset decoder would unpickle, beside good images and as captions."""
    program = pickle.dumps(Canary(tmp_path / "canary"))
    suffixes = (
        "pyd",
        "pkl",
        "pickle",
        "pth",
        "pt",
        "npy",
        "npz",
        "msg",
        "cbor",
        "mp",
        "ten",
        "tb",
        "txt",
        "transcript",
    )
    files = {f"s{i}.{suffix}": program for i, suffix in enumerate(suffixes)}
    files |= {f"s{i}.png": saved(picture(seed=i)) for i in range(len(suffixes))}
    (tmp_path / "0.tar").write_bytes(tar_of({name: files[name] for name in sorted(files)}))
    settings = {"source": "webdataset", "path": str(tmp_path / "0.tar"), "max_bad_samples": 5}
    pipeline = with_images(forks, tmp_path / "x", **settings)
    outcome = pipeline.run()
    assert outcome.code == 0, outcome.said
    assert set(rejected(pipeline)) <= {f"s{suffixes.index('txt')}"}  # a caption that is no text
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "path", ["pipe:mkdir {canary}", "pipe:mkdir {canary} |", "exec:mkdir {canary}", "{tmp}/$(mkdir {canary}).tar"]
)
def test_paths_that_are_programs_do_not_run(forks: Forks, tmp_path: Path, path: str) -> None:
    """webdataset would hand these to a shell."""
    named = path.format(canary=tmp_path / "canary", tmp=tmp_path)
    outcome = with_images(forks, tmp_path / "x", source="webdataset", path=named).run("images")
    assert outcome.code in (2, 3) and "Traceback" not in outcome.said, outcome.said
    assert not (tmp_path / "canary").exists()


def test_an_experiment_file_runs_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    """A YAML tag that makes objects is refused as a mistake in the file."""
    file = tmp_path / "x.yaml"
    file.write_text(f"recipe: !!python/object/apply:os.mkdir ['{tmp_path / 'canary'}']\n")
    outcome = Pipeline(pipeline.forks, file, tmp_path / "home").run("images")
    assert outcome.code == 2 and outcome.refusal["path"] == str(file)
    assert not (tmp_path / "canary").exists()


# --- thousands ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("seed", range(4))
def test_many_mutated_images(hostile: list[Hostile], seed: int) -> None:
    """Bytes changed, cut out, doubled, exchanged: pixels of the right shape or an InputError, within ten seconds."""
    rng = random.Random(seed)
    whole = [file.data for file in hostile if file.kept and len(file.data) < 100_000]
    for _ in range(20_000):
        data = mutated(rng.choice(whole), rng)
        started = time.monotonic()
        with contextlib.suppress(InputError):
            assert load_pixels(data, 8, 3).shape == (8, 8, 3)
        assert time.monotonic() - started < 10


def mutated(data: bytes, rng: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(broken) or 1)
        match rng.randrange(6):
            case 0:
                broken[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                broken[place : place + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff", rng.randbytes(4))
                )
            case 2:
                del broken[place : place + rng.randrange(64)]
            case 3:
                broken[place:place] = broken[place : place + rng.randrange(64)]
            case 4:
                del broken[rng.randrange(len(broken) // 2 + 1) + len(broken) // 2 :]
            case _:
                other = rng.randrange(len(broken) or 1)
                broken[place : place + 8], broken[other : other + 8] = (
                    broken[other : other + 8],
                    broken[place : place + 8],
                )
    return bytes(broken)


TAR_FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A cut, a changed bit, bytes or block, or a block too many; blocks are what a tar is made of."""
    broken, block = bytearray(data), 512 * rng.randrange(len(data) // 512)
    match rng.randrange(7):
        case 0:
            del broken[rng.randrange(len(broken)) :]
        case 1:
            broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        case 2:
            place = block + rng.randrange(500)
            broken[place] = rng.randrange(256)
        case 3:
            broken[block + 124 : block + 136] = rng.choice(
                (b"77777777777\0", b"00000000000\0", b"\x80" + rng.randbytes(11))
            )
        case 4:
            broken[block : block + 512] = bytes(512)
        case 5:
            broken[block:block] = rng.choice((bytes(512), broken[block : block + 512], rng.randbytes(512)))
        case _:
            broken[block + 156] = rng.choice(b"0123456789LKxgSDVMNA\0")
    return bytes(broken)


@pytest.mark.slow
@pytest.mark.parametrize("format", [*TAR_FORMATS, "gzip"])
def test_many_damaged_tars(tmp_path: Path, format: str) -> None:
    """A damaged tar is refused, or every sample that it held is kept or listed: none is lost without a word."""
    rng = random.Random(format)
    names = [f"{'deep/' * 30 if i % 3 else ''}sample-{i}-é" if format != "ustar" else f"sample-{i}" for i in range(6)]
    files = {}
    for i, name in enumerate(names):
        files |= {f"{name}.png": saved(picture("L", (8, 8), seed=i)), f"{name}.cls": b"%d" % i, f"{name}.txt": b"words"}
    whole = tar_of(files, format=TAR_FORMATS.get(format, tarfile.PAX_FORMAT))
    while whole.endswith(bytes(3 * 512)):  # the padding of the last record: damage there is none
        whole = whole[:-512]
    header = {"stage": "images", "level": None, "fingerprint": "0", "config": {}, "inputs": [], "experiment": "fuzz"}
    path = tmp_path / "0.tar"
    config = ImagesConfig(
        source="webdataset", path=str(path), resolution=8, channels=1, labels=True, max_bad_samples=1000
    )
    refused = 0
    for i in range(2500):
        path.write_bytes(damaged(gzip.compress(whole, mtime=0), rng) if format == "gzip" else damaged(whole, rng))
        try:
            with writing(tmp_path / "artifact", header) as writer:
                info = build_images(config, writer)
        except InputError:
            refused += 1
            continue
        assert info["read"] == info["kept"] + info["rejected"] >= len(names), f"damage {i} of {format}"
    print(f"{refused} of 2500 refused")
    assert 0 < refused < 2500
