"""robomimic's HDF5 files (arXiv:2108.03298): demonstrations with low-dimensional and image observations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dmc_hub.data.episodes import Episodes
from dmc_hub.data.readers import hdf5
from dmc_hub.data.readers.source import (
    Contents,
    EpisodeSource,
    as_vectors,
    check_episode_bytes,
    check_images,
    make_episode,
)

_ROBOT_PARTS = ("eef_pos", "eef_quat", "gripper_qpos")
ROBOMIMIC_KEYS = ("object", *(f"robot{arm}_{part}" for arm in (0, 1) for part in _ROBOT_PARTS))
"""The low-dimensional observations of robomimic's own configurations; robot1 is Transport's second arm."""
_DEMO = re.compile(r"\w*?_(\d+)")


@dataclass(frozen=True, kw_only=True)
class RobomimicSource(EpisodeSource):
    """A robomimic file: `data/demo_<i>/{obs/<key>, next_obs/<key>, actions, rewards, dones}` and `mask/<filter key>`.

    Demonstrations come by ascending number, as in robomimic's `SequenceDataset`. One ends by itself if `dones` is set
    at its last step and is cut otherwise; robomimic may set it before, at every state of success, and goes on. Without
    `next_obs` the following observation is taken, and the last one's own.

    path: the file.
    observation_keys: joined to one vector in this order; by default those of `ROBOMIMIC_KEYS` that are there.
    image_keys: kept as images, uint8 of shape `(num_steps, height, width, 3)`.
    filter_key: only the demonstrations of `mask/<filter_key>`, such as "train", "valid" or "20_percent".
    """

    format: ClassVar[str] = "robomimic"
    path: Path
    observation_keys: Sequence[str] | None = None
    image_keys: Sequence[str] = ()
    filter_key: str | None = None

    @classmethod
    def reads(cls, path: Path) -> bool:
        if not hdf5.is_hdf5(path):
            return False
        with hdf5.open_hdf5(path) as file:
            return any(_DEMO.fullmatch(name) for name in hdf5.members(file, "data"))

    @cached_property
    def contents(self) -> Contents:
        with hdf5.open_hdf5(self.path) as file:
            demos = self._demos(file)
            keys = self._observation_keys(file, demos[0])
            first = self._arrays(file, demos[0], keys)
            hdf5.check_sizes(file, {n: a for demo in demos for n, a in self._arrays(file, demo, keys).items()})
            return Contents(
                observation_dim=sum(_width(first[f"data/{demos[0]}/obs/{key}"]) for key in keys),
                action_dim=_width(first[f"data/{demos[0]}/actions"]),
                keys={
                    "observations": " + ".join(f"obs/{key}" for key in keys),
                    "next_observations": " + ".join(f"next_obs/{key}" for key in keys),
                },
                arrays={
                    key: hdf5.describe(file[f"data/{demos[0]}/{key}"])
                    for key in hdf5.array_keys(hdf5.find(file, f"data/{demos[0]}"))
                },
                num_steps=sum(len(hdf5.array(file, f"data/{demo}/actions")) for demo in demos),
                num_episodes=len(demos),
                image_shapes={
                    key: check_images(self.name, f"obs/{key}", first[f"data/{demos[0]}/obs/{key}"].shape)
                    for key in self.image_keys
                },
            )

    def episodes(self) -> Iterator[Episodes]:
        self.contents  # noqa: B018  the sizes are checked before anything is read
        with hdf5.open_hdf5(self.path) as file:
            demos = self._demos(file)
            keys = self._observation_keys(file, demos[0])
            for demo in demos:
                yield self._episode(file, demo, keys)

    def _episode(self, file: Any, demo: str, keys: Sequence[str]) -> Episodes:
        arrays = self._arrays(file, demo, keys)
        check_episode_bytes(self.name, f"data/{demo}", sum(node.nbytes for node in arrays.values()))
        count = len(arrays[f"data/{demo}/actions"])
        for key, node in arrays.items():
            if len(node) != count:
                raise ValueError(f"`{self.path}`: {key!r} has {len(node)} rows, the actions have {count}.")
        if count == 0:
            raise ValueError(f"`{self.path}`: 'data/{demo}/actions' has no steps. Leave the demonstration out.")
        values = {key: hdf5.read_rows(node, 0, count) for key, node in arrays.items()}

        def joined(group: str) -> np.ndarray:
            return np.concatenate([as_vectors(values[f"data/{demo}/{group}/{key}"]) for key in keys], axis=1)

        has_next = f"data/{demo}/next_obs/{keys[0]}" in values
        return make_episode(
            joined("obs"),
            values[f"data/{demo}/actions"],
            values[f"data/{demo}/rewards"].reshape(-1),
            joined("next_obs") if has_next else None,
            terminated=bool(values[f"data/{demo}/dones"].reshape(-1)[-1]),
            images={key: values[f"data/{demo}/obs/{key}"] for key in self.image_keys},
        )

    def _demos(self, file: Any) -> list[str]:
        names = hdf5.members(file, "data")
        if self.filter_key is not None:
            known = hdf5.members(file, "mask")
            if self.filter_key not in known:
                raise ValueError(f"`{self.path}` has no filter key {self.filter_key!r}; it has {known}.")
            node = hdf5.find(file, f"mask/{self.filter_key}")
            hdf5.check_sizes(file, {f"mask/{self.filter_key}": node})
            listed = [name.decode() if isinstance(name, bytes) else str(name) for name in node[:]]
            missing = sorted(set(listed) - set(names))
            if missing:
                raise ValueError(f"`{self.path}`: 'mask/{self.filter_key}' names {missing[:5]}, which 'data' has not.")
            names = listed
        numbers = {name: match for name in names if (match := _DEMO.fullmatch(name))}
        if not numbers or len(numbers) < len(names):
            strange = sorted(set(names) - set(numbers))[:5]
            raise ValueError(f"`{self.path}`: 'data' must hold groups demo_0, demo_1, ...; it has {strange or 'none'}.")
        return sorted(numbers, key=lambda name: int(numbers[name][1]))

    def _observation_keys(self, file: Any, demo: str) -> list[str]:
        known = hdf5.members(file, f"data/{demo}/obs")
        keys = (
            [key for key in ROBOMIMIC_KEYS if key in known] if self.observation_keys is None else self.observation_keys
        )
        missing = [key for key in (*keys, *self.image_keys) if key not in known]
        if missing or not keys:
            raise ValueError(
                f"`{self.path}`: 'data/{demo}/obs' lacks {missing or 'the default keys'}; it has {known}: choose "
                "`observation_keys`."
            )
        return list(keys)

    def _arrays(self, file: Any, demo: str, keys: Sequence[str]) -> dict[str, Any]:
        wanted = [f"data/{demo}/{key}" for key in ("actions", "rewards", "dones")]
        wanted += [f"data/{demo}/obs/{key}" for key in (*keys, *self.image_keys)]
        if hdf5.find(file, f"data/{demo}/next_obs") is not None:
            wanted += [f"data/{demo}/next_obs/{key}" for key in keys]
        arrays = {key: hdf5.array(file, key) for key in wanted}
        scalar = next((key for key, node in arrays.items() if not node.shape), None)
        if scalar is not None:
            raise ValueError(f"`{self.path}`: {scalar!r} has no rows.")
        for key in self.image_keys:
            if arrays[f"data/{demo}/obs/{key}"].dtype != np.uint8:
                raise ValueError(f"`{self.path}`: 'data/{demo}/obs/{key}' must hold uint8 images.")
        return arrays


def _width(node: Any) -> int:
    return int(np.prod(node.shape[1:]))
