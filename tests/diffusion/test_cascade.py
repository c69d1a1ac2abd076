"""Sampling the hierarchy."""

import dataclasses
import math

import pytest
import torch

from nestdiff_core.config import (
    ConditioningConfig,
    DiffusionConfig,
    ExperimentConfig,
    ImagesConfig,
    LevelConfig,
    SamplingConfig,
    UViTConfig,
)
from nestdiff_core.diffusion import make_schedule, sample_cascade
from nestdiff_core.errors import ConfigError, NumericsError
from nestdiff_core.models import build_denoiser

MODEL = UViTConfig(width=16, depth=2, num_heads=2)
SHAPES = {1: (1, 8, 8), 2: (3, 2, 2), 3: (5, 1, 1)}


def experiment(*, noise=0.0, guidance=0.0, labels="none", prediction="x", **sampling):
    """Three levels of `SHAPES`; every level above carries the same condition noise."""
    levels = [LevelConfig(level=1, patch_size=2, guidance=guidance, model=MODEL)]
    for m in (2, 3):
        channels, grid, _ = SHAPES[m]
        levels.append(
            LevelConfig(level=m, grid=grid, channels=channels, condition_noise=noise, guidance=guidance, model=MODEL)
        )
    return ExperimentConfig(
        images=ImagesConfig(source="digits", resolution=8, channels=1, labels=True),
        levels=tuple(levels),
        conditioning=ConditioningConfig(labels=labels),
        diffusion=DiffusionConfig(prediction=prediction),
        sampling=SamplingConfig(**({"num_evaluations": 4, "batch_size": 4} | sampling)),
    )


def networks(config, num_classes=0):
    return {
        m: build_denoiser(config, m, num_classes, generator=torch.Generator().manual_seed(m)).eval() for m in SHAPES
    }


class Seen:
    """A denoiser that predicts zero and remembers what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, z_t, t, z_above, labels=None, drop=None):
        self.calls.append({"z_t": z_t, "t": t[0].item(), "z_above": z_above, "labels": labels, "drop": drop})
        return torch.zeros_like(z_t)


def given(config, count, *levels):
    return {m: torch.randn(count, *config.latent_shape(m), generator=torch.Generator().manual_seed(m)) for m in levels}


# --- the law of what is sampled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "v", "x"])
def test_optimal_denoisers_sample_the_joint_law(prediction):
    """With closed-form denoisers of a linear-Gaussian hierarchy, the cascade has its variances and covariances.

    z_3 ~ N(0, 1), z_2 = .8 z_3 + .6 n, z_1 = .5 mean(z_2) - .4 z_3 + .3 n, with the first channels of z_2 and z_3.
    """
    config = experiment(prediction=prediction, num_evaluations=20, batch_size=2000, noise_gamma=math.inf, noise=0.5)
    schedule = make_schedule(config.diffusion)

    def mean_1(z_above):
        return 0.5 * z_above[2][:, :1].mean((2, 3), keepdim=True) - 0.4 * z_above[3][:, :1]

    means = {
        1: (mean_1, 0.3),
        2: (lambda z_above: 0.8 * z_above[3][:, :1], 0.6),
        3: (lambda z_above: torch.zeros(1, 1, 1, 1), 1.0),
    }

    def denoiser(level):
        mean_of, s = means[level]

        def model(z_t, t, z_above, labels=None, drop=None):
            alpha, sigma = (f(t).float().view(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
            mu = mean_of(z_above)
            x = mu + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (z_t - alpha * mu)
            eps = (z_t - alpha * x) / sigma
            return {"x": x, "eps": eps, "v": alpha * eps - sigma * x}[prediction]

        return model

    z = sample_cascade({m: denoiser(m) for m in SHAPES}, config, image_indices=range(6000), seed=0)
    z_3, z_2, z_1 = z[3][:, 0].flatten(), z[2][:, 0, 0, 0], z[1][:, 0, 0, 0]
    mean_2 = z[2][:, 0].mean((1, 2))
    tolerance = 6 / 6000**0.5
    assert z_3.var() == pytest.approx(1.0, abs=tolerance)
    assert z_2.var() == pytest.approx(1.0, abs=tolerance)
    assert (z_2 * z_3).mean() == pytest.approx(0.8, abs=tolerance)
    rest = z_1 - (0.5 * mean_2 - 0.4 * z_3)  # what z_1 adds to its mean given the levels above
    assert rest.var() == pytest.approx(0.3**2, abs=tolerance * 0.3**2 * 1.5)
    assert abs((rest * z_3).mean()) < tolerance
    assert abs((rest * z_2).mean()) < tolerance
    assert abs(rest.mean()) < tolerance


@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0])
def test_condition_noise_has_its_variance(gamma):
    """A condition is z_m + N(0, t^gamma sigma_m^2), drawn anew at each call and for each image."""
    config = experiment(noise=0.5, noise_gamma=gamma, num_evaluations=3, batch_size=2000)
    z, seen = given(config, 2000, 3, 2), Seen()
    sample_cascade({1: seen}, config, image_indices=range(2000), seed=0, given=z)
    noise = []
    for call in seen.calls:
        noise.append(torch.cat([(call["z_above"][m] - z[m]).flatten(1) for m in (3, 2)], dim=1))
        assert noise[-1].std() == pytest.approx(0.5 * call["t"] ** (gamma / 2), rel=0.03)
    assert abs(torch.corrcoef(torch.stack([n.flatten() for n in noise]))).fill_diagonal_(0).max() < 0.04
    assert abs(torch.corrcoef(noise[0].T)).fill_diagonal_(0).max() < 0.12


def test_infinite_gamma_means_clean_conditions():
    """gamma = inf: conditions are the latents above themselves, at every call, t = 1 included."""
    config = experiment(noise=0.5, noise_gamma=math.inf)
    z, seen = given(config, 4, 3, 2), Seen()
    sample_cascade({1: seen}, config, image_indices=range(4), seed=0, given=z)
    assert seen.calls[0]["t"] == 1
    assert all(torch.equal(call["z_above"][m], z[m]) for call in seen.calls for m in (2, 3))


def test_starting_noise_is_standard_normal():
    """The first z_T of a level is N(0, 1), independent between images, numbers and levels."""
    config = experiment(batch_size=2000, num_evaluations=1)
    seen = {m: Seen() for m in SHAPES}
    sample_cascade(seen, config, image_indices=range(2000), seed=0)
    z_T = torch.cat([seen[m].calls[0]["z_t"].flatten(1) for m in SHAPES], dim=1)
    assert z_T.mean() == pytest.approx(0, abs=0.015)
    assert z_T.std() == pytest.approx(1, abs=0.015)
    assert abs(torch.corrcoef(z_T.T)).fill_diagonal_(0).max() < 0.13  # 6 / sqrt(2000)


# --- an image is decided by (seed, index) -------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 0.7])
def test_requests_may_be_split_and_reordered(guidance):
    """Any part of the images, in any order, gives the same bits as one request for all of them."""
    config = experiment(guidance=guidance, noise=0.5, prediction="eps")
    denoisers = networks(config)
    whole = sample_cascade(denoisers, config, image_indices=range(11), seed=3)
    for part in ([10, 2, 7], range(5), range(5, 11), [6]):
        some = sample_cascade(denoisers, config, image_indices=part, seed=3)
        assert all(torch.equal(some[m], whole[m][list(part)]) for m in SHAPES)


def test_batch_size_does_not_change_an_image():
    """Another batch size leaves the images as they are, up to rounding."""
    config = experiment(guidance=0.7, noise=0.5, prediction="v")
    larger = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, batch_size=7))
    denoisers = networks(config)
    a, b = (sample_cascade(denoisers, c, image_indices=range(9), seed=3) for c in (config, larger))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_images_and_seeds_differ():
    """No two images of a run and no two seeds share their noise."""
    config = experiment()
    a, b = (sample_cascade(networks(config), config, image_indices=range(6), seed=seed) for seed in (0, 1))
    for m in SHAPES:
        assert len(torch.cat([a[m], b[m]]).flatten(1).unique(dim=0)) == 12


def test_shapes_never_change():
    """Every call of a denoiser sees a full batch, however few images are asked for."""
    config, seen = experiment(), {m: Seen() for m in SHAPES}
    sample_cascade(seen, config, image_indices=[1, 9, 10], seed=0)
    assert {len(call["z_t"]) for m in SHAPES for call in seen[m].calls} == {4}
    assert len(seen[1].calls) == 2 * 4  # images 1 and (9, 10), 4 evaluations each


# --- what conditions what -----------------------------------------------------------------------------------------


def test_given_latents_replace_generated_ones():
    """The oracle: given levels come back as they are, in the order of the request, and condition the rest."""
    config, seen = experiment(noise_gamma=math.inf), {1: Seen(), 2: Seen()}
    indices, z = [6, 1, 4], given(experiment(), 3, 3)
    result = sample_cascade(seen, config, image_indices=indices, seed=0, given=z)
    assert torch.equal(result[3], z[3])
    first, second = (seen[2].calls[i]["z_above"][3] for i in (0, 4))  # the batches of images 4..7 and 0..3
    assert torch.equal(first[[2, 0]], z[3][[0, 2]])
    assert torch.equal(second[1], z[3][1])


def test_generated_latents_condition_the_levels_below():
    """Level 1 reads exactly the z_3 and z_2 that the cascade returns."""
    config = experiment(prediction="eps")
    denoisers, seen = networks(config), Seen()
    z = sample_cascade(denoisers | {1: seen}, config, image_indices=range(4), seed=0)
    assert all(torch.equal(seen.calls[0]["z_above"][m], z[m]) for m in (2, 3))


def test_markov_levels_read_one_level():
    """With markov conditioning, level 1 gets z_2 only."""
    config = dataclasses.replace(experiment(), conditioning=ConditioningConfig(levels="markov"))
    seen = {m: Seen() for m in SHAPES}
    sample_cascade(seen, config, image_indices=range(4), seed=0)
    assert [set(seen[m].calls[0]["z_above"]) for m in (3, 2, 1)] == [set(), {3}, {2}]


def test_null_conditions_hide_everything_above():
    """Without conditions, level 1 is the same whatever stands above it, and is not guided."""
    config = experiment(guidance=0.7, noise=0.5, prediction="eps")
    denoisers, z = networks(config), given(experiment(), 4, 3, 2)
    request = {"image_indices": range(4), "seed": 0}
    a = sample_cascade(denoisers, config, **request, given=z, null_conditions=True)
    b = sample_cascade(denoisers, config, **request, given={m: -z_m for m, z_m in z.items()}, null_conditions=True)
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[1], sample_cascade(denoisers, config, **request, given=z)[1])
    seen = Seen()
    sample_cascade({1: seen}, config, **request, given=z, null_conditions=True)
    assert all(len(call["z_t"]) == 4 and call["drop"].all() for call in seen.calls)


def test_guidance_doubles_the_batch_below_the_top():
    """Each level's own w decides; the top level of an unconditional model has nothing to guide."""
    config, seen = experiment(guidance=0.7), {m: Seen() for m in SHAPES}
    sample_cascade(seen, config, image_indices=range(4), seed=0)
    assert [len(seen[m].calls[0]["z_t"]) for m in (3, 2, 1)] == [4, 8, 8]


def test_labels_follow_their_images():
    """Each image is sampled with its own label, whatever the request's order."""
    config = experiment(labels="class")

    def model(z_t, t, z_above, labels=None, drop=None):
        return labels.float().view(-1, 1, 1, 1).expand_as(z_t)

    labels = torch.tensor([5, 0, 9, 2])
    z = sample_cascade(dict.fromkeys(SHAPES, model), config, image_indices=[7, 2, 3, 9], seed=0, labels=labels)
    torch.testing.assert_close(z[1], labels.float().view(-1, 1, 1, 1).expand_as(z[1]))


# --- reports and refusals -----------------------------------------------------------------------------------------


def test_progress_counts_images():
    """The listener hears of every finished batch, up to the number of images."""
    heard = []
    config = experiment()
    sample_cascade(
        networks(config),
        config,
        image_indices=range(6),
        seed=0,
        progress=lambda done, total, what: heard.append((done, total)),
    )
    assert heard == [(4, 6), (6, 6)]


def test_a_latent_that_is_not_finite_is_named():
    """The refusal names the level and the image."""
    config = experiment()

    def broken(z_t, t, z_above, labels=None, drop=None):
        return torch.where(torch.arange(len(z_t)).view(-1, 1, 1, 1) == 2, math.nan, z_t)

    with pytest.raises(NumericsError) as refusal:
        sample_cascade(networks(config) | {2: broken}, config, image_indices=[4, 5, 6, 7], seed=0)
    assert (refusal.value.level, refusal.value.key) == (2, "image 6")


@pytest.mark.parametrize(
    ("request_", "key"),
    [
        ({"image_indices": [1, 1]}, "image_indices"),
        ({"image_indices": [-1]}, "image_indices"),
        ({"given": {2: torch.zeros(2, 3, 2, 2)}}, "given"),
        ({"given": {3: torch.zeros(3, 5, 1, 1)}}, "given"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, "labels"),
        ({"denoisers": {1: Seen(), 3: Seen()}}, "denoisers"),
    ],
)
def test_contradicting_requests_are_refused(request_, key):
    """Before anything is sampled, the refusal names what contradicts the experiment."""
    arguments = {"denoisers": {m: Seen() for m in SHAPES}, "image_indices": range(2), "seed": 0} | request_
    with pytest.raises(ConfigError) as refusal:
        sample_cascade(config=experiment(), **arguments)
    assert refusal.value.key == key
