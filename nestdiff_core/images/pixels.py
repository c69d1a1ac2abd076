"""From the bytes of an image file to a square of pixels: the one pixel policy of the project.

Every image, at every stage, goes through `load_pixels`; its rules are part of what an images artifact means.

    size            refused above MAX_PIXELS, before anything is decoded
    file format     PNG, JPEG, WebP, BMP, TIFF, GIF; several frames: the first
    orientation     turned upright by its EXIF tag
    16-bit grey     divided by 257, so that 65535 becomes 255
    32-bit, float   refused: nothing says what is white
    transparency    laid over white
    palette, CMYK, 1-bit, ...   converted to RGB, or to grey where they have no colour
    grey <-> RGB    ITU-R 601-2 luma; grey is repeated
    square          short side resized to the resolution (bicubic, antialiased), then the centre
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from nestdiff_core.errors import InputError

MAX_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")


class Decoded(NamedTuple):
    """A whole image, upright, in mode L or RGB; `animated` tells that further frames were left out."""

    image: Image.Image
    animated: bool


def load_pixels(data: bytes, resolution: int, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """The image in `data` as `resolution` x `resolution` x `channels` (1 or 3) values from 0 to 255.

    Raises InputError, whose `what` says why, for data that is not a whole image of a known kind.
    """
    return square(decode(data).image, resolution, channels)


def decode(data: bytes) -> Decoded:
    """Decode all of the image in `data`; InputError as for `load_pixels`."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise _unusable(f"is too large to be decoded ({image.width} x {image.height} pixels, limit {MAX_PIXELS:,})")
        several = getattr(image, "is_animated", False) and image.format != "MPO"  # MPO: a photograph and its preview
        if image.format == "PNG":
            Image.open(io.BytesIO(data)).verify()  # its checksums, which loading does not look at
        image.load()
        return Decoded(_eight_bits(ImageOps.exif_transpose(image)), several)
    except (InputError, MemoryError):  # memory: not the image's fault
        raise
    except UnidentifiedImageError as error:  # whose text has the address of the buffer in it
        raise _unusable(f"is no {', '.join(FORMATS)}" if data else "is empty") from error
    except Exception as error:  # on hostile bytes Pillow's decoders raise nearly any class
        reason = f"cannot be decoded ({type(error).__name__}: {' '.join(str(error).split())})"
        raise _unusable(reason) from error


def square(image: Image.Image, resolution: int, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Short side of an 8-bit image resized to `resolution`, then its centre, as an array of `channels`."""
    image = image.convert("RGB" if channels == 3 else "L")
    short = min(image.size)
    width, height = (round(side * resolution / short) for side in image.size)
    if width * height > MAX_PIXELS:
        raise _unusable(f"is too elongated ({image.width} x {image.height} pixels)")
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    image = image.crop((left, top, left + resolution, top + resolution))
    return np.array(image).reshape(resolution, resolution, channels)


def encode_png(pixels: UInt8[np.ndarray, "H W C"]) -> bytes:
    """Lossless PNG; `load_pixels` gives the same pixels back."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray(((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise _unusable(f"has pixels of mode {image.mode}, whose range of values is not defined")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _unusable(reason: str) -> InputError:
    return InputError(reason, fix="Mend or remove the image.")
