"""The one path from a name or a file to a configuration.

recipe (code)  <-  experiment YAML (overrides)
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from nestdiff_core.config import ExperimentConfig
from nestdiff_core.config_io import from_dict, to_dict
from nestdiff_core.errors import ConfigError
from nestdiff_core.files import fingerprint, read_json, write_json
from nestdiff_core.recipes import depth, paper, starters
from nestdiff_core.remote import is_url

DEFAULT_EXPERIMENT = "digits"

RECIPES: dict[str, Callable[[], ExperimentConfig]] = {
    **{f.__name__: f for f in (starters.toy, starters.digits, starters.images64, starters.images64_small)},
    **depth.RECIPES,
    **paper.RECIPES,
}

_LOADED: dict[str, str] = {}  # by name of the experiment: what commands that are printed say


def load_experiment(name: str | os.PathLike[str] | None = None) -> ExperimentConfig:
    """The experiment called `name`: a recipe, the path of a YAML file that changes one, or of a complete .json.

    Without a name, the environment variable NESTDIFF_EXPERIMENT decides, else `digits`. A YAML file holds
    `recipe:` plus settings, nested or dotted (`sampling.num_images: 64`); its experiment is called after the file
    unless it says `name:`, and a relative `images.path` in it is relative to its folder. A .json is what
    `save_experiment` wrote.

    Raises ConfigError for an unknown recipe, a missing or unreadable file, or a setting that cannot work.
    """
    text = str(name or os.environ.get("NESTDIFF_EXPERIMENT") or DEFAULT_EXPERIMENT)
    config = _load(text)
    _LOADED[config.name] = text
    return config


def loaded_from(name: str) -> str | None:
    """The recipe or file that this process has loaded the experiment called `name` from, or None."""
    return _LOADED.get(name)


def _load(text: str) -> ExperimentConfig:
    if text in RECIPES:
        return RECIPES[text]()
    path = Path(text).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return _load_file(path)
    if path.suffix == ".json":
        return from_dict(ExperimentConfig, read_json(path))
    near = difflib.get_close_matches(text, RECIPES, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        "There is no such experiment",
        key="experiment",
        found=text,
        expected=sorted(RECIPES),
        fix=f"{hint}Name a recipe, or the path of a .yaml file.",
    )


def save_experiment(config: ExperimentConfig, root: Path) -> Path:
    """Write the complete configuration below the artifact root, named for its content; returns the path."""
    path = root / "experiments" / f"{config.name}-{fingerprint(to_dict(config))}.json"
    if not path.is_file():
        write_json(path, to_dict(config))
    return path


def _load_file(path: Path) -> ExperimentConfig:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The experiment file cannot be read ({error.strerror})",
            path=path,
            fix="Check NESTDIFF_EXPERIMENT or the path you gave.",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The experiment file is not YAML ({' '.join(str(error).split())})", path=path, fix="Mend that line."
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(
            "The experiment file is not a mapping",
            path=path,
            expected="recipe: NAME and settings",
            found=data,
            fix="See experiments/my_images.yaml.",
        )
    data = dict(data)
    recipe = data.pop("recipe", DEFAULT_EXPERIMENT)
    if recipe not in RECIPES:
        raise ConfigError(
            "There is no such recipe",
            path=path,
            key="recipe",
            expected=sorted(RECIPES),
            found=recipe,
            fix="Name one of these.",
        )
    settings: dict[str, Any] = _undot(data, path)
    settings.setdefault("name", "".join(c if c.isascii() and c.isalnum() else "_" for c in path.stem))
    try:
        config = from_dict(ExperimentConfig, settings, base=RECIPES[recipe]())
    except ConfigError as error:
        error.path = str(path)
        raise
    images = config.images
    if images.path and not is_url(images.path) and not Path(images.path).expanduser().is_absolute():
        images = replace(images, path=str(path.resolve().parent / images.path))
    return replace(config, images=images)


def _undot(data: Any, path: Path) -> Any:
    """`{"a.b": 1, "a": {"c": 2}}` as `{"a": {"b": 1, "c": 2}}`, at any depth; numbers (of levels) become integers."""
    if isinstance(data, list):
        return [_undot(value, path) for value in data]
    if not isinstance(data, dict):
        return data
    result: dict[Any, Any] = {}
    for dotted, value in data.items():
        value = _undot(value, path)
        *parents, last = [int(name) if name.isdigit() else name for name in str(dotted).split(".")]
        place: Any = result
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(
                    f"{dotted} is set inside something that is not a mapping",
                    path=path,
                    key=str(dotted),
                    found=place,
                    fix="Give the setting once, nested or dotted.",
                )
        if isinstance(value, dict) and isinstance(place.get(last), dict):
            value = {**place[last], **value}
        elif last in place:
            raise ConfigError(
                f"{dotted} is given twice", path=path, key=str(dotted), found=value, fix="Keep one of them."
            )
        place[last] = value
    return result
