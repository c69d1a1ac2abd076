"""The levels, their denoisers and training, and what a denoiser is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nestdiff_core.config.knobs import knob, require


@dataclass(frozen=True, kw_only=True)
class UViTConfig:
    """Shape of one denoiser (U-ViT, arXiv 2209.12152). The grid and channels come from its level."""

    width: int = knob(512, "Token width.")
    depth: int = knob(12, "In-blocks plus out-blocks, an even number; one middle block comes on top.")
    num_heads: int = knob(8, "Attention heads.")
    mlp_ratio: float = knob(4.0, "Hidden width of a block's MLP over token width.")
    final_conv: bool = knob(
        True,
        "A 3x3 convolution at the end, as in all published sizes but H. Where steps and channels are few its random "
        "start may cost 5 % of the loss.",
    )
    position_init: Literal["learned", "sincos"] = knob(
        "learned",
        "Start of the position embedding: learned from N(0, .02), as published, or from 2-d sines and cosines.",
    )
    weight_init: Literal["normal", "xavier"] = knob(
        "normal",
        "Start of the linear layers: N(0, .02), as published; or Xavier's uniform, with fusion's layers beginning as "
        "if there were none, which learns faster where steps are few.",
        decides="if_changed",
    )

    def __post_init__(self) -> None:
        for name in ("width", "num_heads", "mlp_ratio"):
            require(getattr(self, name) > 0, f"levels.model.{name}", "> 0", getattr(self, name))
        require(self.depth >= 2 and self.depth % 2 == 0, "levels.model.depth", "an even number >= 2", self.depth)
        require(
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
    optimizer: Literal["adamw", "muon"] = knob(
        "adamw",
        "adamw, as published; or muon for the matrices of the blocks and adamw for the rest, which learns faster where "
        "steps are few.",
        decides="if_changed",
    )
    lr: float = knob(2e-4, "Learning rate after warm-up.")
    lr_decay: Literal["constant", "cosine"] = knob(
        "constant", "constant, as published, or cosine down to zero at num_steps."
    )
    weight_decay: float = knob(0.03, "AdamW weight decay.")
    beta1: float = knob(0.9, "AdamW beta 1.")
    beta2: float = knob(0.9, "AdamW beta 2.")
    warmup_steps: int = knob(5_000, "Linear warm-up steps.")
    ema_decay: float = knob(0.9999, "Decay of the exponential moving average of the weights, which is what samples.")
    ema_warmup: bool = knob(
        False,
        "Whether averages begin as short ones, of decay (1 + step) / (10 + step) as long as that is less, so that none "
        "holds the weights that training started from; needed where steps are few for the decay.",
        decides="if_changed",
    )
    more_ema_decays: tuple[float, ...] = knob(
        (),
        "Decays of further averages of the weights, which are kept in training and exported beside that one for "
        "levels.sampled_decay and sweeps; each takes the memory of the weights.",
        decides="if_changed",
    )
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
    noise_levels: tuple[float, ...] = knob(
        (),
        "Mean and deviation of lambda = log(alpha / sigma), half the log signal-to-noise ratio, that the network is "
        "trained at, a normal cut to the schedule's range; empty: uniform in the schedule's time, as published.",
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
        "bfloat16: mixed precision with weights, optimiser and loss in float32, the fastest on a GPU and on CPUs "
        "with matrix units (AMX), slow on others.",
        decides="if_changed",
    )
    compile: bool = knob(
        False,
        "Whether the network is compiled (torch.compile): faster after a minute or two, with other last bits.",
        decides="never",
    )
    cuda_graphs: bool = knob(
        False,
        "Whether a compiled network's kernels are launched as one CUDA graph: for small levels, where launching them "
        "one by one takes longer than they do; costs memory.",
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
            require(getattr(self, name) >= 1, f"levels.train.{name}", ">= 1", getattr(self, name))
        for name in ("seed", "warmup_steps", "weight_decay", "grad_clip", "max_skipped_steps", "keep_every"):
            require(getattr(self, name) >= 0, f"levels.train.{name}", ">= 0", getattr(self, name))
        require(self.max_loss > 0, "levels.train.max_loss", "> 0", self.max_loss)
        require(
            not self.cuda_graphs or (self.compile and self.accumulation_steps == 1),
            "levels.train.cuda_graphs",
            "false, unless compile is true and accumulation_steps 1, as a graph's gradients cannot be added to",
            True,
        )
        require(
            self.batch_size % self.accumulation_steps == 0,
            "levels.train.accumulation_steps",
            f"a divisor of batch_size = {self.batch_size}",
            self.accumulation_steps,
        )
        require(
            self.keep_every % self.checkpoint_every == 0,
            "levels.train.keep_every",
            f"a multiple of checkpoint_every = {self.checkpoint_every}",
            self.keep_every,
        )
        require(0.0 < self.lr < float("inf"), "levels.train.lr", "a positive number", self.lr)
        require(
            self.noise_levels == () or (len(self.noise_levels) == 2 and self.noise_levels[1] > 0),
            "levels.train.noise_levels",
            "nothing, or a mean and a deviation > 0",
            self.noise_levels,
        )
        for name in ("beta1", "beta2"):
            require(0.0 <= getattr(self, name) < 1.0, f"levels.train.{name}", "in [0, 1)", getattr(self, name))
        for name in ("ema_decay", "condition_drop"):
            require(0.0 <= getattr(self, name) <= 1.0, f"levels.train.{name}", "in [0, 1]", getattr(self, name))
        more = self.more_ema_decays
        require(
            len({*more, self.ema_decay}) == len(more) + 1 and all(0.0 <= decay <= 1.0 for decay in more),
            "levels.train.more_ema_decays",
            f"different numbers in [0, 1], others than ema_decay = {self.ema_decay}",
            more,
        )


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
    guide_step: int = knob(
        0,
        "What guidance contrasts with: 0, the network without its conditions; N, this level's own average of the "
        "weights at step N of its training, told the same (autoguidance); train.keep_every must keep that.",
        decides="if_changed",
    )
    noise_gamma: float = knob(
        -1.0, "gamma while this level is sampled; -1: that of sampling.noise_gamma.", decides="if_changed"
    )
    num_evaluations: int = knob(
        0, "Network evaluations that sample this level; 0: as many as sampling.num_evaluations.", decides="if_changed"
    )
    sampled_decay: float = knob(
        -1.0,
        "Which weights sample this level, by the decay of their average: one of train.more_ema_decays, or 0 for the "
        "weights as training left them; -1: train.ema_decay.",
        decides="if_changed",
    )
    model: UViTConfig = knob(UViTConfig(), "Shape of the denoiser.")
    train: TrainConfig = knob(TrainConfig(), "Training of the denoiser.")

    def __post_init__(self) -> None:
        require(self.level >= 1, "levels.level", ">= 1", self.level)
        require(self.patch_size >= 1, "levels.patch_size", ">= 1", self.patch_size, level=self.level)
        require(self.condition_noise >= 0, "levels.condition_noise", ">= 0", self.condition_noise, level=self.level)
        interval = self.guidance_interval
        require(
            len(interval) == 2 and 0.0 <= interval[0] <= interval[1] <= 1.0,
            "levels.guidance_interval",
            "two times with 0 <= first <= last <= 1",
            interval,
            level=self.level,
        )
        kept = self.train.keep_every
        require(
            0 <= self.guide_step < self.train.num_steps
            and (self.guide_step == 0 or (kept > 0 and self.guide_step % kept == 0)),
            "levels.guide_step",
            f"0, or a step before {self.train.num_steps} that train.keep_every = {kept} keeps",
            self.guide_step,
            level=self.level,
        )
        require(
            self.noise_gamma >= 0 or self.noise_gamma == -1,
            "levels.noise_gamma",
            ">= 0, or -1 for sampling.noise_gamma",
            self.noise_gamma,
            level=self.level,
        )
        require(self.num_evaluations >= 0, "levels.num_evaluations", ">= 0", self.num_evaluations, level=self.level)
        require(
            self.sampled_decay in (-1.0, *self.kept_decays),
            "levels.sampled_decay",
            f"-1, or the decay of one of the averages that training keeps, {self.kept_decays}",
            self.sampled_decay,
            level=self.level,
        )
        if self.level > 1:
            require(self.grid >= 1, "levels.grid", ">= 1", self.grid, level=self.level)
            require(self.channels >= 1, "levels.channels", ">= 1", self.channels, level=self.level)

    @property
    def kept_decays(self) -> tuple[float, ...]:
        """The weights that training leaves to choose from: as they are (0), and each average, by its decay."""
        return tuple(sorted({0.0, self.train.ema_decay, *self.train.more_ema_decays}))

    @property
    def decay(self) -> float:
        """Decay of the average of the weights that samples; 0 is the weights themselves."""
        return self.train.ema_decay if self.sampled_decay == -1 else self.sampled_decay


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
            require(getattr(self, name) >= 1, f"conditioning.text.{name}", ">= 1", getattr(self, name))
        require(bool(self.weights), "conditioning.text.weights", "a file, `hub:TAG` or `random`", self.weights)


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
