"""The files for programs and papers that `report` and `compare` write besides their page."""

import argparse
from collections.abc import Callable
from pathlib import Path

from lopt_pp.commands.common import home_path

SUFFIXES = (".png", ".pdf", ".svg")


def add_exports(parser: argparse.ArgumentParser, csv: str) -> None:
    """Adds the flags that name these files.

    Args:
        parser: of the command.
        csv: what the CSV file has.
    """
    parser.add_argument("--json", type=home_path, metavar="FILE", help="write the results as JSON, too")
    parser.add_argument("--csv", type=home_path, metavar="FILE", help=f"write {csv} as CSV, too")
    parser.add_argument(
        "--png",
        type=_picture,
        metavar="FILE",
        help="draw the losses as a picture for papers, too, of the kind that FILE ends in: .png, .pdf or .svg",
    )


def write_exports(
    given: argparse.Namespace, json: Callable[[], str], csv: Callable[[], str], draw: Callable[[Path], None]
) -> None:
    """Writes the files that were asked for, and says so.

    Args:
        given: the flags.
        json: makes the JSON.
        csv: makes the CSV.
        draw: draws the picture to a file.

    Raises:
        LoptError: one cannot be written.
    """
    # Late, so that --help does not wait for the page's template.
    from lopt_pp.report.page import write_page

    if given.json is not None:
        write_page(given.json, json(), "--json")
        print(f"the results are {given.json}")
    if given.csv is not None:
        write_page(given.csv, csv(), "--csv")
        print(f"the values are {given.csv}")
    if given.png is not None:
        draw(given.png)
        print(f"the picture is {given.png}")


def _picture(text: str) -> Path:
    path = home_path(text)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text} ends in none of {', '.join(SUFFIXES)}")
    return path
