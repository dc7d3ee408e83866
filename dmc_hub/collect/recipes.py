"""What `dmc-hub data collect` does: the behaviour that makes a task's data, and the folder it goes to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmc_hub import checkpoint
from dmc_hub.collect.behaviors import Behavior, Collected, random_behavior, run_behavior
from dmc_hub.collect.experts import ALGORITHMS, replay_episodes, train_experts, trained_behavior
from dmc_hub.collect.scripted import scripted_behavior
from dmc_hub.data import Episodes
from dmc_hub.tasks import Task

BEHAVIORS = ("random", "scripted", "medium", "medium-replay", "medium-expert", "expert")
TRAINED = ("medium", "medium-replay", "medium-expert", "expert")


@dataclass(frozen=True, kw_only=True)
class CollectionSettings:
    """What is collected.

    Attributes:
        behavior: one of `BEHAVIORS`.
        num_episodes: how many; or else `num_steps`. Of "medium-replay" the newest ones, all without either.
        seed: of behaviour, environment and training.
        algorithm: "ppo" or "sac", of what is trained; likewise `training_steps` and `training_dir`, the folder of the
            training run, which all qualities of an environment share.
    """

    behavior: str
    num_episodes: int | None = None
    num_steps: int | None = None
    seed: int = 0
    algorithm: str = "ppo"
    training_steps: int = 1_000_000
    training_dir: Path | None = None

    def __post_init__(self) -> None:
        for name, choices in (("behavior", BEHAVIORS), ("algorithm", ALGORITHMS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}; got {getattr(self, name)!r}.")
        for name in ("num_episodes", "num_steps", "training_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.num_episodes is not None and self.num_steps is not None:
            raise ValueError("`num_episodes` and `num_steps` exclude each other: give one of them.")
        if self.seed < 0:
            raise ValueError(f"`seed` must not be negative, got {self.seed}.")
        if self.behavior in TRAINED and self.training_dir is None:
            raise ValueError(f"`training_dir` is missing: `behavior` {self.behavior!r} trains a policy, kept there.")


def collect(task: Task, settings: CollectionSettings) -> Collected:
    """Make episodes of a task.

    Raises:
        ImportError: an extra is not installed.
        ValueError: the task has images, or no behaviour of that name.
    """
    if task.observation_dim is None:
        raise ValueError(f"`task` {task.name!r} has images: collect episodes of its low-dimensional counterpart.")
    if settings.behavior in TRAINED:
        return _collect_trained(task, settings)
    if settings.behavior == "scripted":
        if not task.name.startswith("metaworld-"):
            raise ValueError(f"`behavior` scripted: only MetaWorld's tasks have scripted experts, not {task.name!r}.")
        return _run(task, scripted_behavior(task.name.removeprefix("metaworld-")), settings, settings.seed)
    env = task.make_env()
    space: Any = env.action_space
    env.close()
    return _run(task, random_behavior(space), settings, settings.seed)


def save_collected(task: Task, settings: CollectionSettings, collected: Collected, folder: Path) -> dict[str, Any]:
    """Write the episodes as a folder that `datasets.load_from_disk` reads, with a manifest that holds the facts."""
    facts = {
        "task": task.name,
        "environment": task.env_id,
        "behavior": settings.behavior,
        "seed": settings.seed,
        **(
            {"algorithm": settings.algorithm, "training_steps": settings.training_steps}
            if _is_trained(settings)
            else {}
        ),
        "origin": "collected with dmc_hub; not the published set of that name",
        **collected.facts(),
    }
    with checkpoint.write_folder_atomically(folder, facts) as stage:
        collected.episodes.to_dataset().save_to_disk(str(stage))
    return facts


def _is_trained(settings: CollectionSettings) -> bool:
    return settings.behavior in TRAINED


def _collect_trained(task: Task, settings: CollectionSettings) -> Collected:
    folder = settings.training_dir
    assert folder is not None
    options = {"algorithm": settings.algorithm, "training_steps": settings.training_steps, "seed": settings.seed}
    with torch.random.fork_rng(devices=[]):
        train_experts(task, folder, **options)  # type: ignore[arg-type]
        if settings.behavior == "medium-replay":
            return Collected(_newest(replay_episodes(folder), settings), None)
        qualities = ("medium", "expert") if settings.behavior == "medium-expert" else (settings.behavior,)
        parts = []
        for number, quality in enumerate(qualities):
            behavior = trained_behavior(task, folder, quality, algorithm=settings.algorithm)
            parts.append(_run(task, behavior, settings, settings.seed + number, share=1 / len(qualities)))
    successes = [part.successes for part in parts if part.successes is not None]
    return Collected(
        Episodes.concatenate(*(part.episodes for part in parts)),
        np.concatenate(successes) if len(successes) == len(parts) else None,
    )


def _newest(episodes: Episodes, settings: CollectionSettings) -> Episodes:
    if settings.num_steps is not None:
        return episodes.newest(settings.num_steps)
    if settings.num_episodes is not None:
        return episodes.select(np.arange(max(0, episodes.num_episodes - settings.num_episodes), episodes.num_episodes))
    return episodes


def _run(task: Task, behavior: Behavior, settings: CollectionSettings, seed: int, share: float = 1.0) -> Collected:
    env = task.make_env()
    steps, episodes = settings.num_steps, settings.num_episodes
    if steps is None and episodes is None:
        raise ValueError("`num_episodes` or `num_steps` must be given: how much to collect.")
    try:
        return run_behavior(
            env,
            behavior,
            seed=seed,
            num_episodes=None if episodes is None else max(1, round(share * episodes)),
            num_steps=None if steps is None else max(1, round(share * steps)),
            progress=True,
        )
    finally:
        env.close()
