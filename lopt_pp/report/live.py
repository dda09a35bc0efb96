"""The page on a run that goes on, and what of it has changed from one version to the next.

A part whose text has changed is sent whole. Of charts only the points that are new are sent; the page draws them again
(`live.js.jinja`).
"""

import json
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lopt_pp.report.charts import FRAME, Chart, Line
from lopt_pp.report.follow import Follower
from lopt_pp.report.page import Page, Section, render, render_part
from lopt_pp.report.run_report import run_page
from lopt_pp.report.state import State

_INTERVAL = 1.0
"""Seconds between two looks at the files."""

_SHARE = 0.05
"""The most of one core that following a run may take: after a long look the next one comes later."""

_KEPT = 60
"""Versions that are kept, for pages that have lost their connection for a while."""


@dataclass(frozen=True)
class Part:
    """A part of the page.

    Attributes:
        name: of its template.
        what: for the template.
        charts: by their keys.
    """

    name: str
    what: Page | Section
    charts: Mapping[str, Chart]

    @cached_property
    def html(self) -> str:
        return render_part(self.name, self.what)

    @cached_property
    def skeleton(self) -> object:
        """All of it but the points of its charts."""
        if not self.charts:
            return self.html
        assert isinstance(self.what, Section)
        return self.what.title, self.what.note, [(key, chart.facts) for key, chart in self.charts.items()]


class Version:
    """The page as it is at some moment.

    Args:
        number: of the version, from 1.
        page: what it shows.
    """

    def __init__(self, number: int, page: Page) -> None:
        self.number, self.page = number, page
        self.parts = {name: Part(name, page, {}) for name in ("head", "state", "tiles")}
        for section in page.shown:
            charts = {section.key_of_chart(chart): chart for chart in section.charts if chart.drawn}
            self.parts[f"section-{section.key}"] = Part("section", section, charts)

    def charts(self) -> dict[str, Any]:
        """What a page has to know of all charts to draw them."""
        return {key: chart_data(chart) for part in self.parts.values() for key, chart in part.charts.items()}

    def since(self, before: "Version | None") -> dict[str, Any]:
        """What a page that shows another version has to change; empty where nothing is to be.

        Args:
            before: that version; None where it is not known.
        """
        earlier: Mapping[str, Part] = {} if before is None else before.parts
        changed, points = [], {}
        for key, part in self.parts.items():
            old = earlier.get(key)
            if old is None or old.skeleton != part.skeleton:
                charts = {name: chart_data(chart) for name, chart in part.charts.items()}
                changed.append({"key": key, "html": part.html, "charts": charts})
                continue
            for name, chart in part.charts.items():
                if new := _new_points(old.charts[name].drawn, chart.drawn):
                    points[name] = new
        update: dict[str, Any] = {"parts": changed} if changed else {}
        if points:
            update["points"] = points
        if list(earlier) != list(self.parts):
            update["order"] = list(self.parts)
        if before is None or _window_title(before.page) != _window_title(self.page):
            update["title"] = _window_title(self.page)
        return update


def chart_data(chart: Chart) -> dict[str, Any]:
    """What a page has to know of a chart to draw it."""
    lines = [
        {"name": name, "colour": colour, "dashed": dashed, "xs": _numbers(line.xs), "ys": _numbers(line.ys)}
        for (name, colour, dashed), line in zip(chart.facts["lines"], chart.drawn, strict=True)
    ]
    return chart.facts | {"lines": lines}


def _new_points(before: Sequence[Line], now: Sequence[Line]) -> list[list[object]]:
    """Of each curve that has changed: its number, where it differs first, and its points from there on."""
    changed: list[list[object]] = []
    for number, (old, new) in enumerate(zip(before, now, strict=True)):
        pairs = zip(old.xs, old.ys, new.xs, new.ys, strict=False)
        same = next((at for at, (x, y, newer_x, newer_y) in enumerate(pairs) if (x, y) != (newer_x, newer_y)), None)
        same = min(len(old.xs), len(new.xs)) if same is None else same
        if same < max(len(old.xs), len(new.xs)):
            changed.append([number, same, _numbers(new.xs[same:]), _numbers(new.ys[same:])])
    return changed


def _numbers(values: Sequence[float]) -> list[float | str]:
    """Numbers of seven digits, which are more than a screen shows; JSON has only those that are finite."""
    return [float(f"{value:.7g}") if math.isfinite(value) else str(value) for value in values]


def _window_title(page: Page) -> str:
    return page.title if page.state is None else f"{page.state.name} · {page.title}"


def dumps(content: object) -> str:
    """JSON that is sound within a page, too."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


class Live:
    """The page on a run, kept up to date while somebody looks at it.

    Args:
        directory: the output directory of the run; may be missing.
        interval: seconds between two looks at the files.
    """

    def __init__(self, directory: Path, interval: float = _INTERVAL) -> None:
        self._follower, self._interval = Follower(directory), interval
        self._epoch = uuid.uuid4().hex[:8]
        """Tells the versions of this server from those of one that ran before it."""
        self._versions: deque[Version] = deque(maxlen=_KEPT)
        self._looking, self._news = threading.Lock(), threading.Condition()
        self._watchers = 0
        self._is_closed = False

    def page(self) -> str:
        """The whole page as it is now, as HTML."""
        if self._watchers == 0:
            self.refresh()
        version = self._versions[-1]
        knows = {"version": self._name(version), "frame": FRAME, "charts": version.charts()}
        return render(version.page, dumps(knows | {"title": _window_title(version.page)}))

    def refresh(self) -> float:
        """Reads what is new of the run, and tells those who look; returns the seconds that it took."""
        with self._looking:
            begin = time.monotonic()
            if self._follower.poll() or not self._versions:
                before = self._versions[-1] if self._versions else None
                version = Version(1 if before is None else before.number + 1, self._page_now())
                if before is None or version.since(before):
                    with self._news:
                        self._versions.append(version)
                        self._news.notify_all()
            return time.monotonic() - begin

    def follow(self) -> None:
        """Refreshes the page as long as somebody looks at it; returns when `close` is called."""
        pause = 0.0
        while True:
            with self._news:
                self._news.wait_for(lambda: self._is_closed or self._watchers > 0)
                if self._is_closed or self._news.wait_for(lambda: self._is_closed, pause):
                    return
            pause = max(self._interval, self.refresh() / _SHARE)

    def close(self) -> None:
        """Lets all go who wait."""
        with self._news:
            self._is_closed = True
            self._news.notify_all()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Counts one who looks at the page, while the context lasts."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, number: int) -> None:
        with self._news:
            self._watchers += number
            self._news.notify_all()

    def update(self, known: str, seconds: float) -> tuple[str, str] | None:
        """What has changed since a version, as soon as something has.

        Args:
            known: the version's name; of one that is not known any more, all is sent.
            seconds: to wait for at most.

        Returns:
            The name of the new version, and the changes as JSON; None where there were none in time.

        Raises:
            EOFError: `close` was called.
        """

        def is_news() -> bool:
            return self._is_closed or bool(self._versions) and self._name(self._versions[-1]) != known

        with self._news:
            self._news.wait_for(is_news, seconds)
            if self._is_closed:
                raise EOFError
            if not is_news():
                return None
            before = next((version for version in self._versions if self._name(version) == known), None)
            newest = self._versions[-1]
        return self._name(newest), dumps(newest.since(before))

    def _name(self, version: Version) -> str:
        return f"{self._epoch}-{version.number}"

    def _page_now(self) -> Page:
        follower = self._follower
        state = follower.state
        if follower.unreadable:
            lines = f"{follower.unreadable} line{'s' if follower.unreadable > 1 else ''} of metrics.jsonl"
            note = f"{lines} cannot be read and {'are' if follower.unreadable > 1 else 'is'} left out"
            state = State("ended", note) if state is None else State(state.name, f"{state.text} ({note})")
        if follower.run is not None:
            return run_page(follower.run, state)
        name = follower.about.get("name") or follower.directory.resolve().name
        return Page(str(name), str(follower.directory), state=state)
