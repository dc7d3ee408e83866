"""`python scripts/reproduce_joint.py --help`: joint optimisation of several rewards on a tiny Stable Diffusion."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dmc_hub.benchmarks.joint_report import as_table, reproduce_joint

QUICK = {"base_steps": 60, "iterations": 2, "joint_iterations": 2}
QUICK |= {"credit_iterations": 2, "recipe_iterations": 2, "num_pictures": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/joint"), help="gets digits-joint.{json,md,png}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a minute a seed, to see that all runs: no real result")
    parser.add_argument("--ablate", action="store_true", help="also joint models with other normalisations and weights")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # networks this small are slower on more
    settings = {**(QUICK if arguments.quick else {}), "ablate": arguments.ablate}
    print(as_table(reproduce_joint(arguments.output_dir, seeds=arguments.seeds, **settings)))


if __name__ == "__main__":
    main()
