"""Controls of guidance: a level's own earlier weights as its guide, and images with more contrast."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nestdiff_core import loading
from nestdiff_core.config import ExperimentConfig
from nestdiff_core.diffusion import sample_cascade
from nestdiff_core.errors import ConfigError, IntegrityError
from nestdiff_core.evaluation.card import SampleOrigin
from nestdiff_core.evaluation.samples import with_contrast
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.models.nested import build_denoiser
from nestdiff_core.recipes import toy


def guided_by(step: int, w: float = 2.0) -> ExperimentConfig:
    """The toy experiment whose top level, which is told nothing, is guided by its own weights of a step."""
    config = toy()
    top = config.level(2)
    top = replace(top, guidance=w, guide_step=step, train=replace(top.train, keep_every=10))
    return replace(config, levels=(config.level(1), top))


def test_a_level_without_conditions_is_guided_by_its_own_checkpoint(toy_run: Any) -> None:
    """The same denoiser serves: what guides is read from its checkpoint, and decides the samples."""
    config, x = guided_by(10), Experiment(guided_by(10), toy_run.root)
    found = loading.Cascade(x, levels=[2]).latents(range(5), seed=0, lowest=2)[2]
    guide = build_denoiser(config, 2, 0).eval()
    weights = x.artifact(Ref("denoiser", 2)).path / "checkpoints" / "step_00000010" / "ema.safetensors"
    guide.load_state_dict(load_file(weights))
    main = {2: loading.open_denoiser(x, 2)}
    by_hand = sample_cascade(main, config, image_indices=range(5), seed=0, guides={2: guide}, lowest=2)[2]
    unguided = sample_cascade(main, toy(), image_indices=range(5), seed=0, lowest=2)[2]
    assert torch.equal(found, by_hand)
    assert not torch.allclose(found, unguided)
    off = Experiment(guided_by(10, w=0.0), toy_run.root)
    assert torch.equal(loading.Cascade(off, levels=[2]).latents(range(5), seed=0, lowest=2)[2], unguided)
    with pytest.raises(ConfigError, match="guides"):
        sample_cascade(main, config, image_indices=range(5), seed=0, lowest=2)


def test_samples_know_their_guide(toy_run: Any) -> None:
    """Other samples, the same denoisers; the card says which step guided, and leaves those without one as they were."""
    plain, x = Experiment(toy(), toy_run.root), Experiment(guided_by(10), toy_run.root)
    assert x.path(Ref("samples")) != plain.path(Ref("samples"))
    assert all(x.path(Ref("denoiser", level)) == plain.path(Ref("denoiser", level)) for level in (1, 2))
    assert SampleOrigin.of(x.config, {}).guide_step == {2: 10}
    assert SampleOrigin.of(plain.config, {}).guide_step == {}


def test_a_guide_that_is_gone_or_damaged_is_refused(toy_run: Any, tmp_path: Path) -> None:
    shutil.copytree(toy_run.root, tmp_path / "artifacts")
    x = Experiment(guided_by(10), tmp_path / "artifacts")
    checkpoint = x.path(Ref("denoiser", 2)) / "checkpoints" / "step_00000010"
    damaged = bytearray((checkpoint / "ema.safetensors").read_bytes())
    damaged[-1] ^= 1
    (checkpoint / "ema.safetensors").write_bytes(damaged)
    with pytest.raises(IntegrityError, match=r"ema\.safetensors"):
        loading.Cascade(x).guides()
    shutil.rmtree(checkpoint)
    with pytest.raises(IntegrityError, match="step 10"):
        loading.Cascade(x).guides()


@pytest.mark.parametrize("step", [5, 20, -10])
def test_a_step_that_training_does_not_keep_is_refused(step: int) -> None:
    """It keeps every tenth, before the last one (20)."""
    with pytest.raises(ConfigError, match="guide_step"):
        guided_by(step)


def test_contrast_multiplies_what_differs_from_an_images_mean() -> None:
    images = torch.rand(3, 3, 4, 4) - 0.5
    more = with_contrast(images, 1.2)
    torch.testing.assert_close(more.mean((1, 2, 3)), images.mean((1, 2, 3)))
    torch.testing.assert_close(more.std((1, 2, 3)), 1.2 * images.std((1, 2, 3)))
    assert with_contrast(images, 1.0) is images


def test_samples_with_more_contrast_are_other_samples_of_the_same_latents(toy_run: Any) -> None:
    plain = Experiment(toy(), toy_run.root)
    sharper = Experiment(replace(toy(), sampling=replace(toy().sampling, contrast=1.5)), toy_run.root)
    assert sharper.path(Ref("samples")) != plain.path(Ref("samples"))
    z_1 = torch.rand(4, 1, 8, 8) - 0.5
    images = [loading.Cascade(x, levels=[]).images(range(4), z_1).astype(float) for x in (plain, sharper)]
    mean = images[0].mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(images[1] - mean, 1.5 * (images[0] - mean), atol=2.0)
