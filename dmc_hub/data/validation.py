"""What is wrong with data, all of it at once: each defect with its kind, episode and step."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa

from dmc_hub.data import episodes as reading
from dmc_hub.data.episodes import COLUMNS, IMAGE_PREFIX, VECTOR_COLUMNS, Episodes
from dmc_hub.errors import DmcHubError

if TYPE_CHECKING:
    from datasets import Dataset

DEFECTS = {
    "missing-column": "a column of `episode_features` is not there",
    "wrong-type": "a column holds another type",
    "wrong-width": "vectors of different lengths, or next observations of another width than the observations",
    "missing-value": "null instead of a value",
    "no-steps": "there is not one step",
    "missing-shard": "files of the set are not there",
    "missing-episode": "numbers are left out in episode_ids: an episode without steps, or rows that were lost",
    "scattered-episode": "the steps of an episode are not next to each other",
    "no-end": "an episode neither terminates nor truncates at its last step",
    "early-end": "an episode terminates or truncates before its last step",
    "not-finite": "NaN or infinity",
    "huge-value": "a number far outside all others of its column",
    "action-out-of-range": "an action outside the environment's action space",
    "broken-transition": "a next observation that is not the observation of the next step",
    "constant-dimension": "an entry of observations or actions that never changes",
    "constant-reward": "every step has the same reward",
    "duplicate-episode": "an episode is there twice",
}
"""The kinds of defects that `validate_dataset` finds."""
HUGE = 1e6
_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


class DatasetDefectsError(DmcHubError, ValueError):
    """Data have defects that were not allowed."""


@dataclass(frozen=True)
class Defect:
    """One kind of defect in one column.

    kind: a key of `DEFECTS`.
    message: what and where: column, number of cases, the first one's episode and step.
    """

    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def validate_dataset(
    data: Episodes | Dataset, *, action_bounds: tuple[np.ndarray, np.ndarray] | None = None
) -> list[Defect]:
    """Everything that is wrong with data, in the order of `DEFECTS` as far as one can go on after each.

    Args:
        data: `Episodes`, or a dataset with the columns of `episode_features`.
        action_bounds: lowest and highest action, each of shape `(action_dim,)`; actions are not compared without them.

    Returns:
        At most one defect of each kind per column, with its first case; empty for data without any.
    """
    if isinstance(data, Episodes):
        return [*_value_defects(data), *_content_defects(data, action_bounds)]
    defects, episodes = _read(data)
    return defects if episodes is None else [*defects, *validate_dataset(episodes, action_bounds=action_bounds)]


def refuse_defects(source: str, defects: Sequence[Defect], allowed: Sequence[str] = ()) -> list[Defect]:
    """Raise unless every defect is of an allowed kind; returns those that are.

    Raises:
        DatasetDefectsError: naming the defects, and the option that allows them.
        ValueError: an allowed kind that there is not.
    """
    unknown = sorted(set(allowed) - set(DEFECTS))
    if unknown:
        raise ValueError(f"`allow_defects` has {', '.join(unknown)}; defects are {', '.join(DEFECTS)}.")
    refused = [defect for defect in defects if defect.kind not in allowed]
    if refused:
        kinds = " ".join(dict.fromkeys(defect.kind for defect in refused))
        raise DatasetDefectsError(
            f"`{source}` has defects: {'; '.join(map(str, refused))}. Repair them, or train all the same with "
            f"`--allow-defects {kinds}`."
        )
    return list(defects)


def missing_shards(folder: Path) -> list[Defect]:
    """Files that the names of their neighbours promise, such as `train-00001-of-00003.parquet`, and that are missing.

    `datasets` reads what is left without a word.
    """
    sets: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        match = _SHARD.fullmatch(path.name)
        if match is not None:
            found = sets.setdefault((str(path.with_name(match["stem"])), int(match["count"])), {"there": set()})
            found["there"].add(int(match["index"]))
            found["suffix"] = match["suffix"]
    return [
        Defect("missing-shard", f"`{stem}-{index:05d}-of-{count:05d}{found['suffix']}` is missing")
        for (stem, count), found in sets.items()
        for index in sorted(set(range(count)) - found["there"])
    ]


# ---- Reading a table whatever is wrong with it ---------------------------------------------------------------


def _read(dataset: Dataset) -> tuple[list[Defect], Episodes | None]:
    """The defects of the table, and the episodes if they can be read in spite of them."""
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    defects = [Defect("missing-column", f"there is no column {name!r}") for name in missing]
    if len(dataset) == 0:
        return [*defects, Defect("no-steps", "the data have no rows")], None
    table = dataset.with_format("arrow")[:]
    ids = _episode_ids(table)
    columns: dict[str, np.ndarray] = {}
    for name in [name for name in table.column_names if name in COLUMNS or name.startswith(IMAGE_PREFIX)]:
        column_defects = list(_column_defects(table.column(name), name, ids))
        defects += column_defects
        if not column_defects:
            columns[name] = _READERS.get(name, _scalar)(table, name)
    if len(columns.keys() & set(COLUMNS)) < len(COLUMNS):
        return defects, None
    if columns["observations"].shape[1] != columns["next_observations"].shape[1]:
        widths = [columns[name].shape[1] for name in ("observations", "next_observations")]
        return [
            *defects,
            Defect("wrong-width", f"'observations' has {widths[0]} entries, 'next_observations' {widths[1]}"),
        ], None
    more, ends = _order_defects(columns.pop("episode_ids"))
    images = {name.removeprefix(IMAGE_PREFIX): columns.pop(name) for name in list(columns) if name not in COLUMNS}
    return [*defects, *more], Episodes(**columns, episode_ends=ends, images=images) if ends is not None else None


_scalar: Callable[[Any, str], np.ndarray] = reading._scalar_column
_READERS: dict[str, Callable[[Any, str], np.ndarray]] = dict.fromkeys(VECTOR_COLUMNS, reading._vector_column)


def _episode_ids(table: pa.Table) -> np.ndarray | None:
    if "episode_ids" not in table.column_names:
        return None
    column = table.column("episode_ids")
    is_usable = pa.types.is_integer(column.type) and not column.null_count
    return column.to_numpy() if is_usable else None


def _column_defects(column: pa.ChunkedArray, name: str, ids: np.ndarray | None) -> Iterator[Defect]:
    """Type, missing values and widths of one column."""
    if name in VECTOR_COLUMNS:
        is_list = pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type)
        if not is_list or not pa.types.is_float32(column.type.value_type):
            yield Defect("wrong-type", f"{name!r} must hold lists of float32, but holds {column.type}")
            return
    elif name in reading._SCALAR_TYPES:
        wanted = reading._SCALAR_TYPES[name]
        if column.type != datasets.Value(wanted).pa_type:
            yield Defect("wrong-type", f"{name!r} must hold {wanted}, but holds {column.type}")
            return
    rows = column.to_pylist() if name in VECTOR_COLUMNS and _is_irregular(column) else None
    nulls = column.is_null().to_numpy() if rows is None else np.array([row is None or None in row for row in rows])
    if nulls.any():
        yield Defect("missing-value", f"{name!r} has {nulls.sum()} null, first at {_row(ids, int(nulls.argmax()))}")
    if rows is not None:
        lengths = np.array([-1 if row is None else len(row) for row in rows])
        usual = np.bincount(lengths[lengths >= 0]).argmax() if (lengths >= 0).any() else 0
        wrong = (lengths >= 0) & (lengths != usual) | (lengths == 0)
        if wrong.any():
            first = int(wrong.argmax())
            yield Defect(
                "wrong-width", f"{name!r} has {lengths[first]} entries instead of {usual} at {_row(ids, first)}"
            )


def _is_irregular(column: pa.ChunkedArray) -> bool:
    """Whether lists have nulls inside, or different lengths."""
    import pyarrow.compute as pc

    if column.null_count or any(chunk.flatten().null_count for chunk in column.chunks):
        return True
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    return len(lengths) != 1 or lengths[0] == 0


def _row(ids: np.ndarray | None, row: int) -> str:
    if ids is None:
        return f"row {row}"
    others = np.flatnonzero(ids[:row] != ids[row])
    return f"episode {ids[row]}, step {row - (int(others[-1]) + 1 if len(others) else 0)}"


def _order_defects(ids: np.ndarray) -> tuple[list[Defect], np.ndarray | None]:
    """Defects of the episodes' order, and their exclusive ends unless one is scattered."""
    ends = np.append(np.flatnonzero(np.diff(ids)) + 1, len(ids)).astype(np.int64)
    found, counts = np.unique(ids[ends - 1], return_counts=True)
    defects = []
    gaps = np.setdiff1d(np.arange(found.min(), min(found.max(), found.min() + 10 * len(ids)) + 1), found)
    if len(gaps):
        what = f"episode {gaps[0]} has no steps" + (f", and {len(gaps) - 1} others" if len(gaps) > 1 else "")
        defects.append(Defect("missing-episode", what))
    if (counts > 1).any():
        where = f"the steps of episode {found[counts > 1][0]} are in {counts[counts > 1][0]} places"
        return [*defects, Defect("scattered-episode", where)], None
    return defects, ends


# ---- Values --------------------------------------------------------------------------------------------------


def _value_defects(episodes: Episodes) -> Iterator[Defect]:
    is_last = np.zeros(episodes.num_steps, dtype=bool)
    is_last[episodes.episode_ends - 1] = True
    is_end = episodes.terminations | episodes.truncations
    yield from _at(episodes, "no-end", "no end", is_last & ~is_end)
    yield from _at(episodes, "early-end", "an end", is_end & ~is_last)
    for name in (*VECTOR_COLUMNS, "rewards"):
        rows = getattr(episodes, name).reshape(episodes.num_steps, -1)
        finite = np.isfinite(rows)
        yield from _at(episodes, "not-finite", f"{name!r} is not finite", ~finite.all(axis=1))
        sizes = np.where(finite, np.abs(rows), 0.0)
        is_huge = sizes > HUGE * np.maximum(np.median(sizes, axis=0), 1.0)
        yield from _at(episodes, "huge-value", f"{name!r} exceeds its median {HUGE:.0e} times", is_huge.any(axis=1))


def _content_defects(episodes: Episodes, action_bounds: tuple[np.ndarray, np.ndarray] | None) -> Iterator[Defect]:
    if action_bounds is not None:
        low, high = (np.asarray(bound, dtype=np.float64) for bound in action_bounds)
        if low.shape != (episodes.action_dim,):
            yield Defect("wrong-width", f"'actions' has {episodes.action_dim} entries, the action space {low.size}")
        else:
            slack = 1e-4 * np.where(np.isfinite(high - low), high - low, 0.0)
            outside = ((episodes.actions < low - slack) | (episodes.actions > high + slack)).any(axis=1)
            yield from _at(episodes, "action-out-of-range", "an action is outside the space", np.asarray(outside))
    yield from _broken_transitions(episodes)
    for name in ("observations", "actions"):
        rows = getattr(episodes, name)
        constant = np.flatnonzero(rows.min(axis=0) == rows.max(axis=0)).tolist() if episodes.num_steps > 1 else []
        if constant:
            entries = ", ".join(map(str, constant[:8])) + (", ..." if len(constant) > 8 else "")
            yield Defect("constant-dimension", f"{name!r} never changes in {len(constant)} entries: {entries}")
    if episodes.num_steps > 1 and episodes.rewards.min() == episodes.rewards.max():
        yield Defect("constant-reward", f"the reward of all {episodes.num_steps} steps is {episodes.rewards[0]:g}")
    yield from _duplicates(episodes)


def _broken_transitions(episodes: Episodes) -> Iterator[Defect]:
    following, reached = episodes.observations[1:], episodes.next_observations[:-1]
    is_inner = np.ones(episodes.num_steps, dtype=bool)
    is_inner[episodes.episode_ends - 1] = False
    differs = np.zeros(episodes.num_steps, dtype=bool)
    with np.errstate(invalid="ignore"):
        differs[:-1] = (np.abs(following - reached) > 1e-4 * np.maximum(1.0, np.abs(following))).any(axis=1)
    what = "the next observation is not the observation of the next step"
    yield from _at(episodes, "broken-transition", what, differs & is_inner)


def _duplicates(episodes: Episodes) -> Iterator[Defect]:
    seen: dict[bytes, int] = {}
    pairs = []
    for index, (start, end) in enumerate(zip(episodes.episode_starts, episodes.episode_ends, strict=True)):
        digest = hashlib.sha1(usedforsecurity=False)
        for name in ("observations", "actions", "rewards"):
            digest.update(np.ascontiguousarray(getattr(episodes, name)[start:end]).data)
        first = seen.setdefault(digest.digest(), index)
        if first != index:
            pairs.append((index, first))
    if pairs:
        index, first = pairs[0]
        yield Defect("duplicate-episode", f"{len(pairs)} in all, first episode {index}, which is episode {first} again")


def _at(episodes: Episodes, kind: str, what: str, rows: np.ndarray) -> Iterator[Defect]:
    if rows.any():
        where = reading._where(episodes, int(rows.argmax()))
        yield Defect(kind, f"{what} in {int(rows.sum())} steps, first at {where}")
