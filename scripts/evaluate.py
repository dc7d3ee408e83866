"""`accelerate launch scripts/evaluate.py --help`: the command `dmc-hub evaluate` as a script."""

import sys

from dmc_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
