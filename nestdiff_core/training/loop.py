"""The training loop of one denoiser: from latents in stores to an exported EMA, resumable to the bit.

`train_level` runs in one process or in each process of a torchrun group. It owns the optimiser, the EMA, the
checkpoints and the signals; what a step is trained on comes from data.py, the loss from diffusion/loss.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nestdiff_core.config import ExperimentConfig, TrainConfig
from nestdiff_core.config_io import deciding
from nestdiff_core.diffusion.loss import level_loss
from nestdiff_core.diffusion.schedule import NoiseSchedule, make_schedule
from nestdiff_core.errors import ConfigError, Interrupted, NumericsError, memory_faults
from nestdiff_core.models.nested import build_denoiser, count_macs
from nestdiff_core.precision import autocast, matrix_precision
from nestdiff_core.progress import Progress, part_of, silent
from nestdiff_core.training import group
from nestdiff_core.training.ahead import Ahead
from nestdiff_core.training.begin import forked_checkpoint, published_weights
from nestdiff_core.training.checkpoint import (
    CheckpointWriter,
    list_checkpoints,
    load_latest,
    read_tensors,
    restore,
)
from nestdiff_core.training.data import Batch, BatchOrder, Draws, LatentBatches, draw, validation_rows
from nestdiff_core.training.optimizer import make_optimizer
from nestdiff_core.training.report import (
    NOISE_LEVELS,
    Line,
    StepNumbers,
    StepReport,
    Window,
    by_noise_level,
    matrix_rate,
    named_losses,
    peak_memory,
)

VALIDATION_SEED = 2**31 - 1
NAMED = 5  # images that an error names
# While it runs, with the parts of losses by noise level.
SHOWN = ("loss", "held_out_loss", "gradient_norm", "images_per_second", "mfu", "loader_wait")


def ignore(_: object) -> None:
    """For who does not want the lines of the log, or warnings."""


class Trainer:
    """Everything that changes while one level is trained, and the step that changes it.

    config, level: which denoiser. batches: its latents and conditions. train_rows, held_out_rows: image rows of
    the two splits. null_context: tokens of the empty caption, for captioned experiments. folder: where checkpoints
    go. record: what each checkpoint's state.json begins with. name: what an error calls the image of a row.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        level: int,
        batches: LatentBatches,
        *,
        train_rows: np.ndarray,
        held_out_rows: np.ndarray,
        num_classes: int,
        null_context: Tensor | None = None,
        folder: Path,
        device: torch.device,
        record: dict[str, Any],
        name: Callable[[int], str] = "row {}".format,
        warn: Callable[[str], object] = print,
    ) -> None:
        self.config, self.level, self.batches, self.device, self.name = config, level, batches, device, name
        self.train: TrainConfig = config.level(level).train
        self.condition_noise = {m: config.level(m).condition_noise for m in config.levels_above(level)}
        self.schedule: NoiseSchedule = make_schedule(config.diffusion)
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        with group.together():
            self._check_shares()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            self.model = build_denoiser(config, level, num_classes).to(device)
        self.model.checkpointing = self.train.activation_checkpointing
        if null_context is not None:
            self.model.null_context.copy_(null_context)
        if self.train.start_from:
            self.model.start_from(published_weights(Path(self.train.start_from).expanduser(), level=level))
        self.weights = {name: value.detach() for name, value in self.model.state_dict().items()}
        self.averages = {
            decay: {name: value.clone() for name, value in self.weights.items()}
            for decay in (self.train.ema_decay, *self.train.more_ema_decays)
        }
        self.ema = self.averages[self.train.ema_decay]
        self.optimizer = make_optimizer(self.model, self.train)
        self.order = BatchOrder(train_rows, self.train.batch_size, self.train.seed)
        self.held_out = validation_rows(held_out_rows)
        self.folder, self.record = folder, record
        self.warn = warn if self.rank == 0 else ignore  # once, not by every process
        self.checkpoints = CheckpointWriter(folder, keep_last=self.train.keep_last, keep_every=self.train.keep_every)
        self.step = self.skipped = 0
        self.runs_ahead = device.type != "cpu"  # a GPU works on while its queue is filled
        self.history: list[Line] = []
        self.window = Window()
        self._resume()
        # A forward pass and a backward pass of twice its cost; one MAC is two operations.
        self.flops_per_image = 3.0 * 2.0 * count_macs(self.model)
        if self.train.compile:
            # A notebook may train all levels in one process, each compiled for training and for validation.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * config.num_levels)
            mode = "reduce-overhead" if self.train.cuda_graphs else None
            self.model.compile(fullgraph=True, dynamic=False, mode=mode)
        self.network: nn.Module = self.model
        if self.world_size > 1:
            self.network = DistributedDataParallel(self.model, broadcast_buffers=False)  # they never change

    def _check_shares(self) -> None:
        parts = self.world_size * self.train.accumulation_steps
        if self.train.batch_size % parts:
            raise ConfigError(
                "The batch cannot be shared evenly",
                stage="denoiser",
                level=self.level,
                key="levels.train.batch_size",
                expected=f"a multiple of {self.world_size} processes x {self.train.accumulation_steps} parts = {parts}",
                found=self.train.batch_size,
                fix="Change the number of processes or levels.train.accumulation_steps.",
            )

    def _resume(self) -> None:
        """Go on from the newest checkpoint that any host has: it is read there and sent to the others."""
        expected, found = self.record.get("fingerprint"), None
        with group.together():
            if group.first_here():
                found = load_latest(self.folder, warn=self.warn, level=self.level, expected=expected)
            if found is None and self.train.fork_from and self.rank == 0:
                found = self._forked()
        path, mine = (None, None) if found is None else found
        source, state = group.from_newest(-1 if mine is None else mine["step"], mine)
        if state is None:
            return
        with group.together():
            tensors = read_tensors(path) if path is not None and source == self.rank else {}
        tensors = group.tensors_of(source, tensors, self.device)
        restore(tensors, model=self.model, ema=self._named_averages(), optimizer=self.optimizer)
        self.step, self.skipped, self.history = state["step"], state.get("skipped", 0), state["history"]
        self.window = Window.restored(state.get("window", {}))

    def _forked(self) -> tuple[Path, dict[str, Any]]:
        return forked_checkpoint(
            Path(self.train.fork_from).expanduser(),
            level=self.level,
            num_steps=self.train.num_steps,
            weights={name: tuple(value.shape) for name, value in self.weights.items()},
            diffusion=deciding(self.config.diffusion),
            optimizer=self.train.optimizer,
        )

    def learning_rate(self, step: int) -> float:
        """Rate of `step` (from 0): a linear warm-up that reaches lr, then constant or a cosine to zero."""
        train = self.train
        rate = train.lr * min(1.0, (step + 1) / max(1, train.warmup_steps))
        if train.lr_decay == "cosine" and step >= train.warmup_steps:
            progress = (step - train.warmup_steps) / max(1, train.num_steps - train.warmup_steps)
            rate *= 0.5 * (1.0 + math.cos(math.pi * progress))
        return rate

    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Per-image loss (B,) of `network`."""
        z_above, draws = dict(batch.latents), batch.draws
        with autocast(self.train.precision, self.device):
            return level_loss(
                network,
                self.schedule,
                self.config.diffusion.prediction,
                z_l=z_above.pop(self.level),
                z_above=z_above,
                condition_noise=self.condition_noise,
                t=draws.t,
                eps=draws.eps,
                eta=draws.eta,
                labels=batch.labels,
                drop=draws.drop,
            )

    def batch(self, step: int) -> Batch:
        """This process's share of what `step` trains on, on the device."""
        train = self.train
        draws = self._draw(train.seed, step, train.batch_size, train.condition_drop, train.noise_levels)
        rows = self.order.batch(step)[self.rank :: self.world_size]
        return self.batches.load(rows, draws.share(self.rank, self.world_size), self.device)

    def train_step(self, batch: Batch, *, stop: bool = False) -> StepReport:
        """One optimiser step. One that explodes leaves weights and optimiser as they are.

        stop: whether this process was asked to stop; the report tells all.
        """
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.learning_rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        parts = [batch.share(i, self.train.accumulation_steps) for i in range(self.train.accumulation_steps)]
        losses = torch.cat([self._add_gradient(part, last=part is parts[-1]) for part in parts])
        t, rows = torch.cat([part.draws.t for part in parts]), np.concatenate([part.rows for part in parts])
        votes = torch.full((1,), float(stop), dtype=torch.float64, device=self.device)
        told = self._sum(torch.cat([by_noise_level(losses, t).flatten(), votes]))
        sums, votes = told[:-1].view(2, -1), told[-1]
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm, loss = nn.utils.get_total_norm(gradients), sums[0].sum() / sums[1].sum()
        exploded = ~(torch.isfinite(norm) & (loss <= self.train.max_loss))
        if self.train.grad_clip:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.train.grad_clip, norm)
        # The fused kernel asks for it on the device, as it does for a gradient scaler: nobody waits for the answer.
        self.optimizer.found_inf = exploded.float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self._update_ema()
        self.step += 1
        return StepReport(self.step - 1, rows, losses, sums=sums, norm=norm, exploded=exploded, stop=votes)

    def _add_gradient(self, part: Batch, *, last: bool) -> Tensor:
        """Add the gradient of a part of the batch; returns its losses. Processes share gradients with the last part."""
        network = self.network
        self._begin_graph()
        with network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext():
            losses = self.loss(network, part)
            (losses.mean() / self.train.accumulation_steps).backward()
        return losses.detach()

    def _begin_graph(self) -> None:
        """Before the network is called: what the last call left in a CUDA graph's memory has been used."""
        if self.train.cuda_graphs:  # asked first: the call imports the compiler, which takes seconds
            torch.compiler.cudagraph_mark_step_begin()

    def settle(self, report: StepReport) -> StepNumbers:
        """Read what a step reported; raises NumericsError where it exploded, once too many have."""
        numbers = report.read()
        self.window.add(numbers)
        if numbers.exploded:
            self.skipped += 1
            error = self._exploded(report, numbers)
            if self.skipped > self.train.max_skipped_steps:
                raise error
            self.warn(f"{error} This step is left out, the {self.skipped}. of at most {self.train.max_skipped_steps}.")
        return numbers

    def _exploded(self, report: StepReport, numbers: StepNumbers) -> NumericsError:
        """What happened, to which images, and what is left. All processes call it: each knows its own images only."""
        bad = self._gather(report.rows[~(report.losses <= self.train.max_loss).cpu().numpy()])
        self.checkpoints.wait()  # one that is being written may be the last good one
        few = ", ".join(self.name(int(row)) for row in bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
        kept = list_checkpoints(self.folder)
        return NumericsError(
            "The loss or its gradient has exploded",
            stage="denoiser",
            level=self.level,
            key=f"step {report.step}",
            expected=f"a finite gradient, a loss of at most {self.train.max_loss:g} (levels.train.max_loss)",
            found=f"loss {numbers.loss}, of {len(bad)} of {self.train.batch_size} images ({few or 'none alone'}), "
            f"gradient norm {numbers.gradient_norm}",
            path=kept[-1] if kept else self.folder,
            fix="Lower levels.train.lr or set levels.train.grad_clip, which makes another denoiser; "
            + (
                "that checkpoint is the last good one, from which it can go on (levels.train.fork_from)."
                if kept
                else "there is no checkpoint yet."
            ),
        )

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """Those of all processes."""
        if self.world_size == 1:
            return rows
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, rows)
        return np.concatenate(everyone)

    def _sum(self, values: Tensor) -> Tensor:
        """Over all processes, each of which saw another share of the batch."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    @torch.no_grad()
    def _update_ema(self) -> None:
        weights = list(self.weights.values())
        most = (1 + self.step) / (10 + self.step) if self.train.ema_warmup else 1.0
        for decay, averages in self.averages.items():
            torch._foreach_lerp_(list(averages.values()), weights, 1.0 - min(decay, most))  # pyright: ignore[reportPrivateImportUsage]

    def _named_averages(self) -> dict[str, Tensor]:
        """The tensors of all averages, as a checkpoint names them: those of the further ones begin with their decay."""
        more = {decay: self.averages[decay] for decay in self.train.more_ema_decays}
        return self.ema | {f"{decay} {name}": value for decay, own in more.items() for name, value in own.items()}

    def _draw(
        self, seed: int, step: int, batch_size: int, condition_drop: float, noise_levels: tuple[float, ...] = ()
    ) -> Draws:
        return draw(
            seed=seed,
            step=step,
            batch_size=batch_size,
            shapes=self.batches.shapes(),
            level=self.level,
            schedule=self.schedule,
            noise_levels=noise_levels,
            condition_drop=condition_drop,
            drop_each=self.config.conditioning.drop == "each",
            num_views=self.batches.num_views,
            num_captions=self.batches.num_captions,
        )

    @torch.no_grad()
    def validation_losses(self, *, condition_drop: float = 0.0) -> np.ndarray:
        """Losses of the EMA on held-out images, summed by noise level (2, 4): see `by_noise_level`.

        Noise and times are the same whenever and with however many processes it is called; times are spread evenly
        over [0, 1]. condition_drop 1 hides the conditions.
        """
        count = len(self.held_out)
        draws = self._draw(VALIDATION_SEED, 0, count, condition_drop)
        draws = replace(draws, t=(torch.arange(count) + 0.5) / count)
        mine = draws.share(self.rank, self.world_size)
        rows = self.held_out[self.rank :: self.world_size]
        size = self.train.batch_size // (self.world_size * self.train.accumulation_steps)
        sums = torch.zeros(2, NOISE_LEVELS, dtype=torch.float64, device=self.device)
        with self.averaged_weights() as model:
            parts = -(-len(rows) // size)
            for i in range(parts):
                self._begin_graph()
                batch = self.batches.load(rows[i::parts], mine.share(i, parts), self.device)
                sums += by_noise_level(self.loss(model, batch), batch.draws.t)
        return self._sum(sums).cpu().numpy()

    @contextmanager
    def averaged_weights(self) -> Iterator[nn.Module]:
        """The model with the EMA in place of its weights, in eval mode; puts the weights back at the end."""
        weights = {name: value.clone() for name, value in self.weights.items()}
        self.model.load_state_dict(self.ema)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.load_state_dict(weights)
            self.model.train()

    def save(self) -> None:
        """Begin to write a checkpoint of this moment, in the first process; `checkpoints.wait` waits for it."""
        if self.rank == 0:
            told = {"history": self.history, "window": self.window.state(), "skipped": self.skipped}
            self.checkpoints.save(
                step=self.step,
                model=self.model,
                ema=self._named_averages(),
                optimizer=self.optimizer,
                record={**self.record, **told},
            )

    def run(
        self,
        *,
        progress: Progress = silent,
        stop: Callable[[], bool] = lambda: False,
        until_step: int | None = None,
        log: Callable[[Line], object] = ignore,
    ) -> None:
        """Train to `num_steps` (or `until_step`), logging and saving on the way.

        `stop` is asked at every step; when it says yes a checkpoint is saved and Interrupted raised. `log` gets each
        line of the history.

        A step's numbers are read while the device is busy with the next, so that it never waits for this process.
        """
        end = self.train.num_steps if until_step is None else min(self.train.num_steps, until_step)
        saved, asked, pending = self.step, False, None
        share = self.train.batch_size // (self.world_size * self.train.accumulation_steps)
        with (
            memory_faults(
                stage="denoiser",
                level=self.level,
                key="levels.train.batch_size",
                found=f"{share} images at once in each process",
                fix=f"Double levels.train.accumulation_steps (now {self.train.accumulation_steps}), set levels.train."
                "activation_checkpointing: true, or take more processes: the result stays the same. Then run the same "
                "command again.",
            ),
            matrix_precision(self.train.precision),
            closing(self.order),
            self.checkpoints,
            Ahead(self.batch, end=end) as batches,
        ):
            matrix_rate(self.device, self.train.precision)  # measured before anything is timed
            self.window.clock, self.window.timed_steps = time.monotonic(), 0
            waited = 0.0
            while self.step < end and not asked:
                report = self.train_step(batches(self.step), stop=stop())
                at_log = self.step % self.train.log_every == 0 or self.step == self.train.num_steps
                at_save = self.step % self.train.checkpoint_every == 0
                if pending is not None:
                    asked |= self.settle(pending).stop
                pending = report
                if at_log or at_save or self.step == end or not self.runs_ahead:
                    asked |= self.settle(pending).stop
                    pending = None
                shown = {}
                if at_log:
                    log(self._log(batches.waited - waited))
                    waited = batches.waited
                    shown = {k: v for k, v in self.history[-1].items() if part_of(k) in SHOWN}
                progress(self.step, self.train.num_steps, f"level {self.level}", **shown)
                if at_save:
                    self.save()
                    saved = self.step
                self.checkpoints.check()
                asked |= self.world_size == 1 and stop()
            if pending is not None:
                self.settle(pending)
            if saved != self.step:
                self.save()
        if asked:
            raise Interrupted(
                f"Stopped by a signal after step {self.step}",
                stage="denoiser",
                level=self.level,
                path=self.folder,
                fix="Run the same command again: it resumes.",
            )

    def _log(self, waited: float) -> Line:
        """Add a line to the history. waited: seconds that its steps have waited for batches."""
        window, images = self.window, self.window.timed_steps * self.train.batch_size
        seconds = max(time.monotonic() - window.clock, 1e-9)
        rate = matrix_rate(self.device, self.train.precision) * self.world_size
        line = {
            "step": self.step,
            **named_losses("loss", window.sums),
            "gradient_norm": window.gradient_norm,
            "lr": self.learning_rate(self.step - 1),
            "skipped_steps": self.skipped,
            "images_per_second": images / seconds,
            "loader_wait": waited / seconds,
            "mfu": images / seconds * self.flops_per_image / rate,
            "memory_gib": peak_memory(self.device) / 2**30,
        }
        if self.step % self.train.checkpoint_every == 0 or self.step == self.train.num_steps:
            line |= named_losses("held_out_loss", self.validation_losses())
            if self.config.levels_above(self.level):
                hidden = self.validation_losses(condition_drop=1.0)
                line |= named_losses("held_out_loss_without_conditions", hidden)
        self.history.append(line)
        self.window = Window()
        return line
