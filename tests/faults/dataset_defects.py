"""Row 10: data with one seeded defect each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np

from dmc_hub.data import Episodes, episode_features, make_nav1d_dataset

BOUNDS = (np.full(1, -1.0), np.full(1, 1.0))


def sound() -> Episodes:
    """Five episodes of eight steps without a defect."""
    return Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=5))


def _columns() -> dict[str, list[Any]]:
    return sound().to_dataset().to_dict()


def _dataset(columns: dict[str, Any], **types: Any) -> datasets.Dataset:
    """Of the usual types where a column has no other."""
    usual = episode_features(3, 1)
    features = {name: types.get(name, usual[name]) for name in columns}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _with(name: str, row: int, value: Any) -> datasets.Dataset:
    """One value replaced: row 19 is step 3 of episode 2."""
    columns = _columns()
    columns[name][row] = value
    return _dataset(columns)


def _without(name: str) -> datasets.Dataset:
    columns = _columns()
    del columns[name]
    return _dataset(columns)


def _wider() -> datasets.Dataset:
    columns = _columns()
    columns["next_observations"] = [[*row, 0.0] for row in columns["next_observations"]]
    return _dataset(columns, next_observations=datasets.List(datasets.Value("float32"), length=4))


def _ragged() -> datasets.Dataset:
    columns = _columns()
    columns["observations"][19] = columns["observations"][19][:2]
    return _dataset(columns, observations=datasets.List(datasets.Value("float32")))


def _null_inside() -> datasets.Dataset:
    columns = _columns()
    columns["observations"][19] = [0.0, None, 0.0]
    return _dataset(columns)


def _double_actions() -> datasets.Dataset:
    return _dataset(_columns(), actions=datasets.List(datasets.Value("float64"), length=1))


def _integer_rewards() -> datasets.Dataset:
    columns = _columns()
    columns["rewards"] = [1] * len(columns["rewards"])
    return _dataset(columns, rewards=datasets.Value("int64"))


def _scattered() -> datasets.Dataset:
    order = [*range(8), *range(16, 20), *range(8, 16), *range(20, 40)]
    return _dataset({name: [values[row] for row in order] for name, values in _columns().items()})


def _lost_rows() -> datasets.Dataset:
    kept = [*range(8), *range(16, 40)]  # episode 1 is gone, as with a lost shard, or had no steps
    return _dataset({name: [values[row] for row in kept] for name, values in _columns().items()})


def _constant(name: str) -> datasets.Dataset:
    columns = _columns()
    columns[name] = [[0.25, *row[1:]] for row in columns[name]]
    if name == "observations":
        columns["next_observations"] = [[0.25, *row[1:]] for row in columns["next_observations"]]
    return _dataset(columns)


def _twice() -> datasets.Dataset:
    columns = _columns()
    for name, values in columns.items():
        if name != "episode_ids":
            values[24:32] = values[8:16]
    return _dataset(columns)


def _constant_reward() -> datasets.Dataset:
    return _dataset({**_columns(), "rewards": [1.0] * 40})


STEP = "episode 2, step 3"
CASES: dict[str, tuple[Callable[[], datasets.Dataset], str, str]] = {
    "no rewards": (lambda: _without("rewards"), "missing-column", "'rewards'"),
    "actions in float64": (_double_actions, "wrong-type", "'actions' must hold lists of float32"),
    "whole rewards": (_integer_rewards, "wrong-type", "'rewards' must hold float32, but holds int64"),
    "a shorter observation": (_ragged, "wrong-width", f"2 entries instead of 3 at {STEP}"),
    "wider next observations": (_wider, "wrong-width", "'observations' has 3 entries, 'next_observations' 4"),
    "a reward that is null": (
        lambda: _with("rewards", 19, None),
        "missing-value",
        f"'rewards' has 1 null, first at {STEP}",
    ),
    "a null in an observation": (_null_inside, "missing-value", STEP),
    "no steps": (lambda: _dataset(_columns()).select([]), "no-steps", "no rows"),
    "an episode without steps": (_lost_rows, "missing-episode", "episode 1 has no steps"),
    "steps of two episodes mixed": (_scattered, "scattered-episode", "the steps of episode 2 are in 2 places"),
    "no end": (lambda: _with("terminations", 23, False), "no-end", "episode 2, step 7"),
    "an early end": (lambda: _with("terminations", 19, True), "early-end", STEP),
    "NaN in an observation": (
        lambda: _with("observations", 19, [0.0, np.nan, 0.0]),
        "not-finite",
        f"'observations' is not finite in 1 steps, first at {STEP}",
    ),
    "infinity in an action": (
        lambda: _with("actions", 19, [np.inf]),
        "not-finite",
        f"'actions' is not finite in 1 steps, first at {STEP}",
    ),
    "NaN in a reward": (
        lambda: _with("rewards", 19, np.nan),
        "not-finite",
        f"'rewards' is not finite in 1 steps, first at {STEP}",
    ),
    "NaN in a next observation": (lambda: _with("next_observations", 19, [np.nan] * 3), "not-finite", STEP),
    "a reward of 1e9": (lambda: _with("rewards", 19, 1e9), "huge-value", f"in 1 steps, first at {STEP}"),
    "an action outside the space": (
        lambda: _with("actions", 19, [1.5]),
        "action-out-of-range",
        f"in 1 steps, first at {STEP}",
    ),
    "a broken transition": (
        lambda: _with("next_observations", 19, [0.9, 0.9, 0.9]),
        "broken-transition",
        f"in 1 steps, first at {STEP}",
    ),
    "an observation that never changes": (
        lambda: _constant("observations"),
        "constant-dimension",
        "'observations' never changes in 1 entries: 0",
    ),
    "actions that never change": (
        lambda: _constant("actions"),
        "constant-dimension",
        "'actions' never changes in 1 entries: 0",
    ),
    "rewards that never change": (_constant_reward, "constant-reward", "all 40 steps is 1"),
    "an episode twice": (_twice, "duplicate-episode", "first episode 3, which is episode 1 again"),
}
"""By name: the data, the kind of defect, and what its message must say."""
