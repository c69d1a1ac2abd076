"""The step of the trainer: learns what there is to learn, stops on numbers that are not finite, rounds as it may."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small import config_with, make_batches, optimizer_slots, state_hash, trainer

from nestdiff_core.config import DiffusionConfig
from nestdiff_core.errors import NumericsError
from nestdiff_core.training.checkpoint import list_checkpoints
from nestdiff_core.training.data import Batch, LatentBatches
from nestdiff_core.training.loop import Trainer


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
from small import config_with, make_batches, trainer
folder = Path(sys.argv[2])
batches, told = make_batches(folder, 48), {}
device, parts = ("cuda", 1) if torch.cuda.is_available() else ("cpu", 2)
for name in ("eager", "compiled"):
    config = config_with(
        optimizer="muon",
        compile=name == "compiled",
        cuda_graphs=name == "compiled" and parts == 1,
        checkpoint_every=3,
        log_every=3,
        activation_checkpointing=True,
        accumulation_steps=parts,
    )
    t = trainer(batches, folder / name, config, device=device)
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
from small import config_with, make_batches, trainer
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


def test_a_rate_is_of_the_time_that_is_trained(batches: LatentBatches, tmp_path: Path) -> None:
    """What passes before `run`, or between two calls of it, is not counted."""
    t = trainer(batches, tmp_path, config_with(log_every=4))
    t.run(until_step=2)
    time.sleep(1)
    start = time.monotonic()
    t.run(until_step=4)
    seconds = time.monotonic() - start
    assert t.history[-1]["images_per_second"] >= 2 * t.train.batch_size / seconds


def test_learning_rate_schedule(batches: LatentBatches, tmp_path: Path) -> None:
    """The warm-up is linear and ends at lr; constant stays there, cosine ends at zero, half-way at a half."""
    constant = trainer(batches, tmp_path, config_with(warmup_steps=4, lr=1.0))
    assert [constant.learning_rate(s) for s in (0, 1, 3, 4, 19)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = trainer(batches, tmp_path, config_with(warmup_steps=4, lr=1.0, lr_decay="cosine"))
    assert [cosine.learning_rate(s) for s in (3, 12)] == pytest.approx([1.0, 0.5])
    assert cosine.learning_rate(20) == pytest.approx(0.0)


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
