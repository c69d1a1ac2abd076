"""Reference statistics of the real images: what evaluation and ladder compare with, made once for all samplings."""

from __future__ import annotations

from pathlib import Path

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact
from nestdiff_core.encoders import build_judge, load_encoder
from nestdiff_core.encoders.weights import weights_digest
from nestdiff_core.errors import ConfigError
from nestdiff_core.evaluation.extractors import Extractor, build_extractor
from nestdiff_core.evaluation.features import FeatureSet, estimate_seconds, extract_all
from nestdiff_core.evaluation.reference import (
    BICUBIC,
    Space,
    load_statistics,
    resize_filter_of,
    save_statistics,
    space_of,
)
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import fingerprint
from nestdiff_core.images.index import SPLITS
from nestdiff_core.progress import Progress, duration, silent
from nestdiff_core.stages.common import logger, reuse


def reference(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """Statistics of both splits in every space: SPLIT.SPACE.npz (evaluation/reference.py), of the same images, crop and
    resize as training. A split is committed once it is whole: a stopped run goes on at the next.

    Where `evaluation.reference_statistics` names a file, it takes the place of the split that samples are compared with
    in its space.
    """
    ref, config, weights = Ref("reference"), x.config.evaluation, judge_weights(x)
    if (made := reuse(x, ref, weights=weights)) is not None:
        return made
    index = loading.open_index(x)
    given = _given(x)
    with x.writing(ref, keep_parts=True) as writer:
        spaces = extractors(x, device=device)
        for split in SPLITS:
            if (part := writer.part(split)) is not None and part["source"] == weights:
                continue
            images = loading.SplitImages(index, split)
            wanted = [e for e in spaces if not (split == config.reference and e.kind == given)]
            if wanted:
                seconds = estimate_seconds(images, wanted)
                what = ", ".join(e.kind for e in wanted)
                logger.info("reference (%s): %s images in %s, %s", split, f"{len(images):,}", what, duration(seconds))
            sets = extract_all(images, wanted, progress=progress, what=f"reference ({split})") if wanted else []
            files, counts = [], {}
            for extractor, features in zip(wanted, sets, strict=True):
                files.append(writer.path / file_name(split, extractor.kind))
                save_statistics(files[-1], features, extractor, resize_filter=BICUBIC)
                counts[extractor.kind] = features.count
            for extractor in spaces:
                if extractor not in wanted:
                    file = Path(config.reference_statistics).expanduser()
                    features = load_statistics(file, extractor)
                    files.append(writer.path / file_name(split, extractor.kind))
                    save_statistics(files[-1], features, extractor, resize_filter=resize_filter_of(file))
                    counts[extractor.kind] = features.count
            writer.commit_part(split, files, source=weights, images=counts)
        parts = {split: part for split in SPLITS if (part := writer.part(split)) is not None}
        for part in parts.values():
            for name in part["files"]:
                writer.fetch(name)  # made by another machine, perhaps
        images = {split: part["images"] for split, part in parts.items()}
        identities = {e.kind: {"weights_sha256": e.weights_sha256, "preprocessing": e.preprocessing} for e in spaces}
        return writer.seal(weights_source=weights, images=images, extractors=identities)


def file_name(split: str, space: str) -> str:
    return f"{split}.{space}.npz"


def extractors(x: Experiment, *, device: str = "cpu") -> list[Extractor]:
    """The extractor of every space of the experiment's evaluation, in order."""
    config = x.config.evaluation
    encoder = load_encoder(x.artifact(Ref("encoder")), device=device) if "encoder" in config.extractors else None
    judges = {j.name: build_judge(j.encoder, num_classes=j.num_classes, device=device) for j in config.judges}
    return [
        build_extractor(
            kind,
            encoder=encoder,
            inception_weights=config.inception_weights,
            judges=judges,
            unit_length=[judge.name for judge in config.judges if judge.unit_length],
            device=device,
        )
        for kind in config.spaces
    ]


def open_statistics(x: Experiment, split: str, spaces: list[Extractor]) -> dict[str, FeatureSet]:
    """What the stage left of a split, by space. Raises IntegrityError where an extractor is another one by now."""
    artifact = x.artifact(Ref("reference"))
    return {e.kind: load_statistics(artifact.path / file_name(split, e.kind), e) for e in spaces}


def open_spaces(x: Experiment, *, device: str = "cpu") -> list[Space]:
    """What samples are compared with, and the real images that they are not compared with, in every space."""
    known = extractors(x, device=device)
    splits = ("train", "held_out") if x.config.evaluation.reference == "train" else ("held_out", "train")
    reference, held_out = (open_statistics(x, split, known) for split in splits)
    folder = x.artifact(Ref("reference")).path
    filters = {e.kind: resize_filter_of(folder / file_name(splits[0], e.kind)) for e in known}
    return [Space(e, reference[e.kind], held_out[e.kind], filters[e.kind]) for e in known]


def judge_weights(x: Experiment) -> str | None:
    """Hash of the files that judge images here: of weights and of given statistics; None where there are none."""
    config = x.config.evaluation
    files = [*(judge.encoder.weights for judge in config.judges), config.inception_weights, config.reference_statistics]
    digests = [weights_digest(file) for file in files]
    return fingerprint(digests) if any(digests) else None


def _given(x: Experiment) -> str | None:
    """The space of `evaluation.reference_statistics`, if there is such a file."""
    if not x.config.evaluation.reference_statistics:
        return None
    space = space_of(Path(x.config.evaluation.reference_statistics).expanduser())
    if space not in x.config.evaluation.spaces:
        raise ConfigError(
            "The reference statistics are of a space in which nothing is measured",
            stage="reference",
            path=x.config.evaluation.reference_statistics,
            key="evaluation.extractors",
            expected=f"{space} among them",
            found=list(x.config.evaluation.spaces),
            fix=f"Add {space} to evaluation.extractors, or leave evaluation.reference_statistics out.",
        )
    return space
