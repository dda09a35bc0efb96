"""Charts of curves as SVG text, for pages that need nothing else.

Colours are CSS variables of the page (`--c0`, `--c1`, ...), so a chart follows the reader's light or dark theme. Values
under the pointer are shown by a few lines of script in the page, which find them in the chart's `data-chart`.

A page that follows a run draws its charts again in the browser whenever it is sent further points: `live.js.jinja` has
the same axes, means and paths, and a test holds the two against each other.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 34
_MOST_POINTS = 300
_NUM_COLOURS = 8
FRAME = {"width": _WIDTH, "height": _HEIGHT, "left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM}
"""Of every chart, in pixels: its size, and the margins around the curves."""


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: for the legend.
        xs: ascending.
        ys: as many.
        colour: number of its colour.
        dashed: whether it is drawn so.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Some curves over the same axis.

    Attributes:
        title: above it.
        lines: that have points.
        unit: of the values.
        x_title: below it.
        note: in small type below it.
        percent: whether values are shares.
        from_zero: whether the axis begins at 0.
        smooth: whether the curves are drawn as running means, over their faint values.
    """

    title: str
    lines: Sequence[Line]
    unit: str = ""
    x_title: str = "step"
    note: str = ""
    percent: bool = False
    from_zero: bool = False
    smooth: bool = True
    drawn: "Sequence[Line]" = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "drawn", [downsample(line) for line in self.lines if line.xs])

    @property
    def key(self) -> str:
        """Names the chart in its page."""
        return key_of(self.title)

    @property
    def facts(self) -> dict[str, Any]:
        """What there is to know of the chart but its points."""
        return {
            "title": self.title,
            "unit": self.unit,
            "x": self.x_title,
            "note": self.note,
            "percent": self.percent,
            "from_zero": self.from_zero,
            "smooth": self.smooth,
            "lines": [(line.name, line.colour % _NUM_COLOURS, line.dashed) for line in self.drawn],
        }

    @property
    def legend(self) -> list[tuple[str, int, bool, str]]:
        """(name, number of the colour, whether dashed, last value) of each curve."""
        return [
            (
                line.name,
                line.colour % _NUM_COLOURS,
                line.dashed,
                self.text((means(line.ys) if self.smooth else line.ys)[-1]),
            )
            for line in self.drawn
        ]

    def text(self, value: float) -> str:
        """A value as the page shows it."""
        return f"{value:.1%}" if self.percent else number(value)

    def svg(self) -> str:
        """The chart; empty where no curve has a point."""
        if not self.drawn:
            return ""
        curves = [(line, means(line.ys) if self.smooth else list(line.ys)) for line in self.drawn]
        x_axis = Axis.over([x for line in self.drawn for x in line.xs], _LEFT, _WIDTH - _RIGHT, whole=True)
        shown = [y for _, ys in curves for y in ys]
        y_axis = Axis.over(shown, _HEIGHT - _BOTTOM, _TOP, from_zero=self.from_zero, may_be_log=not self.percent)
        parts = [*self._grid(x_axis, y_axis)]
        for line, ys in curves:
            dash = ' stroke-dasharray="5 3"' if line.dashed else ""
            colour = f'stroke="var(--c{line.colour % _NUM_COLOURS})"'
            if self.smooth and len(ys) > 8:
                parts.append(f'<path class="raw" {colour} d="{_path(x_axis, y_axis, line.xs, line.ys)}"/>')
            parts.append(f'<path class="curve" {colour}{dash} d="{_path(x_axis, y_axis, line.xs, ys)}"/>')
            if len(ys) == 1:
                x, y = x_axis(line.xs[0]), y_axis(ys[0])
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--c{line.colour % _NUM_COLOURS})"/>')
        data = {
            "plot": [_LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM],
            "range": [x_axis.low, x_axis.high],
            "x": self.x_title,
            "lines": [
                {
                    "name": line.name,
                    "colour": line.colour % _NUM_COLOURS,
                    "dashed": line.dashed,
                    "xs": [round(x, 6) for x in line.xs],
                    "values": [self.text(y) for y in ys],
                }
                for line, ys in curves
            ],
        }
        return (
            f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(self.title)}" '
            f'data-chart="{escape(json.dumps(data))}">{"".join(parts)}</svg>'
        )

    def _grid(self, x_axis: "Axis", y_axis: "Axis") -> Sequence[str]:
        parts = []
        for value in y_axis.ticks:
            y, text = y_axis(value), f"{value:.0%}" if self.percent else number(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
        for value in x_axis.ticks:
            x = x_axis(value)
            anchor = "start" if x < _LEFT + 8 else "middle"  # Not below the lowest value of the other axis.
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="{anchor}">'
                f"{number(value)}</text>"
            )
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(
            f'<text class="tick" x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(self.x_title)}</text>'
        )
        return parts


@dataclass(frozen=True)
class Axis:
    """Maps values to places, in pixels.

    Attributes:
        low: the value at its start.
        high: that at its end.
        start: pixels.
        stop: likewise.
        is_log: whether it is logarithmic.
        ticks: values that are marked.
    """

    low: float
    high: float
    start: float
    stop: float
    is_log: bool
    ticks: Sequence[float]

    @classmethod
    def over(
        cls,
        values: Sequence[float],
        start: float,
        stop: float,
        from_zero: bool = False,
        whole: bool = False,
        may_be_log: bool = False,
    ) -> "Axis":
        """An axis that has room for some values, with ticks at round numbers."""
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        # What falls a hundredfold shows nothing of its end on a linear scale.
        is_log = may_be_log and not from_zero and low > 0 and high / low > 50
        if is_log:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            ticks = [10.0**power for power in range(first, last + 1)]
            return cls(ticks[0], ticks[-1], start, stop, True, ticks)
        if from_zero:
            low = min(low, 0.0)
        if high == low:
            low, high = (low - 0.5, high + 0.5) if whole else (low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1))
        step = _nice((high - low) / 5)
        if whole:
            step = max(step, 1.0)
            ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
            return cls(low, high, start, stop, False, ticks)
        first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
        return cls(first * step, last * step, start, stop, False, [k * step for k in range(first, last + 1)])

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, 1e-300))
        share = (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.stop - self.start)


def _nice(step: float) -> float:
    """The next larger of 1, 2, 2.5 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def _path(x_axis: Axis, y_axis: Axis, xs: Sequence[float], ys: Sequence[float]) -> str:
    points = [(x_axis(x), y_axis(y)) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def downsample(line: Line) -> Line:
    """The line with at most `_MOST_POINTS` points, each the mean of as many neighbouring ones."""
    size = math.ceil(len(line.xs) / _MOST_POINTS)
    if size <= 1:
        return line
    groups = [slice(start, start + size) for start in range(0, len(line.xs), size)]
    xs = [sum(line.xs[group]) / len(line.xs[group]) for group in groups]
    ys = [sum(line.ys[group]) / len(line.ys[group]) for group in groups]
    return Line(line.name, xs, ys, line.colour, line.dashed)


def key_of(title: str) -> str:
    """What names the part of a page with this title in it."""
    return re.sub(r"\W+", "-", title).strip("-").lower()


def means(values: Sequence[float]) -> list[float]:
    """Running means, over a twentieth of the values."""
    reach = len(values) // 40
    return [
        sum(part) / len(part) for part in (values[max(0, at - reach) : at + reach + 1] for at in range(len(values)))
    ]


def number(value: float) -> str:
    """A number as the page shows it: four digits, with k and M for large ones."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if value == 0:
        return "0"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.2g}"
