"""Renders a report as one self-contained HTML page, in the reader's light or dark theme.

A page is made of parts: its head, its state, its tiles and its sections, each an element whose id is the part's key. A
page that follows a run (`lopt_pp.report.live`) is sent the parts that have changed.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from lopt_pp.errors import LoptError
from lopt_pp.report.charts import Chart, key_of
from lopt_pp.report.state import State
from lopt_pp.util.files import write_text


@dataclass(frozen=True)
class Advice:
    """One thing to know of a run.

    Attributes:
        kind: `warn`, the run does harm, or may; `good`, nothing to do; `do`, something that helps; `look`, something to
            look into.
        text: a sentence or two.
    """

    kind: Literal["warn", "good", "do", "look"]
    text: str


@dataclass(frozen=True)
class Section:
    """A part of the page, under a heading; what it has of these is shown in this order.

    Attributes:
        title: the heading.
        note: a line below it.
        advice: warnings are highlighted.
        charts: in two columns.
        bars: (name, shares by phase), one bar each.
        bar_names: of the phases.
        picture: SVG over the whole width.
        picture_names: of the phases in it.
        table: lines of cells, the first line is the head; all columns but the first are numbers.
        pairs: names and values, folded away.
        pairs_title: what is shown of them then.
    """

    title: str
    note: str = ""
    advice: Sequence[Advice] = ()
    charts: Sequence[Chart] = ()
    bars: Sequence[tuple[str, Mapping[str, float]]] = ()
    bar_names: Mapping[str, str] | None = None
    picture: str = ""
    picture_names: Mapping[str, str] | None = None
    table: Sequence[Sequence[str]] = ()
    pairs: Mapping[str, Any] | None = None
    pairs_title: str = ""

    @property
    def key(self) -> str:
        """Names the section in its page."""
        return key_of(self.title)

    def key_of_chart(self, chart: Chart) -> str:
        """Names a chart of the section in the page."""
        return f"{self.key}--{chart.key}"

    @property
    def is_empty(self) -> bool:
        charts = any(chart.drawn for chart in self.charts)
        return not (self.advice or charts or self.bars or self.picture or self.table or self.pairs)


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
        title: heading and title.
        subtitle: a line below it.
        tiles: (name, value, what else) of the most important figures.
        sections: in order; empty ones are left out.
        state: of the run, where there is one that has left word of it.
    """

    title: str
    subtitle: str = ""
    tiles: Sequence[tuple[str, str, str]] = ()
    sections: Sequence[Section] = ()
    state: State | None = None

    @property
    def shown(self) -> list[Section]:
        """The sections that are not empty."""
        return [section for section in self.sections if not section.is_empty]


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("lopt_pp.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def render(page: Page, live: str = "") -> str:
    """The page's HTML.

    Args:
        page: what it shows.
        live: of a page that follows a run, what its script has to know, as JSON.
    """
    return _environment().get_template("page.html.jinja").render(page=page, live=live)


def render_part(name: str, what: object) -> str:
    """The HTML of a part of a page.

    Args:
        name: `head`, `state`, `tiles` or `section`.
        what: the `Page`; of a section the `Section`.
    """
    return str(getattr(_environment().get_template("parts.html.jinja").module, name)(what))


def write_page(path: Path, text: str, flag: str = "--output") -> None:
    """Writes a page, or what else is made of a run.

    Args:
        path: of the file.
        text: its content.
        flag: that names the file.

    Raises:
        LoptError: the file cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise LoptError(f"{flag} {path} cannot be written: {error.strerror}") from error
