"""Episodes: logged data as flat arrays and episode ends, under the names of D4RL and Minari.

The arrays are views of a `datasets.Dataset`'s Arrow buffers where its columns are stored in one piece, so a
dataset loaded from disk stays memory-mapped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset, Features

VECTOR_COLUMNS = ("observations", "actions", "next_observations")
COLUMNS = (*VECTOR_COLUMNS, "rewards", "terminations", "truncations", "episode_ids")
IMAGE_PREFIX = "images."
_SCALAR_TYPES = {"rewards": "float32", "terminations": "bool", "truncations": "bool", "episode_ids": "int64"}
_STEP_FIELDS = (*VECTOR_COLUMNS, "rewards", "terminations", "truncations")
_CAST_HINT = "Cast it: `dataset.cast(dmc_hub.data.episode_features(observation_dim, action_dim))`."


@dataclass(frozen=True)
class Episodes:
    """Logged episodes, one after the other.

    observations: float32 of shape `(num_steps, observation_dim)`.
    actions: float32 of shape `(num_steps, action_dim)`.
    rewards: float32 of shape `(num_steps,)`.
    next_observations: float32 of shape `(num_steps, observation_dim)`.
    terminations: bool of shape `(num_steps,)`, true where the task itself ended.
    truncations: bool of shape `(num_steps,)`, true where the episode was cut.
    episode_ends: int64 of shape `(num_episodes,)`, the exclusive end of every episode.
    images: by camera, uint8 of shape `(num_steps, height, width, 3)`, RGB, what was seen at each observation.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    episode_ends: np.ndarray
    images: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> Episodes:
        """Read and check a dataset with the columns of `episode_features`; no copy where a column is in one piece.

        Raises:
            ValueError: a column is missing or has another type or width, a value is NaN or infinite, there
                are no steps, an episode's steps are not contiguous, or an episode's only end is not its last
                step.
        """
        table = _read_table(dataset)
        vectors = {name: _vector_column(table, name) for name in VECTOR_COLUMNS}
        scalars = {name: _scalar_column(table, name) for name in _SCALAR_TYPES}
        episode_ends = _episode_ends(scalars.pop("episode_ids"))
        cameras = [name for name in table.column_names if name.startswith(IMAGE_PREFIX)]
        images = {name.removeprefix(IMAGE_PREFIX): _image_column(table, name) for name in cameras}
        episodes = cls(**vectors, **scalars, episode_ends=episode_ends, images=images)
        _check_widths(episodes)
        _check_finite(episodes)
        _check_ends(episodes)
        return episodes

    @classmethod
    def ensure(cls, data: Episodes | Dataset) -> Episodes:
        """Episodes as they are, a dataset read and checked."""
        if isinstance(data, cls):
            return data
        if isinstance(data, datasets.Dataset):
            return cls.from_dataset(data)
        raise ValueError(f"`train_dataset` must be an Episodes or a datasets.Dataset, got {type(data).__name__}.")

    @classmethod
    def concatenate(cls, *episodes: Episodes) -> Episodes:
        """Join several sets of episodes of the same widths into one (a copy)."""
        if not episodes:
            raise ValueError("`episodes` is empty: pass at least one `Episodes`.")
        widths = {(part.observation_dim, part.action_dim) for part in episodes}
        if len(widths) > 1:
            raise ValueError(f"`episodes` differ in (observation_dim, action_dim): got {sorted(widths)}.")
        shapes = [{camera: frames.shape[1:] for camera, frames in part.images.items()} for part in episodes]
        if any(other != shapes[0] for other in shapes):
            raise ValueError(f"`episodes` differ in the cameras and shapes of their `images`: got {shapes}.")
        joined = {name: np.concatenate([getattr(part, name) for part in episodes]) for name in _STEP_FIELDS}
        images = {camera: np.concatenate([part.images[camera] for part in episodes]) for camera in shapes[0]}
        offsets = np.cumsum([0, *(part.num_steps for part in episodes[:-1])])
        ends = [part.episode_ends + offset for part, offset in zip(episodes, offsets, strict=True)]
        return cls(**joined, episode_ends=np.concatenate(ends), images=images)

    def first(self, max_steps: int) -> Episodes:
        """The first episodes, as many whole ones as fit into `max_steps` steps.

        Raises:
            ValueError: not even the first one fits.
        """
        count = int(np.searchsorted(self.episode_ends, max_steps, side="right"))
        if count == 0:
            raise ValueError(f"`max_steps` {max_steps} is less than the first episode's {self.episode_ends[0]} steps.")
        return self.select(np.arange(count))

    def newest(self, max_steps: int) -> Episodes:
        """The last episodes, as many whole ones as fit into `max_steps` steps, at least the very last."""
        starts = self.episode_starts
        kept = starts >= self.num_steps - max_steps
        kept[-1] = True
        first = starts[kept][0]
        return Episodes(**self._steps(slice(first, None)), episode_ends=self.episode_ends[kept] - first)

    @property
    def num_steps(self) -> int:
        return len(self.rewards)

    @property
    def num_episodes(self) -> int:
        return len(self.episode_ends)

    @property
    def observation_dim(self) -> int:
        return int(self.observations.shape[1])

    @property
    def action_dim(self) -> int:
        return int(self.actions.shape[1])

    @property
    def episode_starts(self) -> np.ndarray:
        """First step of every episode, int64 of shape `(num_episodes,)`."""
        return np.concatenate([np.zeros(1, dtype=np.int64), self.episode_ends[:-1]])

    @property
    def episode_lengths(self) -> np.ndarray:
        """Number of steps of every episode, int64 of shape `(num_episodes,)`."""
        return np.diff(self.episode_ends, prepend=0)

    def returns(self) -> np.ndarray:
        """Undiscounted return of every episode, float64 of shape `(num_episodes,)`."""
        return np.add.reduceat(self.rewards, self.episode_starts, dtype=np.float64)

    def select(self, indices: np.ndarray) -> Episodes:
        """The episodes at `indices`, integers of shape `(count,)`, in that order (a copy)."""
        starts, lengths = self.episode_starts[indices], self.episode_lengths[indices]
        ends = np.cumsum(lengths)
        rows = np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())
        return Episodes(**self._steps(rows), episode_ends=ends)

    def transitions(self, indices: np.ndarray | Tensor) -> dict[str, Tensor]:
        """Gather single steps.

        Args:
            indices: integer step indices of shape `(batch,)`.

        Returns:
            Float32 tensors `observations`, `actions`, `rewards`, `next_observations` and `terminations` (0 or
            1), each of shape `(batch, ...)`.
        """
        rows = _as_indices(indices)
        return {
            "observations": torch.from_numpy(self.observations[rows]),
            "actions": torch.from_numpy(self.actions[rows]),
            "rewards": torch.from_numpy(self.rewards[rows]),
            "next_observations": torch.from_numpy(self.next_observations[rows]),
            "terminations": torch.from_numpy(self.terminations[rows].astype(np.float32)),
        }

    def windows(self, horizon: int, num_observation_steps: int = 1, num_past_actions: int = 0) -> Windows:
        """All windows of `horizon` steps, one starting at every step, with the observations that led there; their
        actions start `num_past_actions` steps earlier."""
        if horizon < 1 or num_observation_steps < 1:
            raise ValueError(
                f"`horizon` and `num_observation_steps` must be at least 1, got {horizon} and {num_observation_steps}."
            )
        if not 0 <= num_past_actions < horizon:
            raise ValueError(f"`num_past_actions` must lie in 0..{horizon - 1}, got {num_past_actions}.")
        last = np.repeat(self.episode_ends - 1, self.episode_lengths)
        first = np.repeat(self.episode_starts, self.episode_lengths)
        return Windows(self, horizon, num_observation_steps, first, last, num_past_actions)

    def to_dataset(self) -> Dataset:
        """The episodes as a `datasets.Dataset` that `from_dataset` reads back to the same arrays."""
        features = episode_features(
            self.observation_dim, self.action_dim, {camera: frames.shape[1:] for camera, frames in self.images.items()}
        )
        columns = {name: fixed_size_lists(np.asarray(getattr(self, name), np.float32)) for name in VECTOR_COLUMNS}
        columns |= {IMAGE_PREFIX + camera: fixed_size_lists(frames) for camera, frames in self.images.items()}
        for name in ("rewards", "terminations", "truncations"):
            columns[name] = pa.array(getattr(self, name))
        columns["episode_ids"] = pa.array(np.repeat(np.arange(self.num_episodes), self.episode_lengths))
        return datasets.Dataset(pa.table(columns).select(list(features)).cast(features.arrow_schema))

    def _steps(self, rows: np.ndarray | slice) -> dict[str, Any]:
        """The arrays of some steps."""
        arrays: dict[str, Any] = {name: getattr(self, name)[rows] for name in _STEP_FIELDS}
        return {**arrays, "images": {camera: frames[rows] for camera, frames in self.images.items()}}


@dataclass(frozen=True)
class Windows:
    """Windows of a fixed horizon: window `i` starts at step `i` and is padded past its episode's end.

    episodes: where the windows look.
    horizon: number of steps of a window.
    num_observation_steps: length of the history, the current observation included.
    first_steps: first step of the episode of every step, int64 of shape `(num_steps,)`.
    last_steps: last step of the episode of every step, int64 of shape `(num_steps,)`.
    num_past_actions: the actions of a window start so many steps before it.
    """

    episodes: Episodes
    horizon: int
    num_observation_steps: int
    first_steps: np.ndarray
    last_steps: np.ndarray
    num_past_actions: int = 0

    def __len__(self) -> int:
        return self.episodes.num_steps

    def gather(self, indices: np.ndarray | Tensor) -> dict[str, Tensor]:
        """Gather windows in one vectorised read.

        Past the end of an episode the last next observation is repeated, as an absorbing state, with zero
        actions and rewards, and `valid` is false. Actions before the start of an episode repeat its first.

        Args:
            indices: integer start steps of shape `(batch,)`.

        Returns:
            `observations` `(batch, horizon, observation_dim)`, `actions` `(batch, horizon, action_dim)`,
            `rewards` `(batch, horizon)` and `observation_history` `(batch, num_observation_steps, observation_dim)`,
            all float32, and `valid` `(batch, horizon)`, bool.
        """
        starts = _as_indices(indices)
        places = self._places[starts]
        acting = places if self.num_past_actions == 0 else self._acting_places[starts]
        batch = {
            "observations": self._runs["observations"][places],
            "actions": self._runs["actions"][acting],
            "rewards": self._runs["rewards"][places],
            "valid": np.arange(self.horizon) <= (self.last_steps[starts] - starts)[:, None],
        }
        tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
        is_short = self.num_observation_steps == 1
        return {**tensors, "observation_history": tensors["observations"][:, :1] if is_short else self.history(starts)}

    @cached_property
    def _runs(self) -> dict[str, np.ndarray]:
        """By column, the `horizon` rows from each row on, of copies in which every episode is padded: whole runs of
        memory, so that a window is one of them."""
        episodes, after = self.episodes, self.horizon - 1
        rows, is_after = _padded_rows(episodes, 0, after)
        observations, rewards = episodes.observations[rows], episodes.rewards[rows]
        observations[is_after], rewards[is_after] = episodes.next_observations[rows[is_after]], 0
        rows, is_after = _padded_rows(episodes, self.num_past_actions, after)
        actions = episodes.actions[rows]
        actions[is_after] = 0
        padded = {"observations": observations, "actions": actions, "rewards": rewards}
        return {name: _runs(array, self.horizon) for name, array in padded.items()}

    @cached_property
    def _places(self) -> np.ndarray:
        """Where the window of each step starts among the padded rows, int64 of shape `(num_steps,)`."""
        return cast(np.ndarray, np.arange(len(self)) + self._episode_of_step * (self.horizon - 1))

    @cached_property
    def _acting_places(self) -> np.ndarray:
        """The same of its actions, `num_past_actions` steps earlier."""
        return cast(np.ndarray, self._places + self._episode_of_step * self.num_past_actions)

    @cached_property
    def _episode_of_step(self) -> np.ndarray:
        return np.repeat(np.arange(self.episodes.num_episodes), self.episodes.episode_lengths)

    def transitions(self, indices: np.ndarray | Tensor, discount: float) -> dict[str, Tensor]:
        """Gather steps over whole windows, for values of action sequences (arXiv:2507.07969, Eq. 3).

        Args:
            indices: integer start steps of shape `(batch,)`.
            discount: of each step.

        Returns:
            Float32 tensors `observations` `(batch, observation_dim)`, `actions` `(batch, horizon, action_dim)`,
            `rewards` `(batch,)`, discounted and summed over the window, `next_observations` after its last step within
            the episode, `terminations`, 1 where that step ended the task, and `discounts` `(batch,)`, the discount of
            the value after it.
        """
        starts, batch = _as_indices(indices), self.gather(indices)
        ends = np.minimum(starts + self.horizon - 1, self.last_steps[starts])
        powers = discount ** torch.arange(self.horizon + 1, dtype=torch.float32)
        return {
            "observations": batch["observations"][:, 0],
            "actions": batch["actions"],
            "rewards": batch["rewards"] @ powers[:-1],
            "next_observations": torch.from_numpy(self.episodes.next_observations[ends]),
            "terminations": torch.from_numpy(self.episodes.terminations[ends].astype(np.float32)),
            "discounts": powers[torch.from_numpy(ends - starts + 1)],
        }

    def history(self, indices: np.ndarray | Tensor) -> Tensor:
        """The last observations up to those steps, the oldest first; before an episode's start its first is repeated.

        Shape `(batch, num_observation_steps, observation_dim)`, float32.
        """
        return torch.from_numpy(self.episodes.observations[self._history_rows(indices)])

    def image_history(self, indices: np.ndarray | Tensor, cameras: Sequence[str]) -> dict[str, Tensor]:
        """What these cameras saw at the steps of `history`: `images/<camera>`, uint8 of shape `(batch,
        num_observation_steps, height, width, 3)`."""
        rows = self._history_rows(indices)
        return {f"images/{name}": torch.from_numpy(self.episodes.images[name][rows]) for name in cameras}

    def _history_rows(self, indices: np.ndarray | Tensor) -> np.ndarray:
        steps = _as_indices(indices)
        rows = steps[:, None] + np.arange(1 - self.num_observation_steps, 1)
        return cast(np.ndarray, np.maximum(rows, self.first_steps[steps][:, None]))


def episode_features(
    observation_dim: int, action_dim: int, image_shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Features:
    """The columns and types of a dataset of episodes, one row per step.

    Args:
        observation_dim: width of an observation.
        action_dim: width of an action.
        image_shapes: by camera, height, width and 3; a camera's column is `images.<camera>`.
    """
    widths = {"observations": observation_dim, "actions": action_dim, "next_observations": observation_dim}
    vectors = {name: datasets.List(datasets.Value("float32"), length=width) for name, width in widths.items()}
    scalars = {name: datasets.Value(kind) for name, kind in _SCALAR_TYPES.items()}
    images = {IMAGE_PREFIX + camera: _image_feature(shape) for camera, shape in (image_shapes or {}).items()}
    return datasets.Features({**vectors, **scalars, **images})


def _image_feature(shape: tuple[int, ...]) -> datasets.List:
    height, width, channels = shape
    row = datasets.List(datasets.List(datasets.Value("uint8"), length=channels), length=width)
    return datasets.List(row, length=height)


def _padded_rows(episodes: Episodes, before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps of all episodes, each with its first step repeated `before` it and its last `after` it, and which rows
    are of the latter."""
    lengths = episodes.episode_lengths + before + after
    steps = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) - before
    last = np.repeat(episodes.episode_lengths - 1, lengths)
    rows = np.repeat(episodes.episode_starts, lengths) + np.clip(steps, 0, last)
    return rows, steps > last


def _runs(array: np.ndarray, length: int) -> np.ndarray:
    """The `length` rows from each row on, a view."""
    shape, strides = (len(array) - length + 1, length, *array.shape[1:]), (array.strides[0], *array.strides)
    return as_strided(array, shape, strides, writeable=False)


def _as_indices(indices: np.ndarray | Tensor) -> np.ndarray:
    return indices.cpu().numpy() if isinstance(indices, Tensor) else np.asarray(indices)


def fixed_size_lists(array: np.ndarray) -> pa.Array:
    """An array of shape `(rows, ...)` as (nested) Arrow lists of fixed sizes, without a copy if it is contiguous."""
    lists = pa.array(np.ascontiguousarray(array).reshape(-1))
    for size in reversed(array.shape[1:]):
        lists = pa.FixedSizeListArray.from_arrays(lists, size)
    return lists


def _read_table(dataset: Dataset) -> pa.Table:
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`dataset` lacks the columns {missing}; it has {dataset.column_names}. "
            "Rename or add them: one row per step, with the types of `dmc_hub.data.episode_features`."
        )
    if len(dataset) == 0:
        raise ValueError("`dataset` has no steps.")
    images = [name for name in dataset.column_names if name.startswith(IMAGE_PREFIX)]
    return dataset.select_columns([*COLUMNS, *images]).with_format("arrow")[:]


def _vector_column(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name)
    is_list = pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type)
    if not is_list or not pa.types.is_float32(column.type.value_type):
        raise ValueError(f"`dataset` column {name!r} must hold lists of float32, got {column.type}. {_CAST_HINT}")
    _check_no_nulls(column, name)
    _check_equal_widths(column, name)
    chunks = [chunk.flatten() for chunk in column.chunks if len(chunk)]
    if any(chunk.null_count for chunk in chunks):
        raise ValueError(f"`dataset` column {name!r} has missing values (null) inside its lists.")
    return _join([chunk.to_numpy(zero_copy_only=True) for chunk in chunks]).reshape(len(column), -1)


def _image_column(table: pa.Table, name: str) -> np.ndarray:
    column, shape = table.column(name), []
    kind = column.type
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    if len(shape) != 3 or shape[-1] != 3 or not pa.types.is_uint8(kind):
        raise ValueError(
            f"`dataset` column {name!r} must hold uint8 images as lists of fixed sizes (height, width, 3), got "
            f"{column.type}."
        )
    _check_no_nulls(column, name)
    parts = []
    for chunk in column.chunks:
        for _ in shape:
            chunk = chunk.flatten()
        parts.append(chunk.to_numpy(zero_copy_only=True).reshape(-1, *shape))
    return _join([part for part in parts if len(part)])


def _scalar_column(table: pa.Table, name: str) -> np.ndarray:
    column, wanted = table.column(name), datasets.Value(_SCALAR_TYPES[name]).pa_type
    if column.type != wanted:
        raise ValueError(f"`dataset` column {name!r} must hold {wanted}, got {column.type}. {_CAST_HINT}")
    _check_no_nulls(column, name)
    return _join([chunk.to_numpy(zero_copy_only=False) for chunk in column.chunks if len(chunk)])


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _check_no_nulls(column: pa.ChunkedArray, name: str) -> None:
    if column.null_count:
        raise ValueError(f"`dataset` column {name!r} has {column.null_count} missing values (null).")


def _check_equal_widths(column: pa.ChunkedArray, name: str) -> None:
    widths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(widths) > 1 or widths[0] == 0:
        raise ValueError(
            f"`dataset` column {name!r} must hold lists of one length, at least 1; got the lengths {sorted(widths)}."
        )


def _episode_ends(episode_ids: np.ndarray) -> np.ndarray:
    ends = np.append(np.flatnonzero(np.diff(episode_ids)) + 1, len(episode_ids)).astype(np.int64)
    ids, counts = np.unique(episode_ids[ends - 1], return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"`dataset` column 'episode_ids' is not contiguous: episode {ids[counts > 1][0]} is in several "
            "places. Sort the rows by episode and step; a shuffled dataset cannot be used."
        )
    return ends


def _check_widths(episodes: Episodes) -> None:
    width, next_width = episodes.observation_dim, episodes.next_observations.shape[1]
    if width != next_width:
        raise ValueError(
            f"`dataset` column 'next_observations' has width {next_width}, but 'observations' has {width}."
        )


def _check_finite(episodes: Episodes) -> None:
    for name in (*VECTOR_COLUMNS, "rewards"):
        column = getattr(episodes, name)
        with np.errstate(invalid="ignore"):
            # a float64 sum of float32 values cannot overflow, and needs no temporary of the column's size
            is_finite = np.isfinite(column.sum(dtype=np.float64))
        if not is_finite:
            row = np.argmin(np.isfinite(column.reshape(len(column), -1)).all(axis=1))
            raise ValueError(f"`dataset` column {name!r} has NaN or infinite values, first at {_where(episodes, row)}.")


def _check_ends(episodes: Episodes) -> None:
    is_last = np.zeros(episodes.num_steps, dtype=bool)
    is_last[episodes.episode_ends - 1] = True
    wrong = np.flatnonzero((episodes.terminations | episodes.truncations) != is_last)
    if not len(wrong):
        return
    if is_last[wrong[0]]:
        raise ValueError(
            "`dataset` neither terminates nor truncates at the last step of an episode: "
            f"{_where(episodes, wrong[0])}. "
            "Set 'truncations' there if the recording was cut."
        )
    raise ValueError(
        f"`dataset` terminates or truncates inside an episode: {_where(episodes, wrong[0])}. "
        "Give the steps after it another episode id."
    )


def _where(episodes: Episodes, row: int | np.integer) -> str:
    episode = int(np.searchsorted(episodes.episode_ends, row, side="right"))
    return f"episode {episode}, step {int(row) - int(episodes.episode_starts[episode])}"
