"""MetaWorld's single tasks (Yu et al., 2019, arXiv:1910.10897), version 3, with seeds that fix an episode."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium import spaces

from dmc_hub.envs.extras import require
from dmc_hub.envs.flat import FlatEnv

MAX_EPISODE_STEPS = 500
OBSERVATION_DIM, ACTION_DIM = 39, 4
GOALS_SEED = 0
TASK_NAMES = ("button-press", "drawer-open", "sweep-into", "plate-slide")


class MetaWorldEnv(FlatEnv):
    """One of MetaWorld's tasks with the goals of the benchmark MT1.

    An episode's seed chooses one of the 50 positions of object and goal that `metaworld.MT1(name, seed=0)` makes;
    nothing else is random.

    Observation: float32 `(39,)`: hand, gripper and objects now (18), the same one step before (18), the goal (3). They
    are clipped to MetaWorld's bounds, the first one too, which MetaWorld itself does not.
    Action: float32 `(4,)` in `[-1, 1]`: the hand's move in x, y, z, and the gripper's force.
    Reward: MetaWorld's shaped one, in `[0, 10]`.
    Termination: none; truncation after 500 steps. `info["success"]` says whether the task is solved at this step.

    Args:
        name: MetaWorld's name without its version, such as "button-press".
        render_mode: "rgb_array", or None for an environment that does not draw.

    Raises:
        ImportError: metaworld is not installed.
        ValueError: MetaWorld has no such task.
    """

    def __init__(self, name: str, render_mode: str | None = None) -> None:
        require("metaworld", "robotics")
        benchmark = _benchmark(f"{name}-v3")
        (env_class,) = benchmark.train_classes.values()
        self._goals = benchmark.train_tasks
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            env = env_class(render_mode=render_mode)
        env.set_task(self._goals[0])
        self._sawyer = env
        super().__init__(gymnasium.wrappers.TimeLimit(env, MAX_EPISODE_STEPS))
        bounds = env.sawyer_observation_space  # `observation_space` is that of a hidden goal
        self.observation_space = spaces.Box(bounds.low.astype(np.float32), bounds.high.astype(np.float32))

    def flatten(self, observation: Any) -> np.ndarray:
        """MetaWorld's vector inside its bounds."""
        space: Any = self.observation_space
        return cast(np.ndarray, np.clip(super().flatten(observation), space.low, space.high))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; `options={"goal": i}` chooses position `i` of 50."""
        if seed is not None:
            self._sawyer.seed(seed)
        chosen = (options or {}).get("goal")
        index = int(self._sawyer.np_random.integers(len(self._goals))) if chosen is None else int(chosen)
        self._sawyer.set_task(self._goals[index])
        observation, _ = super().reset()
        return observation, {"goal": index}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act for one step."""
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {"success": bool(info["success"])}


@lru_cache(maxsize=8)
def _benchmark(name: str) -> Any:
    metaworld = require("metaworld", "robotics")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metaworld.MT1(name, seed=GOALS_SEED)
