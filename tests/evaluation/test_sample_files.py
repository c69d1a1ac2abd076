"""Sample sets: the rounding rule, and a file that ADM's evaluator would read."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from nestdiff_core.errors import InputError, IntegrityError, NumericsError
from nestdiff_core.evaluation.samples import (
    Blocks,
    StoredSamples,
    load_samples,
    save_samples,
    to_uint8,
    write_npz,
    write_safetensors,
)
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


def in_blocks(array: np.ndarray, *cuts: int) -> Blocks:
    return Blocks(array.shape, array.dtype, np.split(array, cuts))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_set_that_comes_in_pieces_is_the_same_file(tmp_path: Path, channels: int) -> None:
    """Byte for byte, however it is cut; other arrays are beside it as they are."""
    save_samples(tmp_path / "whole.npz", pictures(channels), also={"arr_1": np.arange(5)})
    save_samples(tmp_path / "cut.npz", in_blocks(pictures(channels), 1, 4), also={"arr_1": np.arange(5)})
    assert (tmp_path / "whole.npz").read_bytes() == (tmp_path / "cut.npz").read_bytes()
    assert np.load(tmp_path / "cut.npz")["arr_1"].tolist() == [0, 1, 2, 3, 4]


def test_numpy_reads_what_was_written_in_pieces(tmp_path: Path) -> None:
    """Every type and shape, scalars and empty arrays included."""
    arrays = {"a": np.arange(12.0).reshape(3, 2, 2), "b": np.array(7), "c": np.empty((0, 3), np.float16)}
    write_npz(tmp_path / "some.npz", {**arrays, "a": in_blocks(arrays["a"], 2)})
    with np.load(tmp_path / "some.npz", allow_pickle=False) as found:
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, strict=True)


def test_latents_in_pieces_are_the_file_of_safetensors(tmp_path: Path) -> None:
    """The bytes that safetensors itself writes, names of two digits included."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"z_{m}": torch.randn(9, m, 2, 2, generator=generator).half() for m in (2, 3, 10)}
    save_file(tensors, tmp_path / "its.safetensors")
    write_safetensors(tmp_path / "ours.safetensors", {name: in_blocks(z.numpy(), 4, 5) for name, z in tensors.items()})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "its.safetensors").read_bytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_stored_images_are_read_one_by_one(tmp_path: Path, channels: int) -> None:
    """As numpy reads them, from our files and from ADM's; a number that is not there ends an iteration."""
    images = pictures(channels, n=7)
    save_samples(tmp_path / "samples.npz", images)
    stored = StoredSamples(tmp_path / "samples.npz", num_images=7)
    assert len(stored) == 7 and np.array_equal(np.stack(list(stored)), images)
    assert np.array_equal(stored.read(2, 3), images[2:5]) and np.array_equal(stored.read(5, 99), images[5:])
    with pytest.raises(IndexError):
        stored[7]
    np.savez(tmp_path / "adm.npz", pictures(3), np.arange(5))
    assert np.array_equal(np.stack(list(StoredSamples(tmp_path / "adm.npz"))), pictures(3))


def test_sets_that_cannot_be_read_one_by_one_are_refused(tmp_path: Path) -> None:
    """Missing, cut, incomplete, compressed, of another kind: IntegrityError that names the file."""
    path = tmp_path / "samples.npz"
    save_samples(path, pictures(3))
    with pytest.raises(IntegrityError) as caught:
        StoredSamples(path, num_images=6)
    assert (caught.value.expected, caught.value.found) == (6, 5)
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:-30])
    np.savez_compressed(tmp_path / "small.npz", pictures(3))
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    for name in ("cut.npz", "small.npz", "floats.npz", "absent.npz"):
        with pytest.raises(IntegrityError, match=r"sample set") as caught:
            StoredSamples(tmp_path / name)
        assert caught.value.path == str(tmp_path / name)


def test_a_broken_pixel_is_named_by_its_number() -> None:
    """That of the image, not its place in a batch."""
    x = torch.zeros(2, 1, 2, 2)
    x[1] = torch.nan
    with pytest.raises(NumericsError) as caught:
        to_uint8(x, numbers=[40, 41])
    assert caught.value.key == "image 41"
