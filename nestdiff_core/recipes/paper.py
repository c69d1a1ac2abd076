"""Every row of the paper's tables (arXiv 2412.05984), in both of its versions, with what it prints for each.

Two families, which are two systems. `iclr` (the first version): a pooled feature map at every level, each level told
of the next by fusion. `cvpr` (the accepted one): encoded crops, each level told of all above by tokens. Paths name
no data: set `images.path` (and local weights, where nothing can be downloaded) in a YAML file over the recipe.

What the paper leaves open is said beside it; docs/reproducing-the-paper.md has the commands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from nestdiff_core.config import (
    AutoencoderConfig,
    ConditioningConfig,
    EncoderConfig,
    EvaluationConfig,
    ExperimentConfig,
    FeaturesConfig,
    ImagesConfig,
    LevelConfig,
    SamplingConfig,
    TrainConfig,
    UViTConfig,
)

Labels = Literal["none", "class", "text"]

INCEPTION = "path/to/weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's

# U-ViT's published sizes (arXiv 2209.12152, table 1) and the paper's "ViT-Base".
UVIT_S = UViTConfig(width=512, depth=12, num_heads=8)
UVIT_S_DEEP = UViTConfig(width=512, depth=16, num_heads=8)
UVIT_MID = UViTConfig(width=768, depth=12, num_heads=12)
UVIT_M = UViTConfig(width=768, depth=16, num_heads=12)
UVIT_L = UViTConfig(width=1024, depth=20, num_heads=16)
UVIT_H = UViTConfig(width=1152, depth=28, num_heads=16, final_conv=False)

CLIP = EncoderConfig(kind="open_clip", name="ViT-B-16", weights="hub:openai")
MOCO_V3 = EncoderConfig(kind="timm", name="vit_base_patch16_224", weights="path/to/moco_v3_vit_b_300ep.pth")
MAE = EncoderConfig(kind="timm", name="vit_base_patch16_224.mae", weights="hub")
DINO = EncoderConfig(kind="timm", name="vit_base_patch16_224.dino", weights="hub")
VAE_CODE = EncoderConfig(kind="autoencoder", fold=4)

KL_F8 = AutoencoderConfig(kind="kl", weights="hub:stabilityai/sd-vae-ft-ema", scale=0.18215)


@dataclass(frozen=True)
class Dataset:
    """What the recipes need to know of a data set. images: in its training split, mirror images not counted."""

    path: str
    images: int
    classes: int
    train: TrainConfig
    autoencoder: AutoencoderConfig
    evaluation: EvaluationConfig
    num_samples: int


# U-ViT was published with mixed precision in float16; bfloat16 has no overflows to scale around.
COCO = Dataset(
    "path/to/coco",
    82_783,
    0,
    TrainConfig(batch_size=256, precision="bfloat16", compile=True),
    replace(KL_F8, scale=0.23010),
    EvaluationConfig(extractors=("inception", "encoder"), inception_weights=INCEPTION, reference="held_out"),
    30_000,
)
# The class list is not given; "about 126k" is its usual size, which decides the number of steps only.
IMAGENET_100 = Dataset(
    "path/to/imagenet100",
    126_689,
    100,
    TrainConfig(batch_size=1024, beta1=0.99, beta2=0.99, precision="bfloat16", compile=True),
    KL_F8,
    EvaluationConfig(extractors=("inception", "encoder"), inception_weights=INCEPTION),
    50_000,
)
# Measured against ADM's statistics of 256-pixel ImageNet in the paper; here against the training split.
IMAGENET_1K = replace(IMAGENET_100, path="path/to/imagenet", images=1_281_167, classes=1000)


@dataclass(frozen=True)
class Printed:
    """What the paper prints for a row.

    fid: with guidance where the table has both. parameters: millions, growth: those that the top level adds, both
    without position embeddings. gflops: see `convention`; gflops_growth likewise.
    """

    fid: float | None = None
    parameters: float | None = None
    growth: float | None = None
    gflops: float | None = None
    gflops_growth: float | None = None
    note: str = ""


def _experiment(
    name: str,
    data: Dataset,
    labels: Labels,
    encoder: EncoderConfig,
    levels: tuple[LevelConfig, ...],
    *,
    epochs: int,
    condition_drop: float,
    conditioning: ConditioningConfig,
    noise_gamma: float,
) -> ExperimentConfig:
    train = replace(
        data.train, num_steps=round(epochs * data.images / data.train.batch_size), condition_drop=condition_drop
    )
    return ExperimentConfig(
        name=name,
        images=ImagesConfig(source="webdataset", path=data.path, resolution=256, labels=labels == "class"),
        encoder=encoder,
        features=FeaturesConfig(flip=data.classes > 0),  # as U-ViT caches ImageNet; COCO's captions name sides
        autoencoder=data.autoencoder,
        levels=tuple(replace(level, train=train) for level in levels),
        conditioning=replace(conditioning, labels=labels),
        sampling=SamplingConfig(
            sampler="dpm_solver",
            spacing="time",
            num_evaluations=50,
            num_images=data.num_samples,
            noise_gamma=noise_gamma,
        ),
        evaluation=replace(data.evaluation, clip_score=labels == "text"),
    )


def _patch(grid: int) -> int:
    """Patches of 2 where the grid has at least 4 positions a side, which reproduces the printed costs."""
    return 2 if grid >= 4 else 1


# --- iclr ---------------------------------------------------------------------------------------------------------

ICLR_COCO = ((8, 64), (6, 56), (4, 48), (2, 40))  # grid and channels of z_2, z_3, ...
ICLR_IMAGENET = ((6, 32), (4, 24), (2, 16))


def iclr(
    name: str,
    depth: int,
    data: Dataset,
    model: UViTConfig,
    encoder: EncoderConfig,
    shapes: tuple[tuple[int, int], ...],
    sigmas: tuple[float, ...],
    guidance: float,
    labels: Labels = "none",
    source: Literal["pooled", "patch"] = "pooled",
) -> ExperimentConfig:
    """First version: pooled levels, Markov conditions by fusion, half of them dropped in training.

    shapes, sigmas: of z_2, z_3, ...; deepening adds a level at the top. The noise on conditions while sampling is not
    stated: here as in training (gamma 0).
    """
    levels = [LevelConfig(level=1, patch_size=2, guidance=guidance, model=model)]
    for number, (grid, channels), sigma in zip(range(2, depth + 1), shapes, sigmas, strict=False):
        levels.append(
            LevelConfig(
                level=number,
                grid=grid,
                channels=channels,
                source=source,
                patch_size=_patch(grid),
                condition_noise=sigma,
                guidance=guidance,
                model=model,
            )
        )
    return _experiment(
        name,
        data,
        labels,
        encoder,
        tuple(levels),
        epochs=1000,
        condition_drop=0.5,
        conditioning=ConditioningConfig(levels="markov", injection="fusion"),
        noise_gamma=0.0,
    )


# --- cvpr ---------------------------------------------------------------------------------------------------------

# Grid, channels and source from the top level down. Crops under 64 pixels are not encoded: the feature map is pooled.
CVPR: tuple[tuple[int, int, Literal["pooled", "patch"]], ...] = (
    (1, 256, "patch"), (2, 128, "patch"), (4, 64, "patch"), (8, 32, "pooled"),
)  # fmt: skip
CVPR_SIGMA = 0.5  # of every level above 2; sigma_2 is what each depth tunes


def cvpr(
    name: str,
    depth: int,
    data: Dataset,
    encoder: EncoderConfig,
    sigma_2: float,
    guidance: tuple[float, ...],
    labels: Labels = "none",
    model: UViTConfig = UVIT_MID,
    epochs: int = 200,
    noise_gamma: float = 0.3,
) -> ExperimentConfig:
    """Accepted version: encoded crops, all levels above as tokens, a tenth of them dropped in training.

    guidance: from the top level down, the last one for the rest. Deepening inserts level 2; the levels above it keep
    their denoisers, which are found again by their fingerprints.
    """
    weights = [guidance[min(i, len(guidance) - 1)] for i in range(depth)]
    levels = [LevelConfig(level=1, patch_size=2, guidance=weights[-1], model=model)]
    for i in range(depth - 1)[::-1]:
        grid, channels, source = CVPR[i]
        number = depth - i
        levels.append(
            LevelConfig(
                level=number,
                grid=grid,
                channels=channels,
                source=source,
                patch_size=_patch(grid),
                condition_noise=sigma_2 if number == 2 else CVPR_SIGMA,
                guidance=weights[i],
                model=model,
            )
        )
    return _experiment(
        name,
        data,
        labels,
        encoder,
        tuple(levels),
        epochs=2 * epochs if data.classes else epochs,  # an epoch of ImageNet has every image and its mirror image
        condition_drop=0.1,
        conditioning=ConditioningConfig(levels="all_above", injection="tokens"),
        noise_gamma=noise_gamma,
    )


# --- the rows -----------------------------------------------------------------------------------------------------

RECIPES: dict[str, Callable[[], ExperimentConfig]] = {}
PRINTED: dict[str, Printed] = {}
CLASSES: dict[str, int] = {}
IMAGES: dict[str, int] = {}  # of the training split


def _row(
    name: str,
    family: Callable[..., ExperimentConfig],
    depth: int,
    data: Dataset,
    *arguments: object,
    printed: Printed,
    **options: object,
) -> None:
    RECIPES[name] = partial(family, name, depth, data, *arguments, **options)
    PRINTED[name] = printed
    CLASSES[name], IMAGES[name] = data.classes, data.images


def _rows() -> None:
    coco = (UVIT_S, CLIP, ICLR_COCO)
    costs = {
        1: Printed(32.73, parameters=44.13, gflops=22.70, note="22.65 by every count of the published network."),
        2: Printed(13.24, growth=58.06, gflops_growth=8.54),
        3: Printed(8.29, growth=59.58, gflops_growth=1.42),
        4: Printed(6.86, growth=59.51, gflops_growth=0.72),
        5: Printed(6.27, growth=59.48, gflops_growth=0.71),
    }
    for depth, printed in costs.items():
        _row(f"iclr_coco_l{depth}", iclr, depth, COCO, *coco, (1.0, 0.5, 0.5, 0.0), 1.0, printed=printed)
    for depth, fid in {1: 6.30, 2: 5.24, 3: 5.24}.items():
        _row(f"iclr_coco_text_l{depth}", iclr, depth, COCO, *coco, (1.0, 0.0), 1.0, labels="text", printed=Printed(fid))

    small = (UVIT_M, MOCO_V3, ICLR_IMAGENET)
    note = "130.7M is the network with 1001 classes; its 71.60 GFlops are matched by no convention that was tried."
    for depth, fid in {1: 44.40, 2: 15.31, 3: 11.12, 4: 11.21}.items():
        printed = Printed(fid, parameters=130.7, gflops=71.60, note=note) if depth == 1 else Printed(fid)
        _row(f"iclr_imagenet100_l{depth}", iclr, depth, IMAGENET_100, *small, (1.0, 1.0, 1.0), 0.4, printed=printed)
    for depth, fid in {1: 6.93, 2: 4.88, 3: 5.16}.items():
        _row(
            f"iclr_imagenet100_class_l{depth}",
            iclr,
            depth,
            IMAGENET_100,
            *small,
            (0.5, 0.0),
            0.4,
            labels="class",
            printed=Printed(fid),
        )
    for depth, fid in {1: 3.8, 2: 3.2}.items():  # sigma_2 is not stated: that of ImageNet-100 with classes
        _row(
            f"iclr_imagenet1k_class_l{depth}",
            iclr,
            depth,
            IMAGENET_1K,
            UVIT_L,
            MOCO_V3,
            ICLR_IMAGENET,
            (0.5,),
            0.4,
            labels="class",
            printed=Printed(fid),
        )
    for labels, middle, vae, rcg in (("none", "", 40.25, 38.40), ("class", "_class", 7.2, 8.04)):
        sigmas = (1.0, 1.0) if labels == "none" else (0.5, 0.0)
        _row(
            f"iclr_imagenet100{middle}_vae_l3",
            iclr,
            3,
            IMAGENET_100,
            UVIT_M,
            VAE_CODE,
            ICLR_IMAGENET,
            sigmas,
            0.4,
            labels=labels,
            printed=Printed(vae, note="Levels of the VAE's code; its channels are not stated." if vae > 10 else ""),
        )
        _row(
            f"iclr_imagenet100{middle}_rcg_l2",
            iclr,
            2,
            IMAGENET_100,
            UVIT_M,
            MOCO_V3,
            ((1, 256),),
            (0.0,),
            0.4,
            labels=labels,
            source="patch",
            printed=Printed(rcg, note="One vector of 256 numbers as z_2, as RCG (arXiv 2312.03701) has it."),
        )

    unconditional = {1: (0.0, 55.41), 2: (0.0, 6.59), 3: (0.5, 6.34), 4: (0.5, 5.54), 5: (1.0, 5.03)}
    with_classes = {1: (0.0, 13.75), 2: (0.0, 4.87), 3: (0.0, 4.46), 4: (1.0, 4.25), 5: (1.0, 3.97)}
    gflops = {1: 26.8, 5: 34.0}
    for labels, middle, rows, weights, star in (
        ("none", "", unconditional, (0.8,), 45.19),
        ("class", "_class", with_classes, (0.5, 0.4, 0.3, 0.2, 0.1), 7.18),
    ):
        for depth, (sigma_2, fid) in rows.items():
            cost = gflops.get(depth) if labels == "none" else None
            _row(
                f"cvpr_imagenet{middle}_l{depth}",
                cvpr,
                depth,
                IMAGENET_1K,
                MOCO_V3,
                sigma_2,
                weights,
                labels=labels,
                printed=Printed(fid, gflops=cost),
            )
        _row(
            f"cvpr_imagenet{middle}_l1_star",
            cvpr,
            1,
            IMAGENET_1K,
            MOCO_V3,
            0.0,
            weights,
            labels=labels,
            model=UVIT_M,
            printed=Printed(star, gflops=35.1 if labels == "none" else None),
        )
    for depth, fid in {1: 5.42, 2: 4.72, 3: 5.92}.items():
        _row(
            f"cvpr_coco_text_l{depth}",
            cvpr,
            depth,
            COCO,
            CLIP,
            0.5,
            (1.0,),
            labels="text",
            epochs=1000,
            printed=Printed(fid),
        )
    # The encoder study, without guidance, where no noise is put on conditions while sampling; "none" is L = 1.
    for kind, encoder, fid in (
        ("mae", MAE, 10.96),
        ("moco", MOCO_V3, 10.59),
        ("clip", CLIP, 6.97),
        ("dino", DINO, 6.78),
    ):
        _row(
            f"cvpr_coco_text_l3_{kind}",
            cvpr,
            3,
            COCO,
            encoder,
            0.5,
            (0.0,),
            labels="text",
            epochs=1000,
            noise_gamma=float("inf"),
            printed=Printed(fid),
        )
    _row(
        "cvpr_coco_text_l1_none",
        cvpr,
        1,
        COCO,
        CLIP,
        0.5,
        (0.0,),
        labels="text",
        epochs=1000,
        noise_gamma=float("inf"),
        printed=Printed(14.98),
    )


_rows()
