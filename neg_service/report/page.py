"""One page that needs no network: sections of text, tables and figures as a self-contained HTML file.

What is on it comes from `sections/`; how it looks from `templates/report.html.j2`.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

from jinja2 import Environment, StrictUndefined


@dataclass(frozen=True)
class Picture:
    """A figure. images: PNGs by theme. caption: a sentence that says what it shows. alt: for who cannot see it.

    is_wide: it has several panels, and takes the whole width.
    """

    name: str
    title: str
    caption: str
    alt: str
    images: dict[str, bytes]
    is_wide: bool = False


@dataclass(frozen=True)
class Grid:
    """A table. Cells of `numeric` columns are aligned to the right and sorted as numbers.

    is_interactive: a person can sort and filter it; it needs a name.
    """

    title: str
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    is_interactive: bool = False
    name: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it, in this order: text, tables, figures."""

    name: str
    title: str
    text: str = ""
    grids: list[Grid] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page as HTML; everything in it is escaped."""
    source = resources.files(__package__).joinpath("templates", "report.html.j2").read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data"] = lambda image: base64.b64encode(image).decode()
    return environment.from_string(source).render(title=title, subtitle=subtitle, sections=sections)
