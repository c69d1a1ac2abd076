"""From denoisers to samples and numbers."""

from __future__ import annotations

from safetensors.torch import save_file

from nestdiff_core import loading
from nestdiff_core.artifacts import Artifact
from nestdiff_core.encoders import (
    load_encoder,
)
from nestdiff_core.evaluation.card import SampleOrigin
from nestdiff_core.evaluation.report import evaluate
from nestdiff_core.evaluation.samples import load_samples, save_samples
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import write_json
from nestdiff_core.progress import Progress, silent
from nestdiff_core.stages.common import logger, reuse


def samples(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """Sample the cascade: samples.npz, the latents of the levels above, and what level 1 makes without conditions."""
    ref, config = Ref("samples"), x.config.sampling
    if (made := reuse(x, ref)) is not None:
        return made
    indices = range(config.num_images)
    with x.writing(ref) as writer:
        z = loading.generate(x, indices, seed=config.seed, device=device, progress=progress)
        pictures = loading.decode(x, z[1], device=device)
        save_samples(writer.path / "samples.npz", pictures)
        if x.config.num_levels > 1:
            save_file(
                {f"z_{m}": z[m].half().cpu().contiguous() for m in z if m > 1}, writer.path / "latents.safetensors"
            )
            bare = loading.generate_without_conditions(x, indices, seed=config.seed, device=device, progress=progress)
            save_samples(writer.path / "without_conditions.npz", loading.decode(x, bare, device=device))
        return writer.seal(images=len(pictures), minimum=int(pictures.min()), maximum=int(pictures.max()))


def evaluation(x: Experiment, *, device: str = "cpu", progress: Progress = silent) -> Artifact:
    """The numbers of the sample set against the training images, each with its metric card, in metrics.json."""
    ref = Ref("evaluation")
    if (made := reuse(x, ref)) is not None:
        return made
    index, sampled = loading.open_index(x), x.artifact(Ref("samples"))
    splits = ("train", "held_out") if x.config.evaluation.reference == "train" else ("held_out", "train")
    reference, held_out = (loading.SplitImages(index, split) for split in splits)
    bare = sampled.path / "without_conditions.npz"
    checkpoints = {level.level: x.artifact(Ref("denoiser", level.level)).digest for level in x.config.levels}
    label_sampling = {
        "none": "none",
        "class": "image index modulo number of classes",
        "text": "first caption of the held-out image of this index, modulo their number",
    }[x.config.conditioning.labels]
    with x.writing(ref) as writer:
        record = evaluate(
            load_samples(sampled.path / "samples.npz", num_images=x.config.sampling.num_images),
            reference,
            held_out,
            x.config.evaluation,
            origin=SampleOrigin.of(x.config, checkpoints, label_sampling=label_sampling),
            encoder=load_encoder(x.artifact(Ref("encoder")), device=device),
            others={"without_conditions": load_samples(bare)} if bare.is_file() else {},
            reference_labels=index.labels[reference.rows] if index.num_classes else None,
            held_out_labels=index.labels[held_out.rows] if index.num_classes else None,
            device=device,
        )
        for warning in record["warnings"]:
            logger.warning(warning)
        write_json(writer.path / "metrics.json", record)
        return writer.seal(**record)
