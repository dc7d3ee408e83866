"""Datasets that travel: a folder of Parquet files, statistics and a card, which is also what a Hub repository holds.

`datasets.load_dataset(folder_or_repo, config)` reads one, streamed or not, without `dmc_hub`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData
from huggingface_hub.utils._validators import validate_repo_id

from dmc_hub import cards, checkpoint, transfer
from dmc_hub.data.episodes import COLUMNS, Episodes
from dmc_hub.data.nav1d import NAV1D_VARIANTS, make_nav1d_dataset
from dmc_hub.data.preferences import make_preference_pairs
from dmc_hub.data.statistics import dataset_statistics
from dmc_hub.envs import nav1d

if TYPE_CHECKING:
    from datasets import Dataset

STATISTICS_NAME = "statistics.json"
_NAME = re.compile(r"[A-Za-z0-9]\w*(-\w+)*")
_SPLIT = re.compile(r"\w+")  # what `datasets` accepts


@dataclass(frozen=True)
class DatasetConfig:
    """One configuration of a dataset repository.

    name: what `load_dataset(repo, name)` is given; letters, digits, `_` and `-`.
    summary: one line for the card.
    splits: datasets with the same columns, by name.
    """

    name: str
    summary: str
    splits: Mapping[str, Dataset]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"`name` {self.name!r} must consist of letters, digits, `_` and single `-`.")
        bad = [split for split in self.splits if not _SPLIT.fullmatch(split)]
        if bad or not self.splits:
            raise ValueError(f"`splits` of {self.name!r} must have names of letters, digits and `_`; got {bad}.")
        features = [dataset.features for dataset in self.splits.values()]
        if any(other != features[0] for other in features):
            raise ValueError(f"`splits` of {self.name!r} differ in their features.")
        empty = [split for split, dataset in self.splits.items() if not len(dataset)]
        if empty:
            raise ValueError(f"`splits` of {self.name!r} must not be empty, but {empty} are.")


@dataclass(frozen=True, kw_only=True)
class DatasetCardText:
    """What a card says besides what is computed from the data.

    title: the heading.
    description: a paragraph; taken as text, so that neither HTML nor Jinja in it does anything.
    repo_id: the repository that the card's examples load, `"owner/name"`.
    command: the command that makes the dataset again.
    license: a licence identifier of the Hub.
    tags: further tags of the card.
    scores: reference returns by name, such as an optimum.
    """

    title: str
    description: str
    repo_id: str
    command: str
    license: str = "apache-2.0"
    tags: Sequence[str] = ()
    scores: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate_repo_id(self.repo_id)


def split_episodes(data: Episodes | Dataset, *, validation_fraction: float = 0.1, seed: int = 0) -> dict[str, Dataset]:
    """Split by whole episodes into `train` and `validation`; the same arguments always give the same rows.

    Raises:
        ValueError: a fraction that leaves one of the two without an episode.
    """
    episodes = Episodes.ensure(data)
    count = round(validation_fraction * episodes.num_episodes)
    if not 0 < count < episodes.num_episodes:
        raise ValueError(
            f"`validation_fraction` {validation_fraction} of {episodes.num_episodes} episodes is {count}: both splits "
            "need at least one."
        )
    order = np.random.default_rng(seed).permutation(episodes.num_episodes)
    parts = {"train": order[count:], "validation": order[:count]}
    return {name: episodes.select(np.sort(rows)).to_dataset() for name, rows in parts.items()}


def save_dataset(
    folder: str | os.PathLike[str],
    configs: Sequence[DatasetConfig],
    text: DatasetCardText,
    *,
    rows_per_shard: int = 1_000_000,
) -> None:
    """Write the folder whole or not at all: Parquet shards, `statistics.json`, the card, a manifest with checksums.

    Args:
        folder: replaced if it is there.
        configs: the first is the one that `load_dataset(folder)` loads.
        text: of the card.
        rows_per_shard: rows of one Parquet file.

    Raises:
        ValueError: no configuration, two of one name, or `rows_per_shard` below 1.
    """
    names = [config.name for config in configs]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"`configs` must have different names and not be empty, got {names}.")
    if rows_per_shard < 1:
        raise ValueError(f"`rows_per_shard` must be at least 1, got {rows_per_shard}.")
    statistics = {
        config.name: {split: dataset_statistics(dataset) for split, dataset in config.splits.items()}
        for config in configs
    }
    with checkpoint.write_folder_atomically(folder) as stage:
        for config in configs:
            for split, dataset in config.splits.items():
                _write_shards(stage / "data" / config.name, split, dataset, rows_per_shard)
        checkpoint.save_json(stage / STATISTICS_NAME, statistics)
        (stage / "README.md").write_text(_card(configs, text, statistics), encoding="utf-8")


def push_dataset(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Push a folder of `save_dataset`, only what its manifest lists, in one commit; returns the commit's hash.

    Raises:
        CheckpointError: the folder is not complete or was changed.
        ValueError: it holds symlinks, or `repo_id` is not the name of a repo.
        HubError: the push failed; see `dmc_hub.transfer.push`. The repo is as it was then.
    """
    folder = Path(folder)
    manifest = checkpoint.verify(folder)
    files = {name: folder / name for name in manifest.files}
    bundle = transfer.Bundle(files, manifest.metadata, manifest.library_version)
    return transfer.push(
        bundle,
        repo_id,
        message="Upload dataset",
        repo_type="dataset",
        private=private,
        revision=revision,
        token=token,
    )


def nav1d_dataset_configs(num_episodes: int = 2000, *, num_pairs: int = 4000, seed: int = 0) -> list[DatasetConfig]:
    """The three Nav1D datasets of section 4.1 of arXiv:2502.12198, split 9 : 1, and preference pairs of each.

    Args:
        num_episodes: of each dataset.
        num_pairs: preference pairs of each training split; a ninth as many of the validation split.
        seed: of data, splits and pairs.
    """
    summaries = {
        "full": "uniform random policy",
        "partial": "uniform random policy, only episodes inside [0, 1]",
        "expert": "optimal policy with Gaussian action noise of 0.1",
    }
    configs, preferences = [], []
    for variant in NAV1D_VARIANTS:
        splits = split_episodes(make_nav1d_dataset(variant, num_episodes=num_episodes, seed=seed), seed=seed)
        configs.append(DatasetConfig(variant, summaries[variant], splits))
        pairs = {
            name: make_preference_pairs(
                dataset, horizon=1, num_pairs=max(1, count), max_distance=_pair_distance(len(dataset)), seed=seed
            )
            for (name, dataset), count in zip(splits.items(), (num_pairs, num_pairs // 9), strict=True)
        }
        preferences.append(DatasetConfig(f"{variant}-preferences", f"pairs of actions: {summaries[variant]}", pairs))
    return [*configs, *preferences]


def nav1d_card_text(repo_id: str, command: str) -> DatasetCardText:
    """The text of the Nav1D datasets' card."""
    return DatasetCardText(
        title="Nav1D",
        description=(
            "Offline data of one-dimensional navigation (section 4.1 of arXiv:2502.12198): eight steps "
            "s' = clip(s + a / 2, -1, 1) with rewards around a fixed sequence of targets. An observation is the "
            "position, the time t / 8 and the next target."
        ),
        repo_id=repo_id,
        command=command,
        tags=["nav1d"],
        scores={
            "optimum": nav1d.optimal_return(),
            "optimum inside [0, 1]": nav1d.optimal_return(0.0, 1.0),
        },
    )


def _pair_distance(num_steps: int) -> float:
    """A neighbourhood of positions that holds some ten of the steps of one time."""
    return min(0.1, max(0.005, 10 * nav1d.HORIZON / num_steps))


def _write_shards(folder: Path, split: str, dataset: Dataset, rows_per_shard: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    count = -(-len(dataset) // rows_per_shard)
    for index in range(count):
        shard = dataset.select(range(index * rows_per_shard, min((index + 1) * rows_per_shard, len(dataset))))
        shard.to_parquet(folder / f"{split}-{index:05d}-of-{count:05d}.parquet")


def _card(configs: Sequence[DatasetConfig], text: DatasetCardText, statistics: Mapping[str, Any]) -> str:
    rows = [
        {
            "name": config.name,
            "summary": config.summary,
            "is_episodes": set(COLUMNS) <= set(next(iter(config.splits.values())).column_names),
            "splits": [_split_row(split, statistics[config.name][split]) for split in config.splits],
        }
        for config in configs
    ]
    values = {"metadata": cards.Verbatim(_metadata(configs, text)), "text": text, "configs": rows}
    return cards.render("dataset.md.jinja", values)


def _split_row(name: str, statistics: Mapping[str, Any]) -> dict[str, Any]:
    episodes = statistics.get("episodes")
    return {
        "name": name,
        "num_rows": statistics["num_rows"],
        "num_episodes": episodes["count"] if episodes else None,
        "return_mean": episodes["return"]["mean"] if episodes else None,
        "return_std": episodes["return"]["std"] if episodes else None,
    }


def _metadata(configs: Sequence[DatasetConfig], text: DatasetCardText) -> str:
    """The YAML header: where each split's files are, their features, and how many rows they hold."""
    card = DatasetCardData(
        license=text.license,
        pretty_name=text.title,
        task_categories=["reinforcement-learning", "robotics"],
        tags=["dmc_hub", "offline-rl", *text.tags],
        configs=[
            {
                "config_name": config.name,
                "data_files": [
                    {"split": split, "path": f"data/{config.name}/{split}-*.parquet"} for split in config.splits
                ],
                **({"default": True} if config is configs[0] else {}),
            }
            for config in configs
        ],
    )
    infos = DatasetInfosDict({config.name: _info(config) for config in configs})
    infos.to_dataset_card_data(card)
    return str(card.to_yaml())


def _info(config: DatasetConfig) -> datasets.DatasetInfo:
    splits = datasets.SplitDict()
    for name, dataset in config.splits.items():
        splits.add(datasets.SplitInfo(name, num_examples=len(dataset)))
    return datasets.DatasetInfo(features=next(iter(config.splits.values())).features, splits=splits)
