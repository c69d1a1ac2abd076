"""The training loop of one denoiser: from latents in stores to an exported EMA, resumable to the bit.

`train_level` runs in one process or in each process of a torchrun group. It owns the optimiser, the EMA, the
checkpoints and the signals; what a step is trained on comes from data.py, the loss from diffusion/loss.py.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nestdiff_core.config import ExperimentConfig, TrainConfig
from nestdiff_core.diffusion.loss import level_loss
from nestdiff_core.diffusion.schedule import NoiseSchedule, make_schedule
from nestdiff_core.encoders.weights import read_weights
from nestdiff_core.errors import ConfigError, Interrupted, NumericsError
from nestdiff_core.models.nested import build_denoiser
from nestdiff_core.progress import Progress, silent
from nestdiff_core.training.ahead import Ahead
from nestdiff_core.training.checkpoint import list_checkpoints, load_latest, restore, save_checkpoint
from nestdiff_core.training.data import Batch, BatchOrder, Draws, LatentBatches, draw

VALIDATION_IMAGES = 512
NAMED = 5  # images that an error names
TIMINGS = ("images_per_second", "loader_wait")  # of a log line: share of the time that the loop waited for its batches


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
        if self.train.batch_size % self.world_size:
            raise ConfigError(
                "The batch cannot be shared evenly",
                stage="denoiser",
                level=level,
                key="levels.train.batch_size",
                expected=f"a multiple of {self.world_size} processes",
                found=self.train.batch_size,
                fix="Change the number of processes.",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.train.seed)
            self.model = build_denoiser(config, level, num_classes).to(device)
        if null_context is not None:
            self.model.null_context.copy_(null_context)
        if self.train.start_from:
            self.model.start_from(_published(Path(self.train.start_from).expanduser(), level))
        self.ema = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.train.lr,
            weight_decay=self.train.weight_decay,
            betas=(self.train.beta1, self.train.beta2),
        )
        self.order = BatchOrder(train_rows, self.train.batch_size, self.train.seed)
        self.held_out = held_out_rows[:VALIDATION_IMAGES]
        self.folder, self.record, self.warn = folder, record, warn
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.recent: list[float] = []  # losses since the last log line
        self._resume()
        self.network: nn.Module = DistributedDataParallel(self.model) if self.world_size > 1 else self.model

    def _resume(self) -> None:
        expected = self.record.get("fingerprint")
        found = load_latest(self.folder, warn=self.warn, level=self.level, expected=expected)
        if found is not None:
            path, state = found
            self.step = restore(path, state, model=self.model, ema=self.ema, optimizer=self.optimizer)
            self.history, self.recent = state["history"], state["recent"]

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
        draws = self._draw(self.train.seed, step, self.train.batch_size, self.train.condition_drop)
        rows = self.order.batch(step)[self.rank :: self.world_size]
        return self.batches.load(rows, draws.share(self.rank, self.world_size), self.device)

    def train_step(self, batch: Batch) -> tuple[float, float]:
        """One optimiser step; returns the loss before it, over all processes, and the gradient norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        losses = self.loss(self.network, batch)
        loss = losses.mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.train.grad_clip or math.inf)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise self._exploded(batch, losses.detach(), norm.item())
        self.optimizer.step()
        self._update_ema()
        self.step += 1
        return self._mean(loss.detach()), norm.item()

    def _exploded(self, batch: Batch, losses: Tensor, norm: float) -> NumericsError:
        """What happened, to which images, and what is left."""
        bad = batch.rows[~torch.isfinite(losses).cpu().numpy()]
        few = ", ".join(self.name(int(row)) for row in bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
        kept = list_checkpoints(self.folder)
        return NumericsError(
            "The loss or its gradient is not finite",
            stage="denoiser",
            level=self.level,
            key=f"step {self.step}",
            found=f"loss {losses.mean().item()}, of {len(bad)} of {len(losses)} images ({few or 'none alone'}), "
            f"gradient norm {norm}",
            path=kept[-1] if kept else self.folder,
            fix="Lower levels.train.lr or set levels.train.grad_clip, which makes another denoiser; "
            + ("that checkpoint is the last good one." if kept else "there is no checkpoint yet."),
        )

    def _mean(self, value: Tensor) -> float:
        """Mean over all processes, each of which saw another share of the batch."""
        if self.world_size > 1:
            value = value.double()
            dist.all_reduce(value)
            value /= self.world_size
        return value.item()

    @torch.no_grad()
    def _update_ema(self) -> None:
        values = self.model.state_dict()
        for name, average in self.ema.items():
            average.lerp_(values[name], 1.0 - self.train.ema_decay)

    def _draw(self, seed: int, step: int, batch_size: int, condition_drop: float) -> Draws:
        return draw(
            seed=seed,
            step=step,
            batch_size=batch_size,
            shapes=self.batches.shapes(),
            level=self.level,
            schedule=self.schedule,
            condition_drop=condition_drop,
            drop_each=self.config.conditioning.drop == "each",
            num_views=self.batches.num_views,
            num_captions=self.batches.num_captions,
        )

    @torch.no_grad()
    def validation_loss(self, *, condition_drop: float = 0.0) -> float:
        """Mean loss of the EMA on held-out images at fixed noise and times; condition_drop 1 hides the conditions."""
        with self.averaged_weights() as model:
            draws = self._draw(2**31 - 1, 0, len(self.held_out), condition_drop)
            return self.loss(model, self.batches.load(self.held_out, draws, self.device)).mean().item()

    @contextmanager
    def averaged_weights(self) -> Iterator[nn.Module]:
        """The model with the EMA in place of its weights, in eval mode; puts the weights back at the end."""
        weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.load_state_dict(weights)
            self.model.train()

    def save(self) -> None:
        """A checkpoint of this moment, by the first process only."""
        if self.rank == 0:
            save_checkpoint(
                self.folder,
                step=self.step,
                model=self.model,
                ema=self.ema,
                optimizer=self.optimizer,
                record={**self.record, "history": self.history, "recent": self.recent},
                keep_last=self.train.keep_last,
            )
        if self.world_size > 1:
            dist.barrier()

    def run(
        self, *, progress: Progress = silent, stop: Callable[[], bool] = lambda: False, until_step: int | None = None
    ) -> None:
        """Train to `num_steps` (or `until_step`), logging and saving on the way.

        `stop` is asked after every step; when it says yes a checkpoint is saved and Interrupted raised.
        """
        end = self.train.num_steps if until_step is None else min(self.train.num_steps, until_step)
        saved, clock, waited = self.step, time.monotonic(), 0.0
        with closing(self.order), Ahead(self.batch, end=end) as batches:
            while self.step < end:
                loss, norm = self.train_step(batches(self.step))
                self.recent.append(loss)
                if self.step % self.train.log_every == 0 or self.step == self.train.num_steps:
                    self._log(norm, time.monotonic() - clock, batches.waited - waited)
                    clock, waited = time.monotonic(), batches.waited
                    progress(self.step, self.train.num_steps, f"level {self.level}", **self._shown())
                else:
                    progress(self.step, self.train.num_steps, f"level {self.level}")
                if self.step % self.train.checkpoint_every == 0:
                    self.save()
                    saved = self.step
                if self._any(stop()):
                    if saved != self.step:
                        self.save()
                    raise Interrupted(
                        f"Stopped by a signal after step {self.step}",
                        stage="denoiser",
                        level=self.level,
                        path=self.folder,
                        fix="Run the same command again: it resumes.",
                    )
        if saved != self.step:
            self.save()

    def _log(self, norm: float, seconds: float, waited: float) -> None:
        line = {
            "step": self.step,
            "loss": float(np.mean(self.recent)),
            "gradient_norm": norm,
            "lr": self.learning_rate(self.step - 1),
            "images_per_second": len(self.recent) * self.train.batch_size / max(seconds, 1e-9),
            "loader_wait": waited / max(seconds, 1e-9),
        }
        if self.step % self.train.checkpoint_every == 0 or self.step == self.train.num_steps:
            line["held_out_loss"] = self.validation_loss()
            if self.config.levels_above(self.level):
                line["held_out_loss_without_conditions"] = self.validation_loss(condition_drop=1.0)
        self.history.append(line)
        self.recent = []

    def _shown(self) -> dict[str, float]:
        return {k: v for k, v in self.history[-1].items() if k != "step"}

    def _any(self, flag: bool) -> bool:
        """Whether any process says yes: all must leave the loop at the same step."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())


def _published(path: Path, level: int) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigError(
            "levels.train.start_from is not a file",
            stage="denoiser",
            level=level,
            key="levels.train.start_from",
            path=path,
            fix="Correct the path, or leave it out.",
        )
    return read_weights(path, where="denoiser")


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM and SIGINT set a flag, which the yielded function reads; a second one ends at once."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            os._exit(Interrupted.code)
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
