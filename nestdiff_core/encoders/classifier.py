"""Training a classifier on labelled images, to judge generated ones: its features' distance, and which classes it sees.

What it gives is a file of torchvision's own names, which an encoder of kind torchvision loads (convnet.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from torch import Tensor

from nestdiff_core.config import EncoderConfig
from nestdiff_core.encoders.convnet import Classifier, torchvision_classifier
from nestdiff_core.errors import NumericsError
from nestdiff_core.images.index import ImageIndex
from nestdiff_core.precision import autocast
from nestdiff_core.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining:
    """SGD with Nesterov momentum under one cycle of the learning rate, on images that are shifted and mirrored."""

    num_steps: int
    batch_size: int = 128
    lr: float = 0.05  # at the peak
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rising: float = 0.3  # share of the steps in which the learning rate rises
    shift: float = 0.125  # an image moves by this share of its side at most
    horizontal_flip: bool = True  # off for digits and text
    precision: str = "float32"  # bfloat16: mixed
    seed: int = 0  # of weights and augmentation


def train_classifier(
    config: EncoderConfig,
    num_classes: int,
    batches: Iterator[tuple[UInt8[np.ndarray, "B H W C"], Int64[np.ndarray, " B"]]],
    training: ClassifierTraining,
    *,
    device: str | torch.device = "cpu",
    progress: Progress = silent,
) -> tuple[Classifier, list[float]]:
    """torchvision's network `config.name` after `num_steps` steps, frozen, and the loss (nats) of every step.

    config: of kind torchvision; its weights are not read. batches: images and their classes, 0 to num_classes - 1, one
    batch a step. Raises ConfigError for a network, layer or size that cannot be used, NumericsError when the loss is
    not finite.
    """
    device = torch.device(device)
    network = torchvision_classifier(config, num_classes, seed=training.seed).to(device)
    network.to(memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(
        network.parameters(),
        lr=training.lr,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        nesterov=True,
    )
    generator = torch.Generator(device).manual_seed(training.seed)
    losses: list[float] = []
    network.train()
    for step in range(training.num_steps):
        for group in optimiser.param_groups:
            group["lr"] = training.lr * lr_factor(step, training)
        images, labels = (torch.from_numpy(part).to(device) for part in next(batches))
        views = network.prepare(shifted(images, training, generator))
        with autocast(training.precision, device):
            logits = network.logits(views)
        loss = F.cross_entropy(logits.float(), labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise NumericsError(
                f"The classifier's loss is not finite at step {step + 1}",
                stage="classifier",
                key=f"step {step + 1}",
                found=losses[-1],
                fix="Lower the learning rate.",
            )
        progress(step + 1, training.num_steps, "classifier", loss=losses[-1])
    return network.to(memory_format=torch.contiguous_format).eval().requires_grad_(False), losses


def shifted(
    images: UInt8[Tensor, "B H W C"], training: ClassifierTraining, generator: torch.Generator
) -> UInt8[Tensor, "B H W C"]:
    """Each image moved by whole pixels, its border mirrored where there is nothing, and flipped half of the time."""
    count, side = images.shape[:2]
    most = round(training.shift * side)

    def places() -> Tensor:
        start = torch.randint(-most, most + 1, (count, 1), generator=generator, device=images.device)
        there = (start + torch.arange(side, device=images.device)).abs()
        return side - 1 - (side - 1 - there).abs()

    rows, columns = places(), places()
    if training.horizontal_flip:
        turned = torch.rand(count, 1, generator=generator, device=images.device) < 0.5
        columns = torch.where(turned, columns.flip(1), columns)
    return images[torch.arange(count, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def lr_factor(step: int, training: ClassifierTraining) -> float:
    """A line up to 1, then a half cosine down to 0 at `num_steps`."""
    rise = max(1, round(training.rising * training.num_steps))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, training.num_steps - rise))) / 2


def accuracy(network: Classifier, index: ImageIndex, split: str = "held_out") -> float:
    """Share of a split's images that the network assigns to their class."""
    right = 0
    for rows, images in index.iterate(split):
        right += int((network.classify(images)[1].argmax(1).cpu().numpy() == index.labels[rows]).sum())
    return right / len(index.rows(split))
