"""The sweep: from denoisers to how they are best sampled (evaluation/sweep.py)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact, ArtifactWriter
from nestdiff_core.errors import ConfigError, InputError
from nestdiff_core.evaluation.features import extract
from nestdiff_core.evaluation.gaussian import Gaussian, frechet_distance
from nestdiff_core.evaluation.image_metrics import feature_metrics
from nestdiff_core.evaluation.latent_metrics import averaged, density_coverage
from nestdiff_core.evaluation.samples import StoredSamples, save_samples
from nestdiff_core.evaluation.sweep import (
    Setting,
    best,
    candidates,
    configured,
    noise_of_differences,
    passes,
    short_list,
    to_plain,
    verdict,
    with_settings,
)
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import fingerprint, write_json
from nestdiff_core.latents.moments import Moments
from nestdiff_core.precision import autocast
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stages.common import decoder_weights, forget_other_weights, logger, reuse
from nestdiff_core.stages.ladder import MAX_TRAINING, read_averaged
from nestdiff_core.stages.reference import extractors, judge_weights

SEEDS_APART = 1  # the sweep's seed is so much larger than the samples'


def sweep(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """All numbers in sweep.json, the short list's images in short_HASH.npz, and the chosen settings in chosen.json,
    where `samples` finds them (sampling.chosen_by).

    A setting is committed once it is whole: a stopped sweep goes on at the next.
    """
    ref = Ref("sweep")
    if not x.config.sweep.anything:
        raise ConfigError(
            "There is nothing to sweep",
            stage="sweep",
            key="sweep",
            expected="values in sweep.guidance, noise_gammas or num_evaluations, or sweep.decays",
            found="none",
            fix="Name what is to be tried in the experiment.",
        )
    judging, decoding = judge_weights(x), decoder_weights(x)
    weights = judging if decoding is None else fingerprint([judging, decoding])
    if (made := reuse(x, ref, weights=weights)) is not None:
        return made
    with x.writing(ref, keep_parts=True) as writer:
        forget_other_weights(writer, ref, weights)
        run = _Sweep(x, writer, device, progress)
        levels: dict[int, list[tuple[Setting, float]]] = {}
        record: dict[str, Any] = {"levels": {}}
        above: dict[int, Tensor] = {}
        for level in range(x.config.num_levels, 0, -1):
            rows, settings, z_l = run.level(level, above)
            levels[level] = [(setting, row["fd"]) for setting, row in zip(settings, rows, strict=True)]
            above[level] = z_l
            found = {"rows": rows, "best": best(rows), "configured": 0}
            found["noise"] = noise_of_differences([row["halves"] for row in rows], found["best"])
            record["levels"][str(level)] = found
        chosen, compared = run.images(short_list(x.config, levels, x.config.sweep.short_list))
        record |= compared
        write_json(writer.path / loading.CHOSEN, to_plain(chosen))
        write_json(writer.path / "sweep.json", record)
        logger.info(verdict(record))
        return writer.seal(weights_source=weights, **record)


class _Sweep:
    """What all settings share: seeds, references, opened denoisers, and the count of images."""

    def __init__(self, x: Experiment, writer: ArtifactWriter, device: str, progress: Progress) -> None:
        self.x, self.config, self.writer, self.device = x, x.config, writer, device
        self.index = loading.open_index(x)
        self.seed, self.num = x.config.sampling.seed + SEEDS_APART, x.config.sweep.num_images
        self._cascades: dict[tuple[int, float], loading.Cascade] = {}
        tried = {level.level: candidates(x.config, level.level) for level in x.config.levels}
        self.finished = 0
        self.total = sum(map(len, tried.values())) + x.config.sweep.short_list
        self._progress = progress
        self._announce(tried)

    def _announce(self, tried: Mapping[int, Sequence[Setting]]) -> None:
        """Say what is coming, and how long it will take, once it is sure that every guide is there."""
        for level, found in tried.items():
            if self.config.level(level).guide_step and any(setting.guidance for setting in found):
                loading.open_guide(self.x, level)
        batches = -(-self.num // self.config.sampling.batch_size)
        seconds = {level: self._seconds(level) * batches for level in tried}
        cost = {m: [seconds[m] * passes(self.config, m, setting) for setting in found] for m, found in tried.items()}
        whole = self.config.sweep.short_list * sum(max(found) for found in cost.values())
        logger.info(
            "%d settings of single levels, then at most %d of the whole cascade, %d images each: at most %.0f seconds "
            "of sampling, less what has been done.",
            sum(map(len, tried.values())),
            self.config.sweep.short_list,
            self.num,
            sum(map(sum, cost.values())) + whole,
        )

    def _seconds(self, level: int) -> float:
        """Of one pass of a level's network over a batch."""
        denoiser = self.cascade(level, configured(self.config)[level]).denoisers[level]
        inputs = denoiser.example_inputs(self.config.sampling.batch_size, self.device)
        with torch.inference_mode(), autocast(self.config.sampling.precision, torch.device(self.device)):
            denoiser(*inputs).sum().item()  # warms up
            begun = time.monotonic()
            denoiser(*inputs).sum().item()
        return time.monotonic() - begun

    def cascade(self, level: int, setting: Setting) -> loading.Cascade:
        """The denoiser of one level with the weights of the setting, opened once, to be sampled with it."""
        config = with_settings(self.config, {level: setting})
        key = level, setting.sampled_decay
        if key not in self._cascades:
            self._cascades[key] = loading.Cascade(self.x, config=config, levels=[level], device=self.device)
        return self._cascades[key].under(config)

    def level(self, level: int, above: dict[int, Tensor]) -> tuple[list[dict[str, Any]], list[Setting], Tensor]:
        """Numbers of each setting of a level, the settings, and the latents of the best; above: what the best settings
        of the levels above generated."""
        settings, rows, kept = candidates(self.config, level), [], {}
        real: _Latents | None = None
        for number, setting in enumerate(settings):
            name = f"level_{level}_{number:03d}"
            if (part := self.writer.part(name)) is None:
                real = real or _Latents(self._training(level), self.config.evaluation.num_neighbours, self.seed)
                z_l = self._latents(level, setting, above)
                part = self.writer.commit_part(name, [], numbers=real.numbers(averaged(z_l)))
                numbers = [*(row["fd"] for row in rows), part["numbers"]["fd"]]
                kept = {number: z_l} if min(numbers) == numbers[-1] else kept  # one setting's latents in memory
            rows.append({**asdict(setting), "passes": passes(self.config, level, setting), **part["numbers"]})
            self._finish()
        chosen = best(rows)
        z_l = kept[chosen] if chosen in kept else self._latents(level, settings[chosen], above)
        return rows, settings, z_l

    def _latents(self, level: int, setting: Setting, above: dict[int, Tensor]) -> Tensor:
        cascade = self.cascade(level, setting)
        return cascade.latents(range(self.num), seed=self.seed, given=above, lowest=level, progress=self._within)[level]

    def _training(self, level: int) -> Tensor:
        rows = loading.SplitImages(self.index, "train").subset(MAX_TRAINING, self.config.sampling.seed).rows
        return read_averaged(self.x, level, rows)

    def images(self, compared: Mapping[str, Mapping[int, Setting]]) -> tuple[Mapping[int, Setting], dict[str, Any]]:
        """The setting whose images are best, and the record of all that were compared."""
        self.total += len(compared) - self.config.sweep.short_list
        files = {name: f"short_{fingerprint(to_plain(settings))[:8]}.npz" for name, settings in compared.items()}
        for name, settings in compared.items():
            if self.writer.part(files[name]) is None:
                self._sample(settings, files[name])
            self._finish()
        sets = {name: StoredSamples(self.writer.fetch(file), num_images=self.num) for name, file in files.items()}
        evaluation, metric = self.config.evaluation, ""
        split = "held_out" if evaluation.reference == "train" else "train"
        reference = loading.SplitImages(self.index, split).subset(MAX_TRAINING, self.config.sampling.seed)
        metrics: dict[str, dict[str, float]] = {name: {} for name in compared}
        halves: dict[str, dict[str, list[float]]] = {name: {} for name in compared}
        warnings: dict[str, None] = {}
        for extractor in extractors(self.x, device=self.device):
            real, distance = extract(reference, extractor), extractor.metric_name("fd")
            metric = metric or self.config.sweep.metric or distance
            judge = _Judge(real.values)
            for name, images in sets.items():
                features = extract(images, extractor)
                found = feature_metrics(
                    features, real, extractor, num_neighbours=evaluation.num_neighbours, seed=self.seed
                )
                metrics[name] |= found.values
                halves[name][distance] = judge(features.values)["halves"]
                warnings |= dict.fromkeys(found.warnings)
        macs = {m: self.x.artifact(Ref("denoiser", m)).info["macs"] for m in range(1, self.config.num_levels + 1)}
        rows = [
            {
                "name": name,
                "settings": to_plain(settings),
                "passes": sum(passes(self.config, m, setting) for m, setting in settings.items()),
                "macs": sum(macs[m] * passes(self.config, m, setting) for m, setting in settings.items()),
                "metrics": metrics[name],
                "halves": halves[name],
                "file": files[name],
            }
            for name, settings in compared.items()
        ]
        chosen = best([{"passes": row["passes"], **row["metrics"]} for row in rows], metric)
        record = {
            "short_list": rows,
            "chosen": chosen,
            "metric": metric,
            "noise": noise_of_differences([row["halves"][metric] for row in rows], chosen),
            "num_images": self.num,
            "seed": self.seed,
            "reference": split,
            "num_reference": len(reference),
            "warnings": list(warnings),
        }
        return list(compared.values())[chosen], record

    def _sample(self, settings: Mapping[int, Setting], file: str) -> None:
        z: dict[int, Tensor] = {}
        for level in sorted(settings, reverse=True):
            z[level] = self._latents(level, settings[level], z)
        pictures = self.cascade(1, settings[1]).images(range(self.num), z[1])
        save_samples(self.writer.path / file, pictures)
        self.writer.commit_part(file, [self.writer.path / file], source=file)

    def _within(self, done: int, total: int, what: str, **numbers: float) -> None:
        self._progress(self.finished * self.num + min(done, self.num - 1), self.total * self.num, "sweep")

    def _finish(self) -> None:
        self.finished += 1
        self._progress(self.finished * self.num, self.total * self.num, "sweep")


class _Latents:
    """Training latents of one level, to which generated ones are compared."""

    def __init__(self, real: Float[Tensor, "M C H W"], num_neighbours: int, seed: int) -> None:
        self.real, self.num_neighbours, self.seed = real.double().flatten(1), num_neighbours, seed
        self.judge = _Judge(self.real)

    def numbers(self, z: Float[Tensor, "N C H W"]) -> dict[str, Any]:
        """fd and its halves; density and coverage of as many training latents."""
        values = z.double().flatten(1)
        found = self.judge(values)
        num = min(len(values), len(self.real))
        if num <= self.num_neighbours:
            return found
        order = np.random.default_rng(self.seed).permutation(len(self.real))[:num]
        real = self.real[torch.from_numpy(order)]
        return found | density_coverage(values[:num].numpy(), real.numpy(), self.num_neighbours, seed=self.seed)


class _Judge:
    """Frechet distances to real images, in one space."""

    def __init__(self, real: Float[Tensor, "M D"]) -> None:
        if len(real) < 4:
            raise InputError(
                "There are too few real images to judge a sweep",
                stage="sweep",
                expected=">= 4",
                found=len(real),
                fix="Hold out more images (images.held_out_fraction), or let evaluation.reference be held_out.",
            )
        self.whole, *self.halves = (_gaussian(part) for part in (real, real[0::2], real[1::2]))

    def __call__(self, values: Float[Tensor, "N D"]) -> dict[str, Any]:
        """fd; halves: of every second one to every second real one, and of the others to the others."""
        parts = zip((values[0::2], values[1::2]), self.halves, strict=True)
        distances = [frechet_distance(_gaussian(part), half) for part, half in parts]
        return {"fd": frechet_distance(_gaussian(values), self.whole), "halves": distances}


def _gaussian(values: Float[Tensor, "N D"]) -> Gaussian:
    return Gaussian.of(Moments.of(values.double().numpy()))
