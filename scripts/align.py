"""`accelerate launch scripts/align.py --help`: the command `dmc-hub align` as a script."""

import sys

from dmc_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["align", *sys.argv[1:]]))
