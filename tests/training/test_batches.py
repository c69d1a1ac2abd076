"""What a step is trained on: a function of the seed and its number."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import config_with, trainer

from nestdiff_core.diffusion.schedule import VPSchedule
from nestdiff_core.errors import IntegrityError
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.stores.writer import create_store, write_shard
from nestdiff_core.training.ahead import Ahead
from nestdiff_core.training.data import Batch, BatchOrder, Draws, LatentBatches, draw


def test_batches_join_one_view_of_all_levels(batches: LatentBatches) -> None:
    """Image and conditions of a row are of the same view, the one that was drawn."""
    rows, view = np.array([3, 40, 3, 7]), np.array([0, 1, 1, 0])
    none = torch.zeros(4)
    batch = batches.load(rows, Draws(none, none, {}, {}, torch.from_numpy(view), none), torch.device("cpu"))
    for level, z in batch.latents.items():
        stored = torch.from_numpy(batches.readers[level].read(rows)).float()
        assert torch.equal(z, stored[range(4), view])
    assert batch.labels is not None and batch.labels.tolist() == [3, 0, 3, 7]


def test_captions_are_drawn_with_the_step(tmp_path: Path) -> None:
    """Each image brings one of its captions, and every one has its turn."""
    tokens = np.arange(6 * 3, dtype=np.float32).reshape(6, 3, 1, 1)
    create_store(tmp_path / "text.zarr", {"tokens": (3, 1, 1)}, "float32", [6], 4, {})
    write_shard(tmp_path / "text.zarr", 0, {"tokens": tokens})
    create_store(tmp_path / "z.zarr", {"z_1": (1, 1, 2, 2)}, "float32", [6], 4, {})
    write_shard(tmp_path / "z.zarr", 0, {"z_1": np.zeros((6, 1, 1, 2, 2), np.float32)})
    readers = {1: StoreReader(tmp_path / "z.zarr", "z_1")}
    captioned = LatentBatches(readers, None, StoreReader(tmp_path / "text.zarr", "tokens"))
    rows, seen = np.arange(6), set()
    for step in range(20):
        draws = draw(
            seed=0, step=step, batch_size=6, shapes=captioned.shapes(), level=1, schedule=VPSchedule(),
            condition_drop=0.1, num_captions=captioned.num_captions,
        )  # fmt: skip
        text = captioned.load(rows, draws, torch.device("cpu")).labels
        assert text is not None and torch.equal(text.flatten() // 3, torch.arange(6.0))
        seen |= set(text.flatten().tolist())
    assert seen == set(range(18))


@pytest.mark.parametrize("each", [False, True])
def test_one_coin_for_all_conditions_or_one_for_each(each: bool) -> None:
    """Conditions are dropped at the stated rate, together or independently."""
    draws = draw(
        seed=0, step=0, batch_size=20_000, shapes={1: (1, 1, 1), 2: (1, 1, 1), 3: (1, 1, 1)}, level=1,
        schedule=VPSchedule(), condition_drop=0.3, drop_each=each,
    )  # fmt: skip
    assert list(draws.drop) == ["labels", 3, 2]
    masks = torch.stack(list(draws.drop.values())).float()
    torch.testing.assert_close(masks.mean(1), torch.full((3,), 0.3), atol=0.02, rtol=0)
    correlation = torch.corrcoef(masks)[0, 1:].abs()
    assert (correlation < 0.03).all() if each else (correlation > 0.99).all()


def test_every_step_boundary_is_a_new_seed(batches: LatentBatches, tmp_path: Path) -> None:
    """Two steps never see the same noise, and the noise of a step does not depend on what came before."""
    t = trainer(batches, tmp_path)
    draws = [t._draw(0, step, 8, 0.5) for step in (0, 1, 0)]
    assert not torch.equal(draws[0].eps, draws[1].eps)
    assert torch.equal(draws[0].eps, draws[2].eps) and torch.equal(draws[0].eta[2], draws[2].eta[2])


def test_trained_at_the_noise_levels_that_are_asked_for(batches: LatentBatches, tmp_path: Path) -> None:
    """Times around lambda = 3 instead of everywhere; the noise, and validation's times, are the same."""
    usual, asked = trainer(batches, tmp_path), trainer(batches, tmp_path, config_with(noise_levels=(3.0, 0.1)))
    for step in (0, 5):
        a, b = usual.batch(step).draws, asked.batch(step).draws
        assert (asked.schedule.lambda_(b.t.double()) - 3.0).abs().max() < 0.5 < (a.t - b.t).abs().max()
        assert torch.equal(a.eps, b.eps)
    assert np.array_equal(usual.validation_losses(), asked.validation_losses())


def test_order_visits_every_image_once_an_epoch() -> None:
    """Batches run through one permutation after another; each epoch has each row exactly once."""
    rows = np.arange(100, 110)
    order = BatchOrder(rows, 4, seed=3)
    drawn = np.concatenate([order.batch(step) for step in range(10)])
    epochs = drawn.reshape(4, 10)
    assert (np.sort(epochs, axis=1) == rows).all()
    assert not (epochs[0] == epochs[1]).all()
    again = BatchOrder(rows, 4, seed=3)
    assert (again.batch(7) == order.batch(7)).all()  # from the middle, without the steps before


def test_batch_larger_than_the_set() -> None:
    """A set smaller than a batch recurs within it, evenly."""
    batch = BatchOrder(np.arange(3), 7, seed=0).batch(0)
    assert np.bincount(batch).tolist() in ([2, 2, 3], [2, 3, 2], [3, 2, 2])


@given(
    num_rows=st.integers(1, 40), batch_size=st.integers(1, 20), seed=st.integers(0, 9),
    steps=st.lists(st.integers(0, 60), min_size=1, max_size=8),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_order_is_of_seed_and_step_only(num_rows: int, batch_size: int, seed: int, steps: list[int]) -> None:
    """Whatever was asked before, over any number of epochs, a step's rows are its cut of the permutations in a row."""
    rows = np.arange(100, 100 + num_rows)
    with contextlib.closing(BatchOrder(rows, batch_size, seed)) as order:
        epochs = range((max(steps) + 1) * batch_size // num_rows + 1)
        endless = np.concatenate([np.random.default_rng([seed, e]).permutation(rows) for e in epochs])
        for step in steps:
            np.testing.assert_array_equal(order.batch(step), endless[step * batch_size : (step + 1) * batch_size])


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_share_the_batch(batches: LatentBatches, tmp_path: Path, num_ranks: int) -> None:
    """At any step of any epoch the ranks' latents, labels and draws together are those of one process, each once."""
    t = trainer(batches, tmp_path)
    with contextlib.closing(t.order):
        for step in (0, 1, 7, 3):
            t.rank, t.world_size = 0, 1
            whole = tensors(t.batch(step))
            t.world_size = num_ranks
            for t.rank in range(num_ranks):
                for name, share in tensors(t.batch(step)).items():
                    assert torch.equal(share, whole[name][t.rank :: num_ranks]), name


def test_batches_made_ahead_are_the_same(batches: LatentBatches, tmp_path: Path) -> None:
    """To the bit, from whatever step."""
    t = trainer(batches, tmp_path)
    with contextlib.closing(t.order):
        for first in (0, 4, 9):
            with Ahead(t.batch) as ahead:
                for step in range(first, first + 4):
                    made, expected = tensors(ahead(step)), tensors(trainer(batches, tmp_path).batch(step))
                    assert all(torch.equal(made[name], expected[name]) for name in expected | made)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_the_same(batches: LatentBatches, tmp_path: Path) -> None:
    """Pinned memory and copies that nobody waits for change no bit."""
    t = trainer(batches, tmp_path)
    with contextlib.closing(t.order), Ahead(lambda step: gpu.batch(step)) as ahead:
        gpu = trainer(batches, tmp_path)
        gpu.device = torch.device("cuda")
        for step in range(20):
            made, expected = tensors(ahead(step)), tensors(t.batch(step))
            assert all(made[name].is_cuda and torch.equal(made[name].cpu(), expected[name]) for name in expected)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch, by name."""
    draws, labels = batch.draws, {} if batch.labels is None else {"labels": batch.labels}
    parts = {"z": batch.latents, "eta": draws.eta, "drop": draws.drop}
    named = {f"{part} {name}": value for part, values in parts.items() for name, value in values.items()}
    return named | labels | {"t": draws.t, "eps": draws.eps}


def test_a_batch_that_cannot_be_made_stops_its_own_step(batches: LatentBatches, tmp_path: Path) -> None:
    """The steps before it are done, the error keeps its type, and no thread stays."""
    t = trainer(batches, tmp_path)
    make = t.batch

    def damaged(step: int) -> Batch:
        if step == 7:
            raise IntegrityError("Shard 0 is cut", fix="Make it again.")
        return make(step)

    t.batch = damaged
    before = set(threading.enumerate())
    with pytest.raises(IntegrityError, match="cut"):
        t.run()
    assert t.step == 7
    assert set(threading.enumerate()) <= before


class Timed:
    """A function that is at least four times as slow as another last was, however busy the machine."""

    def __init__(self, work: Callable[..., Any], slower_than: Timed | None = None) -> None:
        self.work, self.other, self.seconds = work, slower_than, 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self.other is not None:
            time.sleep(0.05 + 4 * self.other.seconds)
        began = time.monotonic()
        result = self.work(*arguments, **named)
        self.seconds = time.monotonic() - began
        return result


def test_log_lines_say_how_long_batches_were_waited_for(batches: LatentBatches, tmp_path: Path) -> None:
    """As a share of the time since the last line: about all of it where batches are slow, next to none else."""
    slow, fast = (trainer(batches, tmp_path / name) for name in ("slow", "fast"))
    slow.train_step = Timed(slow.train_step)
    slow.batch = Timed(slow.batch, slower_than=slow.train_step)
    fast.batch = Timed(fast.batch)
    fast.train_step = Timed(fast.train_step, slower_than=fast.batch)
    for t in (slow, fast):
        t.run(until_step=10)
    assert slow.history[-1]["loader_wait"] > 0.5
    assert 0 <= fast.history[-1]["loader_wait"] < 0.2
