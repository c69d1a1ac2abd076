"""Sources, decoding, validation, and the image index: from a user's images to numbered squares of pixels."""

from nestdiff_core.images.build import build_images, source_listing
from nestdiff_core.images.index import ImageIndex, Shard
from nestdiff_core.images.pixels import load_pixels

__all__ = ["ImageIndex", "Shard", "build_images", "load_pixels", "source_listing"]
