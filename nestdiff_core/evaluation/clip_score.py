"""How well images fit their captions, by a CLIP that sees both.

    clip_score = mean over images of max(0, 100 cos(image embedding, caption embedding))        (arXiv 2104.08718)

The CLIP is the one whose text tower conditions the denoisers (`conditioning.text`): they were told its states, so it is
a judge that they know. Compare only numbers of the same CLIP; the real images' own number stands beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from nestdiff_core.config import TextConfig
from nestdiff_core.encoders.base import unit_range
from nestdiff_core.encoders.clip import image_tower
from nestdiff_core.encoders.text import WHERE, build_text_tower
from nestdiff_core.errors import InputError
from nestdiff_core.evaluation.extractors import weights_sha256
from nestdiff_core.evaluation.features import Images, PixelDigest, batches
from nestdiff_core.progress import Progress, silent


@dataclass(frozen=True)
class Clip:
    """Both towers as functions to embeddings of one space; the hash of their weights, how images enter."""

    see: Callable[[UInt8[Tensor, "B H W C"]], Float[Tensor, "B E"]]
    read: Callable[[Sequence[str]], Float[Tensor, "B E"]]
    weights_sha256: str
    preprocessing: dict[str, Any]


@dataclass(frozen=True)
class ClipScore:
    """The score of a set, from 0 to 100, and its standard error; hashes of its pixels and of its captions in order."""

    value: float
    standard_error: float
    digest: str
    captions_digest: str
    count: int


def build_clip(config: TextConfig, *, device: str | torch.device = "cpu") -> Clip:
    """The CLIP of open_clip that a configuration's text tower belongs to, with the same weights.

    Raises what `build_text_tower` raises, and IntegrityError for a file without the image tower.
    """
    vision = image_tower(config.name, config.weights, where=WHERE)
    network = vision.network.to(device).eval().requires_grad_(False)
    tower = build_text_tower(config, device=device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (vision.mean, vision.std))

    def see(images: UInt8[Tensor, "B H W C"]) -> Float[Tensor, "B E"]:
        x = unit_range(images.to(device), vision.input_size)
        return network((x.expand(-1, 3, -1, -1) - mean) / std).float()

    def read(captions: Sequence[str]) -> Float[Tensor, "B E"]:
        return tower.network(tower.tokenizer(list(captions)).to(device)).float()

    preprocessing = {"input_size": vision.input_size, "mean": list(vision.mean), "std": list(vision.std)}
    weights = hashlib.sha256((weights_sha256(network.state_dict()) + tower.weights_sha256).encode()).hexdigest()
    return Clip(see, read, weights, {"resize": "bicubic, antialiased", **preprocessing})


@torch.no_grad()
def clip_score(
    images: Images, captions: Sequence[str], clip: Clip, *, batch_size: int = 64, progress: Progress = silent
) -> ClipScore:
    """The score of images and the caption of each. Raises InputError for another number of captions or none."""
    if not len(images) or len(images) != len(captions):
        raise InputError(
            "Images and captions do not go together",
            stage="evaluation",
            key="clip_score",
            expected=f"{len(images)} captions, one or more",
            found=len(captions),
            fix="Give one caption an image.",
        )
    scores, digest = [], PixelDigest()
    for batch in batches(images, batch_size):
        digest.update(batch)
        told = captions[digest.count - len(batch) : digest.count]
        cosine = F.cosine_similarity(clip.see(torch.from_numpy(batch)), clip.read(told))
        scores.append(100 * cosine.double().clamp(min=0).cpu())
        progress(digest.count, len(images), "clip_score")
    score = torch.cat(scores)
    error = float(score.std() / len(score) ** 0.5) if len(score) > 1 else 0.0
    text = hashlib.sha256(json.dumps(list(captions)).encode()).hexdigest()
    return ClipScore(float(score.mean()), error, digest.hexdigest(), text, len(score))
