"""`accelerate launch scripts/train_images.py train-nft --help`: the commands `dmc-hub images` as a script."""

import sys

from dmc_hub.cli import main

if __name__ == "__main__":
    sys.exit(main(["images", *sys.argv[1:]]))
