"""What a task is: one record, of the built-in tasks and of a user's own alike."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from dmc_hub.data import Episodes, load_episodes
from dmc_hub.data.readers import detect_format
from dmc_hub.envs.workers import RestartingVectorEnv

if TYPE_CHECKING:
    from dmc_hub.rollout import Rollouts


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        name: its id on the command line.
        summary: one line on what it is.
        env_id: what the environment is called in its library, for cards.
        make_env: `() -> gymnasium.Env`, of flat float32 observations and actions in a bounded box (of images: a
            `gymnasium.spaces.Dict` with "state" and "image"); `reset(seed=...)` fixes the episode. An environment that
            knows success says it in `info["success"]` of every step.
        make_render_env: `() -> gymnasium.Env`, the same environment whose `render` gives a frame for pictures and
            videos, uint8 `(height, width, 3)`.
        make_vector: `num_envs -> VectorEnv`, where one faster than gymnasium's `SyncVectorEnv` exists.
        max_num_envs: environments side by side at most, for their memory.
        extras: extras of this package that the environment needs.
        max_episode_steps: steps after which an episode is truncated.
        observation_dim: width of the observations; None for images.
        state_dim: of images: width of the state beside them, the first numbers of the data's observations.
        cameras: of images: by name in the environment, the array of the data that holds its images.
        action_dim: width of the actions.
        reward: what the environment's reward is, in words.
        success: when an episode counts as a success: at "any step", at its "last step", or not defined.
        score: `Rollouts -> scores (num_episodes,)` on the scale of the published tables.
        score_name: what that score is.
        expert_score: the score of an expert, such as D4RL's 100.
        objective: what counts in alignment and reports: an episode's "return", or its "score", where more return is not
            better (an environment that ends with success).
        reader: name of the format that people have data of this task in; see `dmc_hub.data.readers`.
        reader_options: what its reader needs to know.
        data_hint: where that data comes from or how it is made, for error messages.
        behavior: what `dmc-hub data collect` runs by default: "random", "scripted", or a quality of D4RL.
        make_dataset: `seed -> datasets.Dataset` with the columns of `Episodes`, where data can be made on the spot.
        optimal_return: highest expected return, where it is known.
        dynamics: `(observations, actions) -> planned next states`, for the coherency of planners (Eq. 15).
        behavior_log_prob: `(observations, actions) -> log-density` of the policy that made the data, for the coherency
            of policies (Eq. 16).
        allowed_defects: kinds of `dmc_hub.data.DEFECTS` that are no reason to refuse its data. Simulators' observations
            often have entries that never change.
        controllers: kinds of controller that make sense for the task.
        horizon: steps of a planner's window; `policy_horizon` those of a policy's action sequence.
        num_observation_steps: observations that a policy sees.
        num_action_steps: actions executed before the next decision.
        discount: of the critic; likewise its `expectile`, as published for IQL (arXiv:2110.06169, appendix B).
    """

    name: str
    summary: str
    env_id: str
    make_env: Callable[[], gymnasium.Env[Any, Any]]
    max_episode_steps: int
    observation_dim: int | None
    action_dim: int
    make_render_env: Callable[[], gymnasium.Env[Any, Any]] | None = None
    make_vector: Callable[[int], VectorEnv[Any, Any, Any]] | None = None
    max_num_envs: int = 128
    extras: tuple[str, ...] = ()
    reward: str = ""
    success: Literal["any step", "last step"] | None = None
    score: Callable[[Rollouts], np.ndarray] | None = None
    score_name: str | None = None
    expert_score: float = 1.0
    objective: Literal["return", "score"] = "return"
    reader: str | None = None
    reader_options: Mapping[str, Any] = field(default_factory=dict)
    data_hint: str = ""
    behavior: str = "random"
    make_dataset: Callable[[int], datasets.Dataset] | None = None
    optimal_return: Callable[[], float] | None = None
    dynamics: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    behavior_log_prob: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    allowed_defects: tuple[str, ...] = ("constant-dimension",)
    state_dim: int | None = None
    cameras: Mapping[str, str] = field(default_factory=dict)
    controllers: tuple[str, ...] = ("planner", "decision_diffuser", "policy")
    horizon: int = 32
    policy_horizon: int = 16
    num_observation_steps: int = 1
    num_action_steps: int = 1
    discount: float = 0.99
    expectile: float = 0.7

    def episodes(self, seed: int, sources: Sequence[str] = ()) -> Episodes:
        """The task's data.

        Args:
            seed: of data that is made on the spot.
            sources: files, folders or repos, see `load_episodes`, read one after the other; a name that ends with
                `[:N]` stands for its first N steps.

        Raises:
            ValueError: no source for a task without data of its own, or data whose widths are not the task's.
        """
        if not sources:
            return Episodes.from_dataset(self.dataset(seed))
        parts = [self._read(source) for source in sources]
        episodes = parts[0] if len(parts) == 1 else Episodes.concatenate(*parts)
        expected = {"observations": self.observation_dim or self.state_dim, "actions": self.action_dim}
        for name, width in {"observations": episodes.observation_dim, "actions": episodes.action_dim}.items():
            if expected[name] not in (None, width):
                raise ValueError(
                    f"`data` {', '.join(sources)} has {name} of width {width}; those of {self.name!r} have "
                    f"{expected[name]}."
                )
        return episodes

    def options_for(self, source: str) -> dict[str, Any]:
        """What the reader of a file or folder needs to know; nothing for one that is not in the task's own format."""
        path = Path(source)
        return dict(self.reader_options) if path.exists() and detect_format(path) == self.reader else {}

    def _read(self, source: str) -> Episodes:
        sliced = re.fullmatch(r"(.+)\[:(\d+)\]", source)
        path, max_steps = (sliced[1], int(sliced[2])) if sliced else (source, None)
        episodes = load_episodes(path, **self.options_for(path))
        if self.cameras:
            episodes = self._seen(source, episodes)
        return episodes if max_steps is None else episodes.first(max_steps)

    def _seen(self, source: str, episodes: Episodes) -> Episodes:
        """What an image policy sees of the data: the state and the cameras, under their names in the environment."""
        known = episodes.images
        keys = {name: key if key in known else name for name, key in self.cameras.items()}
        if missing := [self.cameras[name] for name, key in keys.items() if key not in known]:
            raise ValueError(f"`data` {source} has no images {', '.join(missing)}: {self.name!r} needs them.")
        return dataclasses.replace(
            episodes,
            observations=episodes.observations[:, : self.state_dim],
            next_observations=episodes.next_observations[:, : self.state_dim],
            images={name: known[key] for name, key in keys.items()},
        )

    def normalized_scores(self, returns: np.ndarray, scores: np.ndarray | None) -> np.ndarray | None:
        """Results of episodes on a scale that tasks share: 1 is an expert's score or, without a score, the optimum.

        Args:
            returns: of shape `(num_episodes,)`.
            scores: what `score` gives, likewise; None where the task has none.

        Returns:
            Float64 of shape `(num_episodes,)`; None where neither expert nor optimum is known.
        """
        if scores is not None:
            return np.asarray(scores, dtype=np.float64) / self.expert_score
        return None if self.optimal_return is None else np.asarray(returns, dtype=np.float64) / self.optimal_return()

    def dataset(self, seed: int) -> datasets.Dataset:
        """Data made on the spot.

        Raises:
            ValueError: this task's data has to come from elsewhere; the message says where.
        """
        if self.make_dataset is None:
            hint = self.data_hint or f"`dmc-hub data collect --task {self.name}` makes episodes of a random policy."
            raise ValueError(f"`task` {self.name!r} has no data of its own: {hint}")
        return self.make_dataset(seed)


def num_side_by_side(task: Task, num_episodes: int, num_workers: int = 0) -> int:
    """How many environments run so many episodes: one per worker, else as many as the task allows in one process."""
    if num_workers < 0:
        raise ValueError(f"`num_workers` must not be negative, got {num_workers}.")
    return min(num_episodes, num_workers or task.max_num_envs)


def make_vector_env(
    task: Task, num_envs: int, *, num_workers: int = 0, worker_timeout: float = 60.0
) -> VectorEnv[Any, Any, Any]:
    """The task's environments side by side, `num_side_by_side` of them, with autoreset NEXT_STEP.

    Args:
        task: whose environments.
        num_envs: how many are asked for.
        num_workers: processes that run one environment each and are restarted if they fail; 0 runs all in this one.
        worker_timeout: seconds that a worker has for one step.

    Raises:
        ImportError: the environment's extra is not installed.
        ValueError: `num_envs` is not positive, `num_workers` is negative, or `worker_timeout` is not positive.
    """
    if num_envs < 1:
        raise ValueError(f"`num_envs` must be at least 1, got {num_envs}.")
    count = num_side_by_side(task, num_envs, num_workers)
    if num_workers:
        return RestartingVectorEnv([task.make_env] * count, timeout=worker_timeout)
    if task.make_vector is not None:
        return task.make_vector(count)
    return SyncVectorEnv([task.make_env] * count, autoreset_mode=AutoresetMode.NEXT_STEP)


def action_bounds(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action of the task's environment, each of shape `(action_dim,)`.

    Raises:
        ImportError: the environment's extra is not installed.
    """
    env = task.make_env()
    try:
        space = env.action_space
        assert isinstance(space, gymnasium.spaces.Box)
        return space.low, space.high
    finally:
        env.close()


def describe_task(task: Task) -> dict[str, Any]:
    """What goes to the Hub with a pipeline: the task's name, its environment, and the spaces of that, JSON-ready."""
    env = task.make_env()
    try:
        spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
        described = {name: _describe_space(space) for name, space in spaces.items()}
    finally:
        env.close()
    return {"task": task.name, "environment": task.env_id, **described}


def _describe_space(space: Any) -> dict[str, Any]:
    if isinstance(space, gymnasium.spaces.Dict):
        return {name: _describe_space(part) for name, part in space.items()}
    described = {"shape": list(space.shape), "dtype": str(space.dtype)}
    if len(space.shape) > 1:  # an image: its bounds say nothing that its type does not
        return described
    return {**described, "low": _bounds(space.low), "high": _bounds(space.high)}


def _bounds(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values.flatten()]
