"""Data: episodes as flat arrays, and the datasets of the embedded task."""

from dmc_hub.data.episodes import Episodes, Windows, episode_features
from dmc_hub.data.nav1d import NAV1D_VARIANTS, make_nav1d_dataset, nav1d_behavior, nav1d_behavior_log_prob

__all__ = [
    "NAV1D_VARIANTS",
    "Episodes",
    "Windows",
    "episode_features",
    "make_nav1d_dataset",
    "nav1d_behavior",
    "nav1d_behavior_log_prob",
]
