"""Preference pairs from logged data: two windows that start alike, the one of higher return preferred."""

from __future__ import annotations

from typing import TYPE_CHECKING

import datasets
import numpy as np
from scipy.spatial import cKDTree

from dmc_hub.data.episodes import Episodes, Windows

if TYPE_CHECKING:
    from datasets import Dataset, Features

_NEIGHBOURS = 16
_ROUNDS = 50


def preference_features(
    observation_dim: int, action_dim: int, horizon: int, num_observation_steps: int = 1
) -> Features:
    """The columns and types of a dataset of preference pairs, one row per pair.

    `observations` is the history `(num_observation_steps, observation_dim)` in which the preferred window starts;
    `chosen_observations`, `chosen_actions`, and likewise `rejected_*`, are the windows, `(horizon, dim)` in the
    environment's units; `chosen_return` and `rejected_return` are the undiscounted sums of their rewards.
    """

    def steps(count: int, width: int) -> datasets.List:
        return datasets.List(datasets.List(datasets.Value("float32"), length=width), length=count)

    sides = {
        f"{side}_{name}": steps(horizon, width)
        for side in ("chosen", "rejected")
        for name, width in (("observations", observation_dim), ("actions", action_dim))
    }
    returns = {f"{side}_return": datasets.Value("float32") for side in ("chosen", "rejected")}
    return datasets.Features({"observations": steps(num_observation_steps, observation_dim), **sides, **returns})


def make_preference_pairs(
    data: Episodes | Dataset,
    *,
    horizon: int,
    num_pairs: int,
    num_observation_steps: int = 1,
    max_distance: float = 0.02,
    seed: int = 0,
) -> Dataset:
    """Draw pairs of windows that lie inside their episodes and start near each other; the same arguments always give
    the same rows.

    Args:
        data: logged episodes.
        horizon: steps of a window.
        num_pairs: pairs to draw, with replacement.
        num_observation_steps: length of the history that both windows have to share.
        max_distance: how far two histories may be apart in any entry, as a share of that entry's range in the data.
        seed: of the draws.

    Returns:
        A dataset with the columns of `preference_features`.

    Raises:
        ValueError: no episode is `horizon` steps long, or too few windows have a neighbour of another return.
    """
    if num_pairs < 1 or not 0 < max_distance <= 1:
        raise ValueError(
            f"`num_pairs` must be at least 1 and `max_distance` in (0, 1], got {num_pairs} and {max_distance}."
        )
    episodes = Episodes.ensure(data)
    windows = episodes.windows(horizon, num_observation_steps)
    starts = np.flatnonzero(np.arange(len(windows)) + horizon - 1 <= windows.last_steps)
    if not len(starts):
        raise ValueError(
            f"`horizon` {horizon} is longer than every episode, of {episodes.episode_lengths.max()} steps."
        )
    batch = windows.gather(starts)
    histories = batch["observation_history"].flatten(1).numpy().astype(np.float64)
    span = np.ptp(histories, axis=0)
    states = histories / np.where(span > 0, span, 1.0)
    returns = batch["rewards"].numpy().sum(axis=1, dtype=np.float64)
    chosen, rejected = _draw_pairs(states, returns, num_pairs, max_distance, np.random.default_rng(seed))
    return _as_dataset(windows, starts[chosen], starts[rejected], returns[chosen], returns[rejected])


def _draw_pairs(
    states: np.ndarray, returns: np.ndarray, num_pairs: int, max_distance: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    tree = cKDTree(states)
    chosen, rejected, found = [], [], 0
    for _ in range(_ROUNDS):
        first = rng.integers(len(states), size=num_pairs)
        _, near = tree.query(states[first], k=_NEIGHBOURS, p=np.inf, distance_upper_bound=max_distance)
        second = near[np.arange(num_pairs), rng.integers(_NEIGHBOURS, size=num_pairs)]
        known = second < len(states)  # past the last index: fewer neighbours than asked for
        first, second = first[known], second[known]
        differ = returns[first] != returns[second]
        first, second = first[differ], second[differ]
        better = returns[first] > returns[second]
        chosen.append(np.where(better, first, second))
        rejected.append(np.where(better, second, first))
        found += len(first)
        if found >= num_pairs:
            return np.concatenate(chosen)[:num_pairs], np.concatenate(rejected)[:num_pairs]
    raise ValueError(
        f"`max_distance` {max_distance} leaves too few pairs: {found} of {num_pairs} found. Raise it, or use more data."
    )


def _as_dataset(
    windows: Windows, chosen: np.ndarray, rejected: np.ndarray, chosen_returns: np.ndarray, rejected_returns: np.ndarray
) -> Dataset:
    best, worst = windows.gather(chosen), windows.gather(rejected)
    columns = {
        "observations": best["observation_history"].numpy(),
        "chosen_observations": best["observations"].numpy(),
        "chosen_actions": best["actions"].numpy(),
        "rejected_observations": worst["observations"].numpy(),
        "rejected_actions": worst["actions"].numpy(),
        "chosen_return": chosen_returns.astype(np.float32),
        "rejected_return": rejected_returns.astype(np.float32),
    }
    episodes = windows.episodes
    features = preference_features(
        episodes.observation_dim, episodes.action_dim, windows.horizon, windows.num_observation_steps
    )
    return datasets.Dataset.from_dict({name: columns[name] for name in features}, features=features)
