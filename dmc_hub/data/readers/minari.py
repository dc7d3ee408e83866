"""Minari datasets (https://minari.farama.org), local and hosted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from dmc_hub.data.episodes import Episodes
from dmc_hub.data.readers import hdf5
from dmc_hub.data.readers.source import (
    Contents,
    EpisodeSource,
    as_vectors,
    check_images,
    check_numeric,
    make_episode,
    read_object,
)

_METADATA = "data/metadata.json"
_SPACES = ("observation_space", "action_space")


@dataclass(frozen=True, kw_only=True)
class MinariSource(EpisodeSource):
    """A dataset of Minari: the folder that holds its `data/`, or its id, downloaded if it is not there.

    Observations that are dictionaries or tuples are flattened to one vector: their entries by sorted key (or index),
    depth first, which is the order of `gymnasium.spaces.flatten`.

    path: the folder.
    observation_keys: the entries of a dictionary to join, in this order, such as ("observation", "desired_goal");
        deeper ones by "a/b". By default all that are not in `image_keys`.
    image_keys: entries that are kept as images, uint8 of shape `(num_steps, height, width, 3)`.
    """

    format: ClassVar[str] = "minari"
    path: Path
    observation_keys: Sequence[str] | None = None
    image_keys: Sequence[str] = ()

    @classmethod
    def reads(cls, path: Path) -> bool:
        if not (path / _METADATA).is_file():
            return False
        return "data_format" in read_object(path, _METADATA)

    @classmethod
    def locate(cls, source: str, options: Mapping[str, Any]) -> Path:
        """The folder of a dataset by its path or id; one that is not on this machine is downloaded."""
        if Path(source).exists():
            return Path(source)
        minari = _import_minari()
        from minari.storage.datasets_root_dir import get_dataset_path

        folder = get_dataset_path(source)
        if not (folder / "data").is_dir():
            minari.download_dataset(source)
        return cast(Path, folder)

    @cached_property
    def contents(self) -> Contents:
        dataset = self._open()
        first = next(iter(dataset.iterate_episodes([int(dataset.episode_indices[0])])), None)
        assert first is not None
        entries = self._entries(first.observations)
        chosen = self._chosen(entries)
        actions = self._entries(first.actions)
        for key, values in {**{key: entries[key] for key in chosen}, **actions}.items():
            check_numeric(self.name, key or "actions", values.dtype)
            if values.ndim < 2:
                raise ValueError(f"`{self.path}`: {key or 'a space'!r} is discrete; only vectors are supported.")
        return Contents(
            observation_dim=sum(_width(entries[key]) for key in chosen),
            action_dim=sum(_width(values) for values in actions.values()),
            keys={"observations": " + ".join(key or "observations" for key in chosen)},
            arrays={
                "observation_space": str(dataset.observation_space),
                "action_space": str(dataset.action_space),
            },
            num_steps=int(dataset.total_steps),
            num_episodes=int(dataset.total_episodes),
            image_shapes={key: check_images(self.name, key, entries[key].shape) for key in self.image_keys},
        )

    def episodes(self) -> Iterator[Episodes]:
        dataset = self._open()
        episodes = iter(dataset.iterate_episodes())
        for index in range(len(dataset)):
            try:
                episode = next(episodes)
            except (OSError, KeyError, RuntimeError, ValueError, AssertionError) as error:
                raise ValueError(f"`{self.path}`: episode {index} cannot be read: {error!r}. Copy it again.") from error
            yield self._episode(index, episode)

    def _episode(self, index: int, episode: Any) -> Episodes:
        entries, actions = self._entries(episode.observations), self._entries(episode.actions)
        rewards = np.asarray(episode.rewards)
        count = len(rewards)
        if count == 0:
            raise ValueError(f"`{self.path}`: 'rewards' has no steps in episode {index}. Leave it out.")
        for key, values in entries.items():
            if len(values) != count + 1:
                raise ValueError(
                    f"`{self.path}`: {key or 'observations'!r} has {len(values)} rows in episode {index} of {count} "
                    "steps; one more than steps is due."
                )
        states = np.concatenate([as_vectors(entries[key]) for key in self._chosen(entries)], axis=1)
        terminations, truncations = (np.asarray(flags, bool) for flags in (episode.terminations, episode.truncations))
        early = np.flatnonzero((terminations | truncations)[:-1])
        if len(early):
            raise ValueError(f"`{self.path}`: episode {index} ends at step {early[0]}, but has {count} steps.")
        return make_episode(
            states[:-1],
            np.concatenate([as_vectors(values) for values in actions.values()], axis=1),
            rewards,
            states[1:],
            terminated=bool(terminations[-1]),
            truncated=bool(truncations[-1]) or not terminations[-1],
            images={key: entries[key][:-1] for key in self.image_keys},
        )

    def _open(self) -> Any:
        minari = _import_minari()
        metadata = read_object(self.path, _METADATA)
        missing = [name for name in _SPACES if name not in metadata]
        if missing:  # Minari would then make the environment that the file names
            raise ValueError(f"`{self.path}`: 'data/metadata.json' lacks {', '.join(missing)}.")
        for file in sorted((self.path / "data").glob("*.hdf5")):
            with hdf5.open_hdf5(file) as opened:
                hdf5.check_file(opened)
        try:
            dataset = minari.MinariDataset(self.path / "data")
        except (OSError, KeyError, ValueError, AssertionError) as error:
            raise ValueError(f"`{self.path}` is not a whole Minari dataset: {error!r}.") from error
        if dataset.total_episodes == 0:
            raise ValueError(f"`{self.path}` has no episodes.")
        return dataset

    def _entries(self, values: Any) -> dict[str, np.ndarray]:
        """The arrays of nested dictionaries and tuples by path, in the order of `gymnasium.spaces.flatten`."""
        if isinstance(values, dict):
            parts = [(str(key), values[key]) for key in sorted(values)]
        elif isinstance(values, tuple):
            parts = [(str(index), value) for index, value in enumerate(values)]
        else:
            return {"": np.asarray(values)}
        inner = [(name, self._entries(value)) for name, value in parts]
        return {f"{name}/{key}".rstrip("/"): value for name, entries in inner for key, value in entries.items()}

    def _chosen(self, entries: dict[str, np.ndarray]) -> list[str]:
        if self.observation_keys is None:
            chosen = [key for key in entries if key not in self.image_keys]
        else:
            chosen = list(self.observation_keys)
        missing = [key for key in (*chosen, *self.image_keys) if key not in entries]
        if missing or not chosen:
            raise ValueError(
                f"`{self.path}`: the observations lack {missing or 'a vector'}; they have {list(entries)}."
            )
        return chosen


def _import_minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise ImportError('Minari datasets are read by minari: `pip install "dmc_hub[minari]"`.') from error
    return minari


def _width(values: np.ndarray) -> int:
    return int(np.prod(values.shape[1:]))
