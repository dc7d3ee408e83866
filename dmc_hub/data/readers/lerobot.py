"""LeRobotDataset v3.0: Parquet files of frames and episodes, JSON, and videos."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download

from dmc_hub.data.episodes import Episodes
from dmc_hub.data.readers.source import (
    BLOCK_BYTES,
    Contents,
    EpisodeSource,
    RewardLabel,
    as_vectors,
    check_episode_bytes,
    check_expansion,
    check_images,
    make_episode,
    make_rewards,
    read_object,
)

VERSION = "v3.0"
STATE, ENVIRONMENT_STATE, ACTION = "observation.state", "observation.environment_state", "action"
REWARD, DONE, TRUNCATED = "next.reward", "next.done", "next.truncated"
_EPISODE = "episode_index"
_INFO = "meta/info.json"


@dataclass(frozen=True, kw_only=True)
class LeRobotSource(EpisodeSource):
    """A LeRobotDataset v3.0: its folder, or its repository on the Hub, of which only the videos asked for are copied.

    Where a dataset has no `next.<observation>`, as `save_lerobot_dataset` writes it, the following frame's observation
    is taken, and the last one's own; where it has no `next.truncated`, an episode ends by itself if its last
    `next.done` is true, and is cut otherwise.

    path: the folder.
    observation_keys: features to join to one vector, in this order; by default `observation.state` and
        `observation.environment_state`, as far as they are there.
    image_keys: features that are kept as images, decoded episode by episode: PNG or JPEG in the Parquet files, or
        video, for which PyAV has to be installed.
    reward: `"zero"`, or a function of observations, actions and next observations of one episode that returns its
        rewards; by default `next.reward`.
    """

    format: ClassVar[str] = "lerobot"
    path: Path
    observation_keys: Sequence[str] | None = None
    image_keys: Sequence[str] = ()
    reward: RewardLabel | None = None

    @classmethod
    def reads(cls, path: Path) -> bool:
        return (path / _INFO).is_file() and "codebase_version" in read_object(path, _INFO)

    @classmethod
    def locate(cls, source: str, options: Mapping[str, Any]) -> Path:
        """The folder of a dataset by its path or repository; a repository is copied, without videos nobody asks for."""
        if Path(source).exists():
            return Path(source)
        videos = [f"videos/{key}/**" for key in options.get("image_keys", ())]
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=["meta/**", "data/**", *videos]))

    @cached_property
    def contents(self) -> Contents:
        info, paths = self._info(), self._paths()
        names = _footer(paths[0]).schema.to_arrow_schema().names
        keys = self._observation_keys(names)
        needed = [*keys, ACTION, _EPISODE, *([REWARD] if self.reward is None else [])]
        missing = [name for name in needed if name not in names]
        if missing:
            hint = " Give `reward`, 'zero' or a function." if missing == [REWARD] else ""
            raise ValueError(f"`{self.path}` lacks {', '.join(missing)}; it has {names}.{hint}")
        num_steps = sum(_footer(path).num_rows for path in paths)
        if num_steps != info.get("total_frames"):
            raise ValueError(f"`{self.path}` has {num_steps} frames, its info.json says {info.get('total_frames')}.")
        widths = {key: _width(self.path, info, key) for key in (*keys, ACTION)}
        check_expansion(
            self.name,
            {key: 4 * width * num_steps for key, width in widths.items()},
            sum(path.stat().st_size for path in paths),
        )
        return Contents(
            observation_dim=sum(widths[key] for key in keys),
            action_dim=widths[ACTION],
            keys={
                "observations": " + ".join(keys),
                "next_observations": " + ".join(keys),
                "actions": ACTION,
                "rewards": REWARD if self.reward is None else "reward",
            },
            arrays={name: f"{each['dtype']} {tuple(each['shape'])}" for name, each in info["features"].items()},
            num_steps=num_steps,
            num_episodes=info.get("total_episodes"),
            image_shapes={key: self._image_shape(info, key) for key in self.image_keys},
        )

    def episodes(self) -> Iterator[Episodes]:
        self.contents  # noqa: B018  sizes and keys are checked before anything is read
        pending: pa.Table | None = None
        frames = _Frames(self.path, self._info(), self.image_keys)
        for batch in self._batches():
            table = batch if pending is None else self._appended(pending, batch)
            ids = _numbers(self.name, table, _EPISODE)[:, 0]
            bounds = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist()]
            for start, end in pairwise(bounds):
                yield self._episode(table.slice(start, end - start), frames)
            pending = table.slice(bounds[-1])
            check_episode_bytes(self.name, _EPISODE, pending.nbytes)
        if pending is not None:
            yield self._episode(pending, frames)

    def _appended(self, pending: pa.Table, batch: pa.Table) -> pa.Table:
        try:
            return pa.concat_tables([pending, batch], promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"`{self.path}`: the files in data/ differ in their types: {error}.") from error

    def _batches(self) -> Iterator[pa.Table]:
        names = _footer(self._paths()[0]).schema.to_arrow_schema().names
        keys = self._observation_keys(names)
        following = [f"next.{key}" for key in keys]
        wanted = [*keys, ACTION, _EPISODE, *(following if set(following) <= set(names) else [])]
        wanted += [name for name in (REWARD, DONE, TRUNCATED, *self.image_keys) if name in names]
        rows = max(1, BLOCK_BYTES // (64 * len(wanted) + 50_000 * len(self.image_keys)))
        for path in self._paths():
            yield from _read_batches(path, wanted, rows)

    def _episode(self, table: pa.Table, frames: _Frames) -> Episodes:
        keys = self._observation_keys(table.column_names)
        observations = self._joined(table, keys)
        actions = as_vectors(_numbers(self.name, table, ACTION))
        following = [f"next.{key}" for key in keys]
        if set(following) <= set(table.column_names):
            next_observations = self._joined(table, following)
        else:
            next_observations = np.concatenate([observations[1:], observations[-1:]])
        if self.reward is None:
            rewards = _numbers(self.name, table, REWARD)[:, 0]
        else:
            rewards = make_rewards(self.name, self.reward, observations, actions, next_observations)
        done = _last_flag(self.name, table, DONE)
        has_truncated = TRUNCATED in table.column_names
        truncated = _last_flag(self.name, table, TRUNCATED) if has_truncated else not done
        return make_episode(
            observations,
            actions,
            rewards,
            next_observations,
            terminated=done and not truncated,
            images=frames.of(table),
        )

    def _joined(self, table: pa.Table, keys: Sequence[str]) -> np.ndarray:
        return np.concatenate([as_vectors(_numbers(self.name, table, key)) for key in keys], axis=1)

    def _info(self) -> dict[str, Any]:
        info = read_object(self.path, _INFO)
        if info.get("codebase_version") != VERSION:
            raise ValueError(f"`{self.path}` has the layout {info.get('codebase_version')!r}; {VERSION} is read.")
        if not isinstance(info.get("features"), dict):
            raise ValueError(f"`{self.path}`: 'meta/info.json' lacks its 'features'.")
        return info

    def _paths(self) -> list[Path]:
        paths = sorted((self.path / "data").glob("chunk-*/file-*.parquet"))
        if not paths:
            raise ValueError(f"`{self.path}` has no frames: there is no data/chunk-*/file-*.parquet.")
        return paths

    def _observation_keys(self, names: Sequence[str]) -> list[str]:
        if self.observation_keys is not None:
            return list(self.observation_keys)
        return [key for key in (STATE, ENVIRONMENT_STATE) if key in names] or [STATE]

    def _image_shape(self, info: Mapping[str, Any], key: str) -> tuple[int, int, int]:
        feature = info["features"].get(key, {})
        if feature.get("dtype") not in ("image", "video"):
            raise ValueError(f"`{self.path}`: {key!r} is no image or video; features are {sorted(info['features'])}.")
        shape = [int(size) for size in feature["shape"]]
        if shape[0] == 3 and shape[-1] != 3:  # some datasets say channels first
            shape = [*shape[1:], 3]
        return check_images(self.name, key, (0, *shape))


class _Frames:
    """The images of episodes, decoded one episode at a time."""

    def __init__(self, path: Path, info: Mapping[str, Any], keys: Sequence[str]) -> None:
        self._path, self._info, self._keys = path, info, keys
        self._videos = [key for key in keys if info["features"][key]["dtype"] == "video"]
        self._places: dict[int, dict[str, Any]] = {}
        if self._videos:
            for file in sorted((path / "meta/episodes").glob("chunk-*/file-*.parquet")):
                columns = [f"videos/{key}/{name}" for key in self._videos for name in _VIDEO_COLUMNS]
                for row in pq.read_table(file, columns=[_EPISODE, *columns]).to_pylist():
                    self._places[row[_EPISODE]] = row

    def of(self, table: pa.Table) -> dict[str, np.ndarray]:
        """Images of an episode's frames by key, uint8 of shape `(num_steps, height, width, 3)`."""
        return {key: self._decode(key, table) if key in self._videos else self._read(key, table) for key in self._keys}

    def _read(self, key: str, table: pa.Table) -> np.ndarray:
        from PIL import Image

        images = []
        for cell in table.column(key).to_pylist():
            if not isinstance(cell, dict) or not cell.get("bytes"):
                raise ValueError(f"`{self._path}`: {key!r} must hold the bytes of its images.")
            with Image.open(io.BytesIO(cell["bytes"]), formats=("PNG", "JPEG")) as image:
                images.append(np.asarray(image.convert("RGB")))
        return np.stack(images)

    def _decode(self, key: str, table: pa.Table) -> np.ndarray:
        episode = int(table.column(_EPISODE)[0].as_py())
        if episode not in self._places:
            raise ValueError(f"`{self._path}`: 'meta/episodes' says nothing of episode {episode}.")
        place = self._places[episode]
        chunk, number, start = (place[f"videos/{key}/{name}"] for name in _VIDEO_COLUMNS)
        path = self._path / "videos" / key / f"chunk-{int(chunk):03d}" / f"file-{int(number):03d}.mp4"
        if not path.is_file():
            raise ValueError(f"`{self._path}` lacks the video {path.relative_to(self._path).as_posix()!r}.")
        return _decode_video(path, float(start), table.num_rows, float(self._info["fps"]))


_VIDEO_COLUMNS = ("chunk_index", "file_index", "from_timestamp")


def _decode_video(path: Path, start: float, count: int, fps: float) -> np.ndarray:
    """`count` frames from `start` seconds on, RGB."""
    try:
        import av
    except ImportError as error:
        raise ImportError("Videos are decoded by PyAV: `pip install av`, or leave `image_keys` out.") from error
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            container.seek(int(start / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time >= start - 0.5 / fps:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if len(frames) == count:
                    return np.stack(frames)
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"`{path}` cannot be decoded: {error}. Copy it again.") from error
    raise ValueError(f"`{path}` has {len(frames)} of {count} frames from {start} s on. Copy it again.")


def _footer(path: Path) -> Any:
    try:
        return pq.read_metadata(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"`{path}` is not a whole Parquet file: {error}. Copy it again.") from error


def _read_batches(path: Path, columns: Sequence[str], num_rows: int) -> Iterator[pa.Table]:
    try:
        file = pq.ParquetFile(path)
        absent = [name for name in columns if name not in file.schema_arrow.names]
        if absent:
            raise ValueError(f"it lacks {', '.join(absent)}")
        for batch in file.iter_batches(batch_size=num_rows, columns=list(columns)):
            yield pa.Table.from_batches([batch]).replace_schema_metadata()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"`{path}` cannot be read: {error}. Copy it again.") from error


def _width(path: Path, info: Mapping[str, Any], key: str) -> int:
    try:
        return int(np.prod([int(size) for size in info["features"][key]["shape"]]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`{path}`: 'meta/info.json' lacks the shape of {key!r}.") from error


def _last_flag(name: str, table: pa.Table, key: str) -> bool:
    return key in table.column_names and bool(_numbers(name, table, key)[-1, 0])


def _numbers(name: str, table: pa.Table, key: str) -> np.ndarray:
    """Shape `(frames, width)`."""
    column = table.column(key)
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if column.null_count:
        raise ValueError(f"`{name}`: {key!r} has {column.null_count} missing values.")
    is_list = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
    values = column.flatten() if is_list else column
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"`{name}`: {key!r} must hold numbers, but has the type {column.type}.")
    if is_list and len(pc.unique(pc.list_value_length(column))) > 1:
        raise ValueError(f"`{name}`: {key!r} has lists of different lengths.")
    return cast(np.ndarray, values.to_numpy(zero_copy_only=False).reshape(len(column), -1))
