"""What stages share: reuse of what is there, work that processes share, and whether an encoder can serve a level."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator

from nestdiff_core.artifacts import Artifact, ArtifactWriter
from nestdiff_core.config import LevelConfig
from nestdiff_core.encoders.weights import weights_digest
from nestdiff_core.errors import ConfigError, IntegrityError
from nestdiff_core.experiment import Experiment, Ref
from nestdiff_core.files import PARTS
from nestdiff_core.sampling.parts import rank, together

logger = logging.getLogger("nestdiff")

MADE_WITH = "made_with"  # the part without files that names the weights of all others


def reuse(x: Experiment, ref: Ref, *, weights: str | None = None) -> Artifact | None:
    """The sealed artifact if every file is as its manifest says.

    weights: hash of the file or folder of weights that it is made with; None where there is none, or none any more.
    Returns None when it has to be made (again); its inputs have then been checked, file by file.
    """
    x.path(ref)  # an input that is missing is refused with the command that makes it
    try:
        if (artifact := x.find(ref)) is not None:
            artifact.verify()
            if weights is None or artifact.info.get("weights_source", weights) == weights:
                return artifact.shared()
            logger.warning("The weights of %s are others than it was made with. It is made again.", ref)
            shutil.rmtree(artifact.path / PARTS, ignore_errors=True)  # no part of it was made with these
    except IntegrityError as error:
        logger.warning("%s It is made again.", error)
    for needed in x.inputs(ref):
        x.artifact(needed).verify()
    return None


def decoder_weights(x: Experiment) -> str | None:
    """Hash of the weights that z_1 is decoded with; None where it is pixels. Another decoder may share the encoder, so
    that z_1 and what is trained on it stay what they are."""
    return weights_digest(x.config.autoencoder.weights)


@contextlib.contextmanager
def writing_together(
    x: Experiment, ref: Ref, *, weights: str | None = None
) -> Iterator[tuple[ArtifactWriter, ArtifactWriter | None]]:
    """Write an artifact in each process of a torchrun group: the writer of its parts, and in the first process that of
    the artifact, to be sealed within the block. Processes meet before and behind it.

    weights: as for `reuse`; parts that a stopped run made with others are forgotten. Parts stay on this machine,
    whatever object storage there is: they are gone once the artifact is whole.
    """
    parts = ArtifactWriter(x.path(ref), x.header(ref))
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(x.writing(ref, keep_parts=True)) if rank() == 0 else None
        if rank() == 0:
            forget_other_weights(parts, ref, weights)
        together()
        yield parts, writer
    together()


def forget_other_weights(parts: ArtifactWriter, ref: Ref, weights: str | None) -> None:
    """Remove the parts that a stopped run made with other weights, and note whose the next ones are; None as for
    `reuse`."""
    if weights is None:
        return
    begun = parts.part(MADE_WITH)
    if begun is not None and begun["source"] != weights:
        logger.warning("The weights of %s are others than a stopped run had. It begins anew.", ref)
        shutil.rmtree(parts.path / PARTS)
    parts.commit_part(MADE_WITH, [], source=weights)


def require_features(level: LevelConfig, stage: str, *, channels: int, side: int) -> None:
    """Refuse a level that asks for more than the encoder gives, before anything is encoded for it."""
    for name, found, limit in (("grid", level.grid, side), ("channels", level.channels, channels)):
        if found > limit:
            raise ConfigError(
                f"Level {level.level} asks more than the encoder's features have",
                stage=stage,
                level=level.level,
                key=f"levels.{name}",
                expected=f"at most {limit}",
                found=found,
                fix="Lower it, or use another encoder.",
            )
