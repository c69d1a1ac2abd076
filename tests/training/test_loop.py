"""The trainer: resumes to the bit, learns what there is to learn, stops on numbers that are not finite."""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestdiff_core.config import ConditioningConfig, DiffusionConfig, ExperimentConfig
from nestdiff_core.diffusion.schedule import VPSchedule
from nestdiff_core.errors import IntegrityError, Interrupted, NumericsError
from nestdiff_core.recipes import toy
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.stores.writer import create_store, write_shard
from nestdiff_core.training.ahead import Ahead
from nestdiff_core.training.checkpoint import list_checkpoints, load_latest
from nestdiff_core.training.data import Batch, BatchOrder, Draws, LatentBatches, draw
from nestdiff_core.training.loop import TIMINGS, Trainer, stop_on_signals

NUM_IMAGES = 48


def config_with(level: int = 1, **train: object) -> ExperimentConfig:
    base = toy()
    level_config = dataclasses.replace(base.level(level), train=dataclasses.replace(base.level(level).train, **train))  # pyright: ignore[reportArgumentType]
    levels = tuple(level_config if entry.level == level else entry for entry in base.levels)
    return dataclasses.replace(base, levels=levels, conditioning=ConditioningConfig(labels="class"))


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> LatentBatches:
    """Correlated random latents of the toy experiment's two levels, in real stores."""
    folder, rng, readers = tmp_path_factory.mktemp("latents"), np.random.default_rng(0), {}
    top = rng.standard_normal((NUM_IMAGES, 4, 2, 2)).astype(np.float32)
    image = np.tanh(np.repeat(np.repeat(top[:, :1], 4, 2), 4, 3))
    for level, clean in {1: image, 2: top}.items():
        z = np.stack([clean, clean[..., ::-1]], axis=1)  # two views
        create_store(folder / f"{level}.zarr", {f"z_{level}": z.shape[1:]}, "float16", [NUM_IMAGES], 16, {})
        write_shard(folder / f"{level}.zarr", 0, {f"z_{level}": z})
        readers[level] = StoreReader(folder / f"{level}.zarr", f"z_{level}")
    return LatentBatches(readers, np.arange(NUM_IMAGES) % 10)


def trainer(
    batches: LatentBatches, folder: Path, config: ExperimentConfig | None = None, warnings: list[str] | None = None
) -> Trainer:
    return Trainer(
        config or config_with(),
        1,
        batches,
        train_rows=np.arange(40),
        held_out_rows=np.arange(40, NUM_IMAGES),
        num_classes=10,
        folder=folder,
        device=torch.device("cpu"),
        record={},
        warn=(warnings or []).append,
    )


def state_hash(t: Trainer) -> str:
    """One hash over model, EMA, optimiser, step and losses."""
    total = hashlib.sha256()
    state = t.optimizer.state_dict()["state"]
    slots = [value for index in sorted(state) for _, value in sorted(state[index].items())]
    for tensor in [*t.model.state_dict().values(), *t.ema.values(), *slots]:
        total.update(tensor.numpy().tobytes())
    history = [sorted((k, v) for k, v in line.items() if k not in TIMINGS) for line in t.history]
    total.update(repr((t.step, history, t.recent)).encode())
    return total.hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(batches: LatentBatches, tmp_path_factory: pytest.TempPathFactory) -> str:
    whole = trainer(batches, tmp_path_factory.mktemp("whole"))
    whole.run()
    return state_hash(whole)


@pytest.mark.parametrize("stop", [1, 3, 5, 10, 12, 19])
def test_resume_equals_an_uninterrupted_run(
    batches: LatentBatches, tmp_path: Path, uninterrupted: str, stop: int
) -> None:
    """N steps, a new trainer, the rest: model, EMA, optimiser and losses are the same bits, wherever it stopped."""
    first = trainer(batches, tmp_path)
    first.run(until_step=stop)
    second = trainer(batches, tmp_path)
    assert second.step == stop
    second.run()
    assert state_hash(second) == uninterrupted


def test_every_step_boundary_is_a_new_seed(batches: LatentBatches, tmp_path: Path) -> None:
    """Two steps never see the same noise, and the noise of a step does not depend on what came before."""
    t = trainer(batches, tmp_path)
    draws = [t._draw(0, step, 8, 0.5) for step in (0, 1, 0)]
    assert not torch.equal(draws[0].eps, draws[1].eps)
    assert torch.equal(draws[0].eps, draws[2].eps) and torch.equal(draws[0].eta[2], draws[2].eta[2])


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


def test_a_damaged_checkpoint_is_passed_over(batches: LatentBatches, tmp_path: Path, uninterrupted: str) -> None:
    """A flipped bit in the newest checkpoint means the one before it, said aloud, and the same result in the end."""
    first = trainer(batches, tmp_path)
    first.run(until_step=12)
    newest = list_checkpoints(tmp_path)[-1] / "ema.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    warnings: list[str] = ["start"]
    second = trainer(batches, tmp_path, warnings=warnings)
    assert second.step == 10 and "step_00000012" in warnings[1] and "ema.safetensors" in warnings[1]
    second.run()
    assert state_hash(second) == uninterrupted


def test_a_damaged_newest_checkpoint_does_not_cost_the_good_one(batches: LatentBatches, tmp_path: Path) -> None:
    """With keep_last 1, after a fallback, what is written next is what is kept."""
    config = config_with(checkpoint_every=50, keep_last=1)
    first = trainer(batches, tmp_path, config)
    first.run(until_step=6)
    good = list_checkpoints(tmp_path)[-1]
    shutil.copytree(good, tmp_path / "step_00000012")
    (tmp_path / "step_00000012" / "ema.safetensors").write_bytes(b"")
    second = trainer(batches, tmp_path, config, warnings=[])
    assert second.step == 6
    second.run(until_step=8)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000008"]
    assert trainer(batches, tmp_path, config).step == 8


def test_an_edited_or_foreign_checkpoint_is_passed_over(batches: LatentBatches, tmp_path: Path) -> None:
    """A step that was changed by hand, or a checkpoint of another denoiser, is not trained on."""
    t = trainer(batches, tmp_path)
    t.run(until_step=6)
    state = list_checkpoints(tmp_path)[-1] / "state.json"
    state.write_text(state.read_text().replace('"step": 6', '"step": 5'))
    with pytest.raises(IntegrityError, match="not what was written"):
        trainer(batches, tmp_path)
    t.save()
    with pytest.raises(IntegrityError, match="of another denoiser"):
        load_latest(tmp_path, warn=lambda _: None, level=1, expected="0123456789abcdef")


def test_only_the_last_checkpoints_are_kept(batches: LatentBatches, tmp_path: Path) -> None:
    """keep_last says how many directories there are, and no temporary one stays."""
    trainer(batches, tmp_path, config_with(checkpoint_every=4, keep_last=3)).run()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step_00000012", "step_00000016", "step_00000020"]


def test_a_signal_saves_and_stops(batches: LatentBatches, tmp_path: Path) -> None:
    """SIGTERM during a step ends the run after that step, with a checkpoint of exactly it."""
    t = trainer(batches, tmp_path)

    def at_step_7(done: int, total: int, what: str, **numbers: float) -> None:
        if done == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with stop_on_signals() as stop, pytest.raises(Interrupted) as caught:
        t.run(progress=at_step_7, stop=stop)
    assert caught.value.code == 75
    assert trainer(batches, tmp_path).step == 7


def test_explosion_stops_the_run(batches: LatentBatches, tmp_path: Path) -> None:
    """A loss that is not finite is a NumericsError with level and step, and the last checkpoint stays."""
    good = trainer(batches, tmp_path)
    good.run(until_step=4)
    bad = trainer(batches, tmp_path)
    with torch.no_grad():
        next(bad.model.parameters()).fill_(float("nan"))
    with pytest.raises(NumericsError, match="step 4") as caught:
        bad.run()
    assert caught.value.level == 1
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000004"]
    assert str(caught.value.path).endswith("step_00000004") and "last good one" in caught.value.fix


def test_the_image_that_breaks_a_step_is_named(batches: LatentBatches, tmp_path: Path) -> None:
    """One latent that is not finite: its row, and no other, is in the error."""
    t = trainer(batches, tmp_path)
    batch = t.batch(0)
    batch.latents[1][3] = float("inf")
    with pytest.raises(NumericsError, match="step 0") as caught:
        t.train_step(batch)
    assert f"of 1 of {len(batch.rows)} images (row {batch.rows[3]})" in str(caught.value.found)
    assert "no checkpoint yet" in caught.value.fix


def test_conditions_help_when_they_tell_the_image(batches: LatentBatches, tmp_path: Path) -> None:
    """Where z_1 is a function of z_2, the held-out loss with the true condition falls well below that without it."""
    config = config_with(num_steps=400, batch_size=40, lr=3e-3, ema_decay=0.98, checkpoint_every=400, log_every=400)
    config = dataclasses.replace(
        config,
        levels=(config.level(1), dataclasses.replace(config.level(2), condition_noise=0.0)),
        diffusion=DiffusionConfig(prediction="x"),  # whose loss is that of z_1 itself, at every noise level
    )
    t = trainer(batches, tmp_path, config)
    t.run()
    assert t.history[-1]["held_out_loss"] < 0.5 * t.history[-1]["held_out_loss_without_conditions"]


def test_learning_rate_schedule(batches: LatentBatches, tmp_path: Path) -> None:
    """The warm-up is linear and ends at lr; constant stays there, cosine ends at zero, half-way at a half."""
    constant = trainer(batches, tmp_path, config_with(warmup_steps=4, lr=1.0))
    assert [constant.learning_rate(s) for s in (0, 1, 3, 4, 19)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = trainer(batches, tmp_path, config_with(warmup_steps=4, lr=1.0, lr_decay="cosine"))
    assert [cosine.learning_rate(s) for s in (3, 12)] == pytest.approx([1.0, 0.5])
    assert cosine.learning_rate(20) == pytest.approx(0.0)


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


def test_log_lines_say_how_long_batches_were_waited_for(batches: LatentBatches, tmp_path: Path) -> None:
    """As a share of the time since the last line: about all of it where batches are slow, next to none else."""
    slow, fast = (trainer(batches, tmp_path / name) for name in ("slow", "fast"))
    make_slow, step_fast = slow.batch, fast.train_step
    slow.batch = lambda step: (time.sleep(0.2), make_slow(step))[1]
    fast.train_step = lambda batch: (time.sleep(0.05), step_fast(batch))[1]
    for t in (slow, fast):
        t.run(until_step=10)
    assert slow.history[-1]["loader_wait"] > 0.5
    assert 0 <= fast.history[-1]["loader_wait"] < 0.2
