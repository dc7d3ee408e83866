"""The tasks: where data and environment come from and what is known about them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import gymnasium
import numpy as np

from dmc_hub.data.nav1d import make_nav1d_dataset, nav1d_behavior
from dmc_hub.envs import NAV1D_ID, nav1d


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: its id on the command line.
        summary: one line on what it is.
        env_id: gymnasium's id of the environment.
        make_dataset: `seed -> datasets.Dataset` with the columns of `Episodes`.
        optimal_return: highest expected return, where it is known.
        dynamics: `(observations, actions) -> planned next states`, for the coherency of planners (Eq. 15).
        behavior_log_prob: `(observations, actions) -> log-density` of the policy that made the data, for the coherency
            of policies (Eq. 16).
    """

    name: str
    summary: str
    env_id: str
    make_dataset: Callable[[int], datasets.Dataset]
    optimal_return: Callable[[], float] | None = None
    dynamics: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    behavior_log_prob: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


def _nav1d_task(variant: str, data: str) -> Task:
    return Task(
        name=f"nav1d-{variant}",
        summary=f"1-D navigation, 8 steps, moving targets; data: {data}",
        env_id=NAV1D_ID,
        make_dataset=functools.partial(_nav1d_dataset, variant),
        optimal_return=nav1d.optimal_return,
        dynamics=nav1d.planned_next_positions,
        behavior_log_prob=nav1d_behavior(variant),
    )


def _nav1d_dataset(variant: str, seed: int) -> datasets.Dataset:
    return make_nav1d_dataset(variant, num_episodes=4000, seed=seed)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _nav1d_task("full", "a uniform random policy"),
        _nav1d_task("partial", "the same, only episodes that stay in [0, 1]"),
        _nav1d_task("expert", "the optimal policy with action noise 0.1"),
    )
}


def describe_task(task: Task) -> dict[str, Any]:
    """What goes to the Hub with a pipeline: the task's name, its environment, and the spaces of that, JSON-ready."""
    env = gymnasium.make(task.env_id)
    try:
        spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
        described = {name: _describe_space(space) for name, space in spaces.items()}
    finally:
        env.close()
    return {"task": task.name, "environment": task.env_id, **described}


def _describe_space(space: Any) -> dict[str, Any]:
    def bounds(values: np.ndarray) -> list[float | None]:
        return [float(value) if np.isfinite(value) else None for value in values.flatten()]

    return {
        "shape": list(space.shape),
        "dtype": str(space.dtype),
        "low": bounds(space.low),
        "high": bounds(space.high),
    }


def get_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        ValueError: unknown; the message lists the known ones.
    """
    if name not in TASKS:
        raise ValueError(f"`task` {name!r} is unknown; known tasks: {', '.join(TASKS)}.")
    return TASKS[name]
