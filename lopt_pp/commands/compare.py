"""`lopt-pp compare RUN_DIR RUN_DIR ...`: one self-contained page that overlays several runs."""

from collections.abc import Sequence
from pathlib import Path

from lopt_pp.commands.common import CommandParser, home_path
from lopt_pp.commands.exports import add_exports, write_exports
from lopt_pp.errors import UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = CommandParser("lopt-pp compare", description=__doc__)
    parser.add_argument(
        "runs", type=home_path, nargs="+", metavar="RUN_DIR", help="the --output_dir of each run, two or more"
    )
    parser.add_argument(
        "--output", type=home_path, default=Path("compare.html"), help="the page (default: compare.html)"
    )
    add_exports(parser, "a line for each run, with its results and the flags that differ,")
    given = parser.read(arguments)
    # Late, so that --help does not wait for the page's template.
    from lopt_pp.report.comparison import compare
    from lopt_pp.report.export import comparison_csv, comparison_json
    from lopt_pp.report.figure import draw_runs
    from lopt_pp.report.page import write_page
    from lopt_pp.report.run_data import read_run

    if len(given.runs) < 2:
        raise UsageError(
            f"{given.runs[0]} alone has nothing to be compared with; give two or more, or see lopt-pp report"
        )
    runs = [read_run(run) for run in given.runs]
    write_page(given.output, compare(runs))
    print(f"the comparison is {given.output}")
    write_exports(
        given, lambda: comparison_json(runs), lambda: comparison_csv(runs), lambda path: draw_runs(runs, path)
    )
    return 0
