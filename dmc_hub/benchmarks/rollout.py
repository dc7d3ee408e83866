"""What running episodes costs beyond the controller's decisions and the environments' steps."""

from __future__ import annotations

import functools
from typing import Any, cast

import gymnasium
import numpy as np
import torch

from dmc_hub.benchmarks.plan import PlannerSizes
from dmc_hub.benchmarks.timing import machine, take_turns
from dmc_hub.envs import NAV1D_ID
from dmc_hub.envs.workers import RestartingVectorEnv
from dmc_hub.rollout import run_episodes

SIZES = PlannerSizes(observation_dim=3, action_dim=1, horizon=8, dim=32, dim_mults=(1, 2), num_inference_steps=10)


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
    environment steps by themselves."""
    planner = sizes.build(device=device, seed=seed)
    results = {}
    for name, count in (("in this process", num_envs), (f"{num_workers} worker processes", num_workers)):
        vector_env = make_envs(count, in_workers=name != "in this process")
        try:
            results[name] = {"environments": count, **_measure(planner, vector_env, count, repeats, device, seed)}
        finally:
            vector_env.close()
    return {"machine": machine(device), "sizes": vars(sizes), "environments": results}


def make_envs(count: int, *, in_workers: bool) -> Any:
    """So many environments of Nav1D, side by side in this process or one in each worker."""
    if in_workers:
        return RestartingVectorEnv([functools.partial(gymnasium.make, NAV1D_ID)] * count)
    return gymnasium.make_vec(NAV1D_ID, num_envs=count)


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
