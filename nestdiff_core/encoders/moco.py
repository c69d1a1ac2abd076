"""MoCo v3 pre-training (arXiv 2104.02057, Algorithm 1) of a small ViT on the experiment's own images.

Query encoder f_q = backbone, projector, predictor; key encoder f_k = backbone, projector, which follows f_q as an
exponential moving average. Two views of each image; each view's query must find the other view's key among the
batch's keys. As in the paper the patch projection stays random and frozen, which steadies ViT training.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from nestdiff_core.config import EncoderConfig, MoCoConfig
from nestdiff_core.encoders.base import unit_range
from nestdiff_core.encoders.vit import ViTEncoder, moco_network
from nestdiff_core.encoders.weights import seeded
from nestdiff_core.errors import NumericsError
from nestdiff_core.images.index import ImageIndex
from nestdiff_core.progress import Progress, silent

POOL_BYTES = 2**30  # pixels that are held in memory to draw batches from


def untrained(config: EncoderConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> ViTEncoder:
    """The encoder that training starts from, for images of as many channels as `mean` and `std` have."""
    return ViTEncoder(
        moco_network(config, len(mean)), input_size=config.input_size, in_channels=len(mean), mean=mean, std=std
    )


def train_moco(
    config: EncoderConfig,
    batches: Iterator[UInt8[np.ndarray, "B H W C"]],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> tuple[ViTEncoder, list[float]]:
    """The encoder after `config.moco.num_steps` steps, and the loss of every step.

    batches: one uint8 batch a step. mean, std: per channel, of values in [0, 1]. Raises NumericsError when the
    loss is not finite.
    """
    moco, progress = config.moco, progress or silent
    device = torch.device(device)
    encoder = untrained(config, mean, std).to(device)
    with seeded(moco.seed + 1):
        tower = nn.Sequential(
            encoder.network, _mlp(encoder.vector_channels, moco.hidden_dim, moco.hidden_dim, moco.projection_dim)
        )
        predictor = _mlp(moco.projection_dim, moco.hidden_dim, moco.projection_dim)
    query, key = nn.Sequential(tower, predictor).to(device), copy.deepcopy(tower).to(device).requires_grad_(False)
    optimiser = torch.optim.AdamW(
        [p for p in query.parameters() if p.requires_grad], lr=moco.lr, weight_decay=moco.weight_decay
    )
    generator = torch.Generator(device).manual_seed(moco.seed)
    losses: list[float] = []
    for step in range(moco.num_steps):
        for group in optimiser.param_groups:
            group["lr"] = moco.lr * lr_factor(step, moco)
        images = unit_range(torch.from_numpy(next(batches)).to(device), config.input_size)
        view_1, view_2 = (encoder.normalise(augment(images, moco, generator)) for _ in range(2))
        _follow(key, tower, key_momentum(step, moco))
        with torch.no_grad():
            k_1, k_2 = key(view_1), key(view_2)
        loss = contrastive_loss(query(view_1), k_2, moco.temperature) + contrastive_loss(
            query(view_2), k_1, moco.temperature
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise NumericsError(
                f"MoCo's loss is not finite at step {step + 1}",
                stage="encoder",
                key=f"step {step + 1}",
                found=losses[-1],
                fix="Lower encoder.moco.lr, or lengthen encoder.moco.warmup_steps.",
            )
        progress(step + 1, moco.num_steps, "encoder", loss=losses[-1])
    return encoder.eval().requires_grad_(False), losses


def contrastive_loss(q: Float[Tensor, "B D"], k: Float[Tensor, "B D"], temperature: float) -> Float[Tensor, ""]:
    """InfoNCE, 2 tau CE(q k^T / tau): the other view of image i is the right one of the batch's B keys for query i."""
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / temperature
    return 2 * temperature * F.cross_entropy(logits, torch.arange(len(q), device=q.device))


def augment(x: Float[Tensor, "B C S S"], moco: MoCoConfig, generator: torch.Generator) -> Float[Tensor, "B C S S"]:
    """One random view of each image (values in [0, 1], before and after), drawn with `generator` on its device.

    A crop of random area, aspect ratio (3:4 to 4:3) and place, turned by a random angle and scaled to the full
    side (bicubic); mirrored half of the time; brightness, contrast and, in colour, saturation changed; noise.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), generator=generator, device=x.device)

    area, ratio = uniform(moco.min_crop_scale, 1.0), torch.exp(uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    right, down = uniform(-1.0, 1.0) * (1 - width), uniform(-1.0, 1.0) * (1 - height)
    angle = torch.deg2rad(uniform(-moco.max_rotation_degrees, moco.max_rotation_degrees))
    if moco.horizontal_flip:
        width = width * torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack([width * cos, -height * sin, right, width * sin, height * cos, down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)
    if moco.jitter:
        brightness, contrast, saturation = (
            uniform(1 - moco.jitter, 1 + moco.jitter)[:, None, None, None] for _ in range(3)
        )
        x = brightness * x
        x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast)
        x = torch.lerp(x.mean(1, keepdim=True), x, saturation) if x.shape[1] == 3 else x
    if moco.noise:
        x = x + moco.noise * torch.randn(x.shape, generator=generator, device=x.device)
    return x.clamp(0, 1)


def lr_factor(step: int, moco: MoCoConfig) -> float:
    """Linear warm-up to 1, then a half cosine down to 0 at `num_steps`."""
    if step < moco.warmup_steps:
        return (step + 1) / moco.warmup_steps
    return (1 + math.cos(math.pi * (step - moco.warmup_steps) / max(1, moco.num_steps - moco.warmup_steps))) / 2


def key_momentum(step: int, moco: MoCoConfig) -> float:
    """Rises from `moco.momentum` to 1 on a half cosine."""
    return 1 - (1 - moco.momentum) * (1 + math.cos(math.pi * step / moco.num_steps)) / 2


# --- batches of the train split -----------------------------------------------------------------------------------


def pixel_statistics(index: ImageIndex) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over the train split, of values in [0, 1]."""
    count, total, squares = 0, np.zeros(index.channels), np.zeros(index.channels)
    for _, images in index.iterate("train"):
        values = images.reshape(-1, index.channels) / 255.0
        count, total, squares = count + len(values), total + values.sum(0), squares + (values**2).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))
    return tuple(mean.tolist()), tuple(std.tolist())


def training_batches(
    index: ImageIndex, batch_size: int, seed: int, pool_bytes: int = POOL_BYTES
) -> Iterator[UInt8[np.ndarray, "B H W C"]]:
    """The images of `labelled_batches`."""
    return (images for images, _ in labelled_batches(index, batch_size, seed, pool_bytes))


def labelled_batches(
    index: ImageIndex, batch_size: int, seed: int, pool_bytes: int = POOL_BYTES
) -> Iterator[tuple[UInt8[np.ndarray, "B H W C"], Int64[np.ndarray, " B"]]]:
    """Endless batches of the train split and its classes (-1: none), every image once an epoch.

    Each epoch shuffles the shards, then holds a pool of them of about `pool_bytes` at a time and shuffles that. A
    set smaller than the pool is read once; one smaller than a batch recurs within it.
    """
    rng = np.random.default_rng(seed)
    pools = _pools(index, np.arange(len(index.shards)), pool_bytes)
    everything = _train_images(index, pools[0]) if len(pools) == 1 else None
    left = np.empty((0, index.resolution, index.resolution, index.channels), np.uint8)
    left_labels = np.empty(0, np.int64)
    while True:
        for pool in pools if everything is not None else _pools(index, rng.permutation(len(index.shards)), pool_bytes):
            images, labels = _train_images(index, pool) if everything is None else everything
            order = rng.permutation(len(images))
            left, left_labels = np.concatenate([left, images[order]]), np.concatenate([left_labels, labels[order]])
            whole = len(left) - len(left) % batch_size
            for start in range(0, whole, batch_size):
                yield left[start : start + batch_size], left_labels[start : start + batch_size]
            left, left_labels = left[whole:], left_labels[whole:]


def _pools(index: ImageIndex, order: np.ndarray, pool_bytes: int) -> list[list[int]]:
    """Shards, in the given order, in groups whose images take about `pool_bytes`; at least one shard a group."""
    image_bytes = index.resolution**2 * index.channels
    pools: list[list[int]] = [[]]
    held = 0
    for k in order.tolist():
        size = index.shards[k].count * image_bytes
        if pools[-1] and held + size > pool_bytes:
            pools.append([])
            held = 0
        pools[-1].append(k)
        held += size
    return pools


def _train_images(index: ImageIndex, shards: list[int]) -> tuple[np.ndarray, np.ndarray]:
    rows = [index.shards[k].rows for k in shards]
    train = [index.splits[own] == "train" for own in rows]
    images = np.concatenate([index.read_shard(k)[chosen] for k, chosen in zip(shards, train, strict=True)])
    return images, np.concatenate([index.labels[own][chosen] for own, chosen in zip(rows, train, strict=True)])


# --- the parts of the network that are thrown away ----------------------------------------------------------------


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers without bias, each with batch norm; ReLU between them; the last norm has no affine part."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after, affine=not last)]
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


@torch.no_grad()
def _follow(key: nn.Module, query: nn.Module, momentum: float) -> None:
    for k, q in zip(key.parameters(), query.parameters(), strict=True):
        k.lerp_(q, 1 - momentum)
