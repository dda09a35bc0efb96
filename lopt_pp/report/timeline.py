"""The pipeline's timeline as SVG text: what each stage does, over time."""

from collections.abc import Sequence
from html import escape
from typing import Any

from lopt_pp.metrics.trace import NAMES
from lopt_pp.report.charts import Axis, number

_ROW, _BAR = 40, 24
_LONG = 1120


def timeline(events: Sequence[dict[str, Any]], num_steps: int = 3) -> str:
    """The pipeline's timeline: a row for each stage of the first replica, over the first steps of a trace.

    Args:
        events: of a trace, in microseconds.
        num_steps: to show, from the first one of the first stage to its last.

    Returns:
        SVG; empty where there are no events.
    """
    spans = [event for event in events if event["ph"] == "X" and event["pid"] == 0]
    if not spans:
        return ""
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    steps = sorted({span["args"]["step"] for span in spans})
    last = steps[min(num_steps, len(steps)) - 1]
    start = min(span["ts"] for span in spans)
    stop = max(span["ts"] + span["dur"] for span in spans if span["args"]["step"] == last and span["tid"] == 0)
    height = 20 + _ROW * len(names) + 26
    long, unit, scale = ((stop - start) / 1e6, "s", 1e6) if stop - start > 3e6 else ((stop - start) / 1e3, "ms", 1e3)
    axis = Axis(0.0, long, 0, _LONG, False, [t for t in Axis.over([0.0, long], 0, _LONG).ticks if t <= long])
    parts = []
    for row, stage in enumerate(sorted(names)):
        parts.append(f'<text class="row" x="0" y="{12 + _ROW * row}">{escape(names[stage])}</text>')
    for span in spans:
        begin, end = ((span["ts"] + extra - start) / scale for extra in (0.0, span["dur"]))
        if begin > long or end - begin < long / _LONG / 10:
            continue
        x, width = axis(begin), max(axis(end) - axis(begin), 0.6)
        row = sorted(names).index(span["tid"])
        about = [f"{NAMES[span['cat']]}, {span['dur'] / 1e3:.1f} ms", *(f"{k} {v}" for k, v in span["args"].items())]
        shade = " alternate" if span["args"]["step"] % 2 else ""
        parts.append(
            f'<rect class="{span["cat"]}{shade}" x="{x:.1f}" y="{17 + _ROW * row}" width="{width:.1f}" '
            f'height="{_BAR - 4}"><title>{escape(", ".join(about))}</title></rect>'
        )
    bottom = height - 24
    for value in axis.ticks:
        anchor = "start" if value == 0 else "middle" if axis(value) < _LONG - 30 else "end"
        text = f"{number(value)} {unit}"
        parts.append(f'<line class="grid" x1="{axis(value):.1f}" x2="{axis(value):.1f}" y1="14" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{axis(value):.1f}" y="{bottom + 15}" text-anchor="{anchor}">{text}</text>')
    return (
        f'<svg class="timeline" viewBox="0 0 {_LONG} {height}" role="img" '
        f'aria-label="What each stage does, over time">{"".join(parts)}</svg>'
    )
