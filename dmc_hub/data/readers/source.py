"""What a reader is: a file or folder of somebody's format that yields its episodes one at a time."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dmc_hub.data.episodes import Episodes

BLOCK_BYTES = 2 << 20
"""Readers read slices of about this size."""
MAX_EPISODE_BYTES = 1 << 30
MAX_CHUNK_BYTES = 256 << 20
_FREE_BYTES, _MAX_EXPANSION = 256 << 20, 100

RewardLabel = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | str


@dataclass(frozen=True)
class Contents:
    """What a source says of itself before its steps are read.

    observation_dim: width of an observation.
    action_dim: width of an action.
    keys: by the name of an array of `Episodes`, where it stands in the source.
    arrays: by key, type and shape of what the source holds, for people.
    num_steps: rows in the source, None if only reading it tells; those without a next observation may be left out.
    num_episodes: None if only reading tells.
    image_shapes: by camera, height, width and 3.
    """

    observation_dim: int
    action_dim: int
    keys: Mapping[str, str]
    arrays: Mapping[str, str] = field(default_factory=dict)
    num_steps: int | None = None
    num_episodes: int | None = None
    image_shapes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)


class EpisodeSource(ABC):
    """Somebody's data, read one episode at a time. A reader is a frozen dataclass: its fields but `path` are options.

    path: the file or folder; None if there is none.
    """

    format: ClassVar[str]
    path: Path | None

    @property
    @abstractmethod
    def contents(self) -> Contents:
        """What the source holds.

        Raises:
            ValueError: it is not what the reader reads, declares more than its size allows, or lacks a key.
        """

    @abstractmethod
    def episodes(self) -> Iterator[Episodes]:
        """Yield each episode as an `Episodes` of one; never more than a slice and an episode are in memory.

        Raises:
            ValueError: naming file and key.
        """

    @classmethod
    def reads(cls, path: Path) -> bool:
        """Whether an existing file or folder looks like this reader's format."""
        return False

    @classmethod
    def locate(cls, source: str, options: Mapping[str, Any]) -> Path:
        """The file or folder that `source` names, downloaded where the format has ids.

        Raises:
            FileNotFoundError: there is nothing at `source`.
        """
        if not Path(source).exists():
            raise FileNotFoundError(f"`{source}` does not exist.")
        return Path(source)

    @property
    def name(self) -> str:
        """What errors call the source."""
        return self.format if self.path is None else str(self.path)

    @property
    def observation_dim(self) -> int:
        return self.contents.observation_dim

    @property
    def action_dim(self) -> int:
        return self.contents.action_dim

    @property
    def num_steps(self) -> int | None:
        return self.contents.num_steps

    @property
    def num_episodes(self) -> int | None:
        return self.contents.num_episodes

    @classmethod
    def option_names(cls) -> list[str]:
        """The options of the reader."""
        assert dataclasses.is_dataclass(cls)
        return [field.name for field in dataclasses.fields(cls) if field.name != "path"]

    def options(self) -> dict[str, Any]:
        """The values of the options."""
        return {name: getattr(self, name) for name in self.option_names()}


def make_episode(
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    next_observations: np.ndarray | None = None,
    *,
    terminated: bool,
    truncated: bool | None = None,
    images: Mapping[str, np.ndarray] | None = None,
) -> Episodes:
    """One episode in the types of `Episodes`.

    Args:
        observations: numbers of shape `(num_steps, ...)`, flattened to vectors.
        actions: numbers of shape `(num_steps, ...)`.
        rewards: numbers of shape `(num_steps,)`.
        next_observations: like `observations`; None: the following observation, and the last one's own.
        terminated: whether the task itself ended at the last step.
        truncated: whether the episode was cut there; by default if it did not terminate.
        images: by camera, uint8 of shape `(num_steps, height, width, 3)`.
    """
    count = len(rewards)
    states = as_vectors(observations)
    following = (
        np.concatenate([states[1:], states[-1:]]) if next_observations is None else as_vectors(next_observations)
    )
    terminations, truncations = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    terminations[count - 1 :] = terminated
    truncations[count - 1 :] = not terminated if truncated is None else truncated
    return Episodes(
        observations=states,
        actions=as_vectors(actions),
        rewards=as_float32(rewards),
        next_observations=following,
        terminations=terminations,
        truncations=truncations,
        episode_ends=np.array([count]),
        images=dict(images or {}),
    )


def as_float32(values: np.ndarray) -> np.ndarray:
    """In float32; what does not fit becomes infinite, which conversion refuses."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float32, copy=False)


def as_vectors(values: np.ndarray) -> np.ndarray:
    """Float32 of shape `(num_steps, width)`."""
    values = np.asarray(values)
    return as_float32(values.reshape(len(values), int(np.prod(values.shape[1:]))))


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` of a folder.

    Raises:
        ValueError: it is missing or something else; the message names it.
    """
    file = folder / name
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"`{folder}` lacks {name!r}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{file}` is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{file}` must hold a mapping.")
    return content


def check_numeric(name: str, key: str, dtype: np.dtype) -> None:
    """Refuse what is not bool, integer or floating point.

    Raises:
        ValueError: naming file and key.
    """
    if np.dtype(dtype).kind not in "fiub":
        raise ValueError(f"`{name}`: {key!r} must hold numbers, but has the type {dtype}.")


def check_images(name: str, key: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape of one image of an array of shape `(num_steps, height, width, 3)`.

    Raises:
        ValueError: naming file and key.
    """
    if len(shape) != 4 or shape[-1] != 3:
        raise ValueError(f"`{name}`: {key!r} must hold images of shape (steps, height, width, 3), got {shape}.")
    return (shape[1], shape[2], shape[3])


def check_expansion(name: str, declared: Mapping[str, int], stored: int) -> None:
    """Refuse a source whose arrays declare far more bytes than it stores, before any of them is read.

    Args:
        name: the file or folder.
        declared: bytes of each array once read, by key.
        stored: bytes on disk.

    Raises:
        ValueError: more than 256 MiB in all, and more than 100 times what is stored.
    """
    total = sum(declared.values())
    if total > max(_FREE_BYTES, _MAX_EXPANSION * stored):
        largest = max(declared, key=lambda key: declared[key])
        raise ValueError(
            f"`{name}` has {stored:,} bytes but declares {total:,}, most of them in {largest!r}: a decompression bomb "
            "or a damaged file."
        )


def check_episode_bytes(name: str, key: str, num_bytes: int) -> None:
    """Refuse an episode that is too long to be held in memory.

    Raises:
        ValueError: naming file and key.
    """
    if num_bytes > MAX_EPISODE_BYTES:
        raise ValueError(
            f"`{name}`: {key!r} marks an episode of more than {MAX_EPISODE_BYTES >> 20} MiB; split the data into "
            "episodes."
        )


def make_rewards(
    name: str, reward: RewardLabel, observations: np.ndarray, actions: np.ndarray, next_observations: np.ndarray
) -> np.ndarray:
    """Rewards of one episode of a source that has none.

    Args:
        name: of the source.
        reward: `"zero"`, or a function of float32 observations, actions and next observations of one episode, each of
            shape `(num_steps, width)`, that returns `(num_steps,)`.
        observations: as above.
        actions: as above.
        next_observations: as above.

    Raises:
        ValueError: an unknown label, or rewards of another shape.
    """
    if reward == "zero":
        return np.zeros(len(actions), dtype=np.float32)
    if not callable(reward):
        raise ValueError(f"`reward` must be 'zero' or a function, got {reward!r}.")
    rewards = np.asarray(reward(observations, actions, next_observations))
    if rewards.shape != (len(actions),):
        raise ValueError(
            f"`{name}`: `reward` returned the shape {rewards.shape} for an episode of {len(actions)} steps."
        )
    return rewards
