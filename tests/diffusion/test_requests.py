"""What a request for samples reports, and which ones are refused."""

import math

import pytest
import torch
from cascades import SHAPES, Seen, experiment, networks

from nestdiff_core.diffusion import sample_cascade
from nestdiff_core.errors import ConfigError, NumericsError


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
    ("kind", "labels"),
    [
        ("none", torch.zeros(2, dtype=torch.long)),
        ("none", torch.zeros(2, 3, 4)),
        ("class", torch.zeros(3, dtype=torch.long)),
        ("class", torch.zeros(2, 3, 4)),
        ("text", torch.zeros(2, dtype=torch.long)),
        ("text", torch.zeros(3, 3, 4)),
        ("text", torch.zeros(2, 3, 5)),
    ],
)
def test_labels_of_another_shape_are_refused(kind, labels):
    """Labels are one class for each image, or its caption's tokens, as the experiment says."""
    with pytest.raises(ConfigError) as refusal:
        sample_cascade(
            {m: Seen() for m in SHAPES}, experiment(labels=kind), image_indices=range(2), seed=0, labels=labels
        )
    assert refusal.value.key == "labels"


@pytest.mark.parametrize(
    ("request_", "key"),
    [
        ({"image_indices": [1, 1]}, "image_indices"),
        ({"image_indices": [-1]}, "image_indices"),
        ({"given": {2: torch.zeros(2, 3, 2, 2)}}, "given"),
        ({"given": {3: torch.zeros(3, 5, 1, 1)}}, "given"),
        ({"denoisers": {1: Seen(), 3: Seen()}}, "denoisers"),
    ],
)
def test_contradicting_requests_are_refused(request_, key):
    """Before anything is sampled, the refusal names what contradicts the experiment."""
    arguments = {"denoisers": {m: Seen() for m in SHAPES}, "image_indices": range(2), "seed": 0} | request_
    with pytest.raises(ConfigError) as refusal:
        sample_cascade(config=experiment(), **arguments)
    assert refusal.value.key == key
