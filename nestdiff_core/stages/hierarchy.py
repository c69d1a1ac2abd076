"""From features to the latents of every level: bases, proposals, latents."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact, ArtifactWriter
from nestdiff_core.autoencoders import Autoencoder, make_autoencoder
from nestdiff_core.config import DesignConfig
from nestdiff_core.encoders.weights import weights_digest
from nestdiff_core.errors import ConfigError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.images.index import ImageIndex
from nestdiff_core.latents.basis import fit_basis
from nestdiff_core.latents.design import Proposal, propose
from nestdiff_core.latents.hierarchy import FeatureMaps, encode_levels, level_moments
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stages.common import reuse
from nestdiff_core.stages.data import open_maps
from nestdiff_core.stages.moments import moments
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.stores.writer import create_store, write_shard

STATISTICS_BYTES = 2**25  # float64 numbers of latents that are held at once


def bases(
    x: Experiment, levels: Sequence[int] | None = None, *, device: str = "cpu", progress: Progress = silent
) -> dict[int, Artifact]:
    """Fit and persist the SVD basis of each level (default: 2..L), all from one read of the features."""
    levels = range(2, x.config.num_levels + 1) if levels is None else levels
    fitted_on = moments(x, levels, device=device, progress=progress)
    made = {}
    for level in levels:
        ref = Ref("svd_basis", level)
        artifact = reuse(x, ref)
        if artifact is None:
            basis = fit_basis(fitted_on[level], x.config.level(level).channels, level)
            with x.writing(ref) as writer:
                basis.save(writer.path / loading.BASIS)
                artifact = writer.seal(**basis.summary())
        made[level] = artifact
    return made


def design(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """Measure the spectrum of the feature map pooled to each grid, and propose levels from it (latents/design.py).

    info: `proposals`, a row per level from the top, and `eigenvalues` by grid.
    """
    ref, config = Ref("design"), x.config.design
    if (made := reuse(x, ref)) is not None:
        return made
    rows = loading.open_index(x).rows("train")
    proposals, spectra = propose_levels(open_maps(x, None, device), rows, config, progress=progress)
    with x.writing(ref) as writer:
        plain = [dataclasses.asdict(p) for p in proposals]
        return writer.seal(proposals=plain, eigenvalues={str(grid): e.tolist() for grid, e in spectra.items()})


def propose_levels(
    maps: FeatureMaps, rows: Int[np.ndarray, " n"], config: DesignConfig, *, progress: Progress = silent
) -> tuple[list[Proposal], dict[int, np.ndarray]]:
    """Levels proposed from the maps of the images `rows`, and the eigenvalues of their tokens for each grid."""
    side = maps.shape[-1]
    grids = config.grids or [2**power for power in range(side.bit_length()) if 2**power < side or side == 1]
    if max(grids) > side:
        raise ConfigError(
            "A grid is finer than the encoder's feature map",
            stage="design",
            key="design.grids",
            expected=f"at most {side}",
            found=max(grids),
            fix="Leave it out.",
        )
    by_grid = level_moments(maps, sorted(grids), rows, progress=progress)
    spectra = {grid: fit_basis(m, 1, level=0).eigenvalues for grid, m in by_grid.items()}
    return propose(spectra, nats=config.nats, growth=config.growth, variance=config.variance), spectra


def latents(
    x: Experiment, levels: Sequence[int] | None = None, *, device: str = "cpu", progress: Progress = silent
) -> dict[int, Artifact]:
    """Materialise z_l (N, views, C, H, W) of the given levels (default: all); one read of a store serves its levels."""
    levels = range(1, x.config.num_levels + 1) if levels is None else levels
    weights = weights_digest(x.config.autoencoder.weights)
    made = {
        level: artifact
        for level in levels
        if (artifact := reuse(x, Ref("latents", level), weights=weights if level == 1 else None)) is not None
    }
    todo = [level for level in levels if level not in made]
    if not todo:
        return made
    index, config = loading.open_index(x), x.config.features
    autoencoder, views = make_autoencoder(x.config.autoencoder, device=device), 1 + config.flip
    level_bases = {level: loading.open_basis(x, level) for level in todo if level > 1}
    readers = {level: open_maps(x, level, device) for level in level_bases}
    with contextlib.ExitStack() as stack:
        writers: dict[int, ArtifactWriter] = {}
        for level in todo:
            ref = Ref("latents", level)
            writer = writers[level] = stack.enter_context(x.writing(ref, keep_parts=True))
            create_store(
                writer.path / loading.STORE,
                {loading.LATENT: (views, *x.config.latent_shape(level))},
                config.dtype,
                [shard.count for shard in index.shards],
                config.chunk_rows,
                {"fingerprint": writer.header["fingerprint"]},
            )
        for k, shard in enumerate(index.shards):
            sources = {level: weights if level == 1 else None for level in todo}
            missing = [
                level
                for level in todo
                if (part := writers[level].part(shard.name)) is None or part["source"] != sources[level]
            ]
            z: dict[int, np.ndarray] = {}
            if 1 in missing:
                z[1] = _codes(autoencoder, index, k, views)
            by_store: dict[Ref, list[int]] = {}
            for level in missing:
                if level > 1:
                    by_store.setdefault(x.level_features(level), []).append(level)
            for levels_of_store in by_store.values():
                maps = readers[levels_of_store[0]].read_shard(k)
                wanted = {level: (x.config.level(level).grid, level_bases[level]) for level in levels_of_store}
                encoded = encode_levels(maps.reshape(-1, *maps.shape[2:]), wanted)
                z |= {level: z_l.reshape(-1, views, *z_l.shape[1:]) for level, z_l in encoded.items()}
            for level, z_l in z.items():
                files = write_shard(writers[level].path / loading.STORE, k, {loading.LATENT: z_l})
                writers[level].commit_part(shard.name, files, rows=shard.count, source=sources[level])
            progress(k + 1, len(index.shards), "latents")
        for level, writer in writers.items():
            reader_l = loading.open_array(writer, loading.LATENT)
            mean, std = _channel_statistics(reader_l, index.rows("train"))
            made[level] = writer.seal(
                rows=index.num_images,
                shape=x.config.latent_shape(level),
                mean=mean.tolist(),
                std=std.tolist(),
                weights_source=weights if level == 1 else None,
            )
    return made


def _codes(autoencoder: Autoencoder, index: ImageIndex, k: int, views: int) -> np.ndarray:
    """z_1 (n, views, C, H, W) of a shard's images, and of their mirror images with two views."""
    images, shard = index.read_shard(k), index.shards[k]
    rows = np.arange(shard.first_row, shard.first_row + shard.count)
    codes = [autoencoder.encode(images, rows=rows).numpy()]
    if views == 2:
        codes.append(autoencoder.encode(images[:, :, ::-1].copy(), rows=rows + index.num_images).numpy())
    return np.stack(codes, axis=1)


def _channel_statistics(reader: StoreReader, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel over views and positions of the images `rows` (ascending), in float64.

    One pass: blocks are centred on their own mean and joined as in latents/moments.py. Shards are read rather than
    mapped, since the pages of a map stay resident.
    """
    _, views, channels, height, width = reader.shape
    block = max(1, STATISTICS_BYTES // (8 * views * channels * height * width))
    count, mean, scatter, first = 0, np.zeros(channels), np.zeros(channels), 0
    for _, z in reader.iterate_shards():
        chosen = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(z))] - first
        for start in range(0, len(chosen), block):
            x = z[chosen[start : start + block]].astype(np.float64)
            n, own = x.size // channels, x.mean(axis=(0, 1, 3, 4))
            x -= own[:, None, None]
            delta, share = own - mean, n / (count + n)
            mean += delta * share
            scatter += np.einsum("nvchw,nvchw->c", x, x) + delta**2 * count * share
            count += n
        first += len(z)
    return mean, np.sqrt(scatter / count)
