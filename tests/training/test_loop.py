"""The trainer: resumes to the bit, learns what there is to learn, stops on numbers that are not finite."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestdiff_core.config import ConditioningConfig, DiffusionConfig, ExperimentConfig
from nestdiff_core.config_io import deciding
from nestdiff_core.diffusion.schedule import VPSchedule
from nestdiff_core.errors import ConfigError, EnvironmentFault, IntegrityError, Interrupted, NumericsError
from nestdiff_core.recipes import toy
from nestdiff_core.stores.reader import StoreReader
from nestdiff_core.stores.writer import create_store, write_shard
from nestdiff_core.training.ahead import Ahead
from nestdiff_core.training.checkpoint import list_checkpoints, load_latest
from nestdiff_core.training.data import Batch, BatchOrder, Draws, LatentBatches, draw
from nestdiff_core.training.loop import Trainer
from nestdiff_core.training.report import MEASURED
from nestdiff_core.training.signals import stop_on_signals

NUM_IMAGES = 48


def config_with(level: int = 1, **train: object) -> ExperimentConfig:
    base = toy()
    level_config = dataclasses.replace(base.level(level), train=dataclasses.replace(base.level(level).train, **train))  # pyright: ignore[reportArgumentType]
    levels = tuple(level_config if entry.level == level else entry for entry in base.levels)
    return dataclasses.replace(base, levels=levels, conditioning=ConditioningConfig(labels="class"))


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> LatentBatches:
    return make_batches(tmp_path_factory.mktemp("latents"), NUM_IMAGES)


def make_batches(folder: Path, num_images: int) -> LatentBatches:
    """Correlated random latents of the toy experiment's two levels, in real stores."""
    rng, readers = np.random.default_rng(0), {}
    top = rng.standard_normal((num_images, 4, 2, 2)).astype(np.float32)
    image = np.tanh(np.repeat(np.repeat(top[:, :1], 4, 2), 4, 3))
    for level, clean in {1: image, 2: top}.items():
        z = np.stack([clean, clean[..., ::-1]], axis=1)  # two views
        create_store(folder / f"{level}.zarr", {f"z_{level}": z.shape[1:]}, "float16", [num_images], 16, {})
        write_shard(folder / f"{level}.zarr", 0, {f"z_{level}": z})
        readers[level] = StoreReader(folder / f"{level}.zarr", f"z_{level}")
    return LatentBatches(readers, np.arange(num_images) % 10)


def trainer(
    batches: LatentBatches,
    folder: Path,
    config: ExperimentConfig | None = None,
    warnings: list[str] | None = None,
    num_held_out: int = 8,
    device: str = "cpu",
) -> Trainer:
    assert batches.labels is not None
    rows, config = np.arange(len(batches.labels)), config or config_with()
    return Trainer(
        config,
        1,
        batches,
        train_rows=rows[:-num_held_out],
        held_out_rows=rows[-num_held_out:],
        num_classes=10,
        folder=folder,
        device=torch.device(device),
        record={"config": {"diffusion": deciding(config.diffusion)}},
        warn=(warnings or []).append,
    )


def state_hash(t: Trainer) -> str:
    """One hash over model, EMA, optimiser, step and losses."""
    total = hashlib.sha256()
    state = t.optimizer.state_dict()["state"]
    slots = [value for index in sorted(state) for _, value in sorted(state[index].items())]
    for tensor in [*t.model.state_dict().values(), *t.ema.values(), *slots]:
        total.update(tensor.numpy().tobytes())
    history = [sorted((k, v) for k, v in line.items() if k not in MEASURED) for line in t.history]
    total.update(repr((t.step, history, t.window.state())).encode())
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


@pytest.mark.parametrize("decays", [(0.9,), (0.5, 0.5), (1.5,)])
def test_an_average_is_kept_once(decays: tuple[float, ...]) -> None:
    """No decay twice, nor that of `ema_decay` (0.9)."""
    with pytest.raises(ConfigError, match="more_ema_decays"):
        config_with(more_ema_decays=decays)


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


def test_explosion_stops_the_run(batches: LatentBatches, tmp_path: Path) -> None:
    """A loss that explodes is a NumericsError with level and step, and the last checkpoint stays."""
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
        t.settle(t.train_step(batch))
    assert f"of 1 of {len(batch.rows)} images (row {batch.rows[3]})" in str(caught.value.found)
    assert "no checkpoint yet" in caught.value.fix


def test_conditions_help_when_they_tell_the_image(tmp_path: Path) -> None:
    """Where z_1 is a function of z_2, the held-out loss with the true condition falls well below that without it,
    and most where the noise hides the image itself."""
    config = config_with(num_steps=800, batch_size=40, lr=3e-3, ema_decay=0.98, checkpoint_every=800, log_every=800)
    config = dataclasses.replace(
        config,
        levels=(config.level(1), dataclasses.replace(config.level(2), condition_noise=0.0)),
        diffusion=DiffusionConfig(prediction="x"),  # whose loss is that of z_1 itself, at every noise level
    )
    t = trainer(make_batches(tmp_path, 1024), tmp_path / "checkpoints", config, num_held_out=256)
    t.run()
    told, hidden = "held_out_loss", "held_out_loss_without_conditions"
    gain = {part: t.history[-1][hidden + part] / t.history[-1][told + part] for part in ("", "_t0.00", "_t0.75")}
    assert gain[""] > 2 and gain["_t0.75"] > gain["_t0.00"]


def same_to_rounding(one: Trainer, other: Trainer) -> None:
    """Losses of all lines, and the weights in the end, are the same to 1e-4."""
    for line, expected in zip(one.history, other.history, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    for name, value in one.ema.items():
        torch.testing.assert_close(value, other.ema[name], rtol=1e-3, atol=1e-4)


def test_parts_of_a_batch_give_the_step_of_the_whole(batches: LatentBatches, tmp_path: Path) -> None:
    """However many parts the gradient is added up from; and a part is never larger than the batch over their number."""
    whole = trainer(batches, tmp_path / "1", config_with(batch_size=24))
    parts = trainer(batches, tmp_path / "4", config_with(batch_size=24, accumulation_steps=4))
    seen, network = set(), parts.network
    network.register_forward_pre_hook(lambda module, inputs: seen.add(len(inputs[0])) if module.training else None)
    for t in (whole, parts):
        t.run()
    same_to_rounding(parts, whole)
    assert seen == {6}


def test_checkpointed_activations_change_no_bit(batches: LatentBatches, tmp_path: Path, uninterrupted: str) -> None:
    """Blocks that are computed again in the backward pass: each is called twice a step, and the result is the same."""
    t = trainer(batches, tmp_path, config_with(activation_checkpointing=True))
    calls: list[bool] = []
    t.model.mid_block.register_forward_pre_hook(lambda module, _: calls.append(True) if module.training else None)
    t.run()
    assert state_hash(t) == uninterrupted and len(calls) == 2 * t.step


def test_bfloat16_follows_float32(batches: LatentBatches, tmp_path: Path) -> None:
    """The loss of each line within 3 %, from other bits, with weights, EMA and optimiser in float32; blocks that are
    computed twice are computed in bfloat16 twice, to the bit."""
    exact, mixed, twice = (
        trainer(batches, tmp_path / str(i), config_with(num_steps=60, log_every=20, lr=1e-3, **how))
        for i, how in enumerate(
            (
                {"precision": "float32"},
                {"precision": "bfloat16"},
                {"precision": "bfloat16", "activation_checkpointing": True},
            )
        )
    )
    for t in (exact, mixed, twice):
        t.run()
    assert state_hash(twice) == state_hash(mixed)
    for line, expected in zip(mixed.history, exact.history, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=0.03) and line["loss"] != expected["loss"]
    slots = [value for state in mixed.optimizer.state.values() for value in state.values()]
    assert {value.dtype for value in [*mixed.weights.values(), *mixed.ema.values(), *slots]} == {torch.float32}


COMPILED = """
import json, sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
sys.path.insert(0, sys.argv[1])
from nestdiff_core.models import count_macs
from test_loop import config_with, make_batches, trainer
folder = Path(sys.argv[2])
batches, told = make_batches(folder, 48), {}
for name in ("eager", "compiled"):
    config = config_with(
        compile=name == "compiled",
        cuda_graphs=name == "compiled",
        checkpoint_every=3,
        log_every=3,
        activation_checkpointing=True,
        accumulation_steps=2,
    )
    t = trainer(batches, folder / name, config, device="cuda" if torch.cuda.is_available() else "cpu")
    t.run(until_step=3)
    graphs = counters["stats"]["unique_graphs"]
    t.run(until_step=12)
    told[name] = {
        "losses": [[line["loss"], line["held_out_loss"]] for line in t.history],
        "graphs": [graphs, counters["stats"]["unique_graphs"]],
        "breaks": sum(counters["graph_break"].values()),
        "names": sorted(t.model.state_dict()),
        "macs": count_macs(t.model),
    }
print(json.dumps(told))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for a CPU needs g++")
def test_a_compiled_network_is_one_graph(tmp_path: Path) -> None:
    """No graph break in a step, one graph for training and one for validation, compiled once; losses to rounding.

    On a GPU, where there is one, and then as CUDA graphs.
    """
    # In a process without the runtime type checks of the tests, which cannot be compiled.
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(Path(__file__).parent), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    eager, compiled = told["eager"], told["compiled"]
    assert eager["graphs"] == [0, 0] and compiled["graphs"] == [2, 2] and compiled["breaks"] == 0
    np.testing.assert_allclose(compiled["losses"], eager["losses"], rtol=1e-4)
    for same in ("names", "macs"):  # a checkpoint does not tell whether the network was compiled
        assert compiled[same] == eager[same]


def test_loss_is_told_by_noise_level(batches: LatentBatches, tmp_path: Path) -> None:
    """Each quarter of t has the mean of its images, and together, weighted by how many they are, they are the loss."""
    t = trainer(batches, tmp_path, config_with(log_every=20, batch_size=40))
    t.run(until_step=19)
    losses, times = t.window.sums, []
    for step in range(19):
        times.append(t.batch(step).draws.t)
    counts = torch.histc(torch.cat(times), bins=4, min=0.0, max=1.0)
    assert losses[1].tolist() == pytest.approx(counts.tolist(), abs=2)  # a time on a border may fall on either side
    assert losses[1].sum() == 19 * 40
    t.run()
    line = t.history[-1]
    for name in ("loss", "held_out_loss", "held_out_loss_without_conditions"):
        parts = [value for key, value in line.items() if key.startswith(f"{name}_t0.")]
        assert len(parts) == 4 and min(parts) < line[name] < max(parts)
    equal = [line[f"held_out_loss_t0.{part}"] for part in ("00", "25", "50", "75")]
    assert np.mean(equal) == pytest.approx(line["held_out_loss"])  # held-out times are spread evenly


def test_an_exploded_step_is_left_out(batches: LatentBatches, tmp_path: Path) -> None:
    """By policy: it changes neither weights nor optimiser, is counted, said with its images, and kept across a stop;
    one more than allowed stops the run."""
    config, said = config_with(max_skipped_steps=1), ["start"]
    t = trainer(batches, tmp_path, config, warnings=said)
    make = t.batch

    def damaged(step: int) -> Batch:
        batch = make(step)
        if step in (6, 15):
            batch.latents[1][2] = float("inf")
        return batch

    t.batch = damaged
    t.run(until_step=6)
    before = [value.clone() for value in [*t.weights.values(), *optimizer_slots(t)]]
    t.run(until_step=7)
    assert all(torch.equal(a, b) for a, b in zip(before, [*t.weights.values(), *optimizer_slots(t)], strict=True))
    assert t.skipped == 1 and "step 6" in said[1] and f"row {make(6).rows[2]}" in said[1]
    again = trainer(batches, tmp_path, config)
    again.batch = damaged
    assert again.skipped == 1
    with pytest.raises(NumericsError, match="step 15"):
        again.run()
    assert np.isfinite([line["loss"] for line in again.history]).all() and again.history[-1]["skipped_steps"] == 1


def test_numbers_may_be_read_a_step_late(batches: LatentBatches, tmp_path: Path, uninterrupted: str) -> None:
    """As on a GPU: with stops on the way the result is the same to the bit, and an exploded step is still the one that
    is named and leaves no trace."""
    for until in (7, 12, None):
        t = trainer(batches, tmp_path / "a")
        t.runs_ahead = True
        t.run(until_step=until)
    assert state_hash(t) == uninterrupted
    late = trainer(batches, tmp_path / "b", config_with(log_every=20))
    late.runs_ahead, make = True, late.batch

    def damaged(step: int) -> Batch:
        batch = make(step)
        if step == 6:
            batch.latents[1][2] = float("nan")
        return batch

    late.batch = damaged
    with pytest.raises(NumericsError, match="step 6"):
        late.run()
    assert late.step == 8 and all(value.isfinite().all() for value in [*late.weights.values(), *optimizer_slots(late)])


PROCESSES = """
import sys
from pathlib import Path
import torch.distributed as dist
from nestdiff_core.errors import NumericsError
rank, tests, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
sys.path.insert(0, tests)
from test_loop import config_with, make_batches, trainer
dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
said = ["start"]
t = trainer(make_batches(folder / str(rank), 48), folder, config_with(max_skipped_steps=1), warnings=said)
make = t.batch
def damaged(step):
    batch = make(step)
    if rank == 1 and step in (2, 4):
        batch.latents[1][1] = float("inf")
    return batch
t.batch = damaged
if rank == 1:
    print(*(make(step).rows[1] for step in (2, 4)))
try:
    t.run()
except NumericsError as error:
    print(said[1:], error)
"""


def test_any_process_names_the_images_of_all(tmp_path: Path) -> None:
    """Two processes, an image that breaks the step in the second: the first, which is heard, names it; and it alone
    warns of steps that are left out."""
    command = [sys.executable, "-c", PROCESSES]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(Path(__file__).parent), str(tmp_path)], stdout=-1, stderr=-1, text=True
        )
        for rank in (0, 1)
    ]
    (first, problems), (second, _) = (process.communicate(timeout=200) for process in started)
    bad = second.splitlines()[0].split()
    assert f"(row {bad[0]})" in first, problems
    assert f"(row {bad[1]})" in first and "of 1 of 32 images" in first
    assert second.splitlines()[1].startswith("[] ")


def optimizer_slots(t: Trainer) -> list[torch.Tensor]:
    return [value for p in t.model.parameters() for _, value in sorted(t.optimizer.state[p].items())]


def test_a_fork_goes_on_with_other_settings(batches: LatentBatches, tmp_path: Path) -> None:
    """From another denoiser's checkpoint: its weights, moving average, optimiser and step, but its own learning rate;
    one with another network, or for another diffusion process, is refused by the name of what differs."""
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


def test_a_rate_is_of_the_time_that_is_trained(batches: LatentBatches, tmp_path: Path) -> None:
    """What passes before `run`, or between two calls of it, is not counted."""
    t = trainer(batches, tmp_path, config_with(log_every=4))
    t.run(until_step=2)
    time.sleep(1)
    start = time.monotonic()
    t.run(until_step=4)
    seconds = time.monotonic() - start
    assert t.history[-1]["images_per_second"] >= 2 * t.train.batch_size / seconds


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_trains_as_the_cpu_does(batches: LatentBatches, tmp_path: Path, precision: str) -> None:
    """The same losses to rounding, an exploded step that is left out, and a resume that changes no bit."""
    config = config_with(precision=precision, num_steps=20, log_every=5, checkpoint_every=5)
    on_cpu, on_gpu = (trainer(batches, tmp_path / d, config, device=d) for d in ("cpu", "cuda"))
    on_gpu.run(until_step=10)
    on_gpu = trainer(batches, tmp_path / "cuda", config, device="cuda")
    assert on_gpu.step == 10
    for t in (on_cpu, on_gpu):
        t.run()
    mine, theirs = ([line["loss"] for line in t.history] for t in (on_cpu, on_gpu))
    assert theirs == pytest.approx(mine, rel=1e-4 if precision == "float32" else 0.03)
    before = {name: value.clone() for name, value in on_gpu.weights.items()}
    batch = on_gpu.batch(0)
    batch.latents[1].fill_(float("nan"))
    assert on_gpu.train_step(batch).read().exploded
    assert all(torch.equal(value, before[name]) for name, value in on_gpu.weights.items())


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
    fast.train_step = lambda *a, **k: (time.sleep(0.05), step_fast(*a, **k))[1]
    for t in (slow, fast):
        t.run(until_step=10)
    assert slow.history[-1]["loader_wait"] > 0.5
    assert 0 <= fast.history[-1]["loader_wait"] < 0.2
