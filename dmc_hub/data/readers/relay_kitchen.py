"""The relay-kitchen demonstrations (arXiv:1910.11956) as Behavior Transformers and Diffusion Policy pack them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, cast

import numpy as np

from dmc_hub.data.episodes import Episodes
from dmc_hub.data.readers.source import (
    Contents,
    EpisodeSource,
    RewardLabel,
    as_vectors,
    check_numeric,
    make_episode,
    make_rewards,
)

_OBSERVATIONS, _ACTIONS, _MASK = "observations_seq.npy", "actions_seq.npy", "existence_mask.npy"


@dataclass(frozen=True, kw_only=True)
class RelayKitchenSource(EpisodeSource):
    """A folder of `observations_seq.npy`, `actions_seq.npy` and `existence_mask.npy`, padded to one length.

    Their first two axes are time and episode, as Behavior Transformers read them, or episode and time, as Diffusion
    Policy does: the mask, whose rows are ones and then zeros along time, tells. The following observation is an
    observation's next one, and the last one's own.

    path: the folder.
    reward: `"zero"`, or a function of observations, actions and next observations of one episode that returns its
        rewards; the files have none.
    time_axis: 0 or 1, for a mask that does not tell.
    terminal: whether a demonstration ends by itself at its last step; by default it is cut there.
    """

    format: ClassVar[str] = "relay-kitchen"
    path: Path
    reward: RewardLabel | None = None
    time_axis: int | None = None
    terminal: bool = False

    @classmethod
    def reads(cls, path: Path) -> bool:
        return path.is_dir() and (path / _OBSERVATIONS).is_file() and (path / _ACTIONS).is_file()

    @cached_property
    def contents(self) -> Contents:
        arrays = {name: self._open(name) for name in (_OBSERVATIONS, _ACTIONS, _MASK)}
        shapes = {name: array.shape[:2] for name, array in arrays.items()}
        if len(set(shapes.values())) > 1 or arrays[_MASK].ndim != 2 or arrays[_OBSERVATIONS].ndim != 3:
            found = {name: array.shape for name, array in arrays.items()}
            raise ValueError(f"`{self.path}`: the files must agree in time and episode, got the shapes {found}.")
        lengths = self._lengths(arrays[_MASK])
        return Contents(
            observation_dim=arrays[_OBSERVATIONS].shape[2],
            action_dim=int(np.prod(arrays[_ACTIONS].shape[2:])),
            keys={
                "observations": _OBSERVATIONS,
                "next_observations": _OBSERVATIONS,
                "actions": _ACTIONS,
                "rewards": "reward",
            },
            arrays={name: f"{array.dtype} {array.shape}" for name, array in arrays.items()},
            num_steps=int(lengths.sum()),
            num_episodes=len(lengths),
        )

    def episodes(self) -> Iterator[Episodes]:
        self.contents  # noqa: B018  shapes are checked before anything is read
        if self.reward is None:
            raise ValueError(f"`{self.path}` has no rewards: give `reward`, 'zero' or a function.")
        mask = self._open(_MASK)
        axis = self._time_axis(np.asarray(mask))
        observations, actions = (np.moveaxis(self._open(name), axis, 1) for name in (_OBSERVATIONS, _ACTIONS))
        for index, length in enumerate(self._lengths(mask)):
            if length == 0:
                raise ValueError(f"`{self.path}`: {_MASK!r} gives episode {index} no steps. Leave it out.")
            states = as_vectors(observations[index, :length])
            acts = as_vectors(actions[index, :length])
            following = np.concatenate([states[1:], states[-1:]])
            rewards = make_rewards(self.name, self.reward, states, acts, following)
            yield make_episode(states, acts, rewards, following, terminated=self.terminal)

    def _open(self, name: str) -> np.ndarray:
        path = self.path / name
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise ValueError(f"`{self.path}` lacks {name!r}.") from None
        except Exception as error:  # numpy parses the header as Python, which fails in many ways
            raise ValueError(f"`{path}` is not a whole npy file of numbers: {error}. Copy it again.") from error
        check_numeric(str(self.path), name, values.dtype)
        if values.ndim < 2:
            raise ValueError(f"`{path}` has the shape {values.shape}; time, episode and entries are due.")
        return cast(np.ndarray, values)

    def _lengths(self, mask: np.ndarray) -> np.ndarray:
        """Number of steps of every episode."""
        return cast(np.ndarray, np.asarray(mask).astype(bool).sum(axis=self._time_axis(np.asarray(mask))))

    def _time_axis(self, mask: np.ndarray) -> int:
        exists = mask.astype(bool)
        fitting = [axis for axis in (0, 1) if not (np.diff(exists.astype(np.int8), axis=axis) > 0).any()]
        if self.time_axis is not None:
            if self.time_axis not in fitting:
                raise ValueError(f"`{self.path}`: {_MASK!r} is not ones and then zeros along axis {self.time_axis}.")
            return self.time_axis
        if len(fitting) != 1:
            reason = "along either axis" if fitting else "along no axis"
            raise ValueError(f"`{self.path}`: {_MASK!r} is ones and then zeros {reason}: give `time_axis`, 0 or 1.")
        return fitting[0]
