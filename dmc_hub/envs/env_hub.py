"""Nav1D for LeRobot's EnvHub: this file, called `env.py`, is all that the Hub repository needs besides a card.

`lerobot.envs.factory.make_env("owner/nav1d", trust_remote_code=True)` then makes it, where `dmc_hub` is installed.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from dmc_hub.envs import NAV1D_ID, nav1d  # importing it registers the environment

SUCCESS_SHARE = 0.9


class LeRobotNav1D(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Nav1D with observations as LeRobot names them: `agent_pos` `(1,)`, the position, and `environment_state` `(2,)`,
    the time and the next target. An episode succeeds with 90 % of the return that was possible from its start."""

    task_description = "Be at the moving target at each of eight steps."
    _max_episode_steps = nav1d.HORIZON

    def __init__(self) -> None:
        super().__init__(gymnasium.make(NAV1D_ID, render_mode="rgb_array"))
        low, high = (getattr(self.env.observation_space, bound) for bound in ("low", "high"))
        self.observation_space = gymnasium.spaces.Dict(
            {
                "agent_pos": gymnasium.spaces.Box(low[:1], high[:1], dtype=np.float32),
                "environment_state": gymnasium.spaces.Box(low[1:], high[1:], dtype=np.float32),
            }
        )
        self._return = self._possible = 0.0

    def reset(self, **options: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode."""
        observation, _ = self.env.reset(**options)
        solution = nav1d.optimal_value_function()
        self._return, self._possible = 0.0, float(np.interp(observation[0], solution.positions, solution.values[0]))
        return _named(observation), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Move; `info["is_success"]` is true at the end of a good episode."""
        observation, reward, terminated, truncated, _ = self.env.step(action)
        self._return += float(reward)
        success = bool(terminated and self._return >= SUCCESS_SHARE * self._possible)
        return _named(observation), float(reward), terminated, truncated, {"is_success": success}


def make_env(n_envs: int = 1, use_async_envs: bool = False, cfg: Any = None) -> Any:
    """The `gymnasium.vector.VectorEnv` that LeRobot asks for; `cfg` is not used."""
    vector = gymnasium.vector.AsyncVectorEnv if use_async_envs else gymnasium.vector.SyncVectorEnv
    return vector([LeRobotNav1D] * n_envs, autoreset_mode=gymnasium.vector.AutoresetMode.NEXT_STEP)


def _named(observation: np.ndarray) -> dict[str, np.ndarray]:
    return {"agent_pos": observation[:1], "environment_state": observation[1:]}
