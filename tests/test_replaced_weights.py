"""Files of weights that are replaced where they lie: nothing of the old ones passes for made with the new."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from nestdiff_core import loading, stages
from nestdiff_core.autoencoders import make_autoencoder
from nestdiff_core.config import AutoencoderConfig, ExperimentConfig
from nestdiff_core.evaluation.samples import load_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.models.nested import build_denoiser
from nestdiff_core.recipes import toy


def flat(config: ExperimentConfig, **train: object) -> ExperimentConfig:
    """Level 1 alone, a few steps of it."""
    level = replace(config.level(1), guidance=0.0, train=replace(config.level(1).train, num_steps=3, **train))
    return replace(
        config,
        levels=(level,),
        ladder=replace(config.ladder, num_images=4),
        sampling=replace(config.sampling, num_images=8),
    )


def change(file: Path) -> None:
    save_file({name: 1.3 * value for name, value in load_file(file).items()}, file)


def decoded(tmp_path: Path) -> tuple[Experiment, Path]:
    """An experiment on the codes of an autoencoder, and the file of its decoder."""
    folder = tmp_path / "taef2"
    folder.mkdir()
    network = make_autoencoder(AutoencoderConfig(kind="taef2", weights="random")).network
    for part in ("encoder", "decoder"):
        save_file(network[part].state_dict(), folder / f"taef2_{part}.safetensors")
    config = flat(replace(toy(), images=replace(toy().images, resolution=16)))
    config = replace(
        config,
        autoencoder=AutoencoderConfig(kind="taef2", weights=str(folder), channels=1),
        levels=(replace(config.level(1), patch_size=1),),
        evaluation=replace(config.evaluation, extractors=("pixels",), probe=False),
    )
    return Experiment(config, tmp_path / "artifacts"), folder / "taef2_decoder.safetensors"


def test_another_decoder_makes_other_pictures_of_the_same_latents(tmp_path: Path) -> None:
    """It may share its encoder, so that z_1 and the denoiser stay what they are."""
    x, decoder = decoded(tmp_path)
    make: tuple[Callable[[Experiment], object], ...] = (
        *(stages.images, stages.latents, lambda x: stages.train(x, 1), stages.reference),
        *(stages.samples, stages.ladder, stages.pictures),
    )
    seen = []
    for _ in range(2):
        for stage in make:
            stage(x)
        seen.append({ref: x.artifact(ref).digest for ref in map(Ref, ("samples", "ladder", "pictures"))})
        now = loading.decode(x, loading.generate(x, range(8), seed=x.config.sampling.seed)[1])
        np.testing.assert_array_equal(load_samples(x.artifact(Ref("samples")).path / "samples.npz"), now)
        trained = x.artifact(Ref("denoiser", 1)).digest
        change(decoder)
    assert not set(seen[0].values()) & set(seen[1].values())
    assert x.artifact(Ref("denoiser", 1)).digest == trained


@pytest.mark.parametrize("replaced", [False, True])
def test_samples_go_on_from_where_they_were_stopped_unless_the_decoder_is_another(
    replaced: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x, decoder = decoded(tmp_path)
    x = Experiment(replace(x.config, sampling=replace(x.config.sampling, num_images=100, batch_size=50)), x.root)
    before: tuple[Callable[[Experiment], object], ...] = stages.images, stages.latents, lambda x: stages.train(x, 1)
    for stage in before:
        stage(x)

    def stop(done: int, *_: object, **__: object) -> None:
        if done == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.samples(x, progress=stop)
    if replaced:
        change(decoder)
        for stage in before:  # the codes are checked against the weights: made again, they are what they were
            stage(x)
    done_by: list[int] = []
    stages.samples(x, progress=lambda done, *_, **__: done_by.append(done))
    now = loading.decode(x, loading.generate(x, range(100), seed=x.config.sampling.seed)[1])
    np.testing.assert_array_equal(load_samples(x.artifact(Ref("samples")).path / "samples.npz"), now)
    assert done_by[0] == (50 if replaced else 100)  # after one part of this run
    assert ("begins anew" in caplog.text) == replaced


def test_a_denoiser_that_was_started_from_other_weights_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is kept: a training is not thrown away because a file has changed."""
    file, x = tmp_path / "start.safetensors", Experiment(flat(toy()), tmp_path)
    save_file(build_denoiser(x.config, 1, 0).state_dict(), file)
    x = Experiment(flat(toy(), start_from=str(file)), tmp_path)
    stages.images(x), stages.latents(x)
    made = stages.train(x, 1)
    assert stages.train(x, 1) is not None and "start_from" not in caplog.text
    content = file.read_bytes()
    file.unlink()
    stages.train(x, 1)
    assert "start_from" not in caplog.text  # it is not needed any more
    file.write_bytes(content)
    change(file)
    again = stages.train(x, 1)
    assert made is not None and again is not None and again.digest == made.digest
    assert "started from other weights than levels.train.start_from now holds" in caplog.text
