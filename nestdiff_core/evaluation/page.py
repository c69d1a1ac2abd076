"""A report as one HTML file: opens from disk, reads on a phone, asks nothing of a network and runs no script.

What is on the page is said in plain data (`Section`, `Figure`); the template is page.html beside this file. Every text
is escaped: names of experiments, classes and images are written by others. A content security policy in the page keeps
it from loading anything, whatever slipped in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from nestdiff_core.evaluation.figures import to_data_url

Rows = Sequence[Mapping[str, Any]]  # of equal keys


@dataclass(frozen=True)
class Figure:
    """A PNG or JPEG and what it shows."""

    picture: bytes
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page. notes: paragraphs. missing: why there is nothing, and what makes it. abreast: how many
    figures, 1 to 3, stand beside each other on a wide screen. folded: further tables by title, closed until somebody
    opens them."""

    title: str
    notes: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    abreast: int = 1
    tables: Mapping[str, Rows] = field(default_factory=dict)
    folded: Mapping[str, Rows] = field(default_factory=dict)
    missing: str = ""

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def render(title: str, lines: Sequence[str], facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """The page. lines: below the title. facts: short values by name, shown large at the top."""
    return _template().render(title=title, lines=lines, facts=facts, sections=sections)


def cell(value: Any) -> str:
    """A value as a table shows it: four digits, thousands apart, a dash for what is not there."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float() if math.isfinite(value):
            return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
        case list() | tuple():
            return ", ".join(map(cell, value))
    return str(value)


def flat(data: Any, where: str = "") -> list[dict[str, str]]:
    """Nested data as rows `field`, `value`, by dotted path."""
    if isinstance(data, Mapping) and data:
        return [row for key, value in data.items() for row in flat(value, f"{where}.{key}" if where else str(key))]
    return [{"field": where, "value": cell(data)}]


def _numeric(rows: Rows, name: str) -> bool:
    values = [row.get(name) for row in rows]
    numbers = [isinstance(v, (int, float)) and not isinstance(v, bool) for v in values if v is not None]
    return bool(numbers) and all(numbers)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"cell": cell, "url": to_data_url}
    environment.tests |= {"numeric_column": lambda name, rows: _numeric(rows, name)}
    return environment.from_string(Path(__file__).with_suffix(".html").read_text())
