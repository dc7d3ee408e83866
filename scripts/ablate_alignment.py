"""`python scripts/ablate_alignment.py --help`: the command `dmc-hub ablate-alignment` as a script."""

import sys

from dmc_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablate-alignment", *sys.argv[1:]]))
