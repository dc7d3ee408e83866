"""`accelerate launch scripts/train_ddpo.py --help`: the command `dmc-hub train-ddpo` as a script."""

import sys

from dmc_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-ddpo", *sys.argv[1:]]))
