"""Push-T (Chi et al., 2023, Diffusion Policy, arXiv:2303.04137) as gym-pusht simulates it.

The geometry is here as pure functions of recorded states, so that data without rewards, such as Diffusion Policy's
human demonstrations, can be labelled.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces

from dmc_hub.envs.extras import require
from dmc_hub.envs.flat import FlatEnv

if TYPE_CHECKING:
    from shapely import MultiPolygon

SIZE = 512.0
IMAGE_SIZE = 96
MAX_EPISODE_STEPS = 300
SUCCESS_COVERAGE = 0.95
GOAL_POSE = (256.0, 256.0, np.pi / 4)
SCALE, LENGTH = 30.0, 4.0
STATE_DIM, ACTION_DIM = 5, 2
_BAR = np.array([[-LENGTH / 2, 1], [LENGTH / 2, 1], [LENGTH / 2, 0], [-LENGTH / 2, 0]]) * SCALE
_STEM = np.array([[-0.5, 1], [-0.5, LENGTH], [0.5, LENGTH], [0.5, 1]]) * SCALE


def coverage(states: np.ndarray) -> np.ndarray:
    """Share of the goal's area that the block covers.

    Args:
        states: of shape `(..., 5)`, pixels and radians: agent x and y, block x and y, block angle.

    Returns:
        Float64 of shape `(...)`, in `[0, 1]`.

    Raises:
        ImportError: shapely is not installed.
        ValueError: states of another width, or not finite.
    """
    states = np.asarray(states, dtype=np.float64)
    if states.ndim < 1 or states.shape[-1] != STATE_DIM or not np.isfinite(states).all():
        raise ValueError(f"`states` must be finite and of shape (..., {STATE_DIM}), got shape {states.shape}.")
    goal = _goal()
    poses = states.reshape(-1, STATE_DIM)[:, 2:]
    shares = [goal.intersection(_block(pose)).area / goal.area for pose in poses]
    return np.asarray(shares, dtype=np.float64).reshape(states.shape[:-1])


def push_t_reward(observations: np.ndarray, actions: np.ndarray, next_observations: np.ndarray) -> np.ndarray:
    """The environment's reward of recorded steps, `clip(coverage / 0.95, 0, 1)` of the state a step leads to.

    Args:
        observations: states before the steps, `(..., 5)`; like the actions they don't count.
        actions: `(..., 2)`.
        next_observations: states after the steps, `(..., 5)`.

    Returns:
        Float32 of shape `(...)`, in `[0, 1]`.
    """
    return np.clip(coverage(next_observations) / SUCCESS_COVERAGE, 0.0, 1.0).astype(np.float32)


class PushTEnv(FlatEnv):
    """gym-pusht's environment with the state as its observation.

    Observation: float32 `(5,)`: agent x and y, block x and y in pixels of `[0, 512]`, block angle in `[0, 2 pi]`: the
    order of `data/state` in Diffusion Policy's data.
    Action: float32 `(2,)`, the agent's target position in pixels of `[0, 512]`.
    Reward: `clip(coverage / 0.95, 0, 1)`.
    Termination: coverage above 0.95, which is success (`info["success"]`, and `info["coverage"]`); truncation after 300
    steps.

    Raises:
        ImportError: gym-pusht is not installed.
    """

    def __init__(self) -> None:
        super().__init__(_make_pusht("state"))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        observation, _ = super().reset(seed=seed, options=options)
        return observation, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act for one step."""
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, _outcome(info)


class PushTImageEnv(gymnasium.Wrapper[Any, np.ndarray, Any, Any]):
    """gym-pusht's environment seen by a camera.

    Observation: `{"state": float32 (2,), agent x and y in pixels of [0, 512]; "image": uint8 (96, 96, 3), RGB}`.
    Action, reward, termination, truncation and success: see `PushTEnv`.

    Raises:
        ImportError: gym-pusht is not installed.
    """

    def __init__(self) -> None:
        super().__init__(_make_pusht("pixels_agent_pos"))
        self.observation_space = spaces.Dict(
            {
                "state": spaces.Box(0.0, SIZE, (2,), np.float32),
                "image": spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode."""
        observation, _ = self.env.reset(seed=seed, options=options)
        return _named(observation), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for one step."""
        observation, reward, terminated, truncated, info = self.env.step(np.clip(action, 0.0, SIZE))
        return _named(observation), float(reward), bool(terminated), bool(truncated), _outcome(info)


def _make_pusht(obs_type: str) -> gymnasium.Env[Any, Any]:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws into memory: no screen is needed
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        require("gym_pusht", "robotics")
        env = require("gym_pusht.envs.pusht", "robotics").PushTEnv(obs_type=obs_type)
    return gymnasium.wrappers.TimeLimit(env, MAX_EPISODE_STEPS)


def _named(observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"state": observation["agent_pos"].astype(np.float32), "image": observation["pixels"]}


def _outcome(info: dict[str, Any]) -> dict[str, Any]:
    return {"success": bool(info["is_success"]), "coverage": float(info["coverage"])}


@lru_cache(maxsize=1)
def _goal() -> MultiPolygon:
    return _block(np.array(GOAL_POSE))


def _block(pose: np.ndarray) -> MultiPolygon:
    """The T at a pose `(x, y, angle)`, which is where the body's own origin lies."""
    shapely = require("shapely", "robotics")
    x, y, angle = pose
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    parts = [shapely.Polygon(corners @ rotation.T + (x, y)) for corners in (_BAR, _STEM)]
    return shapely.MultiPolygon(parts)
