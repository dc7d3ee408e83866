"""`accelerate launch scripts/train_critic.py --help`: the command `dmc-hub train-critic` as a script."""

import sys

from dmc_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-critic", *sys.argv[1:]]))
