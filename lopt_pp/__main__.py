"""`python -m lopt_pp`: the `lopt-pp` command."""

import sys

from lopt_pp.cli import main

if __name__ == "__main__":
    sys.exit(main())
