"""Every knob of an experiment: frozen dataclasses that validate themselves.

An `ExperimentConfig` is what a recipe returns and what a YAML file changes (recipes/), and what is recorded beside
every result (config_io.py turns it into plain data and back). Which part of it a stage reads is said in experiment.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from nestdiff_core.errors import ConfigError


def knob(default: Any, doc: str, *, decides: Literal["always", "if_changed", "never"] = "always") -> Any:
    """A dataclass field with its one-sentence documentation (shown in the launchpad and by `inspect`).

    decides: whether it is part of fingerprints. if_changed: not at its default, so that a knob may be added without
    making anew what was made before it; never: it changes how work is done, not what comes out.
    """
    return field(default=default, metadata={"doc": doc, "decides": decides})


def _require(
    ok: bool,
    name: str,
    expected: str,
    found: Any,
    level: int | None = None,
    fix: str = "Change it in the experiment.",
) -> None:
    if not ok:
        what = f"{name} of level {level} cannot be used" if level is not None else f"{name} cannot be used"
        raise ConfigError(what, key=name, level=level, expected=expected, found=found, fix=fix)


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
        _require(self.resolution >= 4, f"{where}.resolution", ">= 4", self.resolution)
        _require(
            0.0 < self.held_out_fraction < 1.0, f"{where}.held_out_fraction", "between 0 and 1", self.held_out_fraction
        )
        _require(self.images_per_shard >= 1, f"{where}.images_per_shard", ">= 1", self.images_per_shard)
        _require(self.max_bad_samples >= 0, f"{where}.max_bad_samples", ">= 0", self.max_bad_samples)
        if self.source in ("folder", "webdataset"):
            _require(bool(self.path), f"{where}.path", f"a path, as images.source is {self.source!r}", self.path)


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Shape of a vision transformer that is trained here (timm's VisionTransformer)."""

    patch_size: int = knob(16, "Side of a patch in pixels; the feature map has input_size / patch_size tokens a side.")
    width: int = knob(384, "Token width, which is the number of feature channels.")
    depth: int = knob(12, "Number of blocks.")
    num_heads: int = knob(6, "Attention heads.")

    def __post_init__(self) -> None:
        for name in ("patch_size", "width", "depth", "num_heads"):
            _require(getattr(self, name) >= 1, f"encoder.vit.{name}", ">= 1", getattr(self, name))
        _require(
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
        _require(self.num_steps >= 0, "encoder.moco.num_steps", ">= 0", self.num_steps)
        _require(
            self.batch_size >= 2, "encoder.moco.batch_size", ">= 2, since InfoNCE needs negatives", self.batch_size
        )
        _require(0.0 < self.min_crop_scale <= 1.0, "encoder.moco.min_crop_scale", "in (0, 1]", self.min_crop_scale)


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
            _require(
                self.input_size % self.vit.patch_size == 0,
                "encoder.input_size",
                f"a multiple of encoder.vit.patch_size = {self.vit.patch_size}",
                self.input_size,
            )
        elif self.kind != "autoencoder":
            _require(bool(self.weights), "encoder.weights", "a file, `hub` or `random`", self.weights)
        _require(self.fold >= 1, "encoder.fold", ">= 1", self.fold)
        _require(all(value > 0 for value in self.std), "encoder.std", "numbers > 0", self.std)
        for name in ("mean", "std"):
            _require(
                len(getattr(self, name)) in (0, 1, 3), f"encoder.{name}", "no, 1 or 3 numbers", getattr(self, name)
            )


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
        _require(self.batch_size >= 1, "features.batch_size", ">= 1", self.batch_size)
        _require(self.chunk_rows >= 1, "features.chunk_rows", ">= 1", self.chunk_rows)


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
            _require(bool(self.weights), "autoencoder.weights", "a folder, or `hub:NAME` for kl", self.weights)
        _require(self.scale > 0, "autoencoder.scale", "> 0", self.scale)

    def latent_shape(self, channels: int, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of z_1 for square images of `resolution` pixels."""
        match self.kind:
            case "identity":
                return channels, resolution, resolution
            case "kl":
                return 4, resolution // 8, resolution // 8
            case "taef2":
                return 32, resolution // 8, resolution // 8


@dataclass(frozen=True, kw_only=True)
class UViTConfig:
    """Shape of one denoiser (U-ViT, arXiv 2209.12152). The grid and channels come from its level."""

    width: int = knob(512, "Token width.")
    depth: int = knob(12, "In-blocks plus out-blocks, an even number; one middle block comes on top.")
    num_heads: int = knob(8, "Attention heads.")
    mlp_ratio: float = knob(4.0, "Hidden width of a block's MLP over token width.")
    final_conv: bool = knob(True, "A 3x3 convolution at the end, as in all published sizes but H.")
    position_init: Literal["learned", "sincos"] = knob(
        "learned",
        "Start of the position embedding: learned from N(0, .02), as published, or from 2-d sines and cosines.",
    )

    def __post_init__(self) -> None:
        for name in ("width", "num_heads", "mlp_ratio"):
            _require(getattr(self, name) > 0, f"levels.model.{name}", "> 0", getattr(self, name))
        _require(self.depth >= 2 and self.depth % 2 == 0, "levels.model.depth", "an even number >= 2", self.depth)
        _require(
            self.width % self.num_heads == 0,
            "levels.model.width",
            f"a multiple of num_heads = {self.num_heads}",
            self.width,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one denoiser is trained (U-ViT's AdamW recipe by default)."""

    num_steps: int = knob(500_000, "Optimiser steps.")
    batch_size: int = knob(256, "Images per step, over all processes.")
    lr: float = knob(2e-4, "Learning rate after warm-up.")
    lr_decay: Literal["constant", "cosine"] = knob(
        "constant", "constant, as published, or cosine down to zero at num_steps."
    )
    weight_decay: float = knob(0.03, "AdamW weight decay.")
    beta1: float = knob(0.9, "AdamW beta 1.")
    beta2: float = knob(0.9, "AdamW beta 2.")
    warmup_steps: int = knob(5_000, "Linear warm-up steps.")
    ema_decay: float = knob(0.9999, "Decay of the exponential moving average of the weights, which is what samples.")
    grad_clip: float = knob(0.0, "Largest gradient norm; 0 turns clipping off, as published.")
    max_loss: float = knob(
        1000.0,
        "A step whose loss is larger has exploded, as one that is not finite has; a network that outputs 0 is at 1.",
        decides="if_changed",
    )
    max_skipped_steps: int = knob(
        0,
        "Exploded steps that are left out, and counted, before training stops.",
        decides="if_changed",
    )
    condition_drop: float = knob(0.1, "Chance that a sample is trained without any of its conditions (for guidance).")
    start_from: str = knob(
        "",
        "A file of published U-ViT weights to start from; what it does not have (conditions) starts as usual.",
    )
    fork_from: str = knob(
        "",
        "A checkpoint (its folder, step_...) of a denoiser with the same network to go on from, with other settings: "
        "weights, moving average, optimiser and step number.",
        decides="if_changed",
    )
    precision: Literal["float32", "tf32", "bfloat16"] = knob(
        "float32",
        "Arithmetic of the network: float32; tf32: its matrix products in TensorFloat-32 on GPUs that have it; "
        "bfloat16: mixed precision with weights, optimiser and loss in float32, the fastest on a GPU (slow on most "
        "CPUs).",
        decides="if_changed",
    )
    compile: bool = knob(
        False,
        "Whether the network is compiled (torch.compile): faster after a minute or two, with other last bits.",
        decides="never",
    )
    accumulation_steps: int = knob(
        1,
        "Parts into which a process cuts its share of a batch to save memory; their gradients are added up.",
        decides="never",
    )
    activation_checkpointing: bool = knob(
        False,
        "Whether blocks are computed twice rather than remembered: less memory, a forward pass more, the same result.",
        decides="never",
    )
    seed: int = knob(0, "Seed of initialisation, data order, noise and dropping.")
    log_every: int = knob(100, "Steps between log lines.", decides="never")
    checkpoint_every: int = knob(5_000, "Steps between checkpoints.", decides="never")
    keep_last: int = knob(2, "Newest checkpoints that are kept.", decides="never")
    keep_every: int = knob(0, "Checkpoints of every so many steps are kept for good; 0: none.", decides="never")

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "accumulation_steps", "log_every", "checkpoint_every", "keep_last"):
            _require(getattr(self, name) >= 1, f"levels.train.{name}", ">= 1", getattr(self, name))
        for name in ("seed", "warmup_steps", "weight_decay", "grad_clip", "max_skipped_steps", "keep_every"):
            _require(getattr(self, name) >= 0, f"levels.train.{name}", ">= 0", getattr(self, name))
        _require(self.max_loss > 0, "levels.train.max_loss", "> 0", self.max_loss)
        _require(
            self.batch_size % self.accumulation_steps == 0,
            "levels.train.accumulation_steps",
            f"a divisor of batch_size = {self.batch_size}",
            self.accumulation_steps,
        )
        _require(
            self.keep_every % self.checkpoint_every == 0,
            "levels.train.keep_every",
            f"a multiple of checkpoint_every = {self.checkpoint_every}",
            self.keep_every,
        )
        _require(0.0 < self.lr < float("inf"), "levels.train.lr", "a positive number", self.lr)
        for name in ("beta1", "beta2"):
            _require(0.0 <= getattr(self, name) < 1.0, f"levels.train.{name}", "in [0, 1)", getattr(self, name))
        for name in ("ema_decay", "condition_drop"):
            _require(0.0 <= getattr(self, name) <= 1.0, f"levels.train.{name}", "in [0, 1]", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One level of the hierarchy: the latent z_l and the denoiser that generates it."""

    level: int = knob(1, "1 is the image, the largest number the most abstract latent.")
    grid: int = knob(0, "Side of z_l's square grid; level 1 may leave it 0, the autoencoder says.")
    channels: int = knob(0, "Channels of z_l: SVD components kept; level 1 may leave it 0.")
    source: Literal["pooled", "patch"] = knob(
        "pooled",
        "pooled: average-pool the feature map to the grid; patch: cut the image into grid x grid crops and encode each "
        "to one vector. (Level 1 has the autoencoder.)",
    )
    patch_size: int = knob(1, "Side of the patch of z_l that becomes one token.")
    condition_noise: float = knob(
        0.0, "sigma_l: standard deviation of the noise on z_l where it conditions a lower level."
    )
    guidance: float = knob(0.0, "w: eps = cond + w (cond - null) while sampling this level; 0 is no guidance.")
    guidance_interval: tuple[float, ...] = knob(
        (0.0, 1.0), "First and last time t at which guidance is on; 0 is data, 1 is noise."
    )
    model: UViTConfig = knob(UViTConfig(), "Shape of the denoiser.")
    train: TrainConfig = knob(TrainConfig(), "Training of the denoiser.")

    def __post_init__(self) -> None:
        _require(self.level >= 1, "levels.level", ">= 1", self.level)
        _require(self.patch_size >= 1, "levels.patch_size", ">= 1", self.patch_size, level=self.level)
        _require(self.condition_noise >= 0, "levels.condition_noise", ">= 0", self.condition_noise, level=self.level)
        interval = self.guidance_interval
        _require(
            len(interval) == 2 and 0.0 <= interval[0] <= interval[1] <= 1.0,
            "levels.guidance_interval",
            "two times with 0 <= first <= last <= 1",
            interval,
            level=self.level,
        )
        if self.level > 1:
            _require(self.grid >= 1, "levels.grid", ">= 1", self.grid, level=self.level)
            _require(self.channels >= 1, "levels.channels", ">= 1", self.channels, level=self.level)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The frozen CLIP text tower whose last hidden states condition the denoisers (77 x 768 in U-ViT's COCO set-up)."""

    name: str = knob("ViT-L-14", "open_clip model name.")
    weights: str = knob("hub:openai", "A local file, `hub:TAG` for open_clip's own download, or `random`.")
    captions_per_image: int = knob(
        5, "Captions of an image that are encoded; one of them is drawn at every training step."
    )
    length: int = knob(77, "Tokens of the text tower.")
    width: int = knob(768, "Channels of the text tower.")
    batch_size: int = knob(
        256, "Captions per pass; part of the fingerprint, since another batch gives other last bits."
    )

    def __post_init__(self) -> None:
        for name in ("captions_per_image", "length", "width", "batch_size"):
            _require(getattr(self, name) >= 1, f"conditioning.text.{name}", ">= 1", getattr(self, name))
        _require(bool(self.weights), "conditioning.text.weights", "a file, `hub:TAG` or `random`", self.weights)


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """What a denoiser is told, and how."""

    levels: Literal["all_above", "markov"] = knob(
        "all_above", "all_above: every z_m with m > l (cvpr); markov: z_{l+1} only (iclr)."
    )
    injection: Literal["tokens", "fusion"] = knob(
        "tokens",
        "tokens: conditions are extra input tokens (cvpr); fusion: convolutions bring them to the token grid, where "
        "they are added every two blocks (iclr).",
    )
    labels: Literal["none", "class", "text"] = knob(
        "none", "none: unconditional; class: the class label is an extra token; text: so is each token of a caption."
    )
    text: TextConfig = knob(TextConfig(), "The text tower, for labels text.")
    drop: Literal["together", "each"] = knob(
        "together", "In training: one coin drops the label and all conditions of a sample, or a coin for each of them."
    )


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The forward process and what the networks predict."""

    schedule: Literal["discrete", "vp"] = knob(
        "discrete", "discrete: Stable Diffusion's 1000 betas (the paper); vp: the continuous variance-preserving SDE."
    )
    prediction: Literal["eps", "v", "x"] = knob(
        "eps", "What the network outputs and the loss compares: eps (the paper), v or x."
    )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the cascade is sampled."""

    sampler: Literal["dpm_solver_pp", "dpm_solver", "ddim", "ddpm"] = knob(
        "dpm_solver_pp",
        "dpm_solver_pp: DPM-Solver++ 2M; dpm_solver: the single-step solver of order 3 that the paper uses; ddim: "
        "deterministic DDIM; ddpm: ancestral sampling.",
    )
    spacing: Literal["lambda", "time"] = knob(
        "lambda", "Even steps in half the log signal-to-noise ratio, or in time (the paper, for dpm_solver)."
    )
    num_evaluations: int = knob(50, "Network evaluations per level (guidance doubles the batch, not this number).")
    num_images: int = knob(1_000, "Images that the `samples` stage generates.")
    batch_size: int = knob(250, "Images generated together; changes an image by rounding only.")
    noise_gamma: float = knob(
        0.0, "gamma: while sampling, a condition's noise variance is (t/T)^gamma sigma_m^2; inf is none."
    )
    noise_decay: Literal["variance", "deviation"] = knob(
        "variance",
        "Whether (t/T)^gamma scales the variance (the paper's text) or the standard deviation (its caption).",
    )
    noise_draw: Literal["call", "once"] = knob(
        "call", "Whether a condition's noise is drawn anew at every network call or once for an image and level."
    )
    null_branch: Literal["all", "conditions"] = knob(
        "all", "What guidance contrasts with: neither label nor conditions, or the label alone."
    )
    seed: int = knob(0, "Seed; image i depends on (seed, i) only.")
    precision: Literal["float32", "bfloat16"] = knob(
        "float32",
        "Arithmetic of the denoisers: float32, or mixed precision, several times faster on a GPU; the solver's stays "
        "float32.",
        decides="if_changed",
    )
    compile: bool = knob(
        False,
        "Whether the denoisers are compiled (torch.compile): faster after a minute for each level, with other last "
        "bits.",
        decides="if_changed",
    )

    def __post_init__(self) -> None:
        for name in ("num_evaluations", "num_images", "batch_size"):
            _require(getattr(self, name) >= 1, f"sampling.{name}", ">= 1", getattr(self, name))
        _require(self.noise_gamma >= 0, "sampling.noise_gamma", ">= 0", self.noise_gamma)
        _require(self.seed >= 0, "sampling.seed", ">= 0", self.seed)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Which numbers are computed on the samples."""

    extractors: tuple[str, ...] = knob(
        ("encoder",), "Feature spaces of the Frechet distance: encoder (this experiment's own), pixels, inception."
    )
    reference: Literal["train", "held_out"] = knob("train", "The real images that samples are compared with.")
    inception_weights: str = knob("", "For inception: a local .pth, or `download` to let torch-fidelity fetch it.")
    num_neighbours: int = knob(3, "k of precision and recall.")
    probe: bool = knob(False, "Judge the samples with a classifier trained on the real labelled images.")

    def __post_init__(self) -> None:
        _require(self.num_neighbours >= 1, "evaluation.num_neighbours", ">= 1", self.num_neighbours)
        known = ("encoder", "pixels", "inception")
        for name in self.extractors:
            _require(name in known, "evaluation.extractors", f"each one of {known}", name)
        if "inception" in self.extractors:
            _require(
                bool(self.inception_weights),
                "evaluation.inception_weights",
                "a file or `download`",
                self.inception_weights,
            )


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """The oracle ladder, which tells the level that loses the quality (evaluation/ladder.py)."""

    num_images: int = knob(1_000, "Held-out images whose true latents are given level by level, at most.")

    def __post_init__(self) -> None:
        _require(self.num_images >= 2, "ladder.num_images", ">= 2", self.num_images)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A greedy search for one level's condition noise (sigma_l), the others held."""

    level: int = knob(0, "Whose sigma is searched; 0 is no search.")
    sigmas: tuple[float, ...] = knob((0.0, 0.5, 1.0, 1.5), "The candidates.")
    metric: str = knob("fd_encoder", "The number of the evaluation that is to be small.")

    def __post_init__(self) -> None:
        _require(self.level >= 0, "search.level", ">= 0", self.level)
        _require(
            bool(self.sigmas) and min(self.sigmas) >= 0 and len(set(self.sigmas)) == len(self.sigmas),
            "search.sigmas",
            "different numbers >= 0",
            self.sigmas,
        )


@dataclass(frozen=True, kw_only=True)
class DesignConfig:
    """What `design` proposes levels for: how much each should tell the levels below it."""

    nats: float = knob(200.0, "Information of the top level, 1/2 log(1 + 1/sigma^2) for each of its numbers.")
    growth: float = knob(2.0, "How many times as much the next level tells (the paper's sizes grow by 2).")
    variance: float = knob(0.9, "Share of the pooled features' variance that a level's channels keep at least.")
    grids: tuple[int, ...] = knob((), "Sides of the grids to try; empty: 1, 2, 4, ... below the feature map's side.")

    def __post_init__(self) -> None:
        _require(self.nats > 0, "design.nats", "> 0", self.nats)
        _require(self.growth >= 1, "design.growth", ">= 1", self.growth)
        _require(0 < self.variance < 1, "design.variance", "between 0 and 1", self.variance)
        _require(all(grid >= 1 for grid in self.grids), "design.grids", "numbers >= 1", self.grids)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How work is run. Nothing here changes a result or enters a fingerprint; the launchpad may edit it."""

    device: str = knob("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    processes: int = knob(1, "Processes on each host that train a level or sample, one per GPU (torchrun).")
    hosts: int = knob(1, "Machines that train a level together (docs/clusters.md).")
    launcher: Literal["local", "slurm"] = knob(
        "local", "Where training is started. local: on this machine; slurm: as a job of a Slurm cluster."
    )
    slurm_options: str = knob(
        "", "Options of sbatch (such as --partition=gpu --account=mine --time=24:00:00 --gpus-per-node=4)."
    )
    slurm_setup: str = knob("", "Shell lines that a Slurm job begins with (such as module load cuda).")
    restarts: int = knob(
        3, "How often several processes are started again from their last checkpoint after one has died."
    )
    hang_seconds: float = knob(
        600.0, "A process that waits longer for another takes it for hung; all are then started again."
    )
    join_seconds: float = knob(600.0, "How long hosts wait for one another: at the start, and for one that was lost.")

    def __post_init__(self) -> None:
        for name in ("processes", "hosts"):
            _require(getattr(self, name) >= 1, f"runtime.{name}", ">= 1", getattr(self, name))
        _require(self.restarts >= 0, "runtime.restarts", ">= 0", self.restarts)
        for name in ("hang_seconds", "join_seconds"):
            _require(getattr(self, name) > 0, f"runtime.{name}", "> 0", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """One experiment, complete: everything that decides its numbers."""

    name: str = knob("unnamed", "Name of the experiment: prefix of its Dagster assets.")
    images: ImagesConfig = knob(ImagesConfig(source="digits"), "The images.")
    encoder: EncoderConfig = knob(EncoderConfig(weights="random"), "The frozen encoder.")
    features: FeaturesConfig = knob(FeaturesConfig(), "The feature and latent stores.")
    autoencoder: AutoencoderConfig = knob(AutoencoderConfig(), "The space of z_1.")
    levels: tuple[LevelConfig, ...] = knob((LevelConfig(),), "Levels 1..L in order.")
    conditioning: ConditioningConfig = knob(ConditioningConfig(), "What denoisers are told.")
    diffusion: DiffusionConfig = knob(DiffusionConfig(), "The diffusion process.")
    sampling: SamplingConfig = knob(SamplingConfig(), "The cascade.")
    evaluation: EvaluationConfig = knob(EvaluationConfig(), "The numbers.")
    ladder: LadderConfig = knob(LadderConfig(), "Which level loses the quality.")
    search: SearchConfig = knob(SearchConfig(), "A search for one level's condition noise.")
    design: DesignConfig = knob(DesignConfig(), "What `design` proposes levels for.")
    runtime: RuntimeConfig = knob(RuntimeConfig(), "How work is run; in no fingerprint.")

    def __post_init__(self) -> None:
        _require(
            self.name.replace("_", "").isalnum() and self.name.isascii(),
            "name",
            "letters, digits and underscores (it becomes a Dagster asset prefix)",
            self.name,
        )
        numbers = [level.level for level in self.levels]
        _require(
            numbers == list(range(1, len(numbers) + 1)) and bool(numbers),
            "levels",
            "levels numbered 1, 2, ..., L in this order",
            numbers,
        )
        for level in self.levels:
            self._check_level(level)
            self._check_guidance(level)
        down = 1 if self.autoencoder.kind == "identity" else 8
        _require(
            down == 1 or self.autoencoder.channels == self.images.channels,
            "autoencoder.channels",
            f"{self.images.channels}, which images.channels is",
            self.autoencoder.channels,
        )
        _require(
            self.images.resolution % down == 0,
            "images.resolution",
            f"a multiple of {down}, by which the autoencoder {self.autoencoder.kind!r} shrinks it",
            self.images.resolution,
        )
        if self.search.level:
            self.require_search()
        if self.conditioning.labels == "class":
            _require(
                self.images.labels, "conditioning.labels", "images.labels: true when it is `class`", self.images.labels
            )
        if self.evaluation.probe:
            _require(
                self.images.labels and self.evaluation.reference == "train",
                "evaluation.probe",
                "images.labels: true and evaluation.reference: train when the probe is on",
                {"images.labels": self.images.labels, "evaluation.reference": self.evaluation.reference},
            )

    def _check_guidance(self, level: LevelConfig) -> None:
        """What guidance contrasts with must have been seen in training."""
        told = self.conditioning.labels != "none" or bool(self.levels_above(level.level))
        _require(
            not level.guidance or not told or level.train.condition_drop > 0,
            "levels.train.condition_drop",
            "> 0 where levels.guidance is on, which contrasts with a network that was told nothing",
            level.train.condition_drop,
            level=level.level,
        )
        _require(
            self.sampling.null_branch == "all"
            or self.conditioning.labels == "none"
            or self.conditioning.drop == "each",
            "sampling.null_branch",
            "all, unless conditioning.drop is `each`: a label without its conditions is never trained otherwise",
            self.sampling.null_branch,
            level=level.level,
        )

    def _check_level(self, level: LevelConfig) -> None:
        channels, grid = self.latent_shape(level.level)[:2]
        for given, right, name in ((level.grid, grid, "grid"), (level.channels, channels, "channels")):
            _require(
                level.level > 1 or given in (0, right),
                f"levels.{name}",
                f"{right}, which the autoencoder gives",
                given,
                level=1,
            )
        _require(
            grid % level.patch_size == 0,
            "levels.patch_size",
            f"a divisor of the grid {grid}",
            level.patch_size,
            level=level.level,
        )
        values = channels * level.patch_size**2
        _require(
            self.diffusion.prediction == "x" or values <= level.model.width,
            "levels.patch_size",
            f"patches of at most {level.model.width} values, the width of the network, which must carry their noise",
            f"{values} values in a patch of {level.patch_size}",
            level=level.level,
            fix="Choose smaller patches, a wider network, or diffusion.prediction: x.",
        )
        if level.level == 1:
            return
        if level.level > 2:
            below = self.levels[level.level - 2]
            _require(
                (level.grid, level.channels, level.source) != (below.grid, below.channels, below.source),
                "levels.grid",
                f"another grid, channels or source than level {below.level}, of which it is a copy",
                grid,
                level=level.level,
            )
            _require(
                grid <= below.grid,
                "levels.grid",
                f"at most {below.grid}, the grid of level {below.level} below it",
                grid,
                level=level.level,
            )
        if level.source == "patch":
            _require(
                self.images.resolution % grid == 0,
                "levels.grid",
                f"a divisor of images.resolution = {self.images.resolution}, which is cut into so many crops a side",
                grid,
                level=level.level,
            )
        elif self.encoder.kind == "moco":
            side = self.encoder.input_size // self.encoder.vit.patch_size
            _require(
                grid <= side,
                "levels.grid",
                f"at most {side}, the side of the encoder's feature map",
                grid,
                level=level.level,
            )
        if self.encoder.kind == "moco":
            _require(
                level.channels <= self.encoder.vit.width,
                "levels.channels",
                f"at most {self.encoder.vit.width}, the channels of the encoder's features",
                level.channels,
                level=level.level,
            )

    def require_search(self) -> None:
        """Raise a ConfigError unless `search.level` is a level that conditions others."""
        _require(
            2 <= self.search.level <= self.num_levels,
            "search.level",
            f"a level that conditions others, 2 to {self.num_levels}",
            self.search.level,
        )
        _require(
            any(self.search.metric.endswith(f"_{name}") for name in self.evaluation.extractors)
            or ("inception" in self.evaluation.extractors and self.search.metric in ("fid", "kid")),
            "search.metric",
            f"a number of one of {self.evaluation.extractors}, such as fd_{self.evaluation.extractors[0]}",
            self.search.metric,
        )

    @property
    def num_levels(self) -> int:
        return len(self.levels)

    def level(self, number: int) -> LevelConfig:
        """The configuration of level `number` (1 is the image)."""
        _require(
            1 <= number <= self.num_levels,
            "level",
            f"1 to {self.num_levels}, as {self.name!r} has that many levels",
            number,
        )
        return self.levels[number - 1]

    def latent_shape(self, number: int) -> tuple[int, int, int]:
        """(channels, height, width) of z_l."""
        if number == 1:
            return self.autoencoder.latent_shape(self.images.channels, self.images.resolution)
        level = self.level(number)
        return level.channels, level.grid, level.grid

    def has_crops(self, number: int) -> bool:
        """Whether level `number` has a feature store of its own: the vectors of more crops than the whole image."""
        level = self.level(number)
        return number > 1 and level.source == "patch" and level.grid > 1

    def levels_above(self, number: int) -> tuple[int, ...]:
        """Numbers of the levels that condition level `number`, from the top down."""
        top = self.num_levels if self.conditioning.levels == "all_above" else min(number + 1, self.num_levels)
        return tuple(range(top, number, -1))
