"""Does depth pay? Arms that get the same training FLOPs, for each of a few sets of images (docs/results.md).

    l1        one network, no hierarchy
    l1_star   one network as large as the deepest system's together
    l2, l3    two and three levels, as the paper's first version has them: each level is told of the next one above, by
              fusion. The denoiser of level 1 is then the same in both, and is trained once.

An arm's levels share `Scale.tflops` of training, 6 x MACs x images, by SHARES. All arms train alike, with the
initialisation, target and learning rate that suit l1, and see images in the same order; the noise levels that suit its
pixels are for level 1 alone.

Each arm also comes sampled with guidance of a weight that a sweep chose: by what a level makes of its condition
(`_guided`, which l1 has not), and by its own average after about a quarter of its training (`_autoguided`); and l1 with
more contrast, since a judge may take contrast for quality. With `_class` every level is told the image's class as well,
which l1 can then be guided by. VARIANTS change one thing of l2 or l3: the noise on z_2 as a condition, what z_2 is made
of, one more level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from nestdiff_core.config import (
    AutoencoderConfig,
    ConditioningConfig,
    DiffusionConfig,
    EncoderConfig,
    EvaluationConfig,
    ExperimentConfig,
    ImagesConfig,
    JudgeConfig,
    LadderConfig,
    LevelConfig,
    MoCoConfig,
    SamplingConfig,
    SweepConfig,
    TrainConfig,
    UViTConfig,
    ViTConfig,
)

SHARES = {1: (1.0,), 2: (0.8, 0.2), 3: (0.8, 0.15, 0.05), 4: (0.8, 0.12, 0.05, 0.03)}  # from level 1 up
ABOVE = {1: (), 2: ((4, 16),), 3: ((4, 16), (1, 32)), 4: ((4, 16), (2, 24), (1, 32))}  # grid, channels of z_2, z_3 ..
VECTOR = ((1, 64),)  # z_2 as one vector, which RCG has; as long as the narrowest network can carry
VECTOR_SHARES = (0.95, 0.05)  # its network is as small as that of z_3
GUIDANCE = (0.0, 0.5, 1.0, 2.0, 4.0)  # the weights that a guided arm's sweep tries
CONTRAST = 1.2
NOISE = (0.0, 0.5, 1.0)  # on z_2 as a condition, beside the .25 of all other arms: the grid of the second version


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of each denoiser for an image, in millions (a test holds them to count_macs).

    one: without conditions. first: level 1, told of level 2. second, top_second: level 2, told of level 3 or of
    nothing. third: level 3, told of nothing. four, vector: of all levels of L = 4, and of L = 2 with one vector.
    """

    one: float
    star: float
    first: float
    second: float
    top_second: float
    third: float
    four: tuple[float, ...] = ()
    vector: tuple[float, ...] = ()

    def of(self, depth: int, star: bool, vector: bool) -> tuple[float, ...]:
        """From level 1 up."""
        if vector:
            return self.vector
        one = (self.star if star else self.one,)
        two, three = (self.first, self.top_second), (self.first, self.second, self.third)
        return {1: one, 2: two, 3: three, 4: self.four}[depth]


@dataclass(frozen=True)
class Scale:
    """What one table is measured at; numbers of two scales are never compared.

    encoder_size: side in pixels at which SqueezeNet sees an image. judge_size, judge_epochs: the same of the classifier
    that judges, and how long it is trained; moco_epochs: how long the other judge is, and the encoder of l2_moco;
    num_train: images that both learn from. tflops: training of an arm. batch_above: of the levels above 1, whose images
    are fewer tokens.
    """

    name: str
    images: str  # where a recipe looks for them
    resolution: int
    num_classes: int
    encoder_size: int
    judge_size: int
    judge_epochs: int
    moco_epochs: int
    num_train: int
    patch_size: int
    one: UViTConfig
    star: UViTConfig
    above: UViTConfig
    tflops: float
    macs: Macs
    class_macs: Macs  # of denoisers that are told the class
    train: TrainConfig
    batch_above: int
    autoencoder: AutoencoderConfig

    def train_of(self, level: int, macs: float, share: float) -> TrainConfig:
        """As many steps as cost `share` of an arm's FLOPs."""
        train = self.train if level == 1 else replace(self.train, batch_size=self.batch_above, noise_levels=())
        steps = round(share * self.tflops * 1e6 / (6.0 * macs * train.batch_size))
        kept = train.keep_every if steps >= 2 * train.keep_every else train.keep_every // 2  # for a guide's sake
        return replace(train, num_steps=steps, keep_every=kept, checkpoint_every=kept)


def _model(width: int, depth: int, num_heads: int) -> UViTConfig:
    return UViTConfig(
        width=width,
        depth=depth,
        num_heads=num_heads,
        final_conv=False,  # its random start is a matter of luck that a short training does not outlive (LOG.md)
        position_init="sincos",
        weight_init="xavier",
    )


_TRAIN = TrainConfig(
    batch_size=32,
    optimizer="muon",
    lr=6e-3,
    noise_levels=(0.7, 1.4),
    lr_decay="cosine",
    beta2=0.99,
    warmup_steps=200,
    ema_decay=0.999,
    ema_warmup=True,
    grad_clip=1.0,
    precision="bfloat16",
    log_every=50,
    checkpoint_every=500,
    keep_every=500,
)
PIXELS = AutoencoderConfig()

# Hours on two CPU cores with matrix units (AMX): 64 tokens of 2x2 pixels. Steps are few: what learns most from a few
# thousand of them was searched on l1, and so small a network learns more from 100 TFLOP than larger ones
# (LOG.md, 2026-11-22).
CIFAR10_16PX = Scale(
    name="cifar10_16px",
    images="data/cifar10",
    resolution=16,
    num_classes=10,
    encoder_size=80,
    judge_size=32,
    judge_epochs=8,
    moco_epochs=12,
    num_train=50_000,
    patch_size=2,
    one=_model(64, 6, 2),
    star=_model(80, 6, 2),
    above=_model(64, 4, 2),
    tflops=100.0,
    macs=Macs(
        one=27.846,
        star=42.295,
        first=35.349,
        second=6.4109,
        top_second=4.6742,
        third=0.53094,
        four=(35.349, 6.4334, 1.7404, 0.53094),
        vector=(36.599, 0.53504),
    ),
    class_macs=Macs(one=28.332, star=43.018, first=35.934, second=6.7610, top_second=4.9587, third=0.79629),
    train=_TRAIN,
    batch_above=128,
    autoencoder=PIXELS,
)
# One large GPU: 256 tokens of 2x2 pixels, 29 of them seen for each weight of l1 (at 16 px 101, and 7 with the networks
# that turned out too large). Its rate has not been searched.
CIFAR10_32PX = Scale(
    name="cifar10_32px",
    images="data/cifar10",
    resolution=32,
    num_classes=10,
    encoder_size=80,
    judge_size=64,
    judge_epochs=30,
    moco_epochs=100,
    num_train=50_000,
    patch_size=2,
    one=_model(256, 12, 4),
    star=_model(304, 12, 4),
    above=_model(256, 12, 4),
    tflops=25_000.0,
    macs=Macs(
        one=3270.8,
        star=4514.1,
        first=4231.3,
        second=252.27,
        top_second=189.23,
        third=22.063,
        four=(4231.3, 252.36, 72.076, 22.063),
        vector=(4230.2, 22.079),
    ),
    class_macs=Macs(one=3285.2, star=4533.7, first=4248.9, second=266.66, top_second=200.47, third=33.106),
    train=replace(_TRAIN, batch_size=128, lr=3e-3, compile=True),
    batch_above=256,
    autoencoder=PIXELS,
)
# Hours on two CPU cores: 64 tokens of an autoencoder's code, which leaves the finest detail to its decoder, and 10,000
# images, which are seen sixteen times. Its networks are those that were too large for CIFAR-10 (docs/results.md).
TINYIMAGENET20 = replace(
    CIFAR10_16PX,
    name="tinyimagenet20",
    images="data/tinyimagenet20",
    resolution=64,
    num_classes=20,
    encoder_size=144,
    judge_size=64,
    judge_epochs=15,
    moco_epochs=30,
    num_train=10_000,
    patch_size=1,
    one=_model(128, 6, 4),
    star=_model(160, 6, 4),
    above=_model(128, 4, 4),
    macs=Macs(
        one=103.942,
        star=159.879,
        first=133.826,
        second=25.143,
        top_second=18.261,
        third=2.1105,
        four=(133.826, 25.187, 6.8887, 2.1105),
        vector=(138.946, 2.1187),
    ),
    class_macs=Macs(one=105.651, star=162.477, first=135.929, second=26.498, top_second=19.355, third=3.1654),
    train=replace(_TRAIN, noise_levels=()),  # no better at any N(mean, 1.4) of three (LOG.md)
    autoencoder=AutoencoderConfig(kind="taef2", weights="data/taef2"),
)
SCALES = {scale.name: scale for scale in (CIFAR10_16PX, CIFAR10_32PX, TINYIMAGENET20)}


def arm(
    scale: Scale,
    depth: int,
    *,
    star: bool = False,
    guide: Literal["none", "null", "own"] = "none",
    classes: bool = False,
    contrast: float = 1.0,
    noise: float = 0.25,
    vector: bool = False,
    encoder: EncoderConfig | None = None,
) -> ExperimentConfig:
    """One arm of the table; see the module's docstring. star: the enlarged network of depth 1. guide: what guidance
    contrasts with: nothing, the level told nothing, or its own early average. noise: on z_2 as a condition. encoder:
    what the levels above 1 are made of."""
    macs = (scale.class_macs if classes else scale.macs).of(depth, star, vector)
    levels = _levels(scale, macs, VECTOR if vector else ABOVE[depth], star, noise)
    if guide == "own":
        levels = tuple(replace(level, guide_step=_quarter(level.train)) for level in levels)
    guided = guide != "none"
    return ExperimentConfig(
        images=ImagesConfig(source="webdataset", path=scale.images, resolution=scale.resolution, labels=True),
        autoencoder=scale.autoencoder,
        encoder=encoder or squeezenet(scale),
        levels=levels,
        conditioning=ConditioningConfig(levels="markov", injection="fusion", labels="class" if classes else "none"),
        diffusion=DiffusionConfig(prediction="v"),
        sampling=SamplingConfig(
            num_evaluations=25,
            terminal_step=True,
            num_images=10_000,
            contrast=contrast,
            precision="bfloat16",
            without_conditions=False,
            chosen_by="sweep" if guided else "config",
        ),
        evaluation=EvaluationConfig(
            extractors=("pixels",),
            judges=judges(f"data/judges_{scale.name}", scale),
            reference="held_out",
            resamples=100,
        ),
        sweep=SweepConfig(guidance=GUIDANCE if guided else (), num_images=1_000, short_list=4, metric="fd_classifier"),
        ladder=LadderConfig(num_images=2_000),
    )


def judges(folder: str, scale: Scale) -> tuple[JudgeConfig, ...]:
    """Networks that no arm was trained on or conditioned on, as scripts/judges.py makes them in `folder`."""
    classifier = EncoderConfig(
        kind="torchvision",
        name="resnet18",
        layer="layer4",
        input_size=scale.judge_size,
        weights=f"{folder}/classifier.safetensors",
    )
    return (
        JudgeConfig(name="classifier", num_classes=scale.num_classes, encoder=classifier, unit_length=True),
        JudgeConfig(name="moco", encoder=EncoderConfig(kind="moco", weights=f"{folder}/moco")),
    )


def squeezenet(scale: Scale, weights: str = "hub") -> EncoderConfig:
    return EncoderConfig(kind="torchvision", name="squeezenet1_0", weights=weights, input_size=scale.encoder_size)


def small_moco(resolution: int, *, num_steps: int, flip: bool, seed: int) -> EncoderConfig:
    """MoCo v3 of a ViT of 16 tokens: one CPU core learns from about 250 images a second. flip: mirror images."""
    return EncoderConfig(
        kind="moco",
        input_size=resolution,
        vit=ViTConfig(patch_size=max(1, resolution // 4), width=128, depth=4, num_heads=4),
        moco=MoCoConfig(
            num_steps=num_steps,
            lr=1.5e-3,
            warmup_steps=max(1, num_steps // 10),
            projection_dim=128,
            hidden_dim=512,
            min_crop_scale=0.3,
            horizontal_flip=flip,
            seed=seed,
        ),
    )


def _moco(scale: Scale) -> EncoderConfig:
    """As the judge of that name, of another seed: l2_moco is judged by the classifier alone."""
    num_steps = -(-scale.moco_epochs * scale.num_train // MoCoConfig.batch_size)
    return small_moco(scale.resolution, num_steps=num_steps, flip=True, seed=0)


def _code(scale: Scale) -> EncoderConfig:
    """z_1 itself, the paper's control, folded to the grid of z_2."""
    _, side, _ = scale.autoencoder.latent_shape(3, scale.resolution)
    (grid, _), *_ = ABOVE[2]
    return EncoderConfig(kind="autoencoder", fold=side // grid)


def _levels(
    scale: Scale, macs: tuple[float, ...], above: tuple[tuple[int, int], ...], star: bool, noise: float
) -> tuple[LevelConfig, ...]:
    """macs: of each level. above: grid and channels of the levels from 2 up. noise: on z_2 as a condition."""
    plain = [LevelConfig(level=1, patch_size=scale.patch_size, model=scale.star if star else scale.one)]
    for level, (grid, channels) in enumerate(above, start=2):
        noised = noise if level == 2 else 0.25
        plain.append(LevelConfig(level=level, grid=grid, channels=channels, condition_noise=noised, model=scale.above))
    shares = VECTOR_SHARES if above == VECTOR else SHARES[len(plain)]
    return tuple(
        replace(level, train=scale.train_of(level.level, count, share))
        for level, count, share in zip(plain, macs, shares, strict=True)
    )


def _quarter(train: TrainConfig) -> int:
    """The kept step that is nearest to a quarter of the training."""
    return max(1, round(train.num_steps / 4 / train.keep_every)) * train.keep_every


ARMS: dict[str, Callable[[Scale], ExperimentConfig]] = {
    "l1": partial(arm, depth=1),
    "l1_contrast": partial(arm, depth=1, contrast=CONTRAST),
    "l1_autoguided": partial(arm, depth=1, guide="own"),
    "l1_star": partial(arm, depth=1, star=True),
    "l1_star_autoguided": partial(arm, depth=1, star=True, guide="own"),
    "l2": partial(arm, depth=2),
    "l2_guided": partial(arm, depth=2, guide="null"),
    "l2_autoguided": partial(arm, depth=2, guide="own"),
    "l3": partial(arm, depth=3),
    "l3_guided": partial(arm, depth=3, guide="null"),
    "l3_autoguided": partial(arm, depth=3, guide="own"),
}
CLASS_ARMS: dict[str, Callable[[Scale], ExperimentConfig]] = {
    f"l{depth}_class{ending}": make
    for depth in (1, 2, 3)
    for ending, make in (
        ("", partial(arm, depth=depth, classes=True)),
        ("_guided", partial(arm, depth=depth, classes=True, guide="null")),
    )
}
VARIANTS: dict[str, Callable[[Scale], ExperimentConfig]] = {
    **{f"l2_noise{round(100 * sigma)}": partial(arm, depth=2, noise=sigma) for sigma in NOISE},
    "l2_vector": partial(arm, depth=2, vector=True),
    "l2_moco": lambda scale: arm(scale, 2, encoder=_moco(scale)),
    "l2_untrained": lambda scale: arm(scale, 2, encoder=squeezenet(scale, "random")),
    "l2_code": lambda scale: arm(scale, 2, encoder=_code(scale)),
    "l4": partial(arm, depth=4),
}
EVERY = ARMS | CLASS_ARMS | VARIANTS


def _recipe(name: str, make: Callable[[Scale], ExperimentConfig], scale: Scale) -> ExperimentConfig:
    return replace(make(scale), name=name)


RECIPES = {
    (name := f"{scale.name}_{short}"): partial(_recipe, name, make, scale)
    for scale in SCALES.values()
    for short, make in EVERY.items()
}
