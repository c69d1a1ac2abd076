"""Muon for the matrices of the blocks, AdamW for the rest: one optimiser, whose steps can be checked and resumed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import config_with, make_batches, optimizer_slots, state_hash, trainer

from nestdiff_core.errors import NumericsError
from nestdiff_core.models.nested import build_denoiser
from nestdiff_core.recipes.depth import ARMS, CIFAR10_16PX
from nestdiff_core.training.data import Batch, LatentBatches
from nestdiff_core.training.optimizer import Muon, MuonAdamW, block_matrices, make_optimizer

MUON = {"optimizer": "muon", "lr": 1e-3}


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> LatentBatches:
    return make_batches(tmp_path_factory.mktemp("stores"), 48)


def test_every_parameter_is_stepped_by_one_of_them() -> None:
    """Blocks' and fusion's matrices by Muon; positions, patches, read-out, biases and norms by AdamW; none by both."""
    config = ARMS["l3"](CIFAR10_16PX)
    model = build_denoiser(config, 2, 0)
    matrices = {id(p) for p in block_matrices(model)}
    named = {name for name, p in model.named_parameters() if id(p) in matrices}
    assert named == {
        name
        for name, p in model.named_parameters()
        if p.ndim == 2 and name.startswith(("in_blocks.", "mid_block.", "out_blocks.", "fusion.mlps."))
    }
    assert len(named) == 5 * 4 + 2 + 2 * 2  # of 5 blocks, 2 with long skips; two joints
    optimizer = make_optimizer(model, replace(config.level(2).train, optimizer="muon"))
    stepped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(stepped) == sorted(id(p) for p in model.parameters())


def test_matrices_move_along_the_nearest_orthogonal_ones() -> None:
    """The first step against numpy's singular value decomposition of the gradients: the same singular vectors, each
    with a factor of .7 to 1.2 (the iteration's own spread), times .2 sqrt(longer side) of the rate, and weight decay;
    a bias beside them moves as AdamW's first step does."""
    torch.manual_seed(0)
    linears = [torch.nn.Linear(*sides) for sides in ((24, 48), (48, 24), (24, 48))]
    before = [p.weight.detach().clone() for p in linears]
    bias = linears[0].bias.detach().clone()
    muon = Muon([p.weight for p in linears], lr=0.01, weight_decay=0.1)
    optimizer = MuonAdamW(muon, torch.optim.AdamW([linears[0].bias], lr=0.01, weight_decay=0.0))
    for p in linears:
        p.weight.grad = torch.randn_like(p.weight)
    linears[0].bias.grad = torch.ones(48)
    optimizer.step()
    for p, old in zip(linears, before, strict=True):
        moved = old * (1 - 0.01 * 0.1) - p.weight.detach()
        u, _, vt = np.linalg.svd(p.weight.grad.numpy(), full_matrices=False)
        in_its_basis = u.T @ moved.numpy() @ vt.T / (0.01 * 0.2 * np.sqrt(48))
        assert np.diag(in_its_basis).min() > 0.6 and np.diag(in_its_basis).max() < 1.3
        assert np.abs(in_its_basis - np.diag(np.diag(in_its_basis))).max() < 0.05
    assert torch.allclose(bias - linears[0].bias.detach(), torch.full((48,), 0.01), atol=1e-6)


def test_muon_is_torchs() -> None:
    """Ten steps on matrices of two shapes, with changing rates: within 2 % of the way that torch's Muon goes."""
    torch.manual_seed(0)
    ours = [torch.randn(sides) for sides in ((16, 64), (64, 16), (16, 64), (16, 64), (32, 32))]
    theirs, start = [p.clone() for p in ours], [p.clone() for p in ours]
    both = (
        Muon(ours, lr=0.01, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for step in range(10):
        gradients = [torch.randn_like(p) for p in ours]
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = 0.01 * (10 - step)
            for p, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
                p.grad = gradient
            optimizer.step()
    for a, b, c in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - c).norm()


def test_both_follow_the_learning_rate_and_resume_to_the_bit(batches: LatentBatches, tmp_path: Path) -> None:
    whole = trainer(batches, tmp_path / "a", config_with(**MUON))
    whole.run()
    for until in (7, None):
        t = trainer(batches, tmp_path / "b", config_with(**MUON))
        t.run(until_step=until)
        assert {group["lr"] for group in t.optimizer.param_groups} == {t.learning_rate(t.step - 1)}
    assert state_hash(t) == state_hash(whole)
    adamw = trainer(batches, tmp_path / "c", config_with(lr=1e-3))
    adamw.run()
    assert state_hash(adamw) != state_hash(whole)


def test_an_exploded_step_leaves_both_as_they_are(batches: LatentBatches, tmp_path: Path) -> None:
    t = trainer(batches, tmp_path, config_with(**MUON))
    t.run(until_step=5)
    before, make = [value.clone() for value in [*t.weights.values(), *optimizer_slots(t)]], t.batch

    def damaged(step: int) -> Batch:
        batch = make(step)
        batch.latents[1][0] = float("inf")
        return batch

    t.batch = damaged
    with pytest.raises(NumericsError, match="step 5"):
        t.run(until_step=6)
    assert all(torch.equal(a, b) for a, b in zip(before, [*t.weights.values(), *optimizer_slots(t)], strict=True))
