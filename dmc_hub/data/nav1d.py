"""The three Nav1D datasets of section 4.1 of Huh & Mohapatra, 2025 (arXiv:2502.12198), and who made them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np

from dmc_hub.data.episodes import Episodes
from dmc_hub.envs.nav1d import (
    GRID_POINTS_PER_UNIT,
    HORIZON,
    STEP_SIZE,
    decode_observation,
    observation,
    optimal_action,
    step,
)

if TYPE_CHECKING:
    from datasets import Dataset

NAV1D_VARIANTS = ("full", "partial", "expert")
EXPERT_NOISE_STD = 0.1
_BLOCK = 8192


def make_nav1d_dataset(variant: str, *, num_episodes: int = 2000, seed: int = 0) -> Dataset:
    """Generate a Nav1D dataset; the same arguments always give the same rows.

    - `"full"`: a uniform random policy from starts uniform in `[-1, 1]`.
    - `"partial"`: the same, of which only the episodes are kept (rejection) whose nine states all lie in `[0,
      1]`.
    - `"expert"`: the optimal action plus Gaussian noise of standard deviation 0.1, clipped to `[-1, 1]`.

    Args:
        variant: one of `NAV1D_VARIANTS`.
        num_episodes: number of episodes, of eight steps each.
        seed: seed of starts and actions.

    Returns:
        One row per step with the columns of `dmc_hub.data.episode_features(3, 1)`.
    """
    _check_variant(variant)
    if num_episodes < 1:
        raise ValueError(f"`num_episodes` must be at least 1, got {num_episodes}.")
    rng = np.random.default_rng(seed)
    if variant == "expert":
        paths, actions = _expert_episodes(rng, num_episodes)
    else:
        paths, actions = _uniform_episodes(rng, num_episodes, inside=variant == "partial")
    return _as_episodes(paths, actions).to_dataset()


def nav1d_behavior_log_prob(
    variant: str, position: np.ndarray | float, t: np.ndarray | int, action: np.ndarray | float
) -> np.ndarray:
    """Log-density of the action under the dataset's policy (`pi_beta` of Eq. 16); arguments broadcast.

    - `"full"`: uniform on `[-1, 1]`.
    - `"partial"`: the uniform policy given that this and all later states of the episode lie in `[0, 1]`:
      `0.5 p_{t+1}(s') / p_t(s)` for `s'` in `[0, 1]`, where `p_t(s)` is the probability that a uniform policy
      stays inside from there on, by backward recursion on a grid.
    - `"expert"`: the Gaussian around the optimal action *before* its samples were clipped to `[-1, 1]`. A
      clipped sample sits on an atom at -1 or 1, which has no density; it is given the Gaussian's density at
      that point.

    Args:
        variant: one of `NAV1D_VARIANTS`.
        position: positions, in `[-1, 1]`.
        t: step index, an integer in `[0, 7]`.
        action: actions; outside `[-1, 1]` the log-density is minus infinity.

    Returns:
        Log-densities; minus infinity for every action at a state the policy never visits.
    """
    _check_variant(variant)
    position, t, action = np.broadcast_arrays(np.asarray(position, np.float64), t, np.asarray(action, np.float64))
    log_prob = {"full": _full_log_prob, "partial": _partial_log_prob, "expert": _expert_log_prob}[variant]
    return np.where(np.abs(action) <= 1.0, log_prob(position, t, action), -np.inf)


def nav1d_behavior(variant: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """`nav1d_behavior_log_prob` as a function of observations `(..., 3)` and actions `(..., 1)`."""
    _check_variant(variant)

    def log_prob(observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        position, t = decode_observation(observations)
        return nav1d_behavior_log_prob(variant, position, t, np.asarray(actions)[..., 0])

    return log_prob


def _check_variant(variant: str) -> None:
    if variant not in NAV1D_VARIANTS:
        raise ValueError(f"`variant` must be one of {', '.join(map(repr, NAV1D_VARIANTS))}, got {variant!r}.")


def _roll_out(starts: np.ndarray, actions: np.ndarray) -> np.ndarray:
    paths = np.empty((len(starts), HORIZON + 1))
    paths[:, 0] = starts
    for t in range(HORIZON):
        paths[:, t + 1], _ = step(paths[:, t], actions[:, t], t)
    return paths


def _uniform_episodes(rng: np.random.Generator, num_episodes: int, *, inside: bool) -> tuple[np.ndarray, np.ndarray]:
    paths, actions = np.empty((0, HORIZON + 1)), np.empty((0, HORIZON))
    while len(paths) < num_episodes:
        new_actions = rng.uniform(-1.0, 1.0, (_BLOCK, HORIZON))
        new_paths = _roll_out(rng.uniform(-1.0, 1.0, _BLOCK), new_actions)
        keep = (new_paths >= 0.0).all(axis=1) | (not inside)
        paths, actions = (
            np.concatenate([paths, new_paths[keep]]),
            np.concatenate([actions, new_actions[keep]]),
        )
    return paths[:num_episodes], actions[:num_episodes]


def _expert_episodes(rng: np.random.Generator, num_episodes: int) -> tuple[np.ndarray, np.ndarray]:
    paths, actions = np.empty((num_episodes, HORIZON + 1)), np.empty((num_episodes, HORIZON))
    paths[:, 0] = rng.uniform(-1.0, 1.0, num_episodes)
    noise = rng.normal(0.0, EXPERT_NOISE_STD, (num_episodes, HORIZON))
    for t in range(HORIZON):
        actions[:, t] = np.clip(optimal_action(paths[:, t], t) + noise[:, t], -1.0, 1.0)
        paths[:, t + 1], _ = step(paths[:, t], actions[:, t], t)
    return paths, actions


def _as_episodes(paths: np.ndarray, actions: np.ndarray) -> Episodes:
    times = np.arange(HORIZON)
    _, rewards = step(paths[:, :-1], actions, times)
    terminations = np.broadcast_to(times == HORIZON - 1, actions.shape)
    return Episodes(
        observations=observation(paths[:, :-1], times).reshape(-1, 3),
        actions=actions.reshape(-1, 1).astype(np.float32),
        rewards=rewards.reshape(-1).astype(np.float32),
        next_observations=observation(paths[:, 1:], times + 1).reshape(-1, 3),
        terminations=terminations.reshape(-1),
        truncations=np.zeros(actions.size, dtype=bool),
        episode_ends=np.arange(1, len(actions) + 1) * HORIZON,
    )


def _full_log_prob(position: np.ndarray, t: np.ndarray, action: np.ndarray) -> np.ndarray:
    return np.full(position.shape, np.log(0.5))


def _expert_log_prob(position: np.ndarray, t: np.ndarray, action: np.ndarray) -> np.ndarray:
    gap = (action - optimal_action(position, t)) / EXPERT_NOISE_STD
    return cast(np.ndarray, -0.5 * np.square(gap) - np.log(EXPERT_NOISE_STD * np.sqrt(2.0 * np.pi)))


def _partial_log_prob(position: np.ndarray, t: np.ndarray, action: np.ndarray) -> np.ndarray:
    next_position, _ = step(position, action, t)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_prob = np.log(0.5 * _survival(next_position, t + 1)) - np.log(_survival(position, t))
    return np.where(_survival(position, t) > 0.0, log_prob, -np.inf)


def _survival(position: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Probability that a uniform policy at `position` after `t` steps is and stays in `[0, 1]`."""
    table = _survival_table()
    scaled = np.clip(position, 0.0, 1.0) * GRID_POINTS_PER_UNIT
    left = np.minimum(scaled.astype(np.int64), GRID_POINTS_PER_UNIT - 1)
    weight = scaled - left
    value = (1.0 - weight) * table[t, left] + weight * table[t, left + 1]
    return np.where(position >= 0.0, value, 0.0)


@lru_cache(maxsize=1)
def _survival_table() -> np.ndarray:
    """Survival probabilities after `t` steps on a grid of `[0, 1]`, of shape `(9, 2001)`.

    `p_t(s)` averages `p_{t+1}(clip(u))` over `u` uniform in `[s - 0.5, s + 0.5]`, and is zero below 0; above
    1 the clip of the dynamics keeps the state at 1.
    """
    reach = int(STEP_SIZE * GRID_POINTS_PER_UNIT)
    points = np.arange(GRID_POINTS_PER_UNIT + 1)
    table = np.ones((HORIZON + 1, len(points)))
    for t in reversed(range(HORIZON)):
        extended = np.append(table[t + 1], np.full(reach, table[t + 1, -1]))
        areas = 0.5 * (extended[1:] + extended[:-1]) / GRID_POINTS_PER_UNIT
        cumulative = np.append(0.0, np.cumsum(areas))
        table[t] = (cumulative[points + reach] - cumulative[np.maximum(points - reach, 0)]) / (2.0 * STEP_SIZE)
    return table
