"""Images in parts: none twice, none missing, whoever makes them."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from nestdiff_core.artifacts import ArtifactWriter
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
    """Listens to the progress, and makes parts of one file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made, self.told = folder, [], []

    def __call__(self, done: int, total: int, what: str, **numbers: float) -> None:
        self.told.append((done, total))
        assert numbers["images_per_second"] >= 0

    def make(self, part: Part, report) -> list[Path]:
        self.made.append(part.name)
        report(part.num_images // 2)
        file = self.folder / f"{part.name}.txt"
        file.write_text(f"{part.first} to {part.first + part.num_images}")
        return [file]


def made(folder: Path, num_images: int) -> Seen:
    writer, seen = ArtifactWriter(folder, {"stage": "samples"}), Seen(folder)
    make_parts(writer, in_parts(num_images, 4), seen.make, progress=seen)
    return seen


def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    """A second call makes nothing; a part that is gone, damaged, or too short for more images is made again."""
    assert made(tmp_path, 10).made == ["00000", "00001", "00002"]
    assert made(tmp_path, 10).made == []
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
