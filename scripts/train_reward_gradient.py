"""`accelerate launch scripts/train_reward_gradient.py --help`: the command `dmc-hub train-reward-gradient`."""

import sys

from dmc_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-reward-gradient", *sys.argv[1:]]))
