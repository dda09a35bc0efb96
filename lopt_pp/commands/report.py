"""`lopt-pp report RUN_DIR`: one self-contained page on a run; with --serve, one that follows the run as it goes."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lopt_pp.commands.common import CommandParser, home_path
from lopt_pp.commands.exports import add_exports, write_exports
from lopt_pp.util.console import print_warning

PORT = 6007
"""TensorBoard has the one before it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = CommandParser("lopt-pp report", description=__doc__)
    parser.add_argument("run", type=home_path, metavar="RUN_DIR", help="the --output_dir of a run; it may still go on")
    parser.add_argument("--output", type=home_path, help="the page (default: RUN_DIR/report.html)")
    add_exports(parser, "the values of every step and stage")
    parser.add_argument(
        "--serve",
        action="store_true",
        help="serve the page to browsers on this machine and keep it up to date, until Ctrl-C; no file is written, and "
        "RUN_DIR need not exist yet",
    )
    parser.add_argument(
        "--port", type=_port, help=f"with --serve, on the loopback interface (default: {PORT}; 0: any that is free)"
    )
    given = parser.read(arguments)
    # Late, so that --help does not wait for the page's template.
    from lopt_pp.report.advice import advise
    from lopt_pp.report.export import report_csv, report_json
    from lopt_pp.report.figure import draw_run
    from lopt_pp.report.page import write_page
    from lopt_pp.report.run_data import read_run
    from lopt_pp.report.run_report import report
    from lopt_pp.report.state import StateReader

    if given.serve:
        for name in ("output", "json", "csv", "png"):
            if getattr(given, name) is not None:
                parser.error(f"--{name} is of a file that is written; --serve writes none")
        return _serve(given.run, PORT if given.port is None else given.port)
    if given.port is not None:
        parser.error("--port is of the page that --serve serves")
    run = read_run(given.run)
    state = StateReader(given.run).read(run)
    output = given.output if given.output is not None else given.run / "report.html"
    write_page(output, report(run, state))
    print(f"the report is {output}")
    write_exports(given, lambda: report_json(run, state), lambda: report_csv(run), lambda path: draw_run(run, path))
    for advice in advise(run):
        if advice.kind == "warn":
            print_warning(advice.text)
    return 0


def _serve(directory: Path, port: int) -> int:
    # Late, since only this needs a server.
    from lopt_pp.report.server import PageServer, how_to_reach

    server = PageServer(directory, port)
    try:
        server.serve(lambda: print(how_to_reach(server), flush=True))
    except KeyboardInterrupt:
        print()  # After the terminal's ^C.
    return 0


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text} is not a port: 1 to 65535, or 0 for any that is free")
    return int(text)
