"""Sample sets: the rounding rule, and a file that ADM's evaluator would read."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestdiff_core.errors import InputError, IntegrityError, NumericsError
from nestdiff_core.evaluation.samples import load_samples, save_samples, to_uint8
from nestdiff_core.files import sha256_file


def pictures(channels: int, n: int = 5) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 256, (n, 4, 6, channels), dtype=np.uint8)


def test_every_byte_survives() -> None:
    """The 256 values scaled to [-1, 1] come back unchanged: the identity autoencoder loses nothing."""
    values = torch.arange(256).float().reshape(1, 1, 16, 16)
    assert np.array_equal(to_uint8(values / 127.5 - 1).ravel(), np.arange(256))


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (-1.0, 0),
        (1.0, 255),
        (-7.0, 0),
        (7.0, 255),
        (float("inf"), 255),
        (0.0, 128),
        (-1 / 127.5 * 0.99, 127),
        (1 / 127.5 * 0.99, 128),
    ],
)
def test_rounding_rule(x: float, expected: int) -> None:
    """Out of range is clamped, and x = 0 lies at 127.5, whose even neighbour is 128."""
    assert to_uint8(torch.full((1, 1, 1, 1), x)).item() == expected


def test_halves_go_to_even() -> None:
    """Exact halves between two grey levels go to the even one."""
    levels = np.arange(0.5, 255, 1.0)
    x = torch.tensor(levels / 127.5 - 1, dtype=torch.float64).float()
    exact = (x * 127.5 + 127.5).numpy()
    halves = exact == levels  # float32 meets most of them
    assert halves.sum() > 100
    found = to_uint8(x.reshape(1, 1, 1, -1)).ravel()
    assert (found[halves] % 2 == 0).all()


@given(st.floats(-2, 2, width=32), st.floats(-2, 2, width=32))
def test_order_is_kept(a: float, b: float) -> None:
    """A brighter value never becomes a darker byte."""
    low, high = sorted((a, b))
    found = to_uint8(torch.tensor([low, high]).reshape(1, 1, 1, 2)).ravel()
    assert found[0] <= found[1]


def test_layout_and_bad_pixels() -> None:
    """NCHW becomes NHWC; a NaN is an error that names its image."""
    x = torch.zeros(3, 3, 2, 4)
    x[:, 1] = 1.0
    assert to_uint8(x).shape == (3, 2, 4, 3)
    assert (to_uint8(x)[..., 1] == 255).all()
    x[2, 0, 0, 0] = torch.nan
    with pytest.raises(NumericsError) as caught:
        to_uint8(x)
    assert caught.value.key == "image 2"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_set_comes_back(tmp_path: Path, channels: int) -> None:
    """Grey and RGB images come back as they were; for other readers arr_0 is uint8 NHWC with three channels."""
    images, path = pictures(channels), tmp_path / "samples.npz"
    save_samples(path, images)
    assert np.array_equal(load_samples(path, num_images=5), images)
    with np.load(path) as archive:
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], np.repeat(images, 3 // channels, axis=3))


def test_equal_images_are_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file does not depend on the time of day or its name."""
    save_samples(tmp_path / "a.npz", pictures(3))
    later = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: later)
    save_samples(tmp_path / "b.npz", np.asfortranarray(pictures(3)))
    assert sha256_file(tmp_path / "a.npz") == sha256_file(tmp_path / "b.npz")


def test_files_of_others_are_read(tmp_path: Path) -> None:
    """An .npz written by numpy's own savez, as ADM does, is a sample set."""
    np.savez(tmp_path / "adm.npz", pictures(3), np.arange(5))
    assert np.array_equal(load_samples(tmp_path / "adm.npz"), pictures(3))


def test_incomplete_or_damaged_sets_are_refused(tmp_path: Path) -> None:
    """A missing image, a cut file, a changed byte, a missing file, a pickle: IntegrityError that names the file."""
    path = tmp_path / "samples.npz"
    save_samples(path, pictures(3))
    with pytest.raises(IntegrityError) as caught:
        load_samples(path, num_images=6)
    assert (caught.value.expected, caught.value.found) == (6, 5)
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[250] ^= 1
    damaged = {"cut.npz": data[: len(data) // 2], "flipped.npz": bytes(flipped), "text.npz": b"hello"}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "bare.npy", pictures(3))
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    for name in (*damaged, "bare.npy", "objects.npz", "floats.npz", "absent.npz"):
        with pytest.raises(IntegrityError, match=r"sample set"):
            load_samples(tmp_path / name)


def test_what_are_not_images_is_not_written(tmp_path: Path) -> None:
    """Floats are refused before a file appears."""
    with pytest.raises(InputError, match="not images"):
        save_samples(tmp_path / "samples.npz", np.zeros((2, 4, 4, 3)))
    assert not list(tmp_path.iterdir())
