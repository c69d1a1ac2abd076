"""What a knob is: a documented field of a frozen dataclass that validates itself."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from nestdiff_core.errors import ConfigError


def knob(default: Any, doc: str, *, decides: Literal["always", "if_changed", "never"] = "always") -> Any:
    """A dataclass field with its one-sentence documentation (shown in the launchpad and by `inspect`).

    decides: whether it is part of fingerprints. if_changed: not at its default, so that a knob may be added without
    making anew what was made before it; never: it changes how work is done, not what comes out.
    """
    return field(default=default, metadata={"doc": doc, "decides": decides})


def require(
    ok: bool,
    name: str,
    expected: str,
    found: Any,
    level: int | None = None,
    fix: str = "Change it in the experiment.",
) -> None:
    if not ok:
        what = f"{name} of level {level} cannot be used" if level is not None else f"{name} cannot be used"
        raise ConfigError(what, key=name, level=level, expected=expected, found=found, fix=fix)
