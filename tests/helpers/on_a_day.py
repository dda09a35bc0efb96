"""The trainer on a day of one's choice, the first argument: for its own clock, and for that of chat templates."""

from collections.abc import Sequence
from datetime import date, datetime, time, tzinfo

from transformers.utils import chat_template_utils

import lopt_pp.train
from lopt_pp.data import dates


def main(arguments: Sequence[str]) -> int:
    noon = datetime.combine(date.fromisoformat(arguments[0]), time(12))

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return noon

    chat_template_utils.datetime = dates.datetime = Clock  # type: ignore[misc]
    return lopt_pp.train.main(arguments[1:])


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
