"""The images, the frozen networks that see them, and the stores of what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nestdiff_core.config.knobs import knob, require


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Where the images come from and how each becomes a square of `resolution` pixels."""

    source: Literal["digits", "toy", "folder", "webdataset"] = knob(
        "folder",
        "digits: scikit-learn's 8x8 digits; toy: 256 of them; folder: image files below `path`; "
        "webdataset: tar shards at `path` (a folder, or a pattern such as data/train-*.tar or "
        "s3://bucket/train-{00000..01023}.tar).",
    )
    path: str = knob("", "Folder, or for webdataset also a pattern or URL (s3, gs, az, https); ~ is expanded.")
    resolution: int = knob(64, "Side of the square image in pixels: short side resized (bicubic), centre cropped.")
    channels: Literal[1, 3] = knob(3, "3: RGB; 1: grey-scale.")
    labels: bool = knob(
        False,
        "Whether every image must have a class label (folder: the name of its sub-folder; webdataset: a .cls member).",
    )
    held_out_fraction: float = knob(0.1, "Share of the images kept for validation where the source names no split.")
    split_seed: int = knob(0, "Seed of that split.")
    images_per_shard: int = knob(1024, "Images in one WebDataset shard, which is also one Dagster partition.")
    max_bad_samples: int = knob(
        0, "How many unreadable or unlabelled images may be set aside (rejects.jsonl lists them)."
    )

    def __post_init__(self) -> None:
        where = "images"
        require(self.resolution >= 4, f"{where}.resolution", ">= 4", self.resolution)
        require(
            0.0 < self.held_out_fraction < 1.0, f"{where}.held_out_fraction", "between 0 and 1", self.held_out_fraction
        )
        require(self.images_per_shard >= 1, f"{where}.images_per_shard", ">= 1", self.images_per_shard)
        require(self.max_bad_samples >= 0, f"{where}.max_bad_samples", ">= 0", self.max_bad_samples)
        if self.source in ("folder", "webdataset"):
            require(bool(self.path), f"{where}.path", f"a path, as images.source is {self.source!r}", self.path)


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Shape of a vision transformer that is trained here (timm's VisionTransformer)."""

    patch_size: int = knob(16, "Side of a patch in pixels; the feature map has input_size / patch_size tokens a side.")
    width: int = knob(384, "Token width, which is the number of feature channels.")
    depth: int = knob(12, "Number of blocks.")
    num_heads: int = knob(6, "Attention heads.")

    def __post_init__(self) -> None:
        for name in ("patch_size", "width", "depth", "num_heads"):
            require(getattr(self, name) >= 1, f"encoder.vit.{name}", ">= 1", getattr(self, name))
        require(
            self.width % self.num_heads == 0,
            "encoder.vit.width",
            f"a multiple of num_heads = {self.num_heads}",
            self.width,
        )


@dataclass(frozen=True, kw_only=True)
class MoCoConfig:
    """MoCo v3 pre-training on the experiment's own images (arXiv 2104.02057)."""

    num_steps: int = knob(10_000, "Optimiser steps; 0 leaves the network untrained.")
    batch_size: int = knob(256, "Images per step; each gives two views.")
    lr: float = knob(6e-4, "Peak learning rate (AdamW, cosine decay).")
    weight_decay: float = knob(0.1, "AdamW weight decay.")
    warmup_steps: int = knob(500, "Linear warm-up steps.")
    momentum: float = knob(0.99, "Momentum of the key encoder at the start; rises to 1 on a cosine.")
    temperature: float = knob(0.2, "Softmax temperature of InfoNCE.")
    projection_dim: int = knob(256, "Width of the projected vectors that are contrasted.")
    hidden_dim: int = knob(4096, "Hidden width of projector and predictor.")
    min_crop_scale: float = knob(0.2, "Smallest share of the image's area in a random crop.")
    max_rotation_degrees: float = knob(0.0, "Largest rotation of a view.")
    horizontal_flip: bool = knob(True, "Whether views are mirrored half of the time; off for digits and text.")
    jitter: float = knob(0.4, "Strength of brightness, contrast and (RGB) saturation changes.")
    noise: float = knob(0.0, "Standard deviation of pixel noise added to a view (images are in [0, 1]).")
    seed: int = knob(0, "Seed of initialisation, sampling and augmentation.")

    def __post_init__(self) -> None:
        require(self.num_steps >= 0, "encoder.moco.num_steps", ">= 0", self.num_steps)
        require(self.batch_size >= 2, "encoder.moco.batch_size", ">= 2, since InfoNCE needs negatives", self.batch_size)
        require(0.0 < self.min_crop_scale <= 1.0, "encoder.moco.min_crop_scale", "in (0, 1]", self.min_crop_scale)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The frozen visual encoder whose features the hierarchy is cut from."""

    kind: Literal["moco", "timm", "open_clip", "torchvision", "autoencoder"] = knob(
        "timm",
        "moco: a ViT pre-trained here on the images; timm: any timm vision transformer; open_clip: the image tower of "
        "a CLIP; torchvision: a convolutional network; autoencoder: the code of this experiment's autoencoder.",
    )
    name: str = knob("vit_small_patch16_224", "The library's name of the model, for timm, open_clip and torchvision.")
    weights: str = knob(
        "",
        "For timm, open_clip and torchvision: a local .safetensors or .pth file, `hub` for the library's own download "
        "(open_clip: `hub:TAG`), or `random` for an untrained network. A file of OpenAI's CLIP needs a name that "
        "ends in -quickgelu.",
    )
    input_size: int = knob(224, "Side in pixels to which images are resized (bicubic) for the encoder.")
    layer: str = knob("features", "For torchvision: the submodule whose output is the feature map.")
    mean: tuple[float, ...] = knob((), "Channel means of images in [0, 1]; empty: those the model was published with.")
    std: tuple[float, ...] = knob((), "Channel deviations; empty: those the model was published with.")
    fold: int = knob(
        4, "For autoencoder: blocks of fold x fold code positions become channels, so that a level can be small."
    )
    vit: ViTConfig = knob(ViTConfig(), "Shape of the network, for kind moco.")
    moco: MoCoConfig = knob(MoCoConfig(), "Pre-training, for kind moco.")

    def __post_init__(self) -> None:
        if self.kind == "moco":
            require(
                self.input_size % self.vit.patch_size == 0,
                "encoder.input_size",
                f"a multiple of encoder.vit.patch_size = {self.vit.patch_size}",
                self.input_size,
            )
        elif self.kind != "autoencoder":
            require(bool(self.weights), "encoder.weights", "a file, `hub` or `random`", self.weights)
        require(self.fold >= 1, "encoder.fold", ">= 1", self.fold)
        require(all(value > 0 for value in self.std), "encoder.std", "numbers > 0", self.std)
        for name in ("mean", "std"):
            require(len(getattr(self, name)) in (0, 1, 3), f"encoder.{name}", "no, 1 or 3 numbers", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """How encoder outputs are computed and stored."""

    batch_size: int = knob(
        256, "Images per encoder pass; part of the fingerprint, since another batch gives other last bits."
    )
    chunk_rows: int = knob(32, "Images per zarr chunk: what one training read touches.")
    dtype: Literal["float16", "float32"] = knob(
        "float16", "Stored precision; an overflow is refused by key and channel."
    )
    precision: Literal["float32", "bfloat16", "float16"] = knob(
        "float32", "Arithmetic of the encoder: float32, or mixed precision, several times faster on a GPU."
    )
    compile: bool = knob(
        False,
        "Whether the encoder is compiled (torch.compile): faster after a minute, with other last bits.",
        decides="if_changed",
    )
    keep: bool = knob(
        True,
        "Whether features are stored. Without, images are encoded once for the bases and once for the latents, and "
        "nothing but latents needs the disk.",
        decides="never",
    )
    flip: bool = knob(False, "Whether the mirror image is encoded and stored too; training then reads either.")

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "features.batch_size", ">= 1", self.batch_size)
        require(self.chunk_rows >= 1, "features.chunk_rows", ">= 1", self.chunk_rows)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What space z_1 lives in."""

    kind: Literal["identity", "kl", "taef2"] = knob(
        "identity",
        "identity: z_1 is the image itself, scaled to [-1, 1]; kl: diffusers' AutoencoderKL (Stable Diffusion's "
        "KL-f8); taef2: the tiny autoencoder of FLUX.2's space.",
    )
    weights: str = knob(
        "",
        "For kl: a folder as diffusers saves it, or `hub:NAME`; for taef2: the folder of its .safetensors; "
        "for both `random`, for tests.",
    )
    scale: float = knob(1.0, "The code is multiplied by this to become z_1 (0.18215 for Stable Diffusion's KL-f8).")
    channels: Literal[1, 3] = knob(3, "For kl and taef2: channels of decoded images; 1 averages their RGB.")
    posterior: Literal["mean", "sample"] = knob(
        "mean", "For kl: whether z_1 is the mean of the code's distribution, or one sample of it (seeded by row)."
    )

    def __post_init__(self) -> None:
        if self.kind != "identity":
            require(bool(self.weights), "autoencoder.weights", "a folder, or `hub:NAME` for kl", self.weights)
        require(self.scale > 0, "autoencoder.scale", "> 0", self.scale)

    def latent_shape(self, channels: int, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of z_1 for square images of `resolution` pixels."""
        match self.kind:
            case "identity":
                return channels, resolution, resolution
            case "kl":
                return 4, resolution // 8, resolution // 8
            case "taef2":
                return 32, resolution // 8, resolution // 8
