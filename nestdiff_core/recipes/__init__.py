"""Named experiments, and the way a YAML file changes one.

A recipe is a function without arguments that returns a complete `ExperimentConfig`; a variant calls it and replaces
two fields. starters.py has the small ones, paper.py every row of the paper's tables.
"""

from nestdiff_core.recipes.loader import RECIPES, load_experiment, save_experiment
from nestdiff_core.recipes.starters import digits, images64, images64_small, toy

__all__ = [
    "RECIPES",
    "digits",
    "images64",
    "images64_small",
    "load_experiment",
    "save_experiment",
    "toy",
]
