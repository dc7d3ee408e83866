"""`accelerate launch scripts/train_nft.py --help`: the command `dmc-hub train-nft` as a script."""

import sys

from dmc_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-nft", *sys.argv[1:]]))
