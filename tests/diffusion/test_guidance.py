"""Classifier-free guidance."""

import pytest
import torch

from nestdiff_core.diffusion import VPSchedule, guided, to_eps_hat


class Recorder:
    """A denoiser whose output is known: z + t (label + sum of the conditions), without those that are dropped."""

    def __init__(self):
        self.batches = []

    def __call__(self, z_t, t, z_above, labels=None, drop=None):
        self.batches.append(len(z_t))
        drops = drop if isinstance(drop, dict) else dict.fromkeys(("labels", *z_above), drop)
        told = {m: z_m.flatten(1).mean(1) for m, z_m in z_above.items()}
        if labels is not None:
            told["labels"] = labels.float().flatten(1).mean(1) if labels.ndim > 1 else labels.float()
        total = torch.zeros(len(z_t))
        for name, value in told.items():
            total = total + (value if drops.get(name) is None else torch.where(drops[name], 0.0, value))
        return z_t + (t * total).view(-1, 1, 1, 1)


class Halved(Recorder):
    """It says half as much."""

    def __call__(self, *told):
        return 0.5 * super().__call__(*told)


def inputs():
    return torch.randn(3, 2, 4, 4), torch.rand(3), {2: torch.randn(3, 5, 2, 2), 3: torch.randn(3, 7, 1, 1)}


LABELS = {"class": torch.tensor([1, 2, 3]), "text": torch.randn(3, 4, 6)}
every_label = pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)


@every_label
def test_guidance_extrapolates_from_null_to_cond(labels):
    """out = cond + w (cond - null), from one pass of a doubled batch, conditions and labels dropped together."""
    z_t, t, z_above = inputs()
    model = Recorder()
    out = guided(model, 0.8)(z_t, t, z_above, labels)
    assert model.batches == [6]
    cond, null = model(z_t, t, z_above, labels), z_t
    torch.testing.assert_close(out, cond + 0.8 * (cond - null))


@every_label
def test_the_null_branch_may_keep_the_label(labels):
    """null_branch `conditions`: what is contrasted with is the label alone."""
    z_t, t, z_above = inputs()
    model = Recorder()
    out = guided(model, 0.8, null_branch="conditions")(z_t, t, z_above, labels)
    assert model.batches == [6]
    cond, null = model(z_t, t, z_above, labels), model(z_t, t, {}, labels)
    torch.testing.assert_close(out, cond + 0.8 * (cond - null))


@pytest.mark.parametrize(
    ("w", "conditions", "null_branch", "label"),
    [
        (0.0, True, "all", True),
        (0.8, False, "all", False),
        (0.8, False, "conditions", True),
        (0.8, False, "conditions", False),
    ],
)
def test_nothing_to_guide_costs_nothing(w, conditions, null_branch, label):
    """With w = 0, or where the null branch would drop nothing, the batch is not doubled."""
    z_t, t, z_above = inputs()
    z_above, labels = z_above if conditions else {}, LABELS["class"] if label else None
    model = Recorder()
    out = guided(model, w, null_branch=null_branch)(z_t, t, z_above, labels)
    assert model.batches == [3]
    torch.testing.assert_close(out, Recorder()(z_t, t, z_above, labels))


def test_a_guide_takes_the_place_of_null():
    """out = cond + w (cond - guide), both told the same; also where nothing is told, which null could not guide."""
    z_t, t, z_above = inputs()
    for above, labels in ((z_above, LABELS["class"]), ({}, None)):
        model, weaker = Recorder(), Halved()
        out = guided(model, 0.8, guide=weaker)(z_t, t, above, labels)
        assert (model.batches, weaker.batches) == ([3], [3])
        cond = model(z_t, t, above, labels)
        torch.testing.assert_close(out, cond + 0.8 * (cond - 0.5 * cond))


def test_a_guide_has_its_interval_and_costs_nothing_at_w_0():
    z_t, _, z_above = inputs()
    t = torch.tensor([0.1, 0.5, 0.9])
    model, weaker = Recorder(), Recorder()
    out = guided(model, 1.0, (0.4, 0.6), guide=lambda z_t, *_: torch.zeros_like(z_t))(z_t, t, z_above)
    cond = model(z_t, t, z_above)
    torch.testing.assert_close(out, torch.stack([cond[0], 2 * cond[1], cond[2]]))
    guided(model, 0.0, guide=weaker)(z_t, t, z_above)
    assert weaker.batches == []


@every_label
def test_labels_alone_are_guided(labels):
    """A conditional top level has its label to guide."""
    z_t, t, _ = inputs()
    model = Recorder()
    out = guided(model, 0.5)(z_t, t, {}, labels)
    assert model.batches == [6]
    torch.testing.assert_close(out, z_t + 1.5 * (model(z_t, t, {}, labels) - z_t))


@pytest.mark.parametrize(
    ("time", "is_on"), [(0.0, False), (0.29, False), (0.3, True), (0.5, True), (0.7, True), (0.71, False), (1.0, False)]
)
def test_guidance_may_be_limited_to_an_interval(time, is_on):
    """Between the two times, which belong to it, guidance is on; elsewhere one pass gives the conditional output."""
    z_t, _, z_above = inputs()
    t, model = torch.full((3,), time), Recorder()
    out = guided(model, 0.8, (0.3, 0.7))(z_t, t, z_above)
    assert model.batches == [6 if is_on else 3]
    cond = model(z_t, t, z_above)
    torch.testing.assert_close(out, cond + 0.8 * (cond - z_t) if is_on else cond)


def test_an_interval_is_each_samples_own():
    """In a batch of several times, only the samples within the interval are guided."""
    z_t, _, z_above = inputs()
    t, model = torch.tensor([0.1, 0.5, 0.9]), Recorder()
    out = guided(model, 0.8, (0.3, 0.7))(z_t, t, z_above)
    cond = model(z_t, t, z_above)
    assert torch.equal(out[[0, 2]], cond[[0, 2]])
    torch.testing.assert_close(out[1], (cond + 0.8 * (cond - z_t))[1])


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
