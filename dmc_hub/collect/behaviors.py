"""Behaviours, and the episodes that one of them makes in an environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from tqdm.auto import tqdm

from dmc_hub.data import Episodes

Behavior = Callable[[np.random.Generator], Callable[[np.ndarray], np.ndarray]]
"""`generator -> (observation -> action)`: called once per episode; what is random in the episode comes from the
generator."""


@dataclass(frozen=True)
class Collected:
    """Episodes, and which of them succeeded at any step: bool `(num_episodes,)`, None where nobody says."""

    episodes: Episodes
    successes: np.ndarray | None

    def facts(self) -> dict[str, Any]:
        """Sizes, returns and success rate, JSON-ready."""
        returns = self.episodes.returns()
        return {
            "num_steps": self.episodes.num_steps,
            "num_episodes": self.episodes.num_episodes,
            "return_mean": float(returns.mean()),
            "return_std": float(returns.std()),
            "success_rate": None if self.successes is None else float(self.successes.mean()),
        }


def random_behavior(action_space: gymnasium.spaces.Box) -> Behavior:
    """Uniform actions."""

    def start(generator: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
        return lambda _: generator.uniform(action_space.low, action_space.high)

    return start


def run_behavior(
    env: gymnasium.Env[Any, Any],
    behavior: Behavior,
    *,
    seed: int,
    num_episodes: int | None = None,
    num_steps: int | None = None,
    max_episode_steps: int | None = None,
    progress: bool = False,
) -> Collected:
    """Run episodes one after the other; the same arguments give the same episodes.

    Args:
        env: of flat float32 observations.
        behavior: acts.
        seed: episode `i` takes its seed and its generator from `(seed, i)`.
        num_episodes: how many; or else
        num_steps: the episode that reaches this number of steps is cut there and is the last.
        max_episode_steps: longer episodes are cut.
        progress: whether to show a bar.

    Raises:
        ValueError: not exactly one of `num_episodes` and `num_steps`, or one that is not positive.
    """
    if (num_episodes is None) == (num_steps is None) or (num_episodes or num_steps or 0) < 1:
        raise ValueError(
            f"Exactly one of `num_episodes` and `num_steps` must be given, at least 1; got {num_episodes} and "
            f"{num_steps}."
        )
    recorder = Recorder(env)
    successes: list[bool | None] = []
    total, unit = (num_episodes, "episode") if num_steps is None else (num_steps, "step")
    with tqdm(total=total, unit=unit, desc="collecting", disable=not progress) as bar:
        while num_steps is None or recorder.num_steps < num_steps:
            if num_episodes is not None and len(successes) == num_episodes:
                break
            rooms = [max_episode_steps, None if num_steps is None else num_steps - recorder.num_steps]
            room = min((room for room in rooms if room is not None), default=None)
            generator = np.random.default_rng([seed, len(successes)])
            length, success = _run_episode(recorder, behavior(generator), generator, room)
            successes.append(success)
            bar.update(1 if num_steps is None else length)
    known = [success for success in successes if success is not None]
    return Collected(recorder.episodes(), np.array(known) if len(known) == len(successes) else None)


class Recorder(gymnasium.Wrapper[np.ndarray, np.ndarray, Any, Any]):
    """Keeps every step of an environment of flat observations; an episode that is left early counts as cut."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self._steps: list[tuple[np.ndarray, np.ndarray, float, np.ndarray, bool, bool]] = []
        self._ends: list[int] = []
        self._observation: Any = None

    @property
    def num_steps(self) -> int:
        """Steps recorded so far."""
        return len(self._steps)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        self._close_episode()
        self._observation, info = self.env.reset(seed=seed, options=options)
        return self._observation, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Act for one step and keep it."""
        action = np.asarray(action, dtype=np.float32)
        observation, reward, terminated, truncated, info = self.env.step(action)
        before, self._observation = self._observation, observation
        self._steps.append((before, action, float(reward), observation, bool(terminated), bool(truncated)))
        return observation, reward, bool(terminated), bool(truncated), info

    def returns(self) -> np.ndarray:
        """Returns of the episodes that are over, float64."""
        self._close_finished()
        rewards = np.array([step[2] for step in self._steps[: self._ends[-1] if self._ends else 0]])
        return np.add.reduceat(rewards, [0, *self._ends[:-1]]) if self._ends else np.zeros(0)

    def episodes(self, num_steps: int | None = None) -> Episodes:
        """The first `num_steps` steps, all by default.

        Raises:
            ValueError: nothing was recorded.
        """
        self._close_episode()
        count = len(self._steps) if num_steps is None else num_steps
        if count < 1:
            raise ValueError("`num_steps`: no step was recorded yet.")
        columns = [np.asarray(part) for part in zip(*self._steps[:count], strict=True)]
        observations, actions, rewards, next_observations, terminations, truncations = columns
        ends = np.array([*(end for end in self._ends if end < count), count], dtype=np.int64)
        truncations = truncations.astype(bool)
        truncations[ends - 1] |= ~terminations.astype(bool)[ends - 1]
        return Episodes(
            observations=observations.astype(np.float32),
            actions=actions.astype(np.float32),
            rewards=rewards.astype(np.float32),
            next_observations=next_observations.astype(np.float32),
            terminations=terminations.astype(bool),
            truncations=truncations,
            episode_ends=ends,
        )

    def _close_episode(self) -> None:
        if len(self._steps) > (self._ends[-1] if self._ends else 0):
            self._ends.append(len(self._steps))

    def _close_finished(self) -> None:
        if self._steps and (self._steps[-1][4] or self._steps[-1][5]):
            self._close_episode()


def _run_episode(
    env: gymnasium.Env[Any, Any],
    act: Callable[[np.ndarray], np.ndarray],
    generator: np.random.Generator,
    max_steps: int | None,
) -> tuple[int, bool | None]:
    """Its length, and whether it succeeded at any step."""
    observation, _ = env.reset(seed=int(generator.integers(2**31)))
    space: Any = env.action_space
    length, over, success = 0, False, None
    while not over and length != max_steps:
        action = np.clip(act(observation), space.low, space.high)
        observation, _, terminated, truncated, info = env.step(action)
        length, over = length + 1, terminated or truncated
        told = info.get("success", info.get("is_success"))
        success = success if told is None else bool(told) or bool(success)
    return length, success
