"""Episodes of any gymnasium environment under a policy, as a source that is recorded while it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import gymnasium
import numpy as np

from dmc_hub.data.episodes import Episodes
from dmc_hub.data.readers.source import Contents, EpisodeSource, make_episode


@dataclass(frozen=True, kw_only=True)
class RecordedSource(EpisodeSource):
    """Episodes of an environment; what is read again is recorded again, the same for the same seed.

    make_env: makes the environment: actions a Box, observations what `gymnasium.spaces.flatten` makes a vector.
    policy: of an observation, float32 of shape `(observation_dim,)`, and the episode's generator; returns an action.
    episodes_to_record: how many at most.
    steps_to_record: the episode that reaches so many steps is cut there and the last; None: no such limit.
    seed: episode i is reset with `seed + i`, and its generator is of `[seed, i]`.
    """

    format: ClassVar[str] = "gymnasium"
    make_env: Callable[[], gymnasium.Env[Any, Any]]
    policy: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    episodes_to_record: int | None
    steps_to_record: int | None
    seed: int
    path: None = None

    @cached_property
    def contents(self) -> Contents:
        env = self.make_env()
        try:
            if not isinstance(env.action_space, gymnasium.spaces.Box):
                raise ValueError(f"`make_env` has the actions {env.action_space}; only a Box is supported.")
            width = gymnasium.spaces.flatdim(env.observation_space)
            return Contents(
                observation_dim=width,
                action_dim=int(np.prod(env.action_space.shape)),
                keys={},
                arrays={"observation_space": str(env.observation_space), "action_space": str(env.action_space)},
                num_steps=self.steps_to_record if self.episodes_to_record is None else None,
                num_episodes=self.episodes_to_record if self.steps_to_record is None else None,
            )
        finally:
            env.close()

    def episodes(self) -> Iterator[Episodes]:
        env = self.make_env()
        try:
            index = num_steps = 0
            while index != self.episodes_to_record and num_steps != self.steps_to_record:
                left = None if self.steps_to_record is None else self.steps_to_record - num_steps
                episode = self._record(env, index, left)
                yield episode
                index, num_steps = index + 1, num_steps + episode.num_steps
        finally:
            env.close()

    def _record(self, env: gymnasium.Env[Any, Any], index: int, max_steps: int | None) -> Episodes:
        generator = np.random.default_rng([self.seed, index])
        space = env.observation_space
        observation, _ = env.reset(seed=self.seed + index)
        observations, actions = [_flat(space, observation)], []
        rewards: list[float] = []
        terminated = truncated = False
        while not terminated and not truncated and len(rewards) != max_steps:
            action = np.asarray(self.policy(observations[-1], generator))
            if action.shape != env.action_space.shape:
                raise ValueError(
                    f"`policy` returned the shape {action.shape} at episode {index}, step {len(rewards)}; "
                    f"{env.action_space.shape} is due."
                )
            observation, reward, terminated, truncated, _ = env.step(action.astype(env.action_space.dtype))
            observations.append(_flat(space, observation))
            actions.append(action)
            rewards.append(float(reward))
        states = np.stack(observations)
        return make_episode(
            states[:-1],
            np.stack(actions),
            np.array(rewards),
            states[1:],
            terminated=bool(terminated),
            truncated=bool(truncated) or not terminated,
        )


def record_episodes(
    make_env: Callable[[], gymnasium.Env[Any, Any]],
    policy: Callable[[np.ndarray, np.random.Generator], np.ndarray],
    *,
    num_episodes: int | None = None,
    num_steps: int | None = None,
    seed: int,
) -> EpisodeSource:
    """A source of the episodes of a policy in an environment, for `convert`; nothing runs before it is read.

    Args:
        make_env: makes a gymnasium environment whose actions are a Box.
        policy: `(observation, generator) -> action`, of one observation, flattened to float32 of shape
            `(observation_dim,)`; its randomness is the generator's.
        num_episodes: how many at most.
        num_steps: the episode that reaches so many steps is cut there and is the last.
        seed: of environment and generators; the same seed gives the same episodes.

    Raises:
        ValueError: neither or a non-positive limit.
    """
    limits = [limit for limit in (num_episodes, num_steps) if limit is not None]
    if not limits or min(limits) < 1:
        raise ValueError(f"Give `num_episodes` or `num_steps`, at least 1; got {num_episodes} and {num_steps}.")
    return RecordedSource(
        make_env=make_env, policy=policy, episodes_to_record=num_episodes, steps_to_record=num_steps, seed=seed
    )


def _flat(space: gymnasium.Space[Any], observation: Any) -> np.ndarray:
    return np.asarray(gymnasium.spaces.flatten(space, observation), dtype=np.float32)
