"""Data: episodes as flat arrays, the datasets of the embedded task, preference pairs, and datasets that travel."""

from dmc_hub.data.episodes import Episodes, Windows, episode_features
from dmc_hub.data.nav1d import NAV1D_VARIANTS, make_nav1d_dataset, nav1d_behavior, nav1d_behavior_log_prob
from dmc_hub.data.preferences import make_preference_pairs, preference_features
from dmc_hub.data.publishing import (
    DatasetCardText,
    DatasetConfig,
    dataset_statistics,
    load_episodes,
    push_dataset,
    save_dataset,
    split_episodes,
)

__all__ = [
    "NAV1D_VARIANTS",
    "DatasetCardText",
    "DatasetConfig",
    "Episodes",
    "Windows",
    "dataset_statistics",
    "episode_features",
    "load_episodes",
    "make_nav1d_dataset",
    "make_preference_pairs",
    "nav1d_behavior",
    "nav1d_behavior_log_prob",
    "preference_features",
    "push_dataset",
    "save_dataset",
    "split_episodes",
]
