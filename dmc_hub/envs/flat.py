"""The one form in which controllers see environments: flat float32 observations, actions inside their bounds."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class FlatEnv(gymnasium.Wrapper[np.ndarray, np.ndarray, Any, Any]):
    """An environment whose observations are one float32 vector.

    Observation: float32 of shape `(observation_dim,)`, the inner one flattened by `gymnasium.spaces.flatten`.
    Action: float32 of shape `(action_dim,)`; what lies outside the bounds is clipped to them.
    Reward, termination and truncation are the inner ones, the reward as a Python float.

    Raises:
        ValueError: the inner environment's actions are not a vector.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        action_space = env.action_space
        if not isinstance(action_space, spaces.Box) or len(action_space.shape) != 1:
            raise ValueError(f"`env` must have actions of shape (dim,), got {action_space}.")
        flat = spaces.flatten_space(env.observation_space)
        assert isinstance(flat, spaces.Box)
        low, high = (bound.astype(np.float32) for bound in (flat.low, flat.high))
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        low, high = (bound.astype(np.float32) for bound in (action_space.low, action_space.high))
        self.action_space = spaces.Box(low, high, dtype=np.float32)
        self._low, self._high = low, high

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self.flatten(observation), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act for one step."""
        observation, reward, terminated, truncated, info = self.env.step(np.clip(action, self._low, self._high))
        return self.flatten(observation), float(reward), bool(terminated), bool(truncated), info

    def flatten(self, observation: Any) -> np.ndarray:
        """What controllers see of an inner observation, float32 of shape `(observation_dim,)`."""
        return np.asarray(spaces.flatten(self.env.observation_space, observation), dtype=np.float32)


def make_quietly(env_id: str, **options: Any) -> gymnasium.Env[Any, Any]:
    """`gymnasium.make` without its checks of every step and without its advice to take a newer version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gymnasium.make(env_id, disable_env_checker=True, **options)
