"""Configurations to and from plain data: what YAML and JSON hold.

Reading checks every key and every kind of value; what cannot be used is a ConfigError with its dotted name.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from nestdiff_core.config import ExperimentConfig, LevelConfig
from nestdiff_core.errors import ConfigError


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON data of a config dataclass: tuples become lists, nested configs dicts."""
    return _plain(config, lambda _, __: True)


def deciding(config: Any) -> dict[str, Any]:
    """Of `to_dict` what decides results, which is what fingerprints are made from (see `config.knob`)."""

    def decides(field: dataclasses.Field[Any], value: Any) -> bool:
        match field.metadata["decides"]:
            case "if_changed":
                return value != field.default
            case when:
                return when == "always"

    return _plain(config, decides)


def _plain(value: Any, wanted: Callable[[dataclasses.Field[Any], Any], bool]) -> Any:
    if dataclasses.is_dataclass(value):
        fields = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: _plain(v, wanted) for f, v in fields if wanted(f, v)}
    if isinstance(value, tuple):
        return [_plain(v, wanted) for v in value]
    return value


C = TypeVar("C")


def from_dict(cls: type[C], data: Any, *, base: C | None = None, where: str = "") -> C:
    """Build config `cls` from plain data; what `data` leaves out comes from `base`, else from the defaults.

    `where` is the dotted path of `data` in the experiment; errors name it. Levels given as a list are the
    levels of the result: what an entry leaves out comes from the base's level of the same number, else
    from its top level. Levels given as a dict {number: changes} change those levels only.
    """
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where or cls.__name__} is not a mapping",
            key=where,
            expected="key: value pairs",
            found=data,
            fix="Indent its keys below it.",
        )
    hints = typing.get_type_hints(cls)
    changes: dict[str, Any] = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"{path} is not a setting",
                key=path,
                found=key,
                expected=sorted(hints),
                fix=f"{hint}The settings are documented in nestdiff_core/config/.",
            )
        old = getattr(base, key) if base is not None else None
        if key == "levels" and cls is ExperimentConfig:
            changes[key] = _levels(value, old or (LevelConfig(),))
        else:
            changes[key] = _convert(hints[key], value, old, path)
    return dataclasses.replace(base, **changes) if base is not None else cls(**changes)  # type: ignore[type-var]


def _levels(value: Any, base: tuple[LevelConfig, ...]) -> tuple[LevelConfig, ...]:
    numbered = {level.level: level for level in base}
    if isinstance(value, dict):  # changes by level number
        for number, change in value.items():
            if number not in numbered:
                raise ConfigError(
                    "levels names a level that is not there",
                    key=f"levels.{number}",
                    level=number if isinstance(number, int) else None,
                    expected=sorted(numbered),
                    found=number,
                    fix="Give `levels` as a list to change how many there are.",
                )
            numbered[number] = from_dict(LevelConfig, change, base=numbered[number], where=f"levels.{number}")
        return tuple(numbered.values())
    if not isinstance(value, list):
        raise ConfigError(
            "levels is not a list",
            key="levels",
            expected="a list, one entry a level",
            found=value,
            fix="Start each entry with `- level: N`.",
        )
    levels = []
    for index, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise ConfigError(
                "An entry of levels is not a mapping",
                key=f"levels[{index}]",
                expected="key: value pairs",
                found=entry,
                fix="Start each entry with `- level: N`.",
            )
        entry = {"level": index + 1, **entry}
        levels.append(
            from_dict(LevelConfig, entry, base=numbered.get(entry["level"], base[-1]), where=f"levels.{entry['level']}")
        )
    return tuple(levels)


def _convert(kind: Any, value: Any, old: Any, path: str) -> Any:
    """`value` as type `kind`, or a ConfigError that names the setting."""

    def refuse(expected: str) -> ConfigError:
        return ConfigError(
            f"{path} has the wrong kind of value",
            key=path,
            expected=expected,
            found=value,
            fix="Change it in the experiment.",
        )

    if dataclasses.is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, base=old, where=path)
    match typing.get_origin(kind), kind:
        case (typing.Literal, _):
            choices = typing.get_args(kind)
            if value not in choices or isinstance(value, bool):
                raise refuse(f"one of {', '.join(map(str, choices))}")
            return value
        case (origin, _) if origin is tuple:
            if not isinstance(value, (list, tuple)):
                raise refuse("a list")
            return tuple(_convert(typing.get_args(kind)[0], v, None, path) for v in value)
        case (_, numeric) if numeric is float:
            if isinstance(value, str):  # YAML reads 1e-3 as text
                try:
                    return float(value)
                except ValueError:
                    raise refuse("a number") from None
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
                raise refuse("a number")
            return float(value)
        case (_, plain) if plain in (int, bool, str):
            if type(value) is not plain:
                raise refuse({int: "a whole number", bool: "true or false", str: "text"}[plain])
            return value
    raise TypeError(f"config field {path} has a type that from_dict does not know: {kind}")
