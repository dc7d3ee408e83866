"""Franka-Kitchen (Gupta et al., 2019, arXiv:1910.11956) as gymnasium-robotics simulates it, in D4RL's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from dmc_hub.envs.extras import require
from dmc_hub.envs.flat import FlatEnv, make_quietly

MAX_EPISODE_STEPS = 280
OBSERVATION_DIM, ACTION_DIM = 60, 9
SUBTASKS = {
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "relay": (
        "bottom burner",
        "top burner",
        "light switch",
        "slide cabinet",
        "hinge cabinet",
        "microwave",
        "kettle",
    ),
}
"""Subtasks of D4RL's kitchen-mixed and kitchen-partial (arXiv:2004.07219), and all seven, as in Relay Policy
Learning and Diffusion Policy."""
NUM_DEMONSTRATED = 4


class KitchenEnv(FlatEnv):
    """A Franka arm that moves the things of a kitchen.

    Sensor noise is gymnasium-robotics' (0.01 of the amplitudes for the robot, 0.0005 for things), below D4RL's 0.1.

    Observation: float32 `(60,)`, as D4RL has it: joints (9), things (21), goal (30), which is 0 where there is none,
    and throughout for "relay".
    Action: float32 `(9,)`, joint velocities in `[-1, 1]`.
    Reward: number of subtasks completed in this step; each counts once, so that a return is the number of all.
    Termination: when all subtasks are completed; truncation after 280 steps. Success: four subtasks are completed,
    which is what demonstrations do; `info["num_completed"]` says how many are.

    Args:
        kind: one of `SUBTASKS`.
        render_mode: "rgb_array", or None for an environment that does not draw.

    Raises:
        ImportError: gymnasium-robotics is not installed.
    """

    def __init__(self, kind: str, render_mode: str | None = None) -> None:
        require("gymnasium_robotics", "robotics")
        tasks = list(SUBTASKS[kind])
        super().__init__(make_quietly("FrankaKitchen-v1", tasks_to_complete=tasks, render_mode=render_mode))
        elements: Any = require("gymnasium_robotics.envs.franka_kitchen.kitchen_env", "robotics")
        self._goal = _goal(elements, SUBTASKS[kind] if kind != "relay" else ())
        self.observation_space = spaces.Box(-np.inf, np.inf, (OBSERVATION_DIM,), np.float32)

    def flatten(self, observation: Any) -> np.ndarray:
        """D4RL's vector: positions without velocities, and the goal."""
        state = observation["observation"]
        return np.concatenate([state[:9], state[18:39], self._goal]).astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        observation, _ = super().reset(seed=seed, options=options)
        return observation, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act for one step."""
        observation, reward, terminated, truncated, info = super().step(action)
        num_completed = len(info["episode_task_completions"])
        told = {"success": num_completed >= NUM_DEMONSTRATED, "num_completed": num_completed}
        return observation, reward, terminated, truncated, told


def _goal(elements: Any, subtasks: Sequence[str]) -> np.ndarray:
    goal = np.zeros(30)
    for name in subtasks:
        goal[elements.OBS_ELEMENT_INDICES[name]] = elements.OBS_ELEMENT_GOALS[name]
    return goal
