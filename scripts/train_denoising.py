"""`accelerate launch scripts/train_denoising.py --help`: the command `dmc-hub train-denoising` as a script."""

import sys

from dmc_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-denoising", *sys.argv[1:]]))
