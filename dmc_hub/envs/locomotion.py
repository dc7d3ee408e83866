"""Gymnasium's MuJoCo locomotion in the version whose rewards and dynamics are those of D4RL's v2 data: v4."""

from __future__ import annotations

from dmc_hub.envs.extras import require
from dmc_hub.envs.flat import FlatEnv, make_quietly


def make_locomotion(name: str, render_mode: str | None = None) -> FlatEnv:
    """`{name}-v4` of Gymnasium.

    v5 drops the reward of an unhealthy episode's last step and changes Walker2d's friction: policies and scores of
    D4RL (Fu et al., 2020, arXiv:2004.07219) belong to v4.

    Observation, action: HalfCheetah 17 and 6, Hopper 11 and 3, Walker2d 17 and 6; actions in `[-1, 1]`.
    Reward: forward velocity, a healthy reward (not HalfCheetah), minus a cost of control.
    Termination: when the robot falls (not HalfCheetah); truncation after 1,000 steps.

    Args:
        name: "HalfCheetah", "Hopper" or "Walker2d".
        render_mode: "rgb_array", or None for an environment that does not draw.

    Raises:
        ImportError: MuJoCo is not installed.
    """
    require("mujoco", "mujoco")
    return FlatEnv(make_quietly(f"{name}-v4", render_mode=render_mode))
