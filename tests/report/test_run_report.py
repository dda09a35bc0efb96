"""The pages: complete, self-contained, and of what the run has measured."""

import json
import re
import xml.dom.minidom
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import about, record, write_run

from lopt_pp import cli
from lopt_pp.config.train_config import EFFECTS
from lopt_pp.errors import LoptError
from lopt_pp.metrics.records import PHASES
from lopt_pp.metrics.trace import trace_events
from lopt_pp.report.charts import Chart, Line, means, number
from lopt_pp.report.comparison import compare
from lopt_pp.report.run_data import read_run
from lopt_pp.report.run_report import report
from lopt_pp.report.timeline import timeline

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def check_self_contained(self) -> None:
        for tag, attributes in self.tags:
            assert tag not in ("link", "iframe", "img", "object", "embed")
            assert not {"src", "href", "xlink:href"} & attributes.keys()


def records(number: int = 60) -> list[dict[str, Any]]:
    """Of two stages; losses fall, the drift grows."""
    made = []
    for step in range(1, number + 1):
        first = {"reconstruction_loss": 0.5 / step, "learning_rate": 1e-5, "grad_norm": 0.3, "queue_length": 1.5}
        if step % 10 == 0:
            first |= {"drift_norm": 0.001 * step, "drift_cosine": 1 - 1e-4 * step}
        second = {"loss": 2.0 + 1.0 / step, "learning_rate": 1e-4, "grad_norm": 2.0}
        made.append(record(0, step, {"forward": 0.3, "backward": 0.4, "wait_send": 0.2}, **first))
        made.append(record(1, step, {"forward": 0.4, "backward": 0.5, "optimizer": 0.05}, **second))
    return made


TRACE = {
    "traceEvents": list(
        trace_events(
            [
                (11, 0, 0, [("forward", 5.0, 5.1), ("wait_send", 5.1, 5.101), ("backward", 5.101, 5.4)]),
                (11, 1, 0, [("wait_receive", 5.0, 5.2), ("forward", 5.2, 5.3)]),
            ],
            ["stage 0: layers 0-14", "stage 1: layers 15-29"],
        )
    )
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", records(), about([(0, 15), (15, 30)], [[0], [1]]), trace=TRACE)


def test_a_report_is_one_sound_page(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"the report is {run_dir / 'report.html'}\n"
    page = Page((run_dir / "report.html").read_text(encoding="utf-8"))
    page.check_self_contained()
    for heading in (
        "What to make of it",
        "Losses",
        "Boundaries",
        "Speed",
        "Where time went",
        "Stages",
        "Configuration",
    ):
        assert heading in page.text
    assert "The pipeline over time" in page.text and "stage 1: layers 15-29" in page.text
    assert "Stage 1 is the bottleneck" in page.text and "--queue_depth" in page.text
    svgs = re.findall(r"<svg.*?</svg>", (run_dir / "report.html").read_text(), re.DOTALL)
    assert len(svgs) == 10
    for svg in svgs:
        xml.dom.minidom.parseString(svg)


def test_charts_carry_the_values(run_dir: Path) -> None:
    page = Page(report(read_run(run_dir)))
    charts = {a["aria-label"]: json.loads(a["data-chart"]) for t, a in page.tags if t == "svg" and "data-chart" in a}
    (line,) = charts["Drift of the boundary"]["lines"]
    assert line["xs"] == [10, 20, 30, 40, 50, 60] and line["values"][-1] == "6.0%"
    assert [line["name"] for line in charts["Learning rate"]["lines"]] == ["stage 0", "stage 1"]
    assert len(charts["Task loss"]["lines"][0]["xs"]) == 60
    assert "Model FLOPs utilization" not in charts


def test_every_phase_has_a_colour(run_dir: Path) -> None:
    page = report(read_run(run_dir))
    for phase in (*PHASES, "other"):
        assert len(re.findall(rf"--{phase}: #[0-9a-f]{{6}};", page)) == 2, "one by day and one by night"
        assert f".{phase} {{ background: var(--{phase});" in " ".join(page.split()), phase


def test_an_evaluation_before_the_first_step_is_on_the_chart_of_losses_alone(tmp_path: Path) -> None:
    """It is not a step: it has no throughput, and neither the mean times nor the sums of a comparison know of it."""
    later = records()
    later[-1]["eval_loss"] = 2.25
    start = [
        record(0, 0, {"eval": 0.5, "wait_send": 0.4}, eval_reconstruction_loss=0.5) | {"num_tokens": 0},
        record(1, 0, {"eval": 0.5, "wait_receive": 0.4}, eval_loss=3.5) | {"num_tokens": 0},
    ]
    with_start, without = (
        read_run(write_run(tmp_path / name, own, about([(0, 15), (15, 30)], [[0], [1]])))
        for name, own in (("with", [*start, *later]), ("without", later))
    )
    charts = [
        {a["aria-label"]: json.loads(a["data-chart"])["lines"] for t, a in Page(html).tags if "data-chart" in a}
        for html in (report(with_start), report(without))
    ]
    held_out = charts[0]["Task loss"].pop()
    assert (held_out["name"], held_out["xs"], held_out["values"]) == ("held out", [0, 60], ["3.5", "2.25"])
    charts[1]["Task loss"].pop()
    assert charts[0] == charts[1]
    assert with_start.times(1) == without.times(1) and with_start.seconds == without.seconds
    # But for the held-out losses themselves, which both have.
    own = r"<(header|section) id=.(head|section-(at-a-glance|held-out-losses)).*?</\1>|<div id=.tiles.*?</div>\n</div>"
    compared = [re.sub(own, "", compare([run]), flags=re.DOTALL) for run in (with_start, without)]
    assert "Task loss over tokens" in compared[0] and "held out" not in compared[0]
    assert compared[0].replace("/with", "/without") == compared[1]


def test_a_run_that_is_still_at_its_start_is_one_line(tmp_path: Path) -> None:
    start = [record(stage, 0, {"eval": 0.5}) for stage in (0, 1)]
    with pytest.raises(LoptError, match="metrics.jsonl has no step of all stages yet$"):
        read_run(write_run(tmp_path, start))


def test_what_users_name_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    facts = about([(0, 15), (15, 30)], [[0], [1]], model_name_or_path="<script>alert(1)</script>\"'")
    facts["name"] = "</title><script>alert(2)</script>"
    html = report(read_run(write_run(tmp_path, records(3), facts)))
    assert "<script>alert" not in html
    assert Page(html).text.count("<script>alert(1)</script>\"'") == 2


@pytest.mark.parametrize("number", [1, 2, 5000])
def test_runs_of_any_length(number: int, tmp_path: Path) -> None:
    """Without `run.json` and trace, too; a long run does not make a large page."""
    html = report(read_run(write_run(tmp_path, records(number))))
    Page(html).check_self_contained()
    assert len(html) < 250_000


def test_a_line_that_is_still_written_is_left_out(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text() + '{"stage": 0, "st')
    assert read_run(run_dir).steps == 60
    path.write_text('{"stage": 0, "st\n' + path.read_text())
    with pytest.raises(LoptError, match="line 1: no record of a step"):
        read_run(run_dir)


def test_a_directory_without_a_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"lopt-pp: error: {tmp_path} has no metrics.jsonl; give the --output_dir of a run\n"
    )
    for command in ("report", "compare"):
        assert cli.main([command, str(tmp_path / "gone"), str(tmp_path)][: 2 + (command == "compare")]) == 1
        assert capsys.readouterr().err == (
            f"lopt-pp: error: {tmp_path}/gone is not a directory; give the --output_dir of a run\n"
        )


def test_one_run_is_not_compared(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", str(run_dir), "--output", str(tmp_path / "one.html")]) == 2
    assert "alone has nothing to be compared with; give two or more" in capsys.readouterr().err
    assert not (tmp_path / "one.html").exists()


def test_a_run_at_home(run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run_dir.parent))
    run = f"~/{run_dir.name}"
    assert cli.main(["report", run, f"--output={run}/page.html"]) == 0
    assert cli.main(["compare", run, run, f"--output={run}/both.html"]) == 0
    assert (run_dir / "page.html").exists() and (run_dir / "both.html").exists()


def test_comparisons_overlay_runs(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = about([(0, 15), (15, 30)], [[0], [1]], queue_depth=8) | {"name": "another"}
    other = write_run(tmp_path / "other", records(20), facts)
    assert cli.main(["compare", str(run_dir), str(other), "--output", str(tmp_path / "both.html")]) == 0
    page = Page((tmp_path / "both.html").read_text(encoding="utf-8"))
    page.check_self_contained()
    charts = {a["aria-label"]: json.loads(a["data-chart"]) for t, a in page.tags if t == "svg" and "data-chart" in a}
    assert [(line["name"], len(line["xs"])) for line in charts["Task loss"]["lines"]] == [
        ("made up", 60),
        ("another", 20),
    ]
    assert charts["Task loss over tokens"]["lines"][1]["xs"][-1] == 2000
    differing = page.text[page.text.index("What differs") :]
    assert "--queue_depth" in differing and "--max_grad_norm" not in differing


def test_a_comparison_lists_the_flags_that_say_so(tmp_path: Path) -> None:
    """All flags differ here; one that no version knows any more is listed too."""
    runs = []
    for name in ("one", "two"):
        flags = {flag: name for flag in [*EFFECTS, "bygone"]}
        facts = about([(0, 1), (1, 2)], [[0], [1]], **flags)
        runs.append(read_run(write_run(tmp_path / name, records(3), facts)))
    text = Page(compare(runs)).text
    # The page's text has a flag's name and its values, "one" and "two", without spaces between.
    listed = re.findall(r"--(\w+?)onetwo", text[text.index("What differs") :])
    assert sorted(listed) == sorted([*(name for name, effects in EFFECTS.items() if effects.compared), "bygone"])
    assert {"queue_depth", "learning_rate"} <= {*listed} and not {"output_dir", "run_name"} & {*listed}


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, records(3), about([(0, 1), (1, 2)], [[0], [1]]))) for name in "ab"]
    text = Page(compare(runs)).text
    assert str(tmp_path / "a") in text and str(tmp_path / "b") in text


def test_a_curve_lies_where_its_values_are() -> None:
    svg = Chart("x", [Line("a", [0, 10], [0.0, 8.0])], from_zero=True, smooth=False).svg()
    (path,) = re.findall(r'class="curve".*? d="M(.*?)"', svg)
    (x0, y0), (x1, y1) = (map(float, point.split()) for point in path.split("L"))
    assert (x0, x1) == (58, 550) and y0 == 216 and y1 == 10


def test_values_over_many_powers_of_ten_get_a_logarithmic_axis() -> None:
    svg = Chart("x", [Line("a", [1, 2, 3], [1e-3, 1e-1, 10.0])], smooth=False).svg()
    (path,) = re.findall(r'class="curve".*? d="M(.*?)"', svg)
    ys = [float(point.split()[1]) for point in path.split("L")]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)


def test_not_a_number_breaks_no_chart() -> None:
    svg = Chart("x", [Line("a", [1, 2, 3], [1.0, float("nan"), 2.0]), Line("none", [], [])]).svg()
    xml.dom.minidom.parseString(svg)
    assert "nan" not in re.findall(r' d="(.*?)"', svg)[0]


def test_means_and_numbers() -> None:
    assert means([1.0, 2.0]) == [1.0, 2.0]
    assert means([0.0] * 40 + [1.0] * 40)[39:41] == [0.4, 0.6]
    assert [number(value) for value in (0.0, 12345.6, 2.5e6, 0.12345, 2e-5, 31)] == [
        "0",
        "12.35k",
        "2.5M",
        "0.1235",
        "2e-05",
        "31",
    ]


def test_the_timeline_has_a_row_for_each_stage() -> None:
    picture = xml.dom.minidom.parseString(timeline(TRACE["traceEvents"]))
    rows: dict[float, list[str]] = {}
    for bar in picture.getElementsByTagName("rect"):
        rows.setdefault(float(bar.getAttribute("y")), []).append(bar.getAttribute("class").split()[0])
    assert rows == {17: ["forward", "wait_send", "backward"], 57: ["wait_receive", "forward"]}
    widths = {}
    for title in picture.getElementsByTagName("title"):
        assert isinstance(title.firstChild, xml.dom.minidom.Text) and isinstance(
            title.parentNode, xml.dom.minidom.Element
        )
        widths[title.firstChild.data] = float(title.parentNode.getAttribute("width"))
    assert widths["backward, 299.0 ms, step 11, microbatch 0"] == pytest.approx(1120 * 0.299 / 0.4, abs=0.1)
    assert timeline([]) == ""
