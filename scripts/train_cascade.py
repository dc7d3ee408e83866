"""`accelerate launch scripts/train_cascade.py --help`: the command `dmc-hub train-cascade` as a script."""

import sys

from dmc_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-cascade", *sys.argv[1:]]))
