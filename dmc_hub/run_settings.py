"""What a whole run depends on, and what every part of one says of itself."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from typing import Any

import torch

from dmc_hub.tasks import get_task
from dmc_hub.version import __version__

VALIDATION_SEED, EVALUATION_SEED, COLLECTION_SEED = 1_000_000, 2_000_000, 3_000_000


@dataclass(frozen=True)
class OnlineSettings:
    """What a run collects between its stages; see `OnlineConfig`.

    Attributes:
        num_episodes: episodes of each collection; likewise `buffer_size`, `num_candidates` and `action_selection`.
        critic_steps: steps of the critic after each, before `training_scale`.
        num_workers: processes that run the environments; 0 runs them in this one.
        worker_timeout: seconds that a worker has for one step.
    """

    num_episodes: int
    buffer_size: int
    num_candidates: int
    action_selection: str
    critic_steps: int
    num_workers: int
    worker_timeout: float


@dataclass(frozen=True)
class RunSettings:
    """What a run's results depend on; an interrupted run continues only under the same settings.

    Attributes:
        task: id of the task.
        data: sources of its data, see `Task.episodes`; none for data that is made on the spot.
        controller: one of `presets.CONTROLLERS`.
        sampler: one of `presets.SAMPLERS`.
        seed: of data, networks and training.
        methods: alignment methods of one pass.
        max_passes: passes through them at most.
        min_gain: a pass that raises the validated return by a smaller share is the last.
        validations_per_stage: see `AlignmentConfig`; likewise `num_retries`, `max_coherency_drop`, `max_divergence` and
            `min_diversity`.
        num_upsampling_passes: passes through an up-sampler that is trained after alignment; 0 trains none.
        num_candidates: candidates per decision in the evaluation.
        num_validation_episodes: episodes after each stage.
        num_evaluation_episodes: episodes of the reported figures.
        training_scale: factor on all numbers of training steps; below 1 for a quick look.
        foundation: folder or repo of a trained pipeline with its critic to start from; None trains one.
        online: what is collected between stages; None aligns on the task's data alone.
    """

    task: str
    controller: str
    sampler: str
    seed: int
    methods: tuple[str, ...]
    max_passes: int
    min_gain: float
    validations_per_stage: int
    num_retries: int
    max_coherency_drop: float
    num_candidates: int
    num_validation_episodes: int
    num_evaluation_episodes: int
    training_scale: float
    data: tuple[str, ...] = ()
    foundation: str | None = None
    max_divergence: float | None = None
    min_diversity: float | None = None
    num_upsampling_passes: int = 0
    online: OnlineSettings | None = None

    def scaled(self, max_steps: int) -> int:
        """Training steps at this run's scale, at least 1."""
        return max(1, round(max_steps * self.training_scale))


def run_environment() -> dict[str, str]:
    """What figures were measured with: `machine`, and the `version` of this library."""
    return {
        "machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__}, {platform.machine()}",
        "version": __version__,
    }


def run_facts(settings: RunSettings) -> dict[str, Any]:
    """What the manifests of a run's folders say of it."""
    return {"task": get_task(settings.task).name, "controller": settings.controller, "seed": settings.seed}


def say(message: str) -> None:
    """Tell the user how far a run is."""
    print(f"· {message}", file=sys.stderr, flush=True)  # noqa: T201
