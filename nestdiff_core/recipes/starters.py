"""Small recipes: what the tests and the quickstart run, and starting points for your own images."""

from __future__ import annotations

from dataclasses import replace

from nestdiff_core.config import (
    DiffusionConfig,
    EncoderConfig,
    EvaluationConfig,
    ExperimentConfig,
    FeaturesConfig,
    ImagesConfig,
    LadderConfig,
    LevelConfig,
    MoCoConfig,
    SamplingConfig,
    SweepConfig,
    TrainConfig,
    UViTConfig,
    ViTConfig,
)


def toy() -> ExperimentConfig:
    """256 digits, an untrained encoder, two levels, 20 steps each: under a minute on a CPU. What the tests run."""
    model = UViTConfig(width=32, depth=2, num_heads=2)
    train = TrainConfig(
        num_steps=20,
        batch_size=32,
        lr=1e-3,
        warmup_steps=5,
        beta2=0.99,
        ema_decay=0.9,
        log_every=5,
        checkpoint_every=10,
    )
    return ExperimentConfig(
        name="toy",
        images=ImagesConfig(source="toy", resolution=8, channels=1, labels=True, images_per_shard=64),
        encoder=EncoderConfig(
            kind="moco",
            input_size=8,
            vit=ViTConfig(patch_size=2, width=16, depth=1, num_heads=2),
            moco=MoCoConfig(num_steps=0),
        ),
        features=FeaturesConfig(batch_size=64, chunk_rows=16),
        levels=(
            LevelConfig(level=1, patch_size=2, guidance=0.5, model=model, train=train),
            LevelConfig(level=2, grid=2, channels=4, condition_noise=0.5, model=model, train=train),
        ),
        sampling=SamplingConfig(num_evaluations=8, num_images=256, batch_size=64),
        evaluation=EvaluationConfig(extractors=("encoder", "pixels"), probe=True),
    )


def digits() -> ExperimentConfig:
    """The quickstart: scikit-learn's 1,797 handwritten digits at 8x8, three levels, minutes on two CPU cores."""
    model = UViTConfig(width=64, depth=4, num_heads=4, position_init="sincos", weight_init="xavier")
    train = TrainConfig(  # Muon and Xavier: confidence .92, with AdamW and N(0, .02) .83 (LOG.md, 2026-11-22)
        num_steps=1200,
        batch_size=128,
        optimizer="muon",
        lr=4e-3,
        lr_decay="cosine",
        beta2=0.99,
        warmup_steps=100,
        ema_decay=0.99,
        grad_clip=1.0,
        log_every=100,
        checkpoint_every=400,
    )
    return ExperimentConfig(
        name="digits",
        images=ImagesConfig(source="digits", resolution=8, channels=1, labels=True, images_per_shard=512),
        encoder=EncoderConfig(
            kind="moco",
            input_size=8,
            vit=ViTConfig(patch_size=2, width=64, depth=2, num_heads=4),
            moco=MoCoConfig(
                num_steps=450,
                batch_size=128,
                lr=2e-3,
                warmup_steps=40,
                momentum=0.96,
                projection_dim=64,
                hidden_dim=256,
                min_crop_scale=0.6,
                max_rotation_degrees=10.0,
                horizontal_flip=False,
                jitter=0.2,
                noise=0.1,
            ),
        ),
        levels=(
            LevelConfig(level=1, patch_size=2, guidance=0.5, model=model, train=train),
            LevelConfig(
                level=2,
                grid=2,
                channels=16,
                condition_noise=0.25,
                guidance=0.5,
                model=model,
                train=replace(train, num_steps=1400),
            ),
            LevelConfig(
                level=3, grid=1, channels=16, condition_noise=0.25, model=model, train=replace(train, num_steps=1600)
            ),
        ),
        sampling=SamplingConfig(num_evaluations=25, num_images=500),
        evaluation=EvaluationConfig(extractors=("encoder", "pixels"), probe=True),
        sweep=SweepConfig(
            guidance=(0.0, 0.5, 1.0),
            noise_gammas=(0.0, float("inf")),
            num_evaluations=(10, 25),
            decays=True,
        ),
    )


def images64() -> ExperimentConfig:
    """A starting point for your own images: 64x64 RGB, MoCo v3 on the images themselves, three levels, one GPU."""
    model = UViTConfig(width=512, depth=12, num_heads=8)
    train = TrainConfig(
        num_steps=100_000,
        batch_size=256,
        beta1=0.99,
        beta2=0.99,
        warmup_steps=2_500,
        precision="bfloat16",
        compile=True,
    )
    return ExperimentConfig(
        name="images64",
        images=ImagesConfig(source="folder", path="path/to/images", resolution=64, channels=3),
        encoder=EncoderConfig(kind="moco", input_size=64, vit=ViTConfig(patch_size=8, width=384, depth=8, num_heads=6)),
        levels=(
            LevelConfig(level=1, patch_size=4, guidance=0.8, model=model, train=train),
            LevelConfig(level=2, grid=4, channels=64, condition_noise=1.0, guidance=0.8, model=model, train=train),
            LevelConfig(level=3, grid=1, channels=256, condition_noise=0.5, model=model, train=train),
        ),
        sampling=SamplingConfig(num_images=10_000, noise_gamma=0.3),
        evaluation=EvaluationConfig(extractors=("encoder", "pixels")),
    )


def images64_small() -> ExperimentConfig:
    """A first look at your own images on a CPU: images64 with small networks and few steps, in minutes.

    It shows that the images, labels and levels work; the samples are colours and edges, no objects. Predicts x: a token
    of 8x8x3 pixels is wider than the network, which could not carry its noise. Muon and Xavier: in the encoder's
    space a Frechet distance of 2.4 on 10,000 photographs, with AdamW and N(0, .02) 7.9 (LOG.md, 2026-11-22).
    """
    full = images64()
    model = UViTConfig(width=128, depth=4, num_heads=4, position_init="sincos", weight_init="xavier")
    train = TrainConfig(
        num_steps=600,
        batch_size=64,
        optimizer="muon",
        lr=4e-3,
        lr_decay="cosine",
        beta2=0.99,
        warmup_steps=60,
        ema_decay=0.98,
        grad_clip=1.0,
        log_every=50,
        checkpoint_every=200,
    )
    return replace(
        full,
        name="images64_small",
        encoder=replace(
            full.encoder,
            vit=ViTConfig(patch_size=8, width=96, depth=3, num_heads=3),
            moco=MoCoConfig(num_steps=200, batch_size=64, lr=1e-3, warmup_steps=20, projection_dim=64, hidden_dim=256),
        ),
        levels=(
            replace(full.level(1), patch_size=8, model=model, train=train),
            replace(full.level(2), channels=32, model=model, train=train),
            replace(full.level(3), channels=32, model=model, train=train),
        ),
        diffusion=DiffusionConfig(prediction="x"),
        sampling=replace(full.sampling, num_images=100, num_evaluations=20, batch_size=50),
        ladder=LadderConfig(num_images=100),
    )
