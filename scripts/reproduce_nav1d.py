"""`python scripts/reproduce_nav1d.py --help`: the command `dmc-hub reproduce-nav1d` as a script."""

import sys

from dmc_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce-nav1d", *sys.argv[1:]]))
