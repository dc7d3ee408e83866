"""Data: episodes as flat arrays, readers of others' formats, the embedded task's datasets, preference pairs, and
datasets that travel."""

from dmc_hub.data.conversion import convert
from dmc_hub.data.episodes import Episodes, Windows, episode_features
from dmc_hub.data.loading import load_episodes, open_dataset
from dmc_hub.data.nav1d import NAV1D_VARIANTS, make_nav1d_dataset, nav1d_behavior, nav1d_behavior_log_prob
from dmc_hub.data.preferences import make_preference_pairs, preference_features
from dmc_hub.data.publishing import (
    DatasetCardText,
    DatasetConfig,
    push_dataset,
    save_dataset,
    split_episodes,
)
from dmc_hub.data.readers import READERS, EpisodeSource, open_source, record_episodes
from dmc_hub.data.statistics import dataset_statistics
from dmc_hub.data.validation import DEFECTS, DatasetDefectsError, Defect, refuse_defects, validate_dataset

__all__ = [
    "DEFECTS",
    "NAV1D_VARIANTS",
    "READERS",
    "DatasetCardText",
    "DatasetConfig",
    "DatasetDefectsError",
    "Defect",
    "EpisodeSource",
    "Episodes",
    "Windows",
    "convert",
    "dataset_statistics",
    "episode_features",
    "load_episodes",
    "make_nav1d_dataset",
    "make_preference_pairs",
    "nav1d_behavior",
    "nav1d_behavior_log_prob",
    "open_dataset",
    "open_source",
    "preference_features",
    "push_dataset",
    "record_episodes",
    "refuse_defects",
    "save_dataset",
    "split_episodes",
    "validate_dataset",
]
