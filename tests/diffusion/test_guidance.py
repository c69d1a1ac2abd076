"""Classifier-free guidance."""

import pytest
import torch

from nestdiff_core.diffusion import VPSchedule, guided, to_eps_hat


class Recorder:
    """A denoiser whose output is known: z + label + sum of the conditions, without these where dropped."""

    def __init__(self):
        self.batches = []

    def __call__(self, z_t, t, z_above, labels=None, drop=None):
        self.batches.append(len(z_t))
        told = sum(z_m.mean((1, 2, 3)) for z_m in z_above.values()) + (0.0 if labels is None else labels)
        told = told * (1.0 if drop is None else (~drop).float()) * t
        return z_t + torch.as_tensor(told).view(-1, 1, 1, 1)


def inputs():
    return torch.randn(3, 2, 4, 4), torch.rand(3), {2: torch.randn(3, 5, 2, 2)}


def test_guidance_extrapolates_from_null_to_cond():
    """out = cond + w (cond - null), from one pass of a doubled batch, conditions and labels dropped together."""
    z_t, t, z_above = inputs()
    labels, model = torch.tensor([1, 2, 3]), Recorder()
    out = guided(model, 0.8)(z_t, t, z_above, labels)
    assert model.batches == [6]
    cond, null = model(z_t, t, z_above, labels), z_t
    torch.testing.assert_close(out, cond + 0.8 * (cond - null))


@pytest.mark.parametrize(("w", "conditions"), [(0.0, True), (0.8, False)])
def test_nothing_to_guide_costs_nothing(w, conditions):
    """With w = 0, or at the top level of an unconditional model, the batch is not doubled."""
    z_t, t, z_above = inputs()
    z_above = z_above if conditions else {}
    model = Recorder()
    out = guided(model, w)(z_t, t, z_above)
    assert model.batches == [3]
    torch.testing.assert_close(out, Recorder()(z_t, t, z_above))


def test_labels_alone_are_guided():
    """A class-conditional top level has its label to guide."""
    z_t, t, _ = inputs()
    model = Recorder()
    out = guided(model, 0.5)(z_t, t, {}, torch.tensor([1, 2, 3]))
    assert model.batches == [6]
    torch.testing.assert_close(out, z_t + 1.5 * (torch.tensor([1.0, 2.0, 3.0]) * t).view(-1, 1, 1, 1))


@pytest.mark.parametrize("prediction", ["v", "x"])
def test_guiding_any_prediction_guides_eps(prediction):
    """The raw output may be guided whatever it is: its eps_hat is the guided eps_hat."""
    schedule, (z_t, t, z_above) = VPSchedule(), inputs()
    t = t.clamp(min=0.1)
    raw = guided(Recorder(), 0.7)(z_t, t, z_above)
    cond, null = (to_eps_hat(o, z_t, t, schedule, prediction) for o in (Recorder()(z_t, t, z_above), z_t))
    torch.testing.assert_close(
        to_eps_hat(raw, z_t, t, schedule, prediction), cond + 0.7 * (cond - null), rtol=1e-4, atol=1e-4
    )
