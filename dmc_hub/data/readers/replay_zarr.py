"""Diffusion Policy's replay buffers (arXiv:2303.04137): a zarr group, as a folder or a zip."""

from __future__ import annotations

import itertools
import json
import math
import operator
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, cast

import numpy as np

from dmc_hub.data.episodes import Episodes
from dmc_hub.data.readers.source import (
    MAX_CHUNK_BYTES,
    Contents,
    EpisodeSource,
    RewardLabel,
    as_vectors,
    check_episode_bytes,
    check_expansion,
    check_images,
    check_numeric,
    make_episode,
    make_rewards,
)
from dmc_hub.errors import DmcHubError

_BLOSC_HEADER = struct.Struct("<4xI4xI")  # c-blosc's README_CHUNK_FORMAT: ..., nbytes, blocksize, cbytes
_ENDS = "meta/episode_ends"
_ROUNDING = 0.02
MAX_CHUNKS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ReplayZarrSource(EpisodeSource):
    """A replay buffer of Diffusion Policy: zarr (v2) arrays `data/<key>` of all steps and `meta/episode_ends`.

    The following observation is an observation's next one, and the last one's own.

    path: the folder, or a zip of it.
    observation_keys: of `data`, each flattened, joined to one vector in this order.
    action_key: of `data`.
    image_keys: of `data`, kept as images: uint8, or floats of whole numbers in 0..255 such as Push-T's `img`.
    reward: `"zero"`, or a function of observations, actions and next observations (float32, of one episode) that
        returns its rewards; by default `data/reward`, which Push-T has not.
    terminal: whether a demonstration ends by itself at its last step; by default it is cut there.
    """

    format: ClassVar[str] = "zarr"
    path: Path
    observation_keys: Sequence[str] = ("state",)
    action_key: str = "action"
    image_keys: Sequence[str] = ()
    reward: RewardLabel | None = None
    terminal: bool = False

    @classmethod
    def reads(cls, path: Path) -> bool:
        if path.is_dir():
            return (path / "meta/episode_ends/.zarray").is_file()
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(f"{_ENDS}/.zarray") for name in archive.namelist())

    @cached_property
    def contents(self) -> Contents:
        with _open_files(self.path) as files:
            known = sorted(name[len("data/") : -len("/.zarray")] for name in files.sizes if _is_array(name))
            metadata = {key: _metadata(files, key, known) for key in self._keys(known)}
            ends = _metadata(files, _ENDS, known)
            declared = {key: math.prod(each["shape"]) * each["dtype"].itemsize for key, each in metadata.items()}
            check_expansion(self.name, declared, files.num_bytes)
            num_steps = metadata[f"data/{self.action_key}"]["shape"][0]
            for key, each in metadata.items():
                if each["shape"][0] != num_steps:
                    raise ValueError(
                        f"`{self.path}`: {key!r} has {each['shape'][0]} rows, the actions have {num_steps}."
                    )
            return Contents(
                observation_dim=sum(math.prod(metadata[f"data/{key}"]["shape"][1:]) for key in self.observation_keys),
                action_dim=math.prod(metadata[f"data/{self.action_key}"]["shape"][1:]),
                keys={
                    "observations": " + ".join(f"data/{key}" for key in self.observation_keys),
                    "next_observations": " + ".join(f"data/{key}" for key in self.observation_keys),
                    "actions": f"data/{self.action_key}",
                    "rewards": "data/reward" if self.reward is None else "reward",
                },
                arrays={
                    f"data/{key}": f"{each['dtype']} {tuple(each['shape'])}"
                    for key in known
                    for each in [_metadata(files, f"data/{key}", known)]
                },
                num_steps=num_steps,
                num_episodes=ends["shape"][0],
                image_shapes={
                    key: check_images(self.name, f"data/{key}", tuple(metadata[f"data/{key}"]["shape"]))
                    for key in self.image_keys
                },
            )

    def episodes(self) -> Iterator[Episodes]:
        num_steps = self.contents.num_steps
        assert num_steps is not None
        with _open_files(self.path) as files:
            known = sorted(name[len("data/") : -len("/.zarray")] for name in files.sizes if _is_array(name))
            keys = self._keys(known)
            if self.reward is None and "reward" not in known:
                raise ValueError(f"`{self.path}` lacks 'data/reward': give `reward`, 'zero' or a function.")
        with _open_group(self.path, files.prefix) as group:
            ends = self._episode_ends(group, num_steps)
            row_bytes = sum(_row_bytes(group[key]) for key in keys)
            for start, end in zip([0, *ends[:-1]], ends):
                check_episode_bytes(self.name, _ENDS, (end - start) * row_bytes)
                yield self._episode({key: self._read(group, key, start, end) for key in keys})

    def _keys(self, known: Sequence[str]) -> list[str]:
        rewards = ["reward"] if self.reward is None and "reward" in known else []
        return [f"data/{key}" for key in (*self.observation_keys, self.action_key, *self.image_keys, *rewards)]

    def _episode(self, values: Mapping[str, np.ndarray]) -> Episodes:
        observations = np.concatenate([as_vectors(values[f"data/{key}"]) for key in self.observation_keys], axis=1)
        actions = as_vectors(values[f"data/{self.action_key}"])
        following = np.concatenate([observations[1:], observations[-1:]])
        if self.reward is None:
            rewards = values["data/reward"].reshape(-1)
        else:
            rewards = make_rewards(self.name, self.reward, observations, actions, following)
        images = {key: self._as_images(f"data/{key}", values[f"data/{key}"]) for key in self.image_keys}
        return make_episode(observations, actions, rewards, following, terminated=self.terminal, images=images)

    def _as_images(self, key: str, values: np.ndarray) -> np.ndarray:
        if values.dtype == np.uint8:
            return values
        rounded = np.rint(values)
        is_pixel = (rounded >= 0) & (rounded <= 255) & (np.abs(rounded - values) <= _ROUNDING)
        if not is_pixel.all():
            raise ValueError(
                f"`{self.path}`: {key!r} must hold pixels, whole numbers in 0..255; got {values.dtype} "
                f"in {values.min()}..{values.max()}."
            )
        return cast(np.ndarray, rounded.astype(np.uint8))

    def _episode_ends(self, group: Any, num_steps: int) -> list[int]:
        ends = self._read(group, _ENDS, 0, group[_ENDS].shape[0])
        if ends.ndim != 1 or ends.dtype.kind not in "iu" or not len(ends):
            raise ValueError(f"`{self.path}`: {_ENDS!r} must hold whole numbers, one for each episode.")
        lengths = np.diff(ends.astype(np.int64), prepend=0)
        if (lengths < 1).any():
            bad = int(np.argmax(lengths < 1))
            raise ValueError(
                f"`{self.path}`: {_ENDS!r} gives episode {bad} a length of {lengths[bad]}; at least 1 is due."
            )
        if ends[-1] != num_steps:
            raise ValueError(f"`{self.path}`: {_ENDS!r} ends at {ends[-1]}, but the actions have {num_steps} rows.")
        return cast(list[int], ends.tolist())

    def _read(self, group: Any, key: str, start: int, end: int) -> np.ndarray:
        try:
            return np.asarray(group[key][start:end])
        except (RuntimeError, ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"`{self.path}`: {key!r} cannot be read from row {start}: {error}. Copy it again."
            ) from error


@dataclass(frozen=True)
class _Files:
    """The files below a group: whose, their relative names and sizes, how to read one's start, and bytes on disk."""

    path: Path
    sizes: Mapping[str, int]
    read: Callable[[str, int], bytes]
    num_bytes: int
    prefix: str


@contextmanager
def _open_files(path: Path) -> Iterator[_Files]:
    if path.is_dir():
        yield _folder_files(path)
        return
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"`{path}` is not a whole zip file: {error}. Copy it again.") from error
    with archive:
        entries = archive.infolist()
        for entry in entries:
            parts = PurePosixPath(entry.filename).parts
            if ".." in parts or entry.filename.startswith("/") or "\\" in entry.filename:
                raise ValueError(f"`{path}` has the entry {entry.filename!r}, a path outside the folder.")
        check_expansion(str(path), {entry.filename: entry.file_size for entry in entries}, path.stat().st_size)
        roots = sorted((e.filename for e in entries if e.filename.endswith(f"{_ENDS}/.zarray")), key=len)
        if not roots:
            raise ValueError(f"`{path}` lacks the array {_ENDS!r}.")
        prefix = roots[0][: -len(f"{_ENDS}/.zarray")]
        sizes = {e.filename[len(prefix) :]: e.file_size for e in entries if e.filename.startswith(prefix)}

        def read(name: str, limit: int) -> bytes:
            with archive.open(prefix + name) as entry:
                return entry.read(limit)

        yield _Files(path, sizes, read, path.stat().st_size, prefix)


def _folder_files(path: Path) -> _Files:
    sizes: dict[str, int] = {}
    root = path.resolve()
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            entry = Path(folder) / name
            if entry.is_symlink() and not entry.resolve().is_relative_to(root):
                raise ValueError(f"`{path}` has the link {entry.relative_to(path).as_posix()!r} to outside the folder.")
        entries = [Path(folder) / name for name in files]
        sizes |= {entry.relative_to(path).as_posix(): entry.stat().st_size for entry in entries}

    def read(name: str, limit: int) -> bytes:
        with (path / name).open("rb") as file:
            return file.read(limit)

    return _Files(path, sizes, read, sum(sizes.values()), "")


@contextmanager
def _open_group(path: Path, prefix: str) -> Iterator[Any]:
    try:
        import zarr
        from zarr.storage import LocalStore, ZipStore
    except ImportError as error:
        raise ImportError('zarr arrays are read by zarr: `pip install "dmc_hub[zarr]"`.') from error
    store: Any = LocalStore(path, read_only=True) if path.is_dir() else ZipStore(path, mode="r")
    try:
        yield zarr.open_group(store, path=prefix.rstrip("/"), mode="r", zarr_format=2)
    except (LookupError, TypeError, AttributeError, OverflowError, RuntimeError, AssertionError) as error:
        if isinstance(error, DmcHubError):
            raise
        raise ValueError(f"`{path}` is damaged ({type(error).__name__}: {error}). Copy it again.") from error
    finally:
        store.close()


def _is_array(name: str) -> bool:
    return name.startswith("data/") and name.endswith("/.zarray")


def _metadata(files: _Files, key: str, known: Sequence[str]) -> dict[str, Any]:
    """Shape and type of an array whose metadata and chunks are as they should be; zarr itself checks none of it."""
    name, where = f"{key}/.zarray", f"`{files.path}`: {key!r}"
    if name not in files.sizes:
        raise ValueError(f"`{files.path}` lacks the array {key!r}; 'data' has {list(known)}.")
    try:
        content = json.loads(files.read(name, 1 << 20))
        dtype = np.dtype(content["dtype"])
        shape, chunks = ([operator.index(size) for size in content[field]] for field in ("shape", "chunks"))
        codecs = [codec["id"] for codec in [content["compressor"], *(content["filters"] or [])] if codec is not None]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{where} has damaged metadata: {error!r}. Copy it again.") from error
    check_numeric(str(files.path), key, dtype)
    if codecs not in ([], ["blosc"]):
        raise ValueError(f"{where} has the codecs {codecs}; Blosc alone or none is read.")
    if not shape or min(shape) < 0 or len(chunks) != len(shape) or min(chunks) < 1:
        raise ValueError(f"{where} has the shape {shape} in chunks of {chunks}.")
    chunk_bytes = math.prod(chunks) * dtype.itemsize
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise ValueError(f"{where} has chunks of {chunks}, more than {MAX_CHUNK_BYTES >> 20} MiB each.")
    counts = [-(-size // chunk) for size, chunk in zip(shape, chunks)]
    if math.prod(counts) > MAX_CHUNKS:
        raise ValueError(f"{where} declares {math.prod(counts):,} chunks; up to {MAX_CHUNKS:,} are read.")
    separator = content.get("dimension_separator", ".")
    for cell in itertools.product(*map(range, counts)):
        chunk = f"{key}/{separator.join(map(str, cell))}"
        if chunk not in files.sizes and key == "data/reward":
            continue  # zarr 3 writes no chunk of zeros, which sparse rewards have
        if chunk not in files.sizes:
            raise ValueError(f"{where} lacks its chunk {chunk!r}. Copy it again.")
        sizes = (chunk_bytes, files.sizes[chunk])
        head = files.read(chunk, _BLOSC_HEADER.size) if codecs else b""
        if codecs and (len(head) < _BLOSC_HEADER.size or _BLOSC_HEADER.unpack(head) != sizes):
            raise ValueError(f"{where}: the chunk {chunk!r} is damaged. Copy it again.")
        if not codecs and sizes[0] != sizes[1]:
            raise ValueError(f"{where}: the chunk {chunk!r} has {sizes[1]} bytes instead of {sizes[0]}. Copy it again.")
    return {"shape": shape, "dtype": dtype}


def _row_bytes(array: Any) -> int:
    return int(math.prod(array.shape[1:]) * array.dtype.itemsize)
