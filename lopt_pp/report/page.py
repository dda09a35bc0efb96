"""Renders a report as one self-contained HTML page, in the reader's light or dark theme."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from lopt_pp.errors import LoptError
from lopt_pp.report.charts import Chart
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
    def is_empty(self) -> bool:
        charts = any(chart.drawn for chart in self.charts)
        return not (self.advice or charts or self.bars or self.picture or self.table or self.pairs)


def render(title: str, subtitle: str, tiles: Sequence[tuple[str, str, str]], sections: Sequence[Section]) -> str:
    """The page's HTML.

    Args:
        title: heading and title.
        subtitle: a line below it.
        tiles: (name, value, what else) of the most important figures.
        sections: in order; empty ones are left out.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lopt_pp.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html.jinja").render(
        title=title,
        subtitle=subtitle,
        tiles=tiles,
        sections=[section for section in sections if not section.is_empty],
    )


def write_page(path: Path, html: str) -> None:
    """Writes the page.

    Raises:
        LoptError: the file cannot be written.
    """
    try:
        write_text(path, html)
    except OSError as error:
        raise LoptError(f"--output {path} cannot be written: {error.strerror}") from error
