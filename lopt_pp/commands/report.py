"""`lopt-pp report RUN_DIR`: one self-contained page on a run."""

from collections.abc import Sequence

from lopt_pp.commands.common import CommandParser, home_path
from lopt_pp.errors import LoptError
from lopt_pp.report.advice import advise
from lopt_pp.report.page import write_page
from lopt_pp.report.run_data import read_run
from lopt_pp.report.run_report import report
from lopt_pp.util.console import print_error, print_warning


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = CommandParser("lopt-pp report", description=__doc__)
    parser.add_argument("run", type=home_path, metavar="RUN_DIR", help="the --output_dir of a run; it may still go on")
    parser.add_argument("--output", type=home_path, help="the page (default: RUN_DIR/report.html)")
    given = parser.read(arguments)
    output = given.output if given.output is not None else given.run / "report.html"
    try:
        run = read_run(given.run)
        write_page(output, report(run))
    except LoptError as error:
        print_error(str(error))
        return 1
    print(f"the report is {output}")
    for advice in advise(run):
        if advice.kind == "warn":
            print_warning(advice.text)
    return 0
