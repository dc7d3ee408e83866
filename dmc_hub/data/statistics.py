"""What is known of a dataset, computed block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dmc_hub.data.episodes import COLUMNS, IMAGE_PREFIX, Episodes

if TYPE_CHECKING:
    from datasets import Dataset

_BLOCK_ROWS = 65536


class RunningMoments:
    """`min`, `max`, `mean` and `std` of each entry of rows that come in blocks (Chan, Golub & LeVeque, 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self._values: dict[str, np.ndarray] = {}

    def update(self, rows: np.ndarray) -> None:
        """Add rows, numbers of shape `(num_rows, ...)`."""
        if not len(rows):
            return
        values = rows.reshape(len(rows), -1).astype(np.float64)
        mean = values.mean(0)
        new = {"min": values.min(0), "max": values.max(0), "mean": mean, "square": ((values - mean) ** 2).sum(0)}
        old, total = self._values, self.count + len(values)
        if old:
            share, shift = len(values) / total, new["mean"] - old["mean"]
            new = {
                "min": np.minimum(old["min"], new["min"]),
                "max": np.maximum(old["max"], new["max"]),
                "mean": old["mean"] + shift * share,
                "square": old["square"] + new["square"] + shift**2 * self.count * share,
            }
        self._values, self.count = new, total

    def to_dict(self) -> dict[str, list[float]]:
        """A list for each statistic, one number per entry."""
        values = dict(self._values)
        square = values.pop("square")
        return {name: value.tolist() for name, value in {**values, "std": np.sqrt(square / self.count)}.items()}


def moments_of_columns(moments: dict[str, RunningMoments], columns: Mapping[str, np.ndarray]) -> None:
    """Add a block of rows to the moments of every numeric column but images and ids of episodes."""
    for name, column in columns.items():
        if column.dtype.kind in "fbiu" and name != "episode_ids" and not name.startswith(IMAGE_PREFIX):
            moments.setdefault(name, RunningMoments()).update(column)


def episode_statistics(returns: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """Number of episodes, and their lengths and returns, from arrays of shape `(num_episodes,)`."""
    return {
        "count": len(lengths),
        "length": {"min": int(lengths.min()), "max": int(lengths.max()), "mean": float(lengths.mean())},
        "return": {
            "min": float(returns.min()),
            "max": float(returns.max()),
            "mean": float(returns.mean()),
            "std": float(returns.std()),
        },
    }


def dataset_statistics(dataset: Dataset) -> dict[str, Any]:
    """What is known of a split: rows, and `min`, `max`, `mean` and `std` of each entry of each numeric column.

    Images are left out. For data with the columns of `Episodes` also number, length and return of the episodes.
    """
    moments: dict[str, RunningMoments] = {}
    names = [name for name in dataset.column_names if not name.startswith(IMAGE_PREFIX)]
    for block in dataset.select_columns(names).with_format("numpy").iter(_BLOCK_ROWS):
        moments_of_columns(moments, block)
    statistics: dict[str, Any] = {
        "num_rows": len(dataset),
        "columns": {name: values.to_dict() for name, values in moments.items()},
    }
    if set(COLUMNS) <= set(dataset.column_names):
        episodes = Episodes.from_dataset(dataset)
        statistics["episodes"] = episode_statistics(episodes.returns(), episodes.episode_lengths)
    return statistics
