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
from dmc_hub.data.readers.lerobot import ACTION, DONE, ENVIRONMENT_STATE, REWARD, STATE, TRUNCATED, VERSION
from dmc_hub.interop.weights import InteropError

if TYPE_CHECKING:
    from datasets import Dataset

_EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_INDICES = ("frame_index", "episode_index", "index", "task_index")
NEXT_STATE, NEXT_ENVIRONMENT_STATE = "next.observation.state", "next.observation.environment_state"
SUCCESS = "next.success"


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
    `next.truncated` and `next.observation.*`, so that nothing is lost: `load_episodes` reads the same
    arrays.

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
