"""D4RL's HDF5 files (arXiv:2004.07219): locomotion, AntMaze, Kitchen, Maze2D, Adroit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dmc_hub.data.episodes import Episodes
from dmc_hub.data.readers import hdf5
from dmc_hub.data.readers.source import Contents, EpisodeSource, check_episode_bytes, make_episode

_REQUIRED = ("observations", "actions", "rewards", "terminals")
_GOAL = "infos/goal"
_JUMP = 1e-6  # the norm that IQL's code (arXiv:2110.06169) takes for a break between two rows


@dataclass(frozen=True, kw_only=True)
class D4RLSource(EpisodeSource):
    """A D4RL file: `observations, actions, rewards, terminals` and, where they are there, `timeouts` and
    `next_observations`, one row per step.

    An episode ends where `terminals` or `timeouts` is set, after `max_episode_steps`, at the end of the file, and
    where the next row's observation is not the `next_observations` of its row. Terminals are terminations; every other
    end is a truncation.

    Where the file has no `next_observations` the following row's observation is taken, and the rows at time-outs and
    cuts, which have no true one, are left out, as `d4rl.qlearning_dataset` does. A terminal row is kept (D4RL gives it
    the next episode's first observation; here it is its own, which no value is bootstrapped from); D4RL leaves out the
    file's last row even if it is terminal.

    path: the file.
    max_episode_steps: the time limit of a file without `timeouts`, such as 280 for Kitchen.
    append_goal: append `infos/goal` to the observations (AntMaze, Maze2D); an episode then also ends where it changes.
    """

    format: ClassVar[str] = "d4rl"
    path: Path
    max_episode_steps: int | None = None
    append_goal: bool = False

    def __post_init__(self) -> None:
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise ValueError(f"`max_episode_steps` must be at least 1, got {self.max_episode_steps}.")

    @classmethod
    def reads(cls, path: Path) -> bool:
        if not hdf5.is_hdf5(path):
            return False
        with hdf5.open_hdf5(path) as file:
            return {"observations", "actions"} <= set(file)

    @cached_property
    def contents(self) -> Contents:
        with hdf5.open_hdf5(self.path) as file:
            arrays = self._arrays(file)
            goal_dim = _width(arrays["goal"]) if self.append_goal else 0
            return Contents(
                observation_dim=_width(arrays["observations"]) + goal_dim,
                action_dim=_width(arrays["actions"]),
                keys={name: node.name.lstrip("/") for name, node in arrays.items()},
                arrays={node.name.lstrip("/"): hdf5.describe(node) for node in arrays.values()},
                num_steps=len(arrays["rewards"]),
            )

    def episodes(self) -> Iterator[Episodes]:
        with hdf5.open_hdf5(self.path) as file:
            arrays = self._arrays(file)
            count = len(arrays["rewards"])
            pending: dict[str, np.ndarray] = {}
            for start, stop in hdf5.row_blocks(arrays):
                block = {name: hdf5.read_rows(node, start, stop) for name, node in arrays.items()}
                rows = {name: np.concatenate([pending[name], block[name]]) for name in block} if pending else block
                first = 0
                for end in self._ends(rows, is_last=stop == count):
                    episode = self._episode({name: values[first:end] for name, values in rows.items()})
                    if episode is not None:
                        yield episode
                    first = end
                pending = {name: values[first:] for name, values in rows.items()}
                check_episode_bytes(self.name, "timeouts", sum(values.nbytes for values in pending.values()))

    def _arrays(self, file: Any) -> dict[str, Any]:
        wanted = {name: name for name in _REQUIRED}
        wanted |= {name: name for name in ("timeouts", "next_observations") if hdf5.find(file, name) is not None}
        if self.append_goal:
            wanted["goal"] = _GOAL
        arrays = {name: hdf5.array(file, key) for name, key in wanted.items()}
        count = len(arrays["rewards"]) if arrays["rewards"].shape else 0
        for node in arrays.values():
            if not node.shape or len(node) != count:
                raise ValueError(
                    f"`{self.path}`: {node.name.lstrip('/')!r} has the shape {node.shape}, but 'rewards' has {count} "
                    "rows."
                )
        if count == 0:
            raise ValueError(f"`{self.path}` has no steps.")
        hdf5.check_sizes(file, arrays)
        return arrays

    def _ends(self, rows: Mapping[str, np.ndarray], *, is_last: bool) -> np.ndarray:
        """Exclusive ends of the episodes that are whole in `rows`."""
        is_end = rows["terminals"].reshape(-1).astype(bool)
        if "timeouts" in rows:
            is_end = is_end | rows["timeouts"].reshape(-1).astype(bool)
        if "next_observations" in rows:
            jump = rows["observations"][1:].astype(np.float64) - rows["next_observations"][:-1]
            is_end[:-1] |= np.linalg.norm(jump.reshape(len(jump), -1), axis=1) > _JUMP
        if "goal" in rows:
            is_end[:-1] |= (rows["goal"][1:] != rows["goal"][:-1]).reshape(len(is_end) - 1, -1).any(axis=1)
        is_end[-1:] |= is_last
        ends = np.flatnonzero(is_end) + 1
        if self.max_episode_steps is None:
            return ends
        bounds = np.concatenate([[0], ends, [] if is_last else [len(is_end)]]).astype(np.int64)
        steps = self.max_episode_steps
        limits = [np.arange(start + steps, stop + 1, steps) for start, stop in pairwise(bounds)]
        return np.unique(np.concatenate([ends, *limits]))

    def _episode(self, rows: Mapping[str, np.ndarray]) -> Episodes | None:
        count = len(rows["rewards"])
        terminal = bool(rows["terminals"].reshape(-1)[-1])
        timeout = bool(rows["timeouts"].reshape(-1)[-1]) if "timeouts" in rows else count == self.max_episode_steps
        observations, following = rows["observations"], rows.get("next_observations")
        if "goal" in rows:
            goal = rows["goal"].reshape(count, -1)
            observations = np.concatenate([observations.reshape(count, -1), goal], axis=1)
            following = None if following is None else np.concatenate([following.reshape(count, -1), goal], axis=1)
        if following is None and (timeout or not terminal):
            count, terminal, following = count - 1, False, observations[1:]
        if count == 0:
            return None
        return make_episode(
            observations[:count],
            rows["actions"][:count],
            rows["rewards"].reshape(-1)[:count],
            following,
            terminated=terminal,
            truncated=timeout or not terminal,
        )


def _width(node: Any) -> int:
    return int(np.prod(node.shape[1:]))
