"""Numbers of the newest weights of every level, finished or still in training, and their history.

    a level    its generated latents, given true ones of held-out images above, against training latents
    images     the whole cascade, once every level has weights, against training images

Everything but the weights is held: images, latents, seeds, sampling, guidance. These are the yardstick, whose
fingerprint is the address of the history, so that all numbers in one history compare. A sweep's choice is therefore not
sampled with: it is of finished weights, and with each the numbers would begin anew. Training is only read from, and not
waited for. Weights that have been judged are not judged again: the same ones would give the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact
from nestdiff_core.errors import IntegrityError
from nestdiff_core.evaluation.bootstrap import deviation, frechet_resamples
from nestdiff_core.evaluation.features import extract
from nestdiff_core.evaluation.image_metrics import feature_metrics
from nestdiff_core.evaluation.ladder import level_numbers
from nestdiff_core.evaluation.latent_metrics import averaged
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import check_file, fingerprint, read_json, write_json
from nestdiff_core.models.nested import NestedDenoiser
from nestdiff_core.newest import Weights, all_weights
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stages.common import logger
from nestdiff_core.stages.ladder import judges, read_averaged, true_latents
from nestdiff_core.stages.reference import extractors, open_statistics, reference

HISTORY = "history.json"
IMAGES = "images"
MARGIN = 2.0  # combined bootstrap errors by which a number must be worse than the best to count as worse

Record = dict[str, Any]


def watch(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact | None:
    """Judge the newest weights of every level that has some, and add their numbers to the history (history.json).

    Returns the history, whose info has `newest` {level or `images`: record} of the weights as they are now, and
    `missing`, the levels without any; None where no level has. A record is plain JSON data:

        what, step, weights (sha256), denoiser (fingerprint)      which; of images, one entry a level
        fd, error, floor        Frechet distance, its bootstrap error, the distance of held-out latents or images
        numbers                 all numbers of each set, as of the ladder

    Reference statistics that are not there yet are made. Raises IntegrityError where the history is not what was
    written.
    """
    ref, levels = Ref("watch"), range(x.config.num_levels, 0, -1)
    opened = {level: found for level in levels if (found := _open(x, level, device)) is not None}
    if not opened:
        return None
    if x.find(Ref("reference")) is None:  # elsewhere it is made after training, together with the samples
        reference(x, device=device, progress=progress)
    if (sealed := x.find(ref)) is not None:
        sealed.verify()
    known = {record["key"] for record in _everywhere(x)}
    wanted = {str(level): _key(weights) for level, (weights, _) in opened.items()}
    if len(opened) == len(levels):
        wanted[IMAGES] = fingerprint(sorted(wanted.values()))
    new = {}
    for what, record in _judge(x, opened, [w for w, key in wanted.items() if key not in known], device, progress):
        new[wanted[what]] = {"key": wanted[what], "what": what, **record}
    x.find(ref)  # another process may have added to it meanwhile, which is no conflict
    with x.writing(ref, keep_parts=True) as writer:
        records = _joined(_everywhere(x), list(new.values()))
        write_json(writer.path / HISTORY, records)
        now = {record["key"]: record for record in records}
        return writer.seal(
            newest={what: now[key] for what, key in wanted.items()},
            missing=[level for level in levels if level not in opened],
        )


def history(x: Experiment, what: str | None = None) -> list[Record]:
    """All records of this yardstick (of a level's number as text, or of `images`), in the order of their making."""
    path = x.path(Ref("watch")) / HISTORY
    records = read_json(path, stage="watch") if path.is_file() else []
    return [record for record in records if what in (None, record["what"])]


def _everywhere(x: Experiment) -> list[Record]:
    """The history, with what other machines have put into object storage since."""
    told = None if x.mirror is None else x.mirror.read(x.path(Ref("watch")), HISTORY)
    return _joined(json.loads(told) if told else [], history(x))


def _joined(records: list[Record], more: list[Record]) -> list[Record]:
    known = {record["key"] for record in records}
    return records + [record for record in more if record["key"] not in known]


def best(records: Sequence[Record], current: Record) -> Record:
    """The least distance that weights of the same denoiser have had; `current` itself is one of them."""
    same = [record for record in records if record["denoiser"] == current["denoiser"]]
    return min([*same, current], key=lambda record: record["fd"])


def is_worse(current: Record, before: Record) -> bool:
    """Whether a distance is larger by more than MARGIN times the root of the sum of both squared bootstrap errors."""
    return current["fd"] - before["fd"] > MARGIN * math.hypot(current["error"], before["error"])


def from_the_top(whats: Iterable[str]) -> list[str]:
    """Levels' numbers as text, the top first, and `images` at the end: manifests keep no order."""
    return sorted(whats, key=lambda what: (what == IMAGES, 0 if what == IMAGES else -int(what)))


def _key(weights: Weights) -> str:
    return fingerprint([weights.level, weights.denoiser, weights.digest])


def _open(x: Experiment, level: int, device: str) -> tuple[Weights, NestedDenoiser] | None:
    """The newest weights that are whole; a trainer may remove a checkpoint between two looks."""
    for weights in all_weights(x, level):
        try:
            check_file(weights.path, weights.file, stage="denoiser", level=level)
            if x.config.level(level).guidance and x.config.level(level).guide_step:
                loading.open_guide(x, level)  # they cannot be judged before there is one
            return weights, loading.open_denoiser(x, level, weights=weights.path, device=device)
        except (IntegrityError, FileNotFoundError) as error:
            logger.warning("The weights of level %d at step %d are passed over: %s", level, weights.step, error)
    return None


def _judge(
    x: Experiment,
    opened: Mapping[int, tuple[Weights, NestedDenoiser]],
    wanted: Sequence[str],
    device: str,
    progress: Progress,
) -> Iterator[tuple[str, Record]]:
    """The records of what is `wanted`, from the top."""
    if not wanted:
        return
    config, seed, top = x.config, x.config.sampling.seed, x.config.num_levels
    held_out, training = judges(x, config.watch.num_images)
    cascade = loading.Cascade(x, denoisers={level: model for level, (_, model) in opened.items()}, device=device)
    indices, true = range(len(held_out)), {m: true_latents(x, m, held_out.rows) for m in range(1, top + 1)}
    for done, what in enumerate(wanted):
        progress(done, len(wanted), "watch")
        if what == IMAGES:
            yield what, _image_record(x, opened, cascade, held_out, device)
            continue
        level = int(what)
        above = {m: z_m for m, z_m in true.items() if m > level}
        z = cascade.latents(indices, seed=seed, rows=held_out.rows, given=above, lowest=level)[level]
        found = level_numbers(
            {"generated": averaged(z)},
            averaged(true[level]),
            read_averaged(x, level, training.rows),
            name=f"z_{level}",
            num_neighbours=config.evaluation.num_neighbours,
            resamples=config.watch.resamples,
            seed=seed,
        )
        weights = opened[level][0]
        yield (
            what,
            {
                "step": weights.step,
                "weights": weights.digest,
                "denoiser": weights.denoiser,
                "fd": found["numbers"]["generated"]["fd"],
                "error": found["errors"]["generated"],
                "floor": found["numbers"]["held_out"]["fd"],
                "numbers": found["numbers"],
                "num_images": found["settings"]["latents"],
            },
        )
    progress(len(wanted), len(wanted), "watch")


def _image_record(
    x: Experiment,
    opened: Mapping[int, tuple[Weights, NestedDenoiser]],
    cascade: loading.Cascade,
    held_out: loading.SplitImages,
    device: str,
) -> Record:
    """In the first feature space of the evaluation; labels or captions are those of the held-out images."""
    config, seed, indices = x.config, x.config.sampling.seed, range(len(held_out))
    extractor = extractors(x, device=device)[0]
    name, training = extractor.metric_name("fd"), open_statistics(x, "train", [extractor])[extractor.kind]
    pictures = cascade.images(indices, cascade.latents(indices, seed=seed, rows=held_out.rows)[1])
    sets = {"generated": extract(pictures, extractor), "held_out": extract(held_out, extractor)}
    neighbours = config.evaluation.num_neighbours
    numbers = {
        which: feature_metrics(features, training, extractor, num_neighbours=neighbours, seed=seed).values
        for which, features in sets.items()
    }
    generated = {"generated": sets["generated"].values}
    drawn = frechet_resamples(generated, training.gaussian, resamples=config.watch.resamples, seed=seed)
    weights = {str(level): found for level, (found, _) in opened.items()}
    return {
        "name": name,
        "step": {level: w.step for level, w in weights.items()},
        "weights": {level: w.digest for level, w in weights.items()},
        "denoiser": {level: w.denoiser for level, w in weights.items()},
        "fd": numbers["generated"][name],
        "error": deviation(drawn["generated"]),
        "floor": numbers["held_out"][name],
        "numbers": numbers,
        "num_images": len(indices),
    }
