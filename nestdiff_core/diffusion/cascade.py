"""Sampling the whole hierarchy: z_L from noise, then z_{L-1} given it, ..., down to z_1.

Owns randomness and batching. An image is decided by (seed, its index): every random number comes from a stream of
that image and level, and image i always sits in row i mod batch_size of a batch of full size, so that a run over
part of the images computes the same bits as a run over all. Another batch size gives the same image up to the
rounding of matrix products of another shape. Streams count levels from the top: a level inserted below leaves the
samples of those above as they were.

Latents are as the denoisers know them (standardised, z_1 in the autoencoder's space); nothing is clamped here. They,
the noise, guidance and the solver are float32 whatever the networks compute in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nestdiff_core.config import ExperimentConfig
from nestdiff_core.diffusion.guidance import guided
from nestdiff_core.diffusion.process import to_z_hat
from nestdiff_core.diffusion.samplers import (
    TERMINAL_EVALUATIONS,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_dpm_solver_pp,
    terminal_step,
    time_grid,
)
from nestdiff_core.diffusion.schedule import make_schedule
from nestdiff_core.errors import ConfigError, NumericsError, memory_faults
from nestdiff_core.precision import autocast
from nestdiff_core.progress import Progress, silent


@torch.no_grad()
def sample_cascade(
    denoisers: Mapping[int, Callable[..., Tensor]],
    config: ExperimentConfig,
    *,
    image_indices: Sequence[int],
    seed: int,
    labels: Int[Tensor, " N"] | Float[Tensor, "N T W"] | None = None,
    given: Mapping[int, Float[Tensor, "N _ _ _"]] | None = None,
    guides: Mapping[int, Callable[..., Tensor]] | None = None,
    null_conditions: bool = False,
    lowest: int = 1,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[int, Float[Tensor, "N _ _ _"]]:
    """Latents of every level from the top to `lowest` for the images `image_indices`, in their order, on the CPU.

    denoisers: by level, on `device`, called as NestedDenoiser is; levels in `given` or below `lowest` need none.
    image_indices: distinct, from 0; each run of `sampling.batch_size` images that they touch costs a full batch.
    labels: class of each image (N,) or its caption's tokens (N, T, W), as conditioning.labels says; None for the null
    class or the empty caption. given: true latents of the top levels (the oracle), used instead of generated ones.
    guides: by level, the networks that guidance contrasts with where `levels.guide_step` says so.
    null_conditions: no level sees labels or the levels above, and none is guided.

    Raises ConfigError for a request that contradicts the experiment, NumericsError with level and image for a latent
    that is not finite.
    """
    indices, given, guides = list(image_indices), dict(given or {}), dict(guides or {})
    config.level(lowest)
    levels = range(config.num_levels, lowest - 1, -1)
    _check_request(denoisers, config, indices, labels, given, guides, null_conditions, levels)
    sampler = _LevelSampler(config, denoisers, guides, seed, null_conditions)
    result = {m: torch.empty(len(indices), *config.latent_shape(m)) for m in levels}
    finished = 0
    for batch in micro_batches(indices, config.sampling.batch_size, torch.device(device)):
        latents = {m: batch.spread(z_m.float()) for m, z_m in given.items()}
        batch_labels = None if labels is None else batch.spread(labels)
        for level in result:
            if level not in given:
                with memory_faults(
                    stage="samples",
                    level=level,
                    key="sampling.batch_size",
                    found=f"{batch.size} images at once",
                    fix="Lower sampling.batch_size, which changes images by rounding only, and run the same command "
                    "again.",
                ):
                    latents[level] = sampler.sample(level, latents, batch_labels, batch)
            result[level][batch.places] = batch.gather(latents[level], level)
        finished += len(batch.places)
        (progress or silent)(finished, len(indices), "sampling")
    return result


@dataclass(frozen=True)
class MicroBatch:
    """Images that are sampled together; rows without a requested image hold zeros.

    places: where the images stand in the request. images: their indices. size: rows.
    """

    places: list[int]
    images: list[int]
    size: int
    device: torch.device

    @property
    def rows(self) -> list[int]:
        return [i % self.size for i in self.images]

    def spread(self, values: Tensor) -> Tensor:
        """The request's values (N, ...) on this batch's rows."""
        full = torch.zeros(self.size, *values.shape[1:], dtype=values.dtype)
        full[self.rows] = values[self.places].cpu()
        return full.to(self.device)

    def gather(self, z_l: Tensor, level: int) -> Tensor:
        """The images' latents in the order of `places`, on the CPU."""
        values = z_l.cpu()[self.rows]
        finite = values.flatten(1).isfinite().all(1)
        if not finite.all():
            image = self.images[int(finite.int().argmin())]
            raise NumericsError(
                "A sampled latent is not finite",
                stage="samples",
                level=level,
                key=f"image {image}",
                expected="finite numbers",
                found=f"{int((~finite).sum())} images with others",
                fix=f"Train the denoiser of level {level} again, or lower its guidance.",
            )
        return values

    def streams(self, seed: int, *key: int) -> list[np.random.Generator]:
        """Each image's random numbers for the purpose `key`.

        NumPy's, since a torch CPU generator keeps 32 bits of its seed: too few for all images and levels to differ.
        """
        return [np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i, *key))) for i in self.images]

    def normal(self, streams: list[np.random.Generator], shape: tuple[int, int, int]) -> Tensor:
        """The next standard normal numbers (size, *shape) of every image."""
        on_gpu = self.device.type == "cuda"
        full = torch.zeros(self.size, *shape, pin_memory=on_gpu)
        numbers = full.numpy()
        for row, stream in zip(self.rows, streams, strict=True):
            stream.standard_normal(dtype=np.float32, out=numbers[row])
        return full.to(self.device, non_blocking=on_gpu)


def micro_batches(indices: Sequence[int], size: int, device: torch.device) -> list[MicroBatch]:
    """One batch for each run of `size` image indices that is touched: what belongs together wherever it is computed."""
    runs: dict[int, list[int]] = {}
    for place, i in enumerate(indices):
        runs.setdefault(i // size, []).append(place)
    return [MicroBatch(places, [indices[place] for place in places], size, device) for places in runs.values()]


class _LevelSampler:
    """Samples one batch of one level, given the latents above."""

    def __init__(
        self,
        config: ExperimentConfig,
        denoisers: Mapping[int, Callable[..., Tensor]],
        guides: Mapping[int, Callable[..., Tensor]],
        seed: int,
        null_conditions: bool,
    ) -> None:
        self.config, self.denoisers, self.guides = config, denoisers, guides
        self.seed, self.null_conditions = seed, null_conditions
        self.schedule = make_schedule(config.diffusion)

    def _times(self, level: int) -> Tensor:
        sampling, count = self.config.sampling, self.config.num_evaluations(level)
        count -= TERMINAL_EVALUATIONS if sampling.terminal_step else 0
        return time_grid(self.schedule, count, sampling.spacing, to_zero=sampling.sampler != "dpm_solver")

    def sample(self, level: int, latents: Mapping[int, Tensor], labels: Tensor | None, batch: MicroBatch) -> Tensor:
        model = self._model(level, batch)
        conditions = self._conditions(level, latents, batch)

        def z_hat(z_t: Tensor, t: Tensor) -> Tensor:
            output = model(z_t, t, conditions(t), labels)
            return to_z_hat(output.to(z_t.dtype), z_t, t, self.schedule, self.config.diffusion.prediction)

        noise, times = self._noise(level, level, batch), self._times(level)
        start = terminal_step(z_hat, noise(), self.schedule) if self.config.sampling.terminal_step else noise()
        match self.config.sampling.sampler:
            case "dpm_solver_pp":
                return sample_dpm_solver_pp(z_hat, start, times, self.schedule)
            case "dpm_solver":
                return sample_dpm_solver(z_hat, start, times, self.schedule)
            case "ddim":
                return sample_ddim(z_hat, start, times, self.schedule)
            case "ddpm":
                return sample_ddpm(z_hat, start, times, self.schedule, noise)

    def _noise(self, level: int, m: int, batch: MicroBatch) -> Callable[[], Tensor]:
        """The next standard normal numbers in the shape of z_m, of the images' streams while `level` is sampled."""
        top, shape = self.config.num_levels, self.config.latent_shape(m)
        streams = batch.streams(self.seed, top - level, top - m)
        return lambda: batch.normal(streams, shape)

    def _model(self, level: int, batch: MicroBatch) -> Callable[..., Tensor]:
        denoiser, knobs = self._network(self.denoisers[level], batch.device), self.config.level(level)
        if not self.null_conditions:
            guide = self._network(self.guides[level], batch.device) if knobs.guidance and knobs.guide_step else None
            return guided(
                denoiser, knobs.guidance, knobs.guidance_interval, self.config.sampling.null_branch, guide=guide
            )
        drop = torch.ones(batch.size, dtype=torch.bool, device=batch.device)
        return lambda z_t, t, z_above, labels: denoiser(z_t, t, z_above, labels, drop)

    def _network(self, denoiser: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
        """In the arithmetic of `sampling.precision`; what it says comes back as the latent came."""
        if self.config.sampling.precision == "float32":
            return denoiser

        def network(z_t: Tensor, *arguments: object) -> Tensor:
            with autocast(self.config.sampling.precision, device):
                output = denoiser(z_t, *arguments)
            return output.to(z_t.dtype)

        return network

    def _conditions(
        self, level: int, latents: Mapping[int, Tensor], batch: MicroBatch
    ) -> Callable[[Tensor], dict[int, Tensor]]:
        """The noised conditions of one model call, by time (arXiv 2412.05984):

        z_m^ = z_m + (t/T)^(gamma/2) sigma_m eta,  T = 1     (decay `variance`: the text of its method)
        z_m^ = z_m + (t/T)^gamma sigma_m eta                 (decay `deviation`: the caption of its Table 3)

        eta is drawn anew at every call, or once for all calls, which is then what the first call would have drawn.
        """
        sampling = self.config.sampling
        gamma = self.config.noise_gamma(level)
        quiet = self.null_conditions or math.isinf(gamma)
        power = {"variance": gamma / 2.0, "deviation": gamma}[sampling.noise_decay]
        above = {m: latents[m] for m in self.config.levels_above(level)}
        sigma = {m: self.config.level(m).condition_noise for m in above}
        draws = {m: self._noise(level, m, batch) for m in above if sigma[m] > 0 and not quiet}
        once = {m: draw() for m, draw in draws.items()} if sampling.noise_draw == "once" else None

        def conditions(t: Tensor) -> dict[int, Tensor]:
            decay = (t**power).view(-1, 1, 1, 1)
            eta = once or {m: draw() for m, draw in draws.items()}
            return above | {m: above[m] + decay * sigma[m] * eta[m] for m in eta}

        return conditions


def _check_request(
    denoisers: Mapping[int, Callable[..., Tensor]],
    config: ExperimentConfig,
    indices: Sequence[int],
    labels: Tensor | None,
    given: Mapping[int, Tensor],
    guides: Mapping[int, Callable[..., Tensor]],
    null_conditions: bool,
    levels: range,
) -> None:
    """levels: those of the result, from the top."""

    def require(
        ok: bool, what: str, key: str, expected: object, found: object, fix: str, level: int | None = None
    ) -> None:
        if not ok:
            raise ConfigError(what, stage="samples", key=key, level=level, expected=expected, found=found, fix=fix)

    count = len(indices)
    require(
        len(set(indices)) == count and min(indices, default=0) >= 0,
        "These image indices cannot be sampled",
        "image_indices",
        "distinct numbers from 0",
        f"{count} numbers, {len(set(indices))} distinct, from {min(indices, default=0)}",
        "Ask for each image once.",
    )
    top = list(levels)[: len(given)]
    require(
        sorted(given, reverse=True) == top,
        "Latents are given for levels that are not the top ones",
        "given",
        top,
        sorted(given, reverse=True),
        "Give every level from the top down to the lowest one given.",
    )
    for m, z_m in given.items():
        shape = (count, *config.latent_shape(m))
        require(
            tuple(z_m.shape) == shape,
            "Given latents have the wrong shape",
            "given",
            shape,
            tuple(z_m.shape),
            "Give one latent for each image index.",
            level=m,
        )
    missing = [m for m in reversed(levels) if m not in given and m not in denoisers]
    require(
        not missing,
        "Denoisers are missing",
        "denoisers",
        [m for m in reversed(levels) if m not in given],
        sorted(denoisers),
        "Give a denoiser for each level that is to be sampled.",
    )
    needed = [m for m in reversed(levels) if m not in given and config.level(m).guidance and config.level(m).guide_step]
    needed = [] if null_conditions else needed
    require(
        set(needed) <= set(guides),
        "The networks that guide are missing",
        "guides",
        needed,
        sorted(guides),
        "Give one for each level with levels.guide_step, or set that to 0.",
    )
    if labels is not None:
        kind = config.conditioning.labels
        require(
            kind != "none",
            "The experiment takes no labels",
            "labels",
            None,
            f"{len(labels)} labels",
            "Leave them out, or set conditioning.labels and train the denoisers so.",
        )
        text = config.conditioning.text
        shape, fix = {
            "class": ((count,), "Give each image its class index."),
            "text": ((count, text.length, text.width), "Give each image its caption's tokens."),
        }[kind]
        require(
            tuple(labels.shape) == shape,
            "The labels have the wrong shape",
            "labels",
            shape,
            tuple(labels.shape),
            fix,
        )
