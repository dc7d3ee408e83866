"""Episodes as a LeRobotDataset (layout v3.0) of vectors: Parquet files of frames and episodes, and JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from dmc_hub import checkpoint
from dmc_hub.data import Episodes
from dmc_hub.interop.weights import InteropError, read_json

if TYPE_CHECKING:
    from datasets import Dataset

VERSION = "v3.0"
_EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_INDICES = ("frame_index", "episode_index", "index", "task_index")
STATE, ENVIRONMENT_STATE, ACTION = "observation.state", "observation.environment_state", "action"
NEXT_STATE, NEXT_ENVIRONMENT_STATE = "next.observation.state", "next.observation.environment_state"
REWARD, DONE, SUCCESS, TRUNCATED = "next.reward", "next.done", "next.success", "next.truncated"


def save_lerobot_dataset(
    data: Episodes | Dataset,
    folder: str | os.PathLike[str],
    *,
    task: str,
    fps: int,
    state_dim: int | None = None,
    success_return: float | None = None,
    robot_type: str | None = None,
    reference_scores: Mapping[str, float] | None = None,
) -> None:
    """Write episodes as a LeRobotDataset v3.0, which LeRobot and plain `datasets` read.

    The folder appears whole or not at all.

    Besides the observation and the action of each frame it holds `next.reward`, `next.done`, `next.success`,
    `next.truncated` and `next.observation.*`, so that nothing is lost: `load_lerobot_episodes` reads the same arrays.

    Args:
        data: the episodes.
        folder: replaced if it is there.
        task: what the episodes do, in words.
        fps: steps per second.
        state_dim: the first so many numbers of an observation are `observation.state`, the others
            `observation.environment_state`; None: all are the state.
        success_return: an episode succeeds, from its last frame on, with a return of at least this; by default one
            succeeds that the task itself ended.
        robot_type: as LeRobot's.
        reference_scores: returns by name, such as an optimum, kept in `meta/info.json` as `reference_scores`.

    Raises:
        InteropError: a `state_dim` or `fps` that is impossible.
    """
    episodes = Episodes.ensure(data)
    split = episodes.observation_dim if state_dim is None else state_dim
    if not 0 < split <= episodes.observation_dim or fps < 1:
        raise InteropError(
            f"`state_dim` must lie in 1..{episodes.observation_dim} and `fps` be at least 1, got {split} and {fps}."
        )
    frames = _frames(episodes, split, fps, success_return)
    with checkpoint.write_folder_atomically(folder) as stage:
        _write_table(_as_table(frames), stage / _DATA_PATH.format(chunk_index=0, file_index=0))
        _write_table(_episode_table(episodes, frames, task), stage / _EPISODES_PATH.format(chunk_index=0, file_index=0))
        pd.DataFrame({"task_index": [0]}, index=pd.Index([task], name="task")).to_parquet(stage / "meta/tasks.parquet")
        checkpoint.save_json(stage / "meta/stats.json", {name: _moments(column) for name, column in frames.items()})
        checkpoint.save_json(
            stage / "meta/info.json", _info(episodes, frames, fps, robot_type, dict(reference_scores or {}))
        )


def load_lerobot_episodes(folder: str | os.PathLike[str]) -> Episodes:
    """Read the episodes of a folder of `save_lerobot_dataset`, or of another LeRobotDataset v3.0 of vectors.

    Where a dataset has no `next.observation.*`, the following frame's observation is taken, and the last one's own;
    where it has no `next.truncated`, an episode ends by itself if its last `next.done` is true, and is cut otherwise.

    Raises:
        InteropError: another version, or no state, action or reward.
        ValueError: as `Episodes.from_dataset`.
    """
    folder = Path(folder)
    info = read_json(folder / "meta/info.json")
    if info.get("codebase_version") != VERSION:
        raise InteropError(f"`{folder}` has the layout {info.get('codebase_version')!r}; {VERSION} is read.")
    paths = sorted((folder / "data").glob("*/*.parquet"))
    if not paths:
        raise InteropError(f"`{folder}` has no frames: there is no Parquet file in data/.")
    table = pa.concat_tables([pq.read_table(path) for path in paths], promote_options="default")
    if table.num_rows != info.get("total_frames"):
        raise InteropError(f"`{folder}` has {table.num_rows} frames, its info.json says {info.get('total_frames')}.")
    missing = [name for name in (STATE, ACTION, REWARD, "episode_index") if name not in table.column_names]
    if missing:
        raise InteropError(f"`{folder}` lacks {', '.join(missing)}; it has {table.column_names}.")
    return _episodes(table)


# ---- Writing -----------------------------------------------------------------------------------------------


def _frames(episodes: Episodes, split: int, fps: int, success_return: float | None) -> dict[str, np.ndarray]:
    """The columns of all frames, in LeRobot's names and order."""
    frame_index = np.arange(episodes.num_steps) - np.repeat(episodes.episode_starts, episodes.episode_lengths)
    success = episodes.terminations.copy()
    if success_return is not None:
        success[:] = False
        success[episodes.episode_ends - 1] = episodes.returns() >= success_return
    columns = {
        STATE: episodes.observations[:, :split],
        ENVIRONMENT_STATE: episodes.observations[:, split:],
        ACTION: episodes.actions,
        NEXT_STATE: episodes.next_observations[:, :split],
        NEXT_ENVIRONMENT_STATE: episodes.next_observations[:, split:],
        REWARD: episodes.rewards,
        DONE: episodes.terminations | episodes.truncations,
        SUCCESS: success,
        TRUNCATED: episodes.truncations,
        "timestamp": (frame_index / fps).astype(np.float32),
        "frame_index": frame_index,
        "episode_index": np.repeat(np.arange(episodes.num_episodes), episodes.episode_lengths),
        "index": np.arange(episodes.num_steps),
        "task_index": np.zeros(episodes.num_steps, dtype=np.int64),
    }
    columns = {name: column.reshape(len(column), -1) for name, column in columns.items()}
    return {name: column for name, column in columns.items() if column.shape[1]}


def _as_table(frames: Mapping[str, np.ndarray]) -> pa.Table:
    """Vectors of one number are numbers, as in LeRobot."""
    features = datasets.Features(
        {
            name: datasets.Value(str(column.dtype))
            if column.shape[1] == 1
            else datasets.List(datasets.Value(str(column.dtype)), length=column.shape[1])
            for name, column in frames.items()
        }
    )
    columns = {
        name: pa.array(column[:, 0])
        if column.shape[1] == 1
        else pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), column.shape[1])
        for name, column in frames.items()
    }
    return pa.table(columns).cast(features.arrow_schema)


def _episode_table(episodes: Episodes, frames: Mapping[str, np.ndarray], task: str) -> pa.Table:
    count = episodes.num_episodes
    columns: dict[str, Any] = {
        "episode_index": np.arange(count),
        "tasks": [[task]] * count,
        "length": episodes.episode_lengths,
        "data/chunk_index": np.zeros(count, dtype=np.int64),
        "data/file_index": np.zeros(count, dtype=np.int64),
        "dataset_from_index": episodes.episode_starts,
        "dataset_to_index": episodes.episode_ends,
    }
    for name, column in frames.items():
        moments: list[dict[str, Any]] = [{}] * count
        for length in np.unique(episodes.episode_lengths):  # all episodes of one length at once
            rows = np.flatnonzero(episodes.episode_lengths == length)
            together = _moments(
                np.stack([column[start : start + length] for start in episodes.episode_starts[rows]], 1)
            )
            for place, row in enumerate(rows):
                moments[row] = {key: value if key == "count" else value[place] for key, value in together.items()}
        for statistic in moments[0]:
            columns[f"stats/{name}/{statistic}"] = [row[statistic] for row in moments]
    columns["meta/episodes/chunk_index"] = np.zeros(count, dtype=np.int64)
    columns["meta/episodes/file_index"] = np.zeros(count, dtype=np.int64)
    return pa.table(columns)


def _moments(column: np.ndarray) -> dict[str, list[Any]]:
    values = column.astype(np.float64)
    quantiles = np.quantile(values, list(_QUANTILES.values()), axis=0)
    return {
        "min": column.min(0).tolist(),
        "max": column.max(0).tolist(),
        "mean": values.mean(0).tolist(),
        "std": values.std(0).tolist(),
        "count": [len(column)],
        **{name: row.tolist() for name, row in zip(_QUANTILES, quantiles, strict=True)},
    }


def _info(
    episodes: Episodes,
    frames: Mapping[str, np.ndarray],
    fps: int,
    robot_type: str | None,
    reference_scores: dict[str, float],
) -> dict[str, Any]:
    return {
        "codebase_version": VERSION,
        "robot_type": robot_type,
        "total_episodes": episodes.num_episodes,
        "total_frames": episodes.num_steps,
        "total_tasks": 1,
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": fps,
        "splits": {"train": f"0:{episodes.num_episodes}"},
        "data_path": _DATA_PATH,
        "video_path": None,
        "features": {
            name: {"dtype": str(column.dtype), "shape": [column.shape[1]], "names": None}
            for name, column in frames.items()
        },
        "reference_scores": reference_scores,
    }


def _write_table(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


# ---- Reading -----------------------------------------------------------------------------------------------


def _episodes(table: pa.Table) -> Episodes:
    ids = _column(table, "episode_index")[:, 0]
    is_last = np.append(np.diff(ids) != 0, True)
    observations = _observations(table, STATE, ENVIRONMENT_STATE)
    if NEXT_STATE in table.column_names:
        following = _observations(table, NEXT_STATE, NEXT_ENVIRONMENT_STATE)
    else:
        following = np.where(is_last[:, None], observations, np.roll(observations, -1, axis=0))
    if TRUNCATED in table.column_names:
        truncations = _column(table, TRUNCATED)[:, 0].astype(bool)
        terminations = _column(table, DONE)[:, 0].astype(bool) & ~truncations
    else:
        done = _column(table, DONE)[:, 0].astype(bool) if DONE in table.column_names else np.zeros(len(ids), bool)
        terminations, truncations = is_last & done, is_last & ~done
    columns = {
        "observations": observations,
        "actions": _column(table, ACTION).astype(np.float32),
        "rewards": _column(table, REWARD)[:, 0].astype(np.float32),
        "next_observations": following,
        "terminations": terminations,
        "truncations": truncations,
        "episode_ends": np.flatnonzero(is_last) + 1,
    }
    return Episodes.from_dataset(Episodes(**columns).to_dataset())  # checked


def _observations(table: pa.Table, state: str, environment_state: str) -> np.ndarray:
    parts = [_column(table, name) for name in (state, environment_state) if name in table.column_names]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _column(table: pa.Table, name: str) -> np.ndarray:
    """Shape `(frames, width)`."""
    column = table.column(name).combine_chunks()
    if column.null_count:
        raise InteropError(f"The column {name!r} has {column.null_count} missing values.")
    is_list = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
    values = column.flatten() if is_list else column
    return values.to_numpy(zero_copy_only=False).reshape(len(column), -1)
