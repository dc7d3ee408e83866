"""`accelerate launch scripts/train_sft.py --help`: the command `dmc-hub train-sft` as a script."""

import sys

from dmc_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-sft", *sys.argv[1:]]))
