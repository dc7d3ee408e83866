"""MetaWorld's scripted experts, made worse by degrees: offline RL needs good and bad episodes of one task."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from dmc_hub.collect.behaviors import Behavior
from dmc_hub.envs.extras import require

NOISE_LEVELS = (0.0, 0.2, 0.5)
RANDOM_SHARES = (0.0, 0.3, 0.6, 0.9)
MISSING_PROBABILITY, MISSING_DISTANCE = 0.35, 0.12
SEGMENT_STEPS = 20


@dataclass(frozen=True)
class Grade:
    """How an episode's expert is made worse.

    Noise alone does not do it: with a standard deviation of 0.5 the experts still always succeed.

    Attributes:
        noise: standard deviation of Gaussian noise on its actions.
        random_share: probability that a segment of 20 steps is one random action, held.
        offset: error, in metres, of where it sees the object and the goal, of shape `(3,)`.
    """

    noise: float
    random_share: float
    offset: np.ndarray

    @classmethod
    def draw(cls, generator: np.random.Generator) -> Grade:
        """A grade at random: a third of the episodes misses its object by about 12 cm."""
        noise, share = float(generator.choice(NOISE_LEVELS)), float(generator.choice(RANDOM_SHARES))
        direction = generator.normal(size=3) * (1.0, 1.0, 0.3)
        misses = generator.random() < MISSING_PROBABILITY
        return cls(noise, share, direction / np.linalg.norm(direction) * (MISSING_DISTANCE if misses else 0.0))


def scripted_behavior(name: str, draw_grade: Callable[[np.random.Generator], Grade] = Grade.draw) -> Behavior:
    """MetaWorld's scripted expert of a task, in every episode of another grade.

    Args:
        name: MetaWorld's name of the task without its version.
        draw_grade: `generator -> Grade`.

    Raises:
        ImportError: metaworld is not installed.
        ValueError: MetaWorld has no expert of this task.
    """
    experts = require("metaworld.policies", "robotics").ENV_POLICY_MAP
    if f"{name}-v3" not in experts:
        raise ValueError(f"`name` {name!r}: MetaWorld has no scripted expert of that task.")

    def start(generator: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
        return _GradedExpert(experts[f"{name}-v3"](), draw_grade(generator), generator)

    return start


class _GradedExpert:
    def __init__(self, expert: Any, grade: Grade, generator: np.random.Generator) -> None:
        self.expert, self.grade, self.generator = expert, grade, generator
        self._step = 0
        self._held: np.ndarray | None = None

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        if self._step % SEGMENT_STEPS == 0:
            is_random = self.generator.random() < self.grade.random_share
            self._held = self.generator.uniform(-1.0, 1.0, 4) if is_random else None
        self._step += 1
        if self._held is not None:
            return self._held
        seen = observation.astype(np.float64)
        seen[4:7] += self.grade.offset
        seen[36:39] += self.grade.offset
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Environments clip response to [-1, 1]": they do
            action = self.expert.get_action(seen)
        return cast(np.ndarray, np.clip(action, -1.0, 1.0) + self.grade.noise * self.generator.normal(size=4))
