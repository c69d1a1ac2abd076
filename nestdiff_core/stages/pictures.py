"""What each level decides, in pictures: samples that share the levels above, and walks between two images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact
from nestdiff_core.evaluation.figures import image_grid
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import write_bytes
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stages.common import decoder_weights, reuse
from nestdiff_core.stages.ladder import judges, true_latents

ROWS, COLUMNS = 4, 10  # of samples of one picture; the first column of each is real
WALKS = 3
WIDTH = 760  # pixels
SMALL = 16  # pixels a side, below which images are enlarged smoothly


def pictures(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """A picture for each level above 1 of samples that share it, and one for each level of walks at it.

    info: `figures`, each with its file and caption. Images are made in batches as small as the pictures.
    """
    ref, weights = Ref("pictures"), decoder_weights(x)
    if (made := reuse(x, ref, weights=weights)) is not None:
        return made
    held_out, _ = judges(x, max(ROWS, 2 * WALKS))
    rows = held_out.rows
    real = np.stack([held_out[i] for i in range(len(rows))])
    true = {m: true_latents(x, m, rows) for m in range(1, x.config.num_levels + 1)}
    levels, figures = range(x.config.num_levels, 0, -1), []
    with x.writing(ref) as writer:
        several = loading.Cascade(_plain(x, ROWS * (COLUMNS - 1)), device=device)
        pair = loading.Cascade(_plain(x, WALKS), denoisers=several.denoisers, device=device)
        for done, level in enumerate(levels):
            progress(2 * done, 2 * len(levels), "pictures")
            grids = {}
            if level > 1:
                grids[f"frozen_z_{level}"] = frozen(several, level, rows, true, real), _frozen_caption(level, x)
            progress(2 * done + 1, 2 * len(levels), "pictures")
            grids[f"walk_z_{level}"] = walks(pair, level, rows, true, real), _walk_caption(level, x)
            for name, (images, caption) in grids.items():
                picture = image_grid(images, columns=COLUMNS, width=WIDTH, smooth=images.shape[1] <= SMALL)
                file = f"{name}.png" if picture.startswith(b"\x89PNG") else f"{name}.jpg"
                write_bytes(writer.path / file, picture)
                figures.append({"file": file, "caption": caption})
        progress(2 * len(levels), 2 * len(levels), "pictures")
        return writer.seal(
            weights_source=weights, figures=sorted(figures, key=lambda figure: figure["file"].startswith("walk"))
        )


def frozen(
    cascade: loading.Cascade,
    level: int,
    rows: Int64[np.ndarray, " N"],
    true: dict[int, Float[Tensor, "N _ _ _"]],
    real: UInt8[np.ndarray, "N H W C"],
) -> UInt8[np.ndarray, "M H W C"]:
    """Row by row a real image and COLUMNS - 1 samples that have its z_level and all above, with noise of their own."""
    several = COLUMNS - 1
    which = np.repeat(np.arange(min(ROWS, len(rows))), several)
    given = {m: z_m[torch.from_numpy(which)] for m, z_m in true.items() if m >= level}
    made = _images(cascade, range(len(which)), rows[which], given)
    return np.concatenate(
        [np.concatenate([real[i : i + 1], made[i * several : (i + 1) * several]]) for i in range(len(which) // several)]
    )


def walks(
    cascade: loading.Cascade,
    level: int,
    rows: Int64[np.ndarray, " N"],
    true: dict[int, Float[Tensor, "N _ _ _"]],
    real: UInt8[np.ndarray, "N H W C"],
) -> UInt8[np.ndarray, "M H W C"]:
    """Row by row a real image, COLUMNS - 2 steps from its latents of `level` and above to another's, and that image.

    What lies below is generated, with the same noise all along a row. Labels or captions change in the middle.
    """
    pairs = min(WALKS, len(rows) // 2)
    steps = []
    for share in np.linspace(0.0, 1.0, COLUMNS - 2):
        given = {m: between(z[:pairs], z[pairs : 2 * pairs], share, m) for m, z in true.items() if m >= level}
        told = rows[:pairs] if share < 0.5 else rows[pairs : 2 * pairs]
        steps.append(_images(cascade, range(pairs), told, given))
    columns = [real[:pairs], *steps, real[pairs : 2 * pairs]]
    return np.stack(columns, axis=1).reshape(-1, *real.shape[1:])


def between(
    a: Float[Tensor, "N C H W"], b: Float[Tensor, "N C H W"], share: float, level: int
) -> Float[Tensor, "N C H W"]:
    """The latents `share` of the way from a to b: on the arc between them, since the middle of the chord is shorter
    than what a denoiser was trained on; z_1, where brightness matters, on the chord."""
    if level == 1:
        return torch.lerp(a, b, share)
    x, y = a.flatten(1), b.flatten(1)
    cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp(min=1e-12)
    angle = torch.arccos(cosine.clamp(-1.0, 1.0))[:, None]
    arc = (torch.sin((1 - share) * angle) * x + torch.sin(share * angle) * y) / torch.sin(angle).clamp(min=1e-6)
    return torch.where(torch.sin(angle) > 1e-4, arc, torch.lerp(x, y, share)).reshape(a.shape)


def _plain(x: Experiment, batch_size: int) -> Experiment:
    """The same denoisers, sampled as few at a time as a picture has, and not compiled for it."""
    config = loading.sampled_config(x)
    sampling = replace(config.sampling, batch_size=batch_size, compile=False, chosen_by="config")
    return Experiment(replace(config, sampling=sampling), x.root)


def _images(
    cascade: loading.Cascade, indices: Sequence[int], rows: Int64[np.ndarray, " N"], given: dict[int, Tensor]
) -> UInt8[np.ndarray, "N H W C"]:
    z = cascade.latents(indices, seed=cascade.x.config.sampling.seed, rows=rows, given=given)
    return cascade.images(indices, z[1])


def _frozen_caption(level: int, x: Experiment) -> str:
    shared = f"z_{level}" + (" and all above" if level < x.config.num_levels else "")
    return (
        f"{shared} frozen: in each row a real held-out image, and samples that share its {shared}. What differs within "
        f"a row is what the levels below z_{level} decide."
    )


def _walk_caption(level: int, x: Experiment) -> str:
    if level == 1:
        return "Walk at z_1: from one real image to another on a straight line through z_1; nothing is generated."
    held = f"z_{level}" + (" and all above" if level < x.config.num_levels else "")
    return (
        f"Walk at z_{level}: between two real images (left and right) on the arc between their {held}; the levels "
        "below are generated, with the same noise along a row."
    )
