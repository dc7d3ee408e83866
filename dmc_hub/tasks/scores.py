"""Scores of episodes on the scales of the published tables: functions of `Rollouts`, one number per episode."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

if TYPE_CHECKING:
    from dmc_hub.rollout import Rollouts


def d4rl_score(rollouts: Rollouts, *, low: float, high: float) -> np.ndarray:
    """D4RL's normalised score, `100 (return - low) / (high - low)` (Fu et al., 2020, arXiv:2004.07219), `(n,)`.

    Args:
        low: return of a random policy.
        high: return of an expert.
    """
    return 100.0 * (rollouts.returns - low) / (high - low)


def success_score(rollouts: Rollouts, *, when: str, scale: float = 1.0) -> np.ndarray:
    """`scale` where an episode succeeded, else 0, float64 `(n,)`; `when`: see `Rollouts.succeeded`."""
    return scale * rollouts.succeeded(when)


def max_reward_score(rollouts: Rollouts) -> np.ndarray:
    """Highest reward of an episode; of Push-T the maximal coverage over 0.95, as in Diffusion Policy's tables."""
    return rollouts.max_rewards().astype(np.float64)


def share_of_subtasks(rollouts: Rollouts, *, num_subtasks: int, scale: float = 100.0) -> np.ndarray:
    """`scale` times the share of subtasks an episode completed, where the reward counts those a step completed."""
    return scale * rollouts.returns / num_subtasks


def share_with_subtasks(returns: np.ndarray, num_subtasks: int) -> np.ndarray:
    """Diffusion Policy's `p_n` of the Kitchen: shares of episodes with at least 1, 2, ... completed subtasks.

    Args:
        returns: completed subtasks of the episodes, `(num_episodes,)`.
        num_subtasks: the largest n.

    Returns:
        Float64 of shape `(num_subtasks,)`: `p_1` to `p_n`.
    """
    wanted = np.arange(1, num_subtasks + 1)
    return cast(np.ndarray, (np.round(np.asarray(returns))[:, None] >= wanted).mean(axis=0))
