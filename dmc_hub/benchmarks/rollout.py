"""What running episodes costs beyond the controller's decisions and the environments' steps."""

from __future__ import annotations

import functools
import itertools
import time
from typing import Any, cast

import gymnasium
import numpy as np
import torch

from dmc_hub.benchmarks.plan import PlannerSizes
from dmc_hub.benchmarks.timing import machine, take_turns
from dmc_hub.envs import NAV1D_ID
from dmc_hub.envs.workers import RestartingVectorEnv
from dmc_hub.rollout import Lane, run_episodes, run_lanes

SIZES = PlannerSizes(observation_dim=3, action_dim=1, horizon=8, dim=32, dim_mults=(1, 2), num_inference_steps=10)
ALL, HALVES = "all at once", "two halves in turn"
SHARES = (0.25, 0.5, 1.0)
NUM_CANDIDATES = 16


def measure_rollouts(
    *,
    num_envs: int = 16,
    num_workers: int = 2,
    sizes: PlannerSizes = SIZES,
    repeats: int = 10,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Episodes of Nav1D under a planner, with environments in this process and in workers, over as many decisions and
    environment steps by themselves; and, as `turns`, two halves of the workers that take turns over all at once, where
    a step waits for some share of the time of a decision for all."""
    planner = sizes.build(device=device, seed=seed)
    results = {}
    for name, count in (("in this process", num_envs), (f"{num_workers} worker processes", num_workers)):
        vector_env = make_envs(count, in_workers=name != "in this process")
        try:
            results[name] = {"environments": count, **_measure(planner, vector_env, count, repeats, device, seed)}
        finally:
            vector_env.close()
    turns = _measure_turns(planner, num_workers, repeats, device, seed)
    return {"machine": machine(device), "sizes": vars(sizes), "environments": results, "turns": turns}


def make_envs(count: int, *, in_workers: bool) -> Any:
    """So many environments of Nav1D, side by side in this process or one in each worker."""
    if in_workers:
        return RestartingVectorEnv([functools.partial(gymnasium.make, NAV1D_ID)] * count)
    return gymnasium.make_vec(NAV1D_ID, num_envs=count)


class Waiting(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose steps wait, as for a simulation on other cores."""

    def __init__(self, env: gymnasium.Env[Any, Any], seconds: float) -> None:
        super().__init__(env)
        self.seconds = seconds

    def step(self, action: Any) -> Any:
        time.sleep(self.seconds)
        return super().step(action)


def make_waiting(seconds: float) -> Any:
    return Waiting(gymnasium.make(NAV1D_ID), seconds)


def _measure_turns(planner: Any, num_workers: int, repeats: int, device: str, seed: int) -> dict[str, Any]:
    """By the share of a decision that a step waits; `num_workers` is even, and twice as many episodes are run."""

    def controller(observations: Any, generator: torch.Generator | None) -> np.ndarray:
        return cast(np.ndarray, planner(observations, num_candidates=NUM_CANDIDATES, generator=generator).action)

    observations = np.zeros((num_workers, planner.observation_dim), np.float32)
    decision = take_turns({ALL: lambda: controller(observations, None)}, ALL, repeats=repeats, device=device)
    seconds = decision["milliseconds"][ALL] / 1e3
    results = {}
    for share in SHARES:
        make = functools.partial(make_waiting, share * seconds)
        widths = {ALL: [num_workers], HALVES: [num_workers // 2] * 2}
        lanes = {
            name: [Lane(controller, RestartingVectorEnv([make] * count), _generator(seed)) for count in counts]
            for name, counts in widths.items()
        }
        runs = {name: functools.partial(run_lanes, each, seeds=range(2 * num_workers)) for name, each in lanes.items()}
        try:
            results[f"{share:g}"] = take_turns(runs, ALL, repeats=repeats, device=device, warm_up=1)
        finally:
            for lane in itertools.chain(*lanes.values()):
                lane.vector_env.close()
    return {"num_workers": num_workers, "num_candidates": NUM_CANDIDATES, "by_share": results}


def _measure(planner: Any, vector_env: Any, count: int, repeats: int, device: str, seed: int) -> dict[str, Any]:
    seeds = list(range(count))

    def controller(observations: Any, generator: torch.Generator | None) -> np.ndarray:
        return cast(np.ndarray, planner(observations, generator=generator).action)

    episodes = run_episodes(controller, vector_env, seeds=seeds, generator=_generator(seed))
    length = int(episodes.lengths.max())

    def whole() -> None:
        run_episodes(controller, vector_env, seeds=seeds, generator=_generator(seed))

    def parts() -> None:
        generator = _generator(seed)
        vector_env.reset(seed=seeds)
        for step in range(length):
            controller(episodes.observations[:, step], generator)
            vector_env.step(episodes.actions[:, step])

    def stepping() -> None:
        vector_env.reset(seed=seeds)
        for step in range(length):
            vector_env.step(episodes.actions[:, step])

    runs = {"decisions and steps": parts, "run_episodes": whole, "steps alone": stepping}
    return {"steps": length, **take_turns(runs, "decisions and steps", repeats=repeats, device=device)}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
