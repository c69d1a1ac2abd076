"""Images in parts: none twice, none missing, whoever makes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestdiff_core import loading
from nestdiff_core.artifacts import ArtifactWriter
from nestdiff_core.experiment import Experiment
from nestdiff_core.recipes import toy
from nestdiff_core.sampling import Part, in_parts, make_parts


@given(num_images=st.integers(1, 500), size=st.integers(1, 64), before=st.integers(0, 9), processes=st.integers(1, 9))
def test_parts_are_a_partition(num_images: int, size: int, before: int, processes: int) -> None:
    """Every image asked for is in exactly one part of exactly one process, and part k begins with image k * size."""
    first = before * size
    parts = in_parts(num_images, size, first=first)
    dealt = [i for rank in range(processes) for part in parts[rank::processes] for i in part.indices]
    assert sorted(dealt) == list(range(first, first + num_images))
    assert all(part.first == part.number * size and 1 <= part.num_images <= size for part in parts)


class Seen:
    """Listens to the progress, and makes parts of one file; in place of a cascade, whose images take a minute."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made, self.told, self.opened = folder, [], [], 0

    def open(self) -> Seen:
        self.opened += 1
        return self

    def estimate_seconds(self, num_images: int) -> float:
        return 60.0 * num_images

    def __call__(self, done: int, total: int, what: str, **numbers: float) -> None:
        self.told.append((done, total))
        assert numbers["images_per_second"] >= 0

    def make(self, cascade: Seen, part: Part, report) -> list[Path]:
        assert cascade is self
        self.made.append(part.name)
        report(part.num_images // 2)
        file = self.folder / f"{part.name}.txt"
        file.write_text(f"{part.first} to {part.first + part.num_images}")
        return [file]


def made(folder: Path, num_images: int) -> Seen:
    writer, seen = ArtifactWriter(folder, {"stage": "samples"}), Seen(folder)
    make_parts(writer, in_parts(num_images, 4), seen.open, seen.make, progress=seen)
    return seen


def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    """A second call makes nothing; a part that is gone, damaged, or too short for more images is made again."""
    assert made(tmp_path, 10).made == ["00000", "00001", "00002"]
    again = made(tmp_path, 10)
    assert again.made == [] and again.opened == 0
    (tmp_path / "00001.txt").write_text("4 to 9")
    assert made(tmp_path, 10).made == ["00001"]
    assert made(tmp_path, 12).made == ["00002"]
    assert made(tmp_path, 14).made == ["00003"]
    assert made(tmp_path, 10).made == []
    (tmp_path / "00000.txt").unlink()
    assert made(tmp_path, 14).made == ["00000"]


def test_progress_counts_what_is_there(tmp_path: Path) -> None:
    """In images of all parts, and it ends with all of them, once."""
    assert made(tmp_path, 10).told == [(2, 10), (4, 10), (6, 10), (8, 10), (9, 10), (10, 10)]
    (tmp_path / "00001.txt").unlink()
    assert made(tmp_path, 10).told[-1] == (10, 10)


def test_how_long_is_said_first_of_what_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ten images, then the four of a part that is gone, a minute each."""
    with caplog.at_level("INFO", logger="nestdiff"):
        made(tmp_path, 10)
        (tmp_path / "00001.txt").unlink()
        made(tmp_path, 10)
        made(tmp_path, 10)
    assert [r.message for r in caplog.records] == ["samples: 10 images, about 10 min", "samples: 4 images, about 4 min"]


def test_an_estimate_counts_every_pass_of_every_batch(toy_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only networks move, by a second for each image they are given: level 1 is guided, level 2 not."""
    base = toy()
    x = Experiment(replace(base, sampling=replace(base.sampling, batch_size=5)), toy_run.root)
    cascade, clock = loading.Cascade(x), [0.0]
    for denoiser in cascade.denoisers.values():
        denoiser.register_forward_pre_hook(lambda _, given: clock.__setitem__(0, clock[0] + len(given[0])))
    monkeypatch.setattr("nestdiff_core.loading.time.monotonic", lambda: clock[0])
    assert base.level(1).guidance and not base.level(2).guidance
    evaluations = base.sampling.num_evaluations
    assert cascade.estimate_seconds(12) == 3 * evaluations * (2 * 5 + 5)
    before = clock[0]
    cascade.latents(range(12), seed=0)
    assert clock[0] - before == cascade.estimate_seconds(12)
