"""`python scripts/reproduce_joint.py --help`: joint optimisation of several rewards on a tiny Stable Diffusion."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dmc_hub import checkpoint
from dmc_hub.benchmarks.joint import JointMiniature, as_table

QUICK = {"base_steps": 60, "iterations": 2, "num_pictures": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/joint"), help="gets joint.json and joint.md")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a minute, to see that everything runs: no real result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # networks this small are slower on more
    result = JointMiniature(seed=arguments.seed, **(QUICK if arguments.quick else {})).run()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.save_json(arguments.output_dir / "joint.json", result)
    checkpoint.write_text(arguments.output_dir / "joint.md", as_table(result))
    print(as_table(result))


if __name__ == "__main__":
    main()
