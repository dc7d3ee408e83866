"""Embedded environments. Importing this package registers them with gymnasium."""

from __future__ import annotations

import gymnasium as gym

NAV1D_ID = "dmc_hub/Nav1D-v0"


def register_environments() -> None:
    """Register `dmc_hub/Nav1D-v0` with gymnasium; calling it again changes nothing.

    The entry points are strings, so the environment's module is loaded by the first `gym.make`.
    """
    if NAV1D_ID in gym.registry:
        return
    gym.register(
        id=NAV1D_ID,
        entry_point="dmc_hub.envs.nav1d:Nav1DEnv",
        vector_entry_point="dmc_hub.envs.nav1d:Nav1DVectorEnv",
    )


register_environments()
