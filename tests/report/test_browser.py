"""The live page in a real browser: it follows a run without being loaded again, and is the report in the end."""

import html
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import browser, console, set_theme, set_width
from synthetic_runs import about, record, write_run

from lopt_pp.metrics.state import StateFile
from lopt_pp.report.run_data import read_run
from lopt_pp.report.run_report import report
from lopt_pp.report.server import PageServer
from lopt_pp.report.state import StateReader

pytestmark = pytest.mark.slow

PATIENCE = 60
STEPS = 40


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    server = PageServer(tmp_path / "out", 0)
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield server
    server.shutdown()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def until(seen: Any, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not seen():
        assert time.monotonic() < end, f"never seen: {what}"
        time.sleep(0.05)


def lines(step: int) -> str:
    first = {"reconstruction_loss": 0.5 / step, "learning_rate": 1e-5, "queue_length": step % 3}
    first["grad_norm"] = math.nan if step == 20 else 0.3 * step
    second = {"loss": 100.0 / step**2, "learning_rate": 1e-4 * (1 - step / STEPS), "grad_norm": 2.0}
    if step % 10 == 0:
        first |= {"drift_norm": 0.001 * step, "drift_cosine": 1 - 1e-4 * step}
        second |= {"eval_loss": 2.5 + 1 / step}
    records = [
        record(0, step, {"forward": 0.3, "backward": 0.4, "wait_send": 0.2}, **first),
        record(1, step, {"forward": 0.4, "backward": 0.5, "optimizer": 0.05}, **second),
    ]
    return "".join(json.dumps(one) + "\n" for one in records)


def drawn(page: str) -> dict[str, list[Any]]:
    """Of each chart of a page, by its name: its texts, and the places of its curves."""
    charts = {}
    for name, svg in re.findall(r'<svg class="chart".*?aria-label="(.*?)".*?>(.*?)</svg>', page, re.DOTALL):
        paths = re.findall(r'<path class="(\w+)".*? d="(.*?)"', svg)
        numbers = [(kind, [float(at) for at in re.findall(r"[\d.]+", path)]) for kind, path in paths]
        charts[html.unescape(name)] = [re.findall(r"<text.*?>(.*?)</text>", svg), numbers]
    return charts


COLOURS = """
return [...document.querySelectorAll("figure")].map(figure => [
  [...figure.querySelectorAll(".key")].map(key => [key.className, getComputedStyle(key)]).map(([name, style]) =>
    [name.includes("dashed"), style.opacity, name.includes("dashed") ? style.backgroundImage : style.backgroundColor]),
  [...figure.querySelectorAll(".curve")].map(curve => [curve.hasAttribute("stroke-dasharray"),
    getComputedStyle(curve).opacity, getComputedStyle(curve).stroke])]);
"""
"""Of each chart, of the swatches of its legend and of its curves: whether dashed, the opacity, the colour."""

TEXTS = """
return [...document.querySelectorAll("svg.chart")].flatMap(svg => {
  const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  const card = svg.closest(".card").getBoundingClientRect();
  const cut = boxes.filter(([, box]) => box.left < card.left || box.right > card.right).map(([text]) => `cut: ${text}`);
  return cut.concat(boxes.flatMap(([one, a], at) => boxes.slice(at + 1).filter(([, b]) => a.left < b.right - 1 &&
    b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3).map(([other]) => `${one} over ${other}`)));
});
"""
"""The texts of charts that are cut off, or that lie over each other."""


def test_the_page_follows_a_run(server: PageServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with browser(tmp_path / "browser") as driver:

        def text() -> str:
            return driver.execute_script("return document.body.innerText")

        def state() -> str:
            return driver.execute_script("return document.querySelector('#state b').textContent")

        driver.get(server.address)
        driver.execute_script("window.loadedOnce = true")
        assert state() == "waiting" and str(out) in text()

        # It begins, with two steps.
        write_run(out, [], about([(0, 15), (15, 30)], [[0], [1]], max_steps=STEPS) | {"num_steps": STEPS})
        file = StateFile(out, 0)
        # Nobody holds the lock of the directory here; a run's own thread would.
        (out / ".lock-1").write_text("{}")
        with (out / "metrics.jsonl").open("a") as metrics:
            metrics.write(lines(1) + lines(2))
            metrics.flush()
            until(lambda: "Task loss" in text() and state() == "training", "the first steps")
            assert f"step 2 of {STEPS}" in text() and driver.title == "training · made up"
            assert "Drift of the boundary" not in text() and "held out" not in text()
            driver.execute_script("document.querySelector('details').open = true; window.scrollTo(0, 300)")
            for step in range(3, STEPS + 1):
                metrics.write(lines(step)[: None if step < STEPS else 40])
            metrics.flush()
            until(lambda: f"step {STEPS - 1} of {STEPS}" in text(), "the steps until then")
            assert "Drift of the boundary" in text() and "held out" in text() and "is the bottleneck" in text()
            file.set("evaluating", STEPS - 1)
            until(lambda: state() == "evaluating", "the evaluation")
            metrics.write(lines(STEPS)[40:])
            metrics.flush()
        file.end("failed", STEPS, "a <b>reason</b>")
        until(lambda: state() == "failed", "the end")
        until(lambda: f"Steps\n{STEPS}" in text(), "the last step")
        assert "a <b>reason</b>" in text()
        assert driver.execute_script("return window.loadedOnce && document.querySelector('details').open")

        # It is the report now, to the last curve: what the browser has drawn, and what the report has.
        live = driver.execute_script("return document.querySelector('main').innerHTML")
        expected = drawn(report(read_run(out), StateReader(out).read(read_run(out))))
        got = drawn(live)
        assert list(got) == list(expected) and len(got) >= 8
        for name, (texts, curves) in expected.items():
            assert got[name][0] == texts, name
            assert [kind for kind, _ in got[name][1]] == [kind for kind, _ in curves], name
            for (_, places), (_, wanted) in zip(got[name][1], curves, strict=True):
                assert places == pytest.approx(wanted, abs=0.11), name
        assert console(driver) == []

        # A narrow screen has nothing beside it, in either theme, and the themes differ.
        colours = set()
        for theme in ("light", "dark"):
            set_theme(driver, theme)
            colours.add(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
            for width in (320, 1200):
                set_width(driver, width)
                over = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
                assert driver.execute_script(over) == 0, f"{theme}, {width} pixels"
                assert driver.execute_script(TEXTS) == [], f"{theme}, {width} pixels"
            for swatches, curves in driver.execute_script(COLOURS):
                assert len(swatches) == len(curves) > 0
                for (dashed, opacity, swatch), (is_dashed, _, colour) in zip(swatches, curves, strict=True):
                    assert dashed == is_dashed and opacity == "1" and colour in swatch, theme
        assert len(colours) == 2
