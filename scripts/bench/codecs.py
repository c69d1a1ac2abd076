"""What compression would save in a store and what it costs to read: features and latents of real photographs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from nestdiff_core.autoencoders import make_autoencoder
from nestdiff_core.config import AutoencoderConfig, EncoderConfig
from nestdiff_core.encoders.convnet import torchvision_encoder, torchvision_network
from nestdiff_core.encoders.extract import extract_features
from nestdiff_core.images import tars
from nestdiff_core.images.pixels import load_pixels
from nestdiff_core.latents.basis import fit_basis
from nestdiff_core.latents.hierarchy import encode_level, shard_moments
from scripts.bench.measure import compare

SHARED = Path(os.environ.get("NESTDIFF_SHARED", "../shared"))
WEIGHTS, PHOTOGRAPHS = SHARED / "weights", SHARED / "data" / "tinyimagenet20" / "tin20-train-00000.tar.gz"
ROWS, CHUNK_ROWS, BATCH = 1024, 32, 64

CODECS = {
    "crc32c, as stores are": [Crc32cCodec()],
    "zstd, crc32c": [ZstdCodec(level=3), Crc32cCodec()],
    "bytes shuffled, zstd, crc32c": [BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"), Crc32cCodec()],
}


def run() -> None:
    squeezenet = WEIGHTS / "squeezenet1_0_imagenet_fp16.safetensors"
    missing = [path for path in (squeezenet, WEIGHTS / "taef2_encoder.safetensors", PHOTOGRAPHS) if not path.is_file()]
    if missing:
        print(f"\ncodecs: left out, as {missing[0]} is not there (NESTDIFF_SHARED names the folder).")
        return
    for title, values in _stored_arrays(squeezenet).items():
        _compare(title, values.astype(np.float16))


def _stored_arrays(squeezenet: Path) -> dict[str, np.ndarray]:
    """What an experiment on these photographs would store."""
    samples = [members["jpg"] for _, members in zip(range(ROWS), tars.read_samples(PHOTOGRAPHS), strict=False)]
    images = np.stack([load_pixels(data, 64, 3) for data in samples])
    config = EncoderConfig(
        kind="torchvision",
        name="squeezenet1_0",
        weights=str(squeezenet),
        input_size=128,
        mean=(123 / 255, 117 / 255, 104 / 255),
        std=(1 / 255,),
    )
    encoder = torchvision_encoder(config, torchvision_network(config, fetch=True)).eval()
    feature_map = extract_features(encoder, images, 64, "float16")[0][:, 0]
    basis = fit_basis(shard_moments(feature_map, [4])[4], 32, 2)
    code = make_autoencoder(AutoencoderConfig(kind="taef2", weights=str(WEIGHTS))).encode(images)
    zeros = f"{(feature_map == 0).mean():.0%} zeros, as ReLU leaves them"
    return {
        f"features, squeezenet1_0 at 128 pixels ({zeros})": feature_map,
        "latents of a level, 32 x 4 x 4": encode_level(feature_map, 4, basis),
        "latents z_1, taef2": code.numpy(),
    }


def _compare(title: str, values: np.ndarray) -> None:
    rng, row = np.random.default_rng(0), values.shape[1:]
    with tempfile.TemporaryDirectory() as name:
        arrays: dict[str, zarr.Array] = {}
        sizes: dict[str, int] = {}
        for number, (codecs, compressors) in enumerate({"no codec": [], **CODECS}.items()):
            path = Path(name) / str(number)
            array = zarr.create_array(
                path, shape=values.shape, shards=(ROWS, *row), chunks=(CHUNK_ROWS, *row), dtype="float16",
                compressors=compressors,
            )  # fmt: skip
            array[:] = values
            arrays[codecs] = array
            sizes[codecs] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        plain = values.nbytes

        def shuffled(codecs: str) -> str:
            array = arrays[codecs]
            for row in rng.permutation(ROWS)[:BATCH]:
                _ = array[row]
            return codecs

        def whole(codecs: str) -> str:
            _ = arrays[codecs][:]
            return codecs

        for how, read in ((f"{BATCH} rows in random order", shuffled), ("whole shard", whole)):
            compare(
                f"{title}: {how} of {ROWS} x {row}, {CHUNK_ROWS} rows a chunk, zarr-python",
                ("no codec", lambda read=read: read("no codec")),
                {codecs: lambda read=read, codecs=codecs: read(codecs) for codecs in CODECS},
                rounds=7,
                note=("size", lambda codecs: f"{sizes[codecs.removesuffix(', again')] / plain:.3f}"),
            )
