"""`python scripts/benchmark.py --help`: measurements that one command repeats, written as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dmc_hub import __version__, checkpoint
from dmc_hub.arguments import AlignArguments
from dmc_hub.benchmarks.act import measure_acting
from dmc_hub.benchmarks.alignment import SETTINGS, RewardPerForward
from dmc_hub.benchmarks.data import measure_conversion, measure_windows
from dmc_hub.benchmarks.growth import measure_growth
from dmc_hub.benchmarks.plan import measure_plans
from dmc_hub.benchmarks.profile import measure_profiles
from dmc_hub.benchmarks.prompts import stream_prompts
from dmc_hub.benchmarks.ranking import measure_ranking
from dmc_hub.benchmarks.rewards import reward_cost
from dmc_hub.benchmarks.rollout import measure_rollouts
from dmc_hub.benchmarks.startup import measure_startup
from dmc_hub.benchmarks.table import write_table
from dmc_hub.benchmarks.train import measure_loops, measure_training
from dmc_hub.benchmarks.vision import frames_per_second
from dmc_hub.foundations import shared_foundation
from dmc_hub.plots import plot_growth
from dmc_hub.profiling import profiled

TASK = "nav1d-full"
ALIGNMENT_STEPS = {"plain DDPO": 400, "REINFORCE": 400, "PPO": 400, "QV-PG": 200, "NFT": 200}


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """A plan over as many bare forwards of its network, with every sampler."""
    return measure_plans(batch_sizes=arguments.batch_sizes, **_common(arguments, 7))


def act(arguments: argparse.Namespace) -> dict[str, Any]:
    """Networks and one decision over the originals of the same widths."""
    options = {"batch_sizes": arguments.batch_sizes, "compiles": not arguments.eager}
    return measure_acting(**options, **_common(arguments, 15))


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """A training step, data included, over forward, backward and optimiser alone."""
    return measure_training(**_common(arguments, 40))


def align(arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of trainers on tiny models over a bare loop."""
    return measure_loops(**_common(arguments, 150))


def rollout(arguments: argparse.Namespace) -> dict[str, Any]:
    """Episodes over their decisions and environment steps by themselves."""
    return measure_rollouts(num_envs=arguments.num_envs, num_workers=arguments.num_workers, **_common(arguments, 10))


def growth(arguments: argparse.Namespace) -> dict[str, Any]:
    """How cost grows with candidates, horizon, denoising steps, environments, data and processes."""
    result = measure_growth(**_common(arguments, 5))
    if arguments.plot is not None:
        plot_growth(result["growth"], arguments.plot)
    return result


def profile(arguments: argparse.Namespace) -> dict[str, Any]:
    """The most expensive operations of planning, acting, training, alignment and rollouts."""
    return measure_profiles(**_common(arguments, 5))


def _common(arguments: argparse.Namespace, repeats: int) -> dict[str, Any]:
    repeats = repeats if arguments.repeats is None else arguments.repeats
    return {"repeats": repeats, "device": arguments.device, "seed": arguments.seed}


def ranking(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ranking candidates part-way saves and costs: time, value of what is chosen, return on Nav1D."""
    with _foundation(arguments, scale=arguments.scale) as foundation:
        options: dict[str, Any] = {"task": TASK, "controller": arguments.controller}
        return measure_ranking(foundation, **options, num_episodes=arguments.num_episodes, **_common(arguments, 5))


@contextmanager
def _foundation(arguments: argparse.Namespace, scale: float = 1.0) -> Iterator[Path]:
    """The one that is given, or a new one of Nav1D."""
    if arguments.foundation is not None:
        yield Path(arguments.foundation)
        return
    with tempfile.TemporaryDirectory() as scratch:
        options: dict[str, Any] = {"controller": arguments.controller, "training_scale": scale}
        run = AlignArguments(task=TASK, output_dir=scratch, **options)
        yield shared_foundation(run.settings(), Path(scratch))


def alignment(arguments: argparse.Namespace) -> dict[str, Any]:
    """Denoiser evaluations to 90 % of the best gain: plain DDPO, REINFORCE, PPO, QV-PG, NFT."""
    with _foundation(arguments) as foundation:
        steps = {name: max(2, round(arguments.scale * ALIGNMENT_STEPS[name])) for name in SETTINGS}
        return RewardPerForward(foundation, controller=arguments.controller, seed=arguments.seed).run(steps)


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


def prompts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time to the first batch and memory while millions of prompts are streamed and encoded."""
    with tempfile.TemporaryDirectory() as scratch:
        return stream_prompts(Path(scratch), count=arguments.count, seed=arguments.seed)


def startup(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds that importing dmc_hub adds to importing torch, and of the command line's help."""
    return measure_startup(repeats=arguments.repeats)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)

    def add(run: Callable[[argparse.Namespace], dict[str, Any]]) -> argparse.ArgumentParser:
        command = benchmarks.add_parser(run.__name__, help=str(run.__doc__).replace("%", "%%"))
        command.set_defaults(run=run)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--output", help="JSON file; printed by default")
        command.add_argument("--profile", help="file for a trace of the run, for chrome://tracing or Perfetto")
        command.add_argument("--threads", type=int, help="threads of torch; as many as there are cores by default")
        return command

    for run in (plan, act, train, align, rollout, growth, ranking, profile):
        command = add(run)
        command.add_argument("--device", default="cpu")
        command.add_argument("--repeats", type=int, help="of each measurement")
    for name in ("plan", "act"):
        benchmarks.choices[name].add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    benchmarks.choices["act"].add_argument("--eager", action="store_true", help="compile nothing")
    benchmarks.choices["rollout"].add_argument("--num-envs", type=int, default=16)
    benchmarks.choices["rollout"].add_argument("--num-workers", type=int, default=2, help="an even number")
    benchmarks.choices["growth"].add_argument("--plot", help="PNG file")
    benchmarks.choices["ranking"].add_argument("--num-episodes", type=int, default=128)
    for command in (benchmarks.choices["ranking"], add(alignment)):
        command.add_argument("--controller", choices=("planner", "policy"), default="planner")
        command.add_argument("--foundation", help="folder of a trained pipeline with its critic; else one is trained")
    benchmarks.choices["ranking"].add_argument("--scale", type=float, default=0.5, help="factor on its training steps")
    benchmarks.choices["alignment"].add_argument(
        "--scale", type=float, default=1.0, help="factor on the numbers of training steps"
    )
    command = add(data)
    command.add_argument("--horizons", type=int, nargs="+", default=[4, 8, 16, 32])
    command.add_argument("--batch-size", type=int, default=256)
    command.add_argument("--gigabytes", type=float, default=2.0, help="size of the file to convert; 0: none")
    command = add(rewards)
    command.add_argument("--counts", type=int, nargs="+", default=[1, 3, 6, 12])
    command = add(prompts)
    command.add_argument("--count", type=int, default=2_000_000)
    add(startup).add_argument("--repeats", type=int, default=7)
    command = add(vision)
    command.add_argument("--batch-size", type=int, default=64, help="frames at once")
    command.add_argument("--device", default="cpu")
    command = benchmarks.add_parser("table", help="Write the table of a page from the JSON files of a folder.")
    command.add_argument("--page", default="docs/speed.md")
    command.add_argument("--folder", default="docs/benchmarks")
    return parser


def main() -> int:
    """Parse the arguments, run one benchmark, write or print its JSON."""
    arguments = _parser().parse_args()
    if arguments.benchmark == "table":
        write_table(Path(arguments.page), Path(arguments.folder))
        return 0
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    result = {
        "benchmark": arguments.benchmark,
        "command": " ".join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "versions": {"dmc_hub": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {platform.machine()}",
    }
    with profiled(arguments.profile) as most_expensive:
        measured = arguments.run(arguments)
    result |= {**measured, **({"most_expensive": most_expensive} if most_expensive else {})}
    text = json.dumps(result, indent=2) + "\n"
    if arguments.output is None:
        print(text, end="")
    else:
        checkpoint.write_text(arguments.output, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
