"""The pixel policy against values that follow from its rules."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nestdiff_core.errors import InputError
from nestdiff_core.images import pixels
from nestdiff_core.images.pixels import decode, encode_png, load_pixels


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    """v becomes v / 257, to the nearest: 65535 is white and 32768 the middle, where Pillow's own conversion clips."""
    values = np.array([[0, 128, 257], [32768, 65407, 65535], [1000, 40000, 64000]], np.uint16)
    found = load_pixels(saved(Image.fromarray(values)), 3, 1)[..., 0]
    np.testing.assert_array_equal(found, np.rint(values / 257))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    """c a + 255 (1 - a), so that what alpha hides does not come back."""
    grey, alpha = np.full((4, 4), 40, np.uint8), np.array([[0, 51, 204, 255]] * 4, np.uint8)
    bands = [grey, alpha] if mode == "LA" else [grey, grey, grey, alpha]
    image = Image.merge(mode, [Image.fromarray(band) for band in bands])
    expected = 40 * (alpha / 255) + 255 * (1 - alpha / 255)
    for channels in (1, 3):
        found = load_pixels(saved(image), 4, channels).astype(float)
        np.testing.assert_allclose(found, np.repeat(expected[..., None], channels, 2), atol=1)


def test_transparent_palette_entry_is_white() -> None:
    """A palette's transparent colour is transparency too."""
    image = Image.new("P", (4, 4), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(1, (2, 0, 4, 4))
    found = load_pixels(saved(image, transparency=0), 4, 3)
    assert (found[:, :2] == 255).all() and (found[:, 2:] == [0, 0, 200]).all()


def test_exif_orientation_is_applied() -> None:
    """Orientation 6 is shown after a quarter turn clockwise."""
    upright = np.arange(16, dtype=np.uint8).reshape(4, 4)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.rot90(upright, 1).copy())
    np.testing.assert_array_equal(load_pixels(saved(stored, exif=exif), 4, 1)[..., 0], upright)


def test_colour_models_are_converted() -> None:
    """1-bit is black and white, CMYK is subtractive, and grey has ITU-R 601 weights."""
    bits = Image.fromarray(np.array([[0, 255], [255, 0]] * 2, np.uint8).repeat(2, 1)).convert("1")
    np.testing.assert_array_equal(load_pixels(saved(bits), 4, 1)[..., 0], np.asarray(bits, np.uint8) * 255)
    cmyk = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    np.testing.assert_allclose(load_pixels(saved(cmyk, "TIFF"), 4, 3)[0, 0], [0, 255, 255], atol=1)
    rgb = Image.new("RGB", (4, 4), (200, 100, 50))
    np.testing.assert_allclose(load_pixels(saved(rgb), 4, 1), 0.299 * 200 + 0.587 * 100 + 0.114 * 50, atol=1)


def test_first_frame_of_an_animation() -> None:
    """Of several frames the first is taken, and it is told."""
    frames = [Image.new("L", (4, 4), value) for value in (10, 250)]
    image, animated = decode(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert animated and np.asarray(image.convert("L")).max() == 10
    assert not decode(saved(frames[0], "GIF")).animated


def test_short_side_then_centre() -> None:
    """A 12 x 4 image at resolution 4 is its middle third; at 2 it is that third, averaged."""
    values = np.zeros((4, 12), np.uint8)
    values[:, 4:8] = 100
    np.testing.assert_array_equal(load_pixels(saved(Image.fromarray(values)), 4, 1), 100)
    flat = load_pixels(saved(Image.new("L", (640, 480), 77)), 8, 3)
    assert flat.shape == (8, 8, 3) and (flat == 77).all()


def test_downsampling_is_antialiased() -> None:
    """The finest checkerboard becomes an even grey; without an antialiasing filter it would stay black or white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    found = load_pixels(saved(Image.fromarray(board)), 8, 1).astype(float)
    np.testing.assert_allclose(found, 127.5, atol=6)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]), st.integers(4, 20))
@settings(max_examples=30, deadline=None)
def test_png_of_our_own_comes_back(seed: int, channels: int, side: int) -> None:
    """Images that are written into shards are read back to the bit."""
    image = np.random.default_rng(seed).integers(0, 256, (side, side, channels), np.uint8)
    np.testing.assert_array_equal(load_pixels(encode_png(image), side, channels), image)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_refused_or_decoded(format: str, seed: int) -> None:
    """Whatever happens to the bytes, the answer is an image of the right shape or an InputError."""
    rng = np.random.default_rng(seed)
    data = bytearray(saved(Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)), format))
    for place in rng.integers(0, len(data), 8):
        data[place] = rng.integers(0, 256)
    data = data[: rng.integers(len(data) // 2, len(data) + 1)]
    with contextlib.suppress(InputError):
        assert load_pixels(bytes(data), 8, 3).shape == (8, 8, 3)


def test_every_bit_of_a_png_counts() -> None:
    """PNG has checksums, so a changed bit anywhere behind its header is found."""
    data = saved(Image.effect_noise((8, 8), 80))
    for place in range(29, len(data), 7):
        broken = bytearray(data)
        broken[place] ^= 4
        with pytest.raises(InputError):
            load_pixels(bytes(broken), 8, 1)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated_image_is_refused(format: str) -> None:
    """Half an image is not an image."""
    data = saved(Image.effect_noise((64, 64), 80), format)
    with pytest.raises(InputError, match="decoded"):
        load_pixels(data[: len(data) // 2], 8, 1)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file with more pixels than the limit is refused from its header."""
    bomb = saved(Image.new("1", (200, 200)))
    monkeypatch.setattr(pixels, "MAX_PIXELS", 10_000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(InputError, match="too large"):
        decode(bomb)


def test_an_elongated_image_does_not_blow_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resizing the short side up must not make the long one endless."""
    monkeypatch.setattr(pixels, "MAX_PIXELS", 10_000)
    with pytest.raises(InputError, match="elongated"):
        load_pixels(saved(Image.new("L", (1000, 1))), 64, 1)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_undefined_range_is_refused(mode: str) -> None:
    """32-bit and floating-point pixels do not say what is white."""
    with pytest.raises(InputError, match="range of values"):
        load_pixels(saved(Image.new(mode, (4, 4), 1), "TIFF"), 4, 1)


def test_empty_and_foreign_files_are_refused() -> None:
    """Nothing at all, text, and formats outside the list."""
    with pytest.raises(InputError, match="empty"):
        load_pixels(b"", 4, 1)
    for data in (b"hello", saved(Image.new("L", (4, 4)), "PPM")):
        with pytest.raises(InputError, match="is no PNG"):
            load_pixels(data, 4, 1)
