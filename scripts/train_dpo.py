"""`accelerate launch scripts/train_dpo.py --help`: the command `dmc-hub train-dpo` as a script."""

import sys

from dmc_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-dpo", *sys.argv[1:]]))
