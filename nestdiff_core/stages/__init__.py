"""The pipeline, stage by stage: what Dagster's assets, the command line and a notebook call.

Each function takes an `Experiment`, makes its artifact(s) and returns them. What is there already and whole is
checked and returned, never made again; what is there but damaged is made again, and says so. An input that is
missing is an IntegrityError with the command that makes it.
"""

from nestdiff_core.stages.data import crops, encoder, features, images, text
from nestdiff_core.stages.denoisers import CHECKPOINTS, train
from nestdiff_core.stages.hierarchy import bases, design, latents, propose_levels
from nestdiff_core.stages.ladder import ladder
from nestdiff_core.stages.neighbours import neighbour_pictures, neighbours
from nestdiff_core.stages.pictures import pictures
from nestdiff_core.stages.reference import reference
from nestdiff_core.stages.report import report
from nestdiff_core.stages.sampling import evaluation, samples
from nestdiff_core.stages.sweep import sweep
from nestdiff_core.stages.watch import watch

__all__ = [
    "CHECKPOINTS",
    "bases",
    "crops",
    "design",
    "encoder",
    "evaluation",
    "features",
    "images",
    "ladder",
    "latents",
    "neighbour_pictures",
    "neighbours",
    "pictures",
    "propose_levels",
    "reference",
    "report",
    "samples",
    "sweep",
    "text",
    "train",
    "watch",
]
