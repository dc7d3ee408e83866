"""`python scripts/benchmark.py --help`: measurements that one command repeats, written as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dmc_hub import __version__, checkpoint
from dmc_hub.arguments import AlignArguments
from dmc_hub.benchmarks.alignment import SETTINGS, RewardPerForward
from dmc_hub.benchmarks.data import measure_conversion, measure_windows
from dmc_hub.benchmarks.rewards import reward_cost
from dmc_hub.benchmarks.vision import frames_per_second
from dmc_hub.recipes import shared_foundation

ALIGNMENT_STEPS = {"plain DDPO": 400, "REINFORCE": 400, "PPO": 400, "QV-PG": 200, "NFT": 200}


def alignment(arguments: argparse.Namespace) -> dict[str, Any]:
    """Denoiser evaluations to 90 % of the best gain: plain DDPO, REINFORCE, PPO, QV-PG, NFT."""
    with tempfile.TemporaryDirectory() as scratch:
        foundation = arguments.foundation
        if foundation is None:
            run = AlignArguments(task="nav1d-full", output_dir=scratch, controller=arguments.controller)
            foundation = shared_foundation(run.settings(), Path(scratch))
        steps = {name: max(2, round(arguments.scale * ALIGNMENT_STEPS[name])) for name in SETTINGS}
        return RewardPerForward(Path(foundation), controller=arguments.controller, seed=arguments.seed).run(steps)


def data(arguments: argparse.Namespace) -> dict[str, Any]:
    """Windows per second against a Dataset with a DataLoader, and the memory of converting a large file."""
    result: dict[str, Any] = {
        "windows": [
            measure_windows(horizon=horizon, batch_size=arguments.batch_size, seed=arguments.seed)
            for horizon in arguments.horizons
        ]
    }
    if arguments.gigabytes > 0:
        result["conversion"] = measure_conversion(arguments.gigabytes, seed=arguments.seed)
    return result


def vision(arguments: argparse.Namespace) -> dict[str, Any]:
    """Frames per second of the vision encoder, forward and with gradient, beside the bare ResNet's."""
    return frames_per_second(batch_size=arguments.batch_size, device=arguments.device, seed=arguments.seed)


def rewards(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a joint reward by the number of rewards in it, beside those of the rewards alone."""
    return {"rewards": [reward_cost(count, seed=arguments.seed) for count in arguments.counts]}


def main() -> int:
    """Parse the arguments, run one benchmark, write or print its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    command = benchmarks.add_parser("alignment", help=alignment.__doc__)
    command.set_defaults(run=alignment)
    command.add_argument("--controller", choices=("planner", "policy"), default="planner")
    command.add_argument("--foundation", help="folder of a trained pipeline with its critic; by default one is trained")
    command.add_argument("--scale", type=float, default=1.0, help="factor on the numbers of training steps")
    command = benchmarks.add_parser("data", help=data.__doc__)
    command.set_defaults(run=data)
    command.add_argument("--horizons", type=int, nargs="+", default=[4, 8, 16, 32])
    command.add_argument("--batch-size", type=int, default=256)
    command.add_argument("--gigabytes", type=float, default=2.0, help="size of the file to convert; 0: none")
    command = benchmarks.add_parser("vision", help=vision.__doc__)
    command.set_defaults(run=vision)
    command.add_argument("--batch-size", type=int, default=64, help="frames at once")
    command.add_argument("--device", default="cpu")
    command = benchmarks.add_parser("rewards", help=rewards.__doc__)
    command.set_defaults(run=rewards)
    command.add_argument("--counts", type=int, nargs="+", default=[1, 3, 6, 12])
    for each in benchmarks.choices.values():
        each.add_argument("--seed", type=int, default=0)
        each.add_argument("--output", help="JSON file; printed by default")
    arguments = parser.parse_args()
    result = {
        "benchmark": arguments.benchmark,
        "command": " ".join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "versions": {"dmc_hub": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {platform.machine()}",
        **arguments.run(arguments),
    }
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output is None:
        print(text, end="")
    else:
        checkpoint.write_text(arguments.output, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
