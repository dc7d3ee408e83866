"""Make data: run behaviours in a task's environment, scripted, random, or trained by reinforcement learning."""

from dmc_hub.collect.behaviors import Behavior, Collected, random_behavior, run_behavior
from dmc_hub.collect.recipes import BEHAVIORS, CollectionSettings, collect, save_collected

__all__ = [
    "BEHAVIORS",
    "Behavior",
    "Collected",
    "CollectionSettings",
    "collect",
    "random_behavior",
    "run_behavior",
    "save_collected",
]
