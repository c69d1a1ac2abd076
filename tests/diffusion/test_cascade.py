"""Sampling the hierarchy."""

import dataclasses
import math

import pytest
import torch
from cascades import SAMPLERS, SHAPES, Seen, every_sampler, experiment, given, networks

from nestdiff_core.config import ConditioningConfig
from nestdiff_core.diffusion import (
    make_schedule,
    sample_cascade,
    sample_ddim,
    sample_dpm_solver,
    sample_dpm_solver_pp,
    time_grid,
    to_z_hat,
)

# --- the law of what is sampled -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "prediction", "num_evaluations"),
    [
        ("dpm_solver_pp", "eps", 20),
        ("dpm_solver_pp", "v", 20),
        ("dpm_solver_pp", "x", 20),
        ("dpm_solver", "eps", 20),
        ("ddim", "eps", 100),
    ],
)
def test_optimal_denoisers_sample_the_joint_law(sampler, prediction, num_evaluations):
    """With closed-form denoisers of a linear-Gaussian hierarchy, the cascade has its variances and covariances.

    z_3 ~ N(0, 1), z_2 = .8 z_3 + .6 n, z_1 = .5 mean(z_2) - .4 z_3 + .3 n, with the first channels of z_2 and z_3.
    """
    knobs = {"sampler": sampler, "num_evaluations": num_evaluations, "batch_size": 2000, "noise_gamma": math.inf}
    config = experiment(prediction=prediction, noise=0.5, **knobs)
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


def test_ddpm_walks_with_fresh_noise():
    """Where all data is one point, the latents of DDPM's walk have the law of the forward process at all times:

    variance sigma_t^2, and correlation e^-|lambda_t - lambda_s| of one image's latent at two times.
    """
    config = experiment(sampler="ddpm", num_evaluations=5, batch_size=2000)
    schedule, seen = make_schedule(config.diffusion), Seen()  # predicts z_1 = 0
    sample_cascade({1: seen}, config, image_indices=range(2000), seed=0, given=given(config, 2000, 3, 2))
    t = torch.tensor([call["t"] for call in seen.calls], dtype=torch.float64)
    walk = torch.stack([call["z_t"].flatten() for call in seen.calls]).double()  # (times, 2000 images x 64 numbers)
    tolerance = 6 / walk.shape[1] ** 0.5
    torch.testing.assert_close(walk[1:].std(1), schedule.sigma(t[1:]), rtol=tolerance, atol=0)
    places = schedule.lambda_(t)
    torch.testing.assert_close(torch.corrcoef(walk), (-(places[:, None] - places).abs()).exp(), rtol=0, atol=tolerance)
    images = walk[-1].view(2000, 64)
    assert abs(torch.corrcoef(images.T)).fill_diagonal_(0).max() < 6 / 2000**0.5
    assert len(images.unique(dim=0)) == 2000


def noises(config, z, count):
    """What was added to z_3 and z_2 at each call of level 1, and the times."""
    seen = Seen()
    sample_cascade({1: seen}, config, image_indices=range(count), seed=0, given=z)
    added = [torch.cat([(call["z_above"][m] - z[m]).flatten(1) for m in (3, 2)], dim=1) for call in seen.calls]
    return added, [call["t"] for call in seen.calls]


@pytest.mark.parametrize(("decay", "power"), [("variance", 0.5), ("deviation", 1.0)])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 2.0])
def test_condition_noise_decays(gamma, decay, power):
    """A condition is z_m + N(0, t^gamma sigma_m^2), or t^(2 gamma), drawn anew at each call and for each image."""
    config = experiment(noise=0.5, noise_gamma=gamma, noise_decay=decay, num_evaluations=3, batch_size=2000)
    added, times = noises(config, given(config, 2000, 3, 2), 2000)
    for noise, t in zip(added, times, strict=True):
        assert noise.std() == pytest.approx(0.5 * t ** (gamma * power), rel=0.03)
    assert abs(torch.corrcoef(torch.stack([n.flatten() for n in added]))).fill_diagonal_(0).max() < 0.04
    assert abs(torch.corrcoef(added[0].T)).fill_diagonal_(0).max() < 0.12


@every_sampler
def test_condition_noise_may_be_drawn_once(sampler):
    """noise_draw `once`: all calls of a level share what `call` draws first; only the decay differs."""
    knobs = {"noise": 0.5, "noise_gamma": 1.0, "noise_decay": "deviation", "sampler": sampler, "batch_size": 200}
    anew, once = (experiment(noise_draw=draw, **knobs) for draw in ("call", "once"))
    z = given(anew, 200, 3, 2)
    (first, *_), _ = noises(anew, z, 200)
    added, times = noises(once, z, 200)
    assert torch.equal(added[0], first)
    for noise, t in zip(added, times, strict=True):
        torch.testing.assert_close(noise, t * first, rtol=0, atol=1e-6)
    assert abs(torch.corrcoef(first.T)).fill_diagonal_(0).max() < 6 / 200**0.5  # nothing shared between numbers


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


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"guidance": 0.7},
        {"guidance": 0.7, "interval": (0.0, 0.5), "null_branch": "conditions"},
        {"noise_draw": "once", "noise_gamma": 0.3},
        *({"sampler": sampler, "spacing": "time"} for sampler in SAMPLERS),
        {"sampler": "ddpm", "noise_draw": "once", "guidance": 0.7},
    ],
    ids=str,
)
def test_requests_may_be_split_and_reordered(knobs):
    """Any part of the images, in any order, gives the same bits as one request for all of them."""
    config = experiment(noise=0.5, prediction="eps", **knobs)
    denoisers = networks(config)
    whole = sample_cascade(denoisers, config, image_indices=range(11), seed=3)
    for part in ([10, 2, 7], range(5), range(5, 11), [6]):
        some = sample_cascade(denoisers, config, image_indices=part, seed=3)
        assert all(torch.equal(some[m], whole[m][list(part)]) for m in SHAPES)


@pytest.mark.parametrize("labels", ["class", "text"])
def test_labelled_requests_may_be_split_and_reordered(labels):
    """So it is where each image comes with its label or caption."""
    config = experiment(noise=0.5, prediction="eps", labels=labels, guidance=0.7)
    denoisers = networks(config, num_classes=10 if labels == "class" else 0)
    told = torch.arange(11) % 10 if labels == "class" else torch.randn(11, 3, 4)
    whole = sample_cascade(denoisers, config, image_indices=range(11), seed=3, labels=told)
    part = [10, 2, 7]
    some = sample_cascade(denoisers, config, image_indices=part, seed=3, labels=told[part])
    assert all(torch.equal(some[m], whole[m][part]) for m in SHAPES)
    others = sample_cascade(denoisers, config, image_indices=part, seed=3, labels=told[[1, 3, 5]])
    assert not any(torch.equal(some[m], others[m]) for m in SHAPES)


@every_sampler
@pytest.mark.parametrize("draw", ["call", "once"])
def test_inserting_a_level_keeps_the_samples_above(sampler, draw):
    """Levels 2 and 3 become 3 and 4 of a deeper hierarchy: with the same weights, the same bits."""
    knobs = {"noise": 0.5, "guidance": 0.7, "prediction": "eps", "sampler": sampler, "noise_draw": draw}
    before = experiment(**knobs)
    after = experiment(**knobs, shapes={1: (1, 8, 8), 2: (2, 4, 4), 3: SHAPES[2], 4: SHAPES[3]})
    old, new = networks(before), networks(after)
    for m in (2, 3):
        new[m + 1].load_state_dict(old[m].state_dict())
    a, b = (sample_cascade(nets, c, image_indices=range(6), seed=3) for nets, c in ((old, before), (new, after)))
    for m in (2, 3):
        assert torch.equal(a[m], b[m + 1])
    assert len(torch.cat([a[1], b[1]]).flatten(1).unique(dim=0)) == 12  # level 1 has one more above it: other noise


@every_sampler
def test_batch_size_does_not_change_an_image(sampler):
    """Another batch size leaves the images as they are, up to rounding."""
    config = experiment(guidance=0.7, noise=0.5, prediction="v", sampler=sampler)
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


# --- samplers -----------------------------------------------------------------------------------------------------


@every_sampler
@pytest.mark.parametrize("spacing", ["lambda", "time"])
def test_the_configured_sampler_takes_its_grid(sampler, spacing):
    """Each level is evaluated num_evaluations times, at the times of the configured spacing."""
    config = experiment(sampler=sampler, spacing=spacing, num_evaluations=5)
    seen, schedule = {m: Seen() for m in SHAPES}, make_schedule(config.diffusion)
    sample_cascade(seen, config, image_indices=range(4), seed=0)
    times = time_grid(schedule, 5, spacing, to_zero=sampler != "dpm_solver")[:-1].float()
    assert all([call["t"] for call in seen[m].calls] == times.tolist() for m in SHAPES)


@pytest.mark.parametrize("spacing", ["lambda", "time"])
def test_the_configured_sampler_makes_the_samples(spacing):
    """From a level's first noise, the sampler's own function comes to the same latent."""
    functions = {"dpm_solver_pp": sample_dpm_solver_pp, "dpm_solver": sample_dpm_solver, "ddim": sample_ddim}
    for name, function in functions.items():
        config = experiment(sampler=name, spacing=spacing, num_evaluations=6, prediction="eps")
        schedule, denoisers, first = make_schedule(config.diffusion), networks(config), []

        def top(z_t, t, z_above, labels=None, denoisers=denoisers, first=first):
            first.append(z_t)
            return denoisers[3](z_t, t, z_above, labels)

        z = sample_cascade(denoisers | {3: top}, config, image_indices=range(4), seed=0)

        def z_hat(z_t, t, denoisers=denoisers, schedule=schedule):
            return to_z_hat(denoisers[3](z_t, t, {}), z_t, t, schedule, "eps")

        with torch.no_grad():
            times = time_grid(schedule, 6, spacing, to_zero=name != "dpm_solver")
            torch.testing.assert_close(function(z_hat, first[0], times, schedule), z[3])


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


def test_guidance_may_be_limited_to_an_interval():
    """Each level's own interval decides at which times the batch is doubled."""
    config, seen = experiment(guidance=0.7, interval=(0.2, 0.8), num_evaluations=20), {m: Seen() for m in SHAPES}
    sample_cascade(seen, config, image_indices=range(4), seed=0)
    calls = [call for m in (1, 2) for call in seen[m].calls]
    assert all(len(call["z_t"]) == (8 if 0.2 <= call["t"] <= 0.8 else 4) for call in calls)
    assert {len(call["z_t"]) for call in calls} == {4, 8}


def test_the_null_branch_may_keep_the_label():
    """null_branch `conditions`: the second half of the batch loses every level above and no label; the top level has
    nothing to guide."""
    config = experiment(guidance=0.7, labels="class", null_branch="conditions")
    seen, half = {m: Seen() for m in SHAPES}, torch.arange(8) >= 4
    sample_cascade(seen, config, image_indices=range(4), seed=0, labels=torch.arange(4))
    assert all(call["drop"] is None and len(call["z_t"]) == 4 for call in seen[3].calls)
    for call in seen[1].calls:
        assert torch.equal(call["labels"], torch.arange(4).repeat(2))
        assert set(call["drop"]) == {"labels", 2, 3}
        assert not call["drop"]["labels"].any()
        assert all(torch.equal(call["drop"][m], half) for m in (2, 3))


@pytest.mark.parametrize("null_branch", ["all", "conditions"])
@pytest.mark.parametrize("labels", ["class", "text"])
def test_networks_take_what_guidance_gives_them(null_branch, labels):
    """Guided samples differ between the null branches and from unguided ones, through the real denoisers."""
    told = torch.arange(4) if labels == "class" else torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    samples = []
    for knobs in ({}, {"guidance": 0.7, "null_branch": null_branch}, {"guidance": 0.7, "interval": (0.0, 0.0)}):
        config = experiment(prediction="eps", labels=labels, **knobs)
        denoisers = networks(config, num_classes=10 if labels == "class" else 0)
        samples.append(sample_cascade(denoisers, config, image_indices=range(4), seed=0, labels=told))
    plain, guided, never = samples
    assert all(torch.equal(plain[m], never[m]) for m in SHAPES)
    assert torch.equal(plain[3], guided[3]) == (null_branch == "conditions")
    assert not torch.equal(plain[1], guided[1])


def test_captions_follow_their_images():
    """Each image is sampled with its own caption, whatever the request's order."""
    config, captions = experiment(labels="text"), torch.randn(4, 3, 4)

    def model(z_t, t, z_above, labels=None, drop=None):
        return labels.sum((1, 2)).view(-1, 1, 1, 1).expand_as(z_t)

    z = sample_cascade(dict.fromkeys(SHAPES, model), config, image_indices=[7, 2, 3, 9], seed=0, labels=captions)
    torch.testing.assert_close(z[1], captions.sum((1, 2)).view(-1, 1, 1, 1).expand_as(z[1]))


def test_labels_follow_their_images():
    """Each image is sampled with its own label, whatever the request's order."""
    config = experiment(labels="class")

    def model(z_t, t, z_above, labels=None, drop=None):
        return labels.float().view(-1, 1, 1, 1).expand_as(z_t)

    labels = torch.tensor([5, 0, 9, 2])
    z = sample_cascade(dict.fromkeys(SHAPES, model), config, image_indices=[7, 2, 3, 9], seed=0, labels=labels)
    torch.testing.assert_close(z[1], labels.float().view(-1, 1, 1, 1).expand_as(z[1]))
