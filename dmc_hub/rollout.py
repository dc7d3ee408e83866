"""Run a controller in vectorised environments, exactly one episode per seed."""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Space
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from tqdm.auto import tqdm

from dmc_hub.data import Episodes
from dmc_hub.envs.workers import WORKER_FAILURE
from dmc_hub.errors import EnvironmentFailedError

NUM_REPETITIONS = 2
STATE = "state"
Controller = Callable[[Any, torch.Generator | None], np.ndarray]
"""Maps the observations of all environments, an array or a mapping, and a generator to actions."""


@dataclass(frozen=True)
class Rollouts:
    """Episodes of different lengths padded with zeros to the longest one.

    seeds: int64 of shape `(num_episodes,)`.
    returns: undiscounted returns, float64 of shape `(num_episodes,)`.
    lengths: int64 of shape `(num_episodes,)`.
    observations: float32 of shape `(num_episodes, max_length, observation_dim)`.
    actions: float32 of shape `(num_episodes, max_length, action_dim)`.
    rewards: float32 of shape `(num_episodes, max_length)`.
    next_observations: as `observations`.
    terminations: bool of shape `(num_episodes, max_length)`.
    truncations: bool of shape `(num_episodes, max_length)`.
    valid: bool of shape `(num_episodes, max_length)`, false in the padding.
    failed_seeds: int64 of shape `(num_failed,)`, seeds of the episodes that were given up: they are in no other field.
    visited: bool of shape `(num_calls, num_envs)`, whose answers of each call of the controller are in `actions`.
    successes: bool of shape `(num_episodes, max_length)`, what `info["success"]` (or `info["is_success"]`) said of each
        step; None where the environment never said it.
    images: by camera, if they were recorded, uint8 of shape `(num_valid_steps, height, width, channels)`, one episode
        after the other.
    """

    seeds: np.ndarray
    returns: np.ndarray
    lengths: np.ndarray
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    valid: np.ndarray
    failed_seeds: np.ndarray
    visited: np.ndarray
    successes: np.ndarray | None = None
    images: Mapping[str, np.ndarray] = field(default_factory=dict)

    def paths(self) -> np.ndarray:
        """All observations of every episode, the last one included: `(num_episodes, max_length + 1, dim)`."""
        return np.concatenate([self.observations[:, :1], self.next_observations], axis=1)

    def max_rewards(self) -> np.ndarray:
        """Highest reward of every episode, float32 of shape `(num_episodes,)`."""
        return cast(np.ndarray, np.where(self.valid, self.rewards, -np.inf).max(axis=1))

    def succeeded(self, when: str) -> np.ndarray:
        """Which episodes succeeded, bool of shape `(num_episodes,)`.

        Args:
            when: at "any step", or at the "last step".

        Raises:
            ValueError: another `when`, or an environment that does not say what success is.
        """
        if when not in ("any step", "last step"):
            raise ValueError(f"`when` must be 'any step' or 'last step', got {when!r}.")
        if self.successes is None:
            raise ValueError("`success` is not known: the environment's `info` has neither 'success' nor 'is_success'.")
        if when == "any step":
            return np.asarray(self.successes.any(axis=1))
        return cast(np.ndarray, self.successes[np.arange(len(self.lengths)), self.lengths - 1])

    def to_episodes(self) -> Episodes:
        """The valid steps as flat episodes, for training or for a dataset."""
        return Episodes(
            observations=self.observations[self.valid],
            actions=self.actions[self.valid],
            rewards=self.rewards[self.valid],
            next_observations=self.next_observations[self.valid],
            terminations=self.terminations[self.valid],
            truncations=self.truncations[self.valid],
            episode_ends=np.cumsum(self.lengths),
            images=self.images,
        )


class _Step(NamedTuple):
    """One step of all environments, whose observations are states; `valid` marks those whose episode was still running,
    `tells_success` those whose `successes` were told."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    valid: np.ndarray
    successes: np.ndarray
    tells_success: np.ndarray


@dataclass(frozen=True)
class _Batch:
    """The steps of one episode in each environment, and what their cameras saw if that is recorded."""

    steps: list[_Step]
    images: dict[str, list[np.ndarray]]


def run_episodes(
    controller: Controller,
    vector_env: VectorEnv[Any, Any, Any],
    *,
    seeds: Sequence[int],
    generator: torch.Generator | None = None,
    on_reset: Callable[[list[int]], None] | None = None,
    on_batch: Callable[[Rollouts], None] | None = None,
    record_images: bool = False,
    progress: bool = False,
) -> Rollouts:
    """Run one episode per seed, `vector_env.num_envs` of them at a time.

    The controller always sees all environments, so the shape of its batch never changes; what it answers for
    those whose episode is over (or that have no seed left, in the last batch) is ignored.

    An episode whose environment fails in a `RestartingVectorEnv` is run again after the others, twice at most; then it
    is given up with a warning.

    Args:
        controller: maps float32 observations `(num_envs, observation_dim)` and `generator` to actions
            `(num_envs, action_dim)`; where there are images, a mapping of `state` and of each camera's uint8
            `(num_envs, height, width, channels)`.
        vector_env: with one-dimensional float observations and actions and autoreset mode NEXT_STEP. With images, the
            observation is a `Dict` of such a `state` and of a uint8 `Box` for each camera.
        seeds: one seed per episode, given to the environment that runs it.
        generator: passed on to the controller at every step.
        on_reset: called with their seeds whenever episodes start in all environments, for controllers that remember.
        on_batch: called with what these episodes were when all of them are over, those that failed left out.
        record_images: keep what the cameras saw, for `Rollouts.to_episodes`; observations are the state either way.
        progress: whether to show a bar that counts finished episodes.

    Returns:
        The episodes in the order of `seeds`.

    Raises:
        ValueError: `seeds` is empty, the environment does not fit, or an action, observation or reward has
            the wrong shape or is not finite.
        RuntimeError: all episodes had to be given up.
    """
    lane = Lane(controller, vector_env, generator, on_reset, on_batch)
    return run_lanes([lane], seeds=seeds, record_images=record_images, progress=progress)


@dataclass(frozen=True)
class Lane:
    """A controller and the environments that it acts in; the fields are the arguments of `run_episodes`."""

    controller: Controller
    vector_env: VectorEnv[Any, Any, Any]
    generator: torch.Generator | None = None
    on_reset: Callable[[list[int]], None] | None = None
    on_batch: Callable[[Rollouts], None] | None = None


def run_lanes(
    lanes: Sequence[Lane], *, seeds: Sequence[int], record_images: bool = False, progress: bool = False
) -> Rollouts:
    """As `run_episodes`, in several lanes that take turns: while the workers of one step, the next one's controller
    decides.

    Each batch of consecutive seeds runs in one lane from its reset to its end, so that with lanes that are alike, each
    with a memory and a generator of its own that `on_reset` seeds, every episode is bit for bit what a single lane
    makes of it. Environments in this process step at once, and nothing is gained.

    Raises:
        ValueError: there is no lane, or they differ in the number of environments; see also `run_episodes`.
    """
    num_envs = _check_lanes(lanes)
    if len(seeds) == 0:
        raise ValueError("`seeds` is empty: pass one seed per episode.")
    batches: dict[int, _Batch] = {}  # by their numbers, in the order in which they were started
    place_of: dict[int, tuple[int, int]] = {}  # of the episode of each seed's index: batch and environment
    todo, num_failures = list(range(len(seeds))), [0] * len(seeds)
    idle, turns, numbers = list(lanes), deque[_Turn](), itertools.count()
    with tqdm(total=len(seeds), desc="episodes", unit="episode", disable=not progress) as bar:
        while todo or turns:
            while todo and idle:
                chunk, todo = todo[:num_envs], todo[num_envs:]
                lane, batch_seeds = idle.pop(0), [int(seeds[i]) for i in chunk]
                run = _run_batch(lane, batch_seeds, bar, record_images=record_images)
                turns.append(_Turn(lane, next(numbers), chunk, batch_seeds, run))
            turn = turns.popleft()
            try:
                next(turn.run)
            except StopIteration as end:
                batch, failed = end.value
                idle.append(turn.lane)
            else:
                turns.append(turn)
                continue
            for place, index in enumerate(turn.chunk):
                num_failures[index] += int(failed[place])
                if not failed[place]:
                    place_of[index] = turn.number, place
                elif num_failures[index] <= NUM_REPETITIONS:
                    todo.append(index)
            if batch.steps:
                steps = [step._replace(valid=step.valid & ~failed) for step in batch.steps]
                batches[turn.number] = _Batch(steps, batch.images)
            places = [place for place in range(len(turn.chunk)) if not failed[place]]
            if turn.lane.on_batch is not None and places:
                turn.lane.on_batch(_collect([batches[turn.number]], places, [turn.seeds[i] for i in places], []))
    given_up = [int(seed) for index, seed in enumerate(seeds) if index not in place_of]
    _report_failures(lanes[0].vector_env, given_up, len(seeds))
    kept, column = sorted(place_of), {number: num_envs * rank for rank, number in enumerate(sorted(batches))}
    columns = [column[number] + place for number, place in (place_of[index] for index in kept)]
    ordered = [batches[number] for number in sorted(batches)]
    return _collect(ordered, columns, [int(seeds[index]) for index in kept], given_up)


class _Turn(NamedTuple):
    """A batch that is being run: its lane, its number, the indices of its seeds, these, and the run itself."""

    lane: Lane
    number: int
    chunk: list[int]
    seeds: list[int]
    run: Generator[None, None, tuple[_Batch, np.ndarray]]


def _check_lanes(lanes: Sequence[Lane]) -> int:
    """The number of environments of each."""
    for lane in lanes:
        _check_environment(lane.vector_env)
    widths = {lane.vector_env.num_envs for lane in lanes}
    if len(widths) != 1:
        raise ValueError(
            f"`lanes` must be at least one, with as many environments in each; got {sorted(widths)} environments."
        )
    return widths.pop()


def _run_batch(
    lane: Lane, seeds: list[int], bar: Any, *, record_images: bool
) -> Generator[None, None, tuple[_Batch, np.ndarray]]:
    """One episode in each environment: the steps of all, and whose environment failed, bool of shape `(num_envs,)`.

    Yields whenever workers are busy.
    """
    vector_env = lane.vector_env
    if lane.on_reset is not None:
        lane.on_reset(seeds)
    spare = vector_env.num_envs - len(seeds)
    env_seeds: Any = [int(seed) for seed in (*seeds, *([seeds[-1]] * spare))]  # gymnasium annotates one seed
    observations, infos = yield from _reset(vector_env, env_seeds)
    running = np.arange(vector_env.num_envs) < len(seeds)
    failed = running & _failures(infos, vector_env)
    running = running & ~failed
    steps: list[_Step] = []
    recorded: dict[str, list[np.ndarray]] = {}
    while running.any():
        place = _Place(vector_env, seeds, len(steps), running)
        states, images = place.check_observations("observations", observations)
        seen = {STATE: states, **images} if images else states
        actions = place.check("actions", lane.controller(seen, lane.generator), vector_env.action_space.shape)
        for name, frames in images.items() if record_images else ():
            recorded.setdefault(name, []).append(frames)
        next_observations, rewards, terminations, truncations, infos = yield from _step(vector_env, actions)
        failed = failed | (running & _failures(infos, vector_env))
        running = running & ~failed
        place = place._replace(running=running)
        rewards = place.check("rewards", rewards, running.shape, np.float64)
        next_states, _ = place.check_observations("next_observations", next_observations)
        steps.append(
            _Step(
                states,
                actions,
                rewards,
                next_states,
                np.array(terminations),
                np.array(truncations),
                running,
                *_successes(infos, vector_env.num_envs),
            )
        )
        finished = running & (terminations | truncations)
        running = running & ~finished
        observations = next_observations
        bar.update(int(finished.sum()))
    return _Batch(steps, recorded), failed


def _reset(vector_env: VectorEnv[Any, Any, Any], seeds: Any) -> Generator[None, None, tuple[Any, dict[str, Any]]]:
    """What `reset` returns; yields while workers reset."""
    if not isinstance(vector_env, AsyncVectorEnv):
        return vector_env.reset(seed=seeds)
    vector_env.reset_async(seed=seeds)
    yield
    return vector_env.reset_wait()


def _step(vector_env: VectorEnv[Any, Any, Any], actions: np.ndarray) -> Generator[None, None, tuple[Any, ...]]:
    """What `step` returns; yields while workers step."""
    if not isinstance(vector_env, AsyncVectorEnv):
        return vector_env.step(actions)
    vector_env.step_async(actions)
    yield
    return vector_env.step_wait()


def _successes(infos: dict[str, Any], num_envs: int) -> tuple[np.ndarray, np.ndarray]:
    """Whose step was a success, and whose environment says so, both bool of shape `(num_envs,)`."""
    for name in ("success", "is_success"):
        if name in infos:
            told = np.asarray(infos.get(f"_{name}", np.ones(num_envs)), dtype=bool)
            return np.asarray(infos[name]).astype(bool) & told, told
    return np.zeros(num_envs, dtype=bool), np.zeros(num_envs, dtype=bool)


def _failures(infos: dict[str, Any], vector_env: VectorEnv[Any, Any, Any]) -> np.ndarray:
    """Whose environment failed in this call."""
    return np.asarray(infos.get(f"_{WORKER_FAILURE}", np.zeros(vector_env.num_envs, dtype=bool)))


def _report_failures(vector_env: VectorEnv[Any, Any, Any], given_up: list[int], num_episodes: int) -> None:
    if not given_up:
        return
    where = f"environment {_name(vector_env)} failed {1 + NUM_REPETITIONS} times each on the seeds {given_up}"
    if len(given_up) == num_episodes:
        raise EnvironmentFailedError(f"The {where}, all there were: see the warnings for the reasons.")
    warnings.warn(f"The {where}: these episodes are left out.", stacklevel=3)


class _Place(NamedTuple):
    """Where a rollout is, for the check of what the controller and the environment return."""

    vector_env: VectorEnv[Any, Any, Any]
    seeds: Sequence[int]
    step: int
    running: np.ndarray

    def check_observations(self, name: str, observations: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Copies of the state and of the images by camera, if there are any."""
        space = self.vector_env.observation_space
        if not isinstance(space, Dict):
            return self.check(name, observations, space.shape), {}
        images = {
            camera: self.check(f"{name}[{camera!r}]", observations[camera], space[camera].shape, np.uint8)
            for camera in space
            if camera != STATE
        }
        return self.check(f"{name}[{STATE!r}]", observations[STATE], space[STATE].shape), images

    def check(self, name: str, values: Any, shape: tuple[int, ...] | None, dtype: Any = np.float32) -> np.ndarray:
        """A copy of `values` as an array of `dtype`, checked for its shape and, where running, for NaN."""
        array = np.array(values, dtype=dtype)
        where = f"in environment {_name(self.vector_env)} at step {self.step}"
        if array.shape != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {array.shape} {where} (seeds {list(self.seeds)}).")
        is_bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1) & self.running
        if is_bad.any():
            index = int(np.argmax(is_bad))
            got = f"got {array[index]} {where} (seed {self.seeds[index]})"
            raise ValueError(f"`{name}` must be finite, {got}.")
        return array


def _name(vector_env: VectorEnv[Any, Any, Any]) -> str:
    return type(vector_env.unwrapped).__name__ if vector_env.spec is None else vector_env.spec.id


def _check_environment(vector_env: VectorEnv[Any, Any, Any]) -> None:
    mode = vector_env.metadata.get("autoreset_mode")
    if mode != AutoresetMode.NEXT_STEP:
        raise ValueError(
            f"`vector_env` must have the autoreset mode NEXT_STEP, got {mode}. Make it with "
            '`gymnasium.make_vec(..., vector_kwargs={"autoreset_mode": AutoresetMode.NEXT_STEP})`.'
        )
    _check_vector_space("observation", _state_space(vector_env.single_observation_space))
    _check_vector_space("action", vector_env.single_action_space)


def _check_vector_space(name: str, space: Space[Any]) -> None:
    if space.shape is None or len(space.shape) != 1:
        raise ValueError(f"`vector_env` must have {name}s of shape (dim,), got {space.shape}.")


def _state_space(space: Space[Any]) -> Space[Any]:
    """What is not images."""
    if not isinstance(space, Dict):
        return space
    wrong = [name for name in space if name != STATE and not _is_image(space[name])]
    if STATE not in space.spaces or wrong:
        raise ValueError(
            f"`vector_env` must have observations of one `{STATE}` and of uint8 images (height, width, channels), got "
            f"{space}."
        )
    return space[STATE]


def _is_image(space: Space[Any]) -> bool:
    return isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3


def _collect(batches: list[_Batch], columns: list[int], seeds: list[int], failed_seeds: list[int]) -> Rollouts:
    """The episodes in the given columns of the batches, which are `num_envs` columns each."""
    max_length = max(len(batch.steps) for batch in batches)
    values = []
    for rows in zip(*(map(np.stack, zip(*batch.steps, strict=True)) for batch in batches), strict=True):
        padded = [_pad(row, max_length) for row in rows]
        values.append(np.concatenate(padded, axis=1).swapaxes(0, 1)[columns])
    length = int(_Step(*values).valid.sum(axis=1).max())  # a failed episode may have been longer
    step = _Step(*(value[:, :length] for value in values))
    valid = step.valid
    rewards = np.where(valid, step.rewards, 0.0)
    tells_success = bool((step.tells_success & valid).any())
    return Rollouts(
        seeds=np.asarray(seeds, dtype=np.int64),
        returns=rewards.sum(axis=1),
        lengths=valid.sum(axis=1),
        observations=np.where(valid[..., None], step.observations, np.float32(0.0)),
        actions=np.where(valid[..., None], step.actions, np.float32(0.0)),
        rewards=rewards.astype(np.float32),
        next_observations=np.where(valid[..., None], step.next_observations, np.float32(0.0)),
        terminations=step.terminations & valid,
        truncations=step.truncations & valid,
        valid=valid,
        failed_seeds=np.asarray(failed_seeds, dtype=np.int64),
        visited=np.concatenate([np.stack([step.valid for step in batch.steps]) for batch in batches]),
        successes=step.successes & valid if tells_success else None,
        images=_collect_images(batches, columns, step.valid),
    )


def _collect_images(batches: list[_Batch], columns: list[int], valid: np.ndarray) -> dict[str, np.ndarray]:
    """The images of the valid steps, in the order of the episodes."""
    num_envs = len(batches[0].steps[0].valid)
    places = [(batches[column // num_envs], column % num_envs) for column in columns]
    return {
        camera: np.stack(
            [
                batch.images[camera][step][env]
                for (batch, env), row in zip(places, valid)
                for step in np.flatnonzero(row)
            ]
        )
        for camera in batches[0].images
    }


def _pad(column: np.ndarray, length: int) -> np.ndarray:
    return np.pad(column, [(0, length - len(column)), *[(0, 0)] * (column.ndim - 1)])
