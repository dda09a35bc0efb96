"""Writes to a terminal that it shares: lines by logging and by `print`, and as rank 0 below a progress bar.

Arguments: how many lines; the rank, or `ask`.
"""

import logging
import sys

from lopt_pp.util.screen import SCREEN, shared

number, rank = int(sys.argv[1]), sys.argv[2]
done = 0
logging.basicConfig(format="rank %(name)s logs %(message)s")


def show(columns: int) -> str:
    assert columns == 79
    return f"bar {done}/{number} {'=' * 40}"  # Longer than the lines.


with shared():
    if rank == "ask":
        with SCREEN.bar(show) as draw:
            print("how many? ", end="", flush=True)
            draw()
            done = number
            draw()
            print(number)
            print("first\nsec", end="")
            print("ond", file=sys.stdout)
    elif rank == "0":
        with SCREEN.bar(show) as draw:
            for done in range(number):
                logging.getLogger(rank).warning("%d", done)
                draw()
                print("rank", rank, "prints", done)
            done = number
    else:
        for done in range(number):
            logging.getLogger(rank).warning("%d", done)
            print("rank", rank, "prints", done)
