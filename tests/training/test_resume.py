"""Checkpoints: resuming to the bit, damage, forks, what is kept."""

import dataclasses
import errno
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from small import config_with, optimizer_slots, state_hash, trainer

from nestdiff_core.config import DiffusionConfig
from nestdiff_core.errors import ConfigError, EnvironmentFault, IntegrityError, Interrupted, NumericsError
from nestdiff_core.recipes import toy
from nestdiff_core.training.checkpoint import list_checkpoints, load_latest
from nestdiff_core.training.data import Batch, LatentBatches
from nestdiff_core.training.signals import stop_on_signals


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


def test_further_averages_are_those_of_their_decay_and_resume_to_the_bit(
    batches: LatentBatches, tmp_path: Path, uninterrupted: str
) -> None:
    """Decay d: a step's average is d times the last and 1 - d times the weights, 0 the weights themselves; stopping
    anywhere changes no bit of them, and keeping them none of the rest."""
    config = config_with(more_ema_decays=(0.5, 0.0))
    whole = trainer(batches, tmp_path / "whole", config)
    expected = {name: value.clone().double() for name, value in whole.weights.items()}
    for until in range(1, 6):
        whole.run(until_step=until)
        for name, value in whole.weights.items():
            expected[name] = 0.5 * expected[name] + 0.5 * value.double()
    for name, value in whole.averages[0.5].items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(whole.averages[0.0][name], whole.weights[name])
    whole.run()
    assert state_hash(whole) == uninterrupted
    trainer(batches, tmp_path / "parts", config).run(until_step=7)
    rest = trainer(batches, tmp_path / "parts", config)
    rest.run()
    for decay, averages in whole.averages.items():
        assert all(torch.equal(value, rest.averages[decay][name]) for name, value in averages.items())


def test_an_average_that_a_fork_does_not_find_begins_with_the_weights(batches: LatentBatches, tmp_path: Path) -> None:
    """Others go on; those that the new denoiser does not keep are left behind."""
    first = trainer(batches, tmp_path / "a", config_with(more_ema_decays=(0.5, 0.25)))
    first.run(until_step=10)
    source = str(list_checkpoints(tmp_path / "a")[-1])
    fork = trainer(batches, tmp_path / "b", config_with(fork_from=source, more_ema_decays=(0.75, 0.5)))
    for name, value in first.weights.items():
        assert torch.equal(fork.averages[0.5][name], first.averages[0.5][name])
        assert torch.equal(fork.averages[0.75][name], value)


def test_averages_that_warm_up_forget_where_training_began(batches: LatentBatches, tmp_path: Path) -> None:
    """Step n mixes (1 + n) / (10 + n) of what was, at most the decay; resumed, it goes on from there."""
    config = config_with(ema_warmup=True, ema_decay=0.3)
    t = trainer(batches, tmp_path, config)
    name = next(iter(t.weights))
    expected = t.ema[name].clone()
    for n in range(6):
        t.run(until_step=n + 1)
        keep = min(0.3, (1 + n) / (10 + n))  # .1, .18, .25, .3, ...
        expected = keep * expected + (1 - keep) * t.weights[name]
        torch.testing.assert_close(t.ema[name], expected)
        t = trainer(batches, tmp_path, config)


@pytest.mark.parametrize("decays", [(0.9,), (0.5, 0.5), (1.5,)])
def test_an_average_is_kept_once(decays: tuple[float, ...]) -> None:
    """No decay twice, nor that of `ema_decay` (0.9)."""
    with pytest.raises(ConfigError, match="more_ema_decays"):
        config_with(more_ema_decays=decays)


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
    t.checkpoints.wait()
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


def test_a_fork_goes_on_with_other_settings(batches: LatentBatches, tmp_path: Path) -> None:
    """From another denoiser's checkpoint: its weights, moving average, optimiser and step, but its own learning rate;
    one with another network, diffusion process or optimiser is refused by the name of what differs."""
    first = trainer(batches, tmp_path / "a")
    first.run(until_step=10)
    source = str(list_checkpoints(tmp_path / "a")[-1])
    fork = trainer(batches, tmp_path / "b", config_with(fork_from=source, lr=1e-5, lr_decay="cosine"))
    assert fork.step == 10
    for mine, theirs in ((fork.weights, first.weights), (fork.ema, first.ema)):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert all(torch.equal(a, b) for a, b in zip(optimizer_slots(fork), optimizer_slots(first), strict=True))
    fork.run(until_step=12)
    assert fork.optimizer.param_groups[0]["lr"] == pytest.approx(fork.learning_rate(11)) != first.learning_rate(11)
    assert trainer(batches, tmp_path / "b", config_with(fork_from=source)).step == 12  # its own come first
    wide = dataclasses.replace(
        config_with(fork_from=source).level(1), model=dataclasses.replace(toy().level(1).model, depth=4)
    )
    other = dataclasses.replace(config_with(), levels=(wide, toy().level(2)))
    with pytest.raises(ConfigError, match="fork_from") as caught:
        trainer(batches, tmp_path / "c", other)
    assert "out_blocks" in str(caught.value) or "in_blocks" in str(caught.value)
    other = dataclasses.replace(config_with(fork_from=source), diffusion=DiffusionConfig(prediction="v"))
    with pytest.raises(ConfigError, match=r"expected \{'diffusion': .*'v'.*found \{'diffusion': .*'eps'"):
        trainer(batches, tmp_path / "c", other)
    with pytest.raises(ConfigError, match=r"expected \{'optimizer': 'muon'\}, found \{'optimizer': 'adamw'\}"):
        trainer(batches, tmp_path / "c", config_with(fork_from=source, optimizer="muon"))
    with pytest.raises(ConfigError, match=r"expected \{'step': 'below num_steps = 10'\}, found \{'step': 10\}"):
        trainer(batches, tmp_path / "c", config_with(fork_from=source, num_steps=10, checkpoint_every=10))


def test_a_fork_from_nowhere_is_refused_by_its_name(batches: LatentBatches, tmp_path: Path) -> None:
    """A path that is no checkpoint is a setting to correct, not an artifact to make again."""
    with pytest.raises(ConfigError, match="fork_from is not a checkpoint"):
        trainer(batches, tmp_path / "a", config_with(fork_from=str(tmp_path / "step_00000010")))


def test_a_checkpoint_that_is_being_written_is_the_last_good_one(
    batches: LatentBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that explodes while it is on its way to the disk is an error that names it."""
    from nestdiff_core.training import checkpoint

    t, write = trainer(batches, tmp_path, config_with(checkpoint_every=5)), checkpoint.save_file
    t.run(until_step=4)

    def slow(tensors: dict[str, torch.Tensor], path: Path) -> None:
        time.sleep(1)
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    make = t.batch

    def damaged(step: int) -> Batch:
        batch = make(step)
        if step == 5:
            batch.latents[1][2] = float("inf")
        return batch

    t.batch = damaged
    with pytest.raises(NumericsError, match="step 5") as caught:
        t.run()
    assert str(caught.value.path).endswith("step_00000005")


def test_a_checkpoint_of_a_cpu_leaves_the_gpu_alone(
    batches: LatentBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be in use, and would be given a context."""

    def touched(*_: object) -> None:
        raise AssertionError("the GPU was waited for")

    t = trainer(batches, tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", touched)
    t.save()
    t.checkpoints.wait()


def test_checkpoints_kept_for_good(batches: LatentBatches, tmp_path: Path) -> None:
    """Those of every keep_every steps stay beside the newest."""
    trainer(batches, tmp_path, config_with(checkpoint_every=2, keep_last=1, keep_every=6)).run()
    assert [p.name[-2:] for p in list_checkpoints(tmp_path)] == ["06", "12", "18", "20"]


def test_training_goes_on_while_a_checkpoint_is_written(
    batches: LatentBatches, tmp_path: Path, uninterrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are done before it is on the disk, it holds the state of its own step, and the next waits for it."""
    from nestdiff_core.training import checkpoint

    t, write, during = trainer(batches, tmp_path), checkpoint.save_file, []

    def slow(tensors: dict[str, torch.Tensor], path: Path) -> None:
        start = t.step
        deadline = time.monotonic() + 30
        while t.step == start and t.step < 20 and time.monotonic() < deadline:
            time.sleep(0.001)
        during.append(t.step - start)
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    t.run()
    monkeypatch.undo()
    assert max(during) > 0 and state_hash(t) == uninterrupted
    assert state_hash(trainer(batches, tmp_path)) == uninterrupted
    oldest = list_checkpoints(tmp_path)[0]
    alone = trainer(batches, tmp_path / "alone")
    alone.run(until_step=int(oldest.name[-2:]))
    same = tmp_path / "alone" / oldest.name
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (oldest / name).read_bytes() == (same / name).read_bytes()


def test_a_checkpoint_that_cannot_be_written_stops_the_run(
    batches: LatentBatches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soon after, not at the end; nothing of it stays and the one before is whole."""
    from nestdiff_core.training import checkpoint

    t = trainer(batches, tmp_path)
    t.run(until_step=5)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(EnvironmentFault, match="No space"):
        t.run(until_step=20)
    assert t.step < 20
    monkeypatch.undo()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step_00000005"]
    assert trainer(batches, tmp_path).step == 5
