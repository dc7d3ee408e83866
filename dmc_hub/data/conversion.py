"""Any source of episodes as a folder that `datasets.load_from_disk` and `Episodes.from_dataset` map into memory.

The columns are first written to files of their own, as the episodes come; then these are mapped into memory and
written as one Arrow batch, so that every column is one piece and none has to be copied when it is read.
"""

from __future__ import annotations

import io
import json
import mmap
import os
from array import array
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from dmc_hub import checkpoint
from dmc_hub.data.episodes import IMAGE_PREFIX, VECTOR_COLUMNS, Episodes, episode_features, fixed_size_lists
from dmc_hub.data.readers.source import BLOCK_BYTES, EpisodeSource
from dmc_hub.data.statistics import RunningMoments, episode_statistics, moments_of_columns

if TYPE_CHECKING:
    from datasets import Features

FACTS_NAME = "source.json"
_ARROW_NAME = "data-00000-of-00001.arrow"
_WRITE_BYTES = 8 << 20


def convert(source: EpisodeSource, output_dir: str | os.PathLike[str]) -> Path:
    """Write the episodes of a source as a folder that `load_episodes` maps into memory; whole or not at all.

    Besides the Arrow file it holds `source.json`: format, file name, size, sha256 and options of the source, and the
    statistics of `dataset_statistics`.

    Args:
        source: from `open_source` or `record_episodes`.
        output_dir: the folder; replaced if it is there.

    Returns:
        The folder.

    Raises:
        ValueError: the source is not what its reader reads; or an episode without a step, with a NaN or infinite value
            or of another width, named by file, key, episode and step.
    """
    folder, contents = Path(output_dir), source.contents
    with checkpoint.write_folder_atomically(folder) as stage:
        columns = _ColumnFiles(stage / "columns")
        with (
            columns,
            tqdm(total=contents.num_steps, unit="step", unit_scale=True, desc=Path(source.name).name) as progress,
        ):
            for block in _blocks(source):
                columns.append(block)
                progress.update(block.num_steps)
        if columns.num_steps == 0:
            raise ValueError(f"`{source.name}` has no steps with a next observation.")
        features = episode_features(contents.observation_dim, contents.action_dim, contents.image_shapes)
        columns.write_arrow(stage / _ARROW_NAME, features)
        columns.delete()
        _write_state(stage, features)
        checkpoint.save_json(stage / FACTS_NAME, {**_facts(source), "statistics": columns.statistics()})
    return folder


def is_converted(folder: Path) -> bool:
    """Whether `folder` is one that `datasets.load_from_disk` opens."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


# ---- Episodes, checked ---------------------------------------------------------------------------------------


def _blocks(source: EpisodeSource) -> Iterator[Episodes]:
    """Whole episodes in blocks of some size, checked."""
    gathered: list[Episodes] = []
    first = size = 0
    for index, episode in enumerate(source.episodes()):
        _check_shapes(source, index, episode)
        gathered.append(episode)
        size += _num_bytes(episode)
        if size >= BLOCK_BYTES:
            yield _joined(source, first, gathered)
            gathered, first, size = [], index + 1, 0
    if gathered:
        yield _joined(source, first, gathered)


def _num_bytes(episode: Episodes) -> int:
    vectors = sum(getattr(episode, name).nbytes for name in VECTOR_COLUMNS)
    return int(vectors + sum(frames.nbytes for frames in episode.images.values()))


def _joined(source: EpisodeSource, first: int, gathered: list[Episodes]) -> Episodes:
    block = Episodes.concatenate(*gathered)
    for name in (*VECTOR_COLUMNS, "rewards"):
        column = getattr(block, name)
        is_finite = np.isfinite(column).reshape(len(column), -1).all(axis=1)
        if not is_finite.all():
            row = int(np.argmin(is_finite))
            episode = int(np.searchsorted(block.episode_ends, row, side="right"))
            raise ValueError(
                f"`{source.name}`: {_key(source, name)} has NaN or infinite values (in float32), first at episode "
                f"{first + episode}, step {row - int(block.episode_starts[episode])}. Leave the episode out."
            )
    return block


def _check_shapes(source: EpisodeSource, index: int, episode: Episodes) -> None:
    contents, count = source.contents, episode.num_steps
    if count == 0:
        raise ValueError(f"`{source.name}`: {_key(source, 'rewards')} has no steps in episode {index}. Leave it out.")
    wanted = {
        "observations": (count, contents.observation_dim),
        "actions": (count, contents.action_dim),
        "rewards": (count,),
        "next_observations": (count, contents.observation_dim),
    }
    got = {name: getattr(episode, name).shape for name in wanted}
    wanted |= {IMAGE_PREFIX + camera: (count, *shape) for camera, shape in contents.image_shapes.items()}
    got |= {IMAGE_PREFIX + camera: frames.shape for camera, frames in episode.images.items()}
    for name, shape in wanted.items():
        if got.get(name) != shape:
            raise ValueError(
                f"`{source.name}`: {_key(source, name)} has the shape {got.get(name)} in episode {index} instead of "
                f"{shape}."
            )


def _key(source: EpisodeSource, name: str) -> str:
    """What an error calls an array: the source's own key, and our name where that is another."""
    key = source.contents.keys.get(name, name)
    return repr(key) if key == name else f"{key!r} ({name})"


# ---- The Arrow file ------------------------------------------------------------------------------------------


class _ColumnFiles:
    """One file per column, appended to; the statistics are kept along the way."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.num_steps = self.num_episodes = 0
        self._files: dict[str, BinaryIO] = {}
        self._moments: dict[str, RunningMoments] = {}
        self._returns, self._lengths = array("d"), array("q")

    def __enter__(self) -> _ColumnFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, block: Episodes) -> None:
        columns = {name: getattr(block, name) for name in (*VECTOR_COLUMNS, "rewards", "terminations", "truncations")}
        moments_of_columns(self._moments, columns)
        ids = np.repeat(np.arange(block.num_episodes) + self.num_episodes, block.episode_lengths)
        columns |= {"episode_ids": ids.astype(np.int64)}
        columns |= {IMAGE_PREFIX + camera: frames for camera, frames in block.images.items()}
        for name, values in columns.items():
            if name not in self._files:
                self._files[name] = (self.folder / str(len(self._files))).open("wb")
            self._files[name].write(np.ascontiguousarray(values).data)
        self._returns.frombytes(block.returns().tobytes())
        self._lengths.frombytes(block.episode_lengths.tobytes())
        self.num_steps += block.num_steps
        self.num_episodes += block.num_episodes

    def statistics(self) -> dict[str, Any]:
        """As `dataset_statistics`."""
        return {
            "num_rows": self.num_steps,
            "columns": {name: moments.to_dict() for name, moments in self._moments.items()},
            "episodes": episode_statistics(np.array(self._returns), np.array(self._lengths)),
        }

    def write_arrow(self, path: Path, features: Features) -> None:
        """All columns as one batch of an Arrow stream."""
        schema = features.arrow_schema
        with ExitStack() as stack:
            mappings, arrays = [], []
            for field in schema:
                file = stack.enter_context(open(self._files[field.name].name, "rb"))
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                mappings.append(mapping)
                arrays.append(_arrow_array(np.frombuffer(mapping, np.uint8), field.type))
            batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
            output = stack.enter_context(path.open("wb"))
            sink = _ForgetfulSink(output, mappings)
            with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as writer:
                writer.write_batch(batch)

    def delete(self) -> None:
        """Remove the files."""
        for file in self._files.values():
            os.unlink(file.name)
        self.folder.rmdir()


class _ForgetfulSink(io.RawIOBase):
    """Writes long buffers in slices and lets go of the mapped pages after each, so that they don't fill the memory."""

    def __init__(self, file: BinaryIO, mappings: list[mmap.mmap]) -> None:
        super().__init__()
        self._file, self._mappings = file, mappings

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _WRITE_BYTES):
            self._file.write(view[start : start + _WRITE_BYTES])
            if len(view) > _WRITE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
                for mapping in self._mappings:
                    mapping.madvise(mmap.MADV_DONTNEED)
        return len(view)

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()


def _arrow_array(data: np.ndarray, kind: pa.DataType) -> pa.Array:
    """The bytes of a column as an Arrow array; only booleans are copied."""
    shape = []
    value_type = kind
    while pa.types.is_fixed_size_list(value_type):
        shape.append(value_type.list_size)
        value_type = value_type.value_type
    return fixed_size_lists(data.view(value_type.to_pandas_dtype()).reshape(-1, *shape)).cast(kind)


def _write_state(stage: Path, features: Features) -> None:
    """What `datasets.Dataset.save_to_disk` writes beside the Arrow file."""
    info = datasets.DatasetInfo(features=features)
    checkpoint.save_json(stage / "dataset_info.json", asdict(info))
    state: Mapping[str, Any] = {
        "_data_files": [{"filename": _ARROW_NAME}],
        "_fingerprint": checkpoint.record_of(stage / _ARROW_NAME).sha256[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    checkpoint.save_json(stage / "state.json", state)


def _facts(source: EpisodeSource) -> dict[str, Any]:
    facts: dict[str, Any] = {"format": source.format}
    if source.path is not None:
        facts["name"] = source.path.name
        facts |= identity_of(source.path)
        if source.path.is_file():
            facts["sha256"] = checkpoint.record_of(source.path).sha256
    options = {name: value for name, value in source.options().items() if value is not None}
    return {**facts, "options": json.loads(json.dumps(options, default=name_of))}


def identity_of(path: Path) -> dict[str, int]:
    """Size of a file, or number and size of the files of a folder."""
    if path.is_file():
        return {"size": path.stat().st_size}
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    return {"num_files": len(sizes), "size": sum(sizes)}


def name_of(value: Any) -> str:
    """What the facts call an option that is not JSON, such as a function."""
    return f"{value.__module__}:{value.__qualname__}" if callable(value) else repr(value)
