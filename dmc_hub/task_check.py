"""Whether a task works from environment to evaluation: everything once, in small."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from peft import LoraConfig

from dmc_hub.agent import Agent
from dmc_hub.data import Episodes
from dmc_hub.evaluation import evaluate
from dmc_hub.presets import control
from dmc_hub.rollout import run_episodes
from dmc_hub.tasks import Task, make_vector_env
from dmc_hub.trainers.alignment import METHODS
from dmc_hub.trainers.denoising import DenoisingConfig, DenoisingTrainer
from dmc_hub.trainers.inverse_dynamics import InverseDynamicsConfig, InverseDynamicsTrainer
from dmc_hub.trainers.iql import IQLConfig, IQLTrainer

NUM_STEPS, NUM_EPISODES, EPISODE_STEPS, BATCH_SIZE, NUM_TRAIN_STEPS = 100, 4, 40, 16, 20


@dataclasses.dataclass(frozen=True)
class CheckedPart:
    """One thing that was tried: its name, the seconds it took, and what came of it in words."""

    name: str
    seconds: float
    result: str


def check_task(task: Task, *, seed: int = 0) -> Iterator[CheckedPart]:
    """Make the environment, step it, collect a tiny dataset, train, align and evaluate each kind of controller.

    Yields:
        The parts, as they are finished. What does not work raises.

    Raises:
        ImportError: the environment's extra is not installed; the message names it.
        ValueError: the environment is not what the task's record says.
    """
    start = time.perf_counter()
    env = task.make_env()
    try:
        _check_spaces(task, env)
        yield CheckedPart("environment", time.perf_counter() - start, task.env_id)
        start = time.perf_counter()
        num_steps = _step(env, seed)
        seconds = time.perf_counter() - start
        yield CheckedPart(f"{num_steps} random steps", seconds, f"{num_steps / seconds:.0f} steps/s")
    finally:
        env.close()
    start = time.perf_counter()
    episodes = _random_episodes(task, seed)
    yield CheckedPart("dataset", time.perf_counter() - start, f"{episodes.num_steps} steps of a random policy")
    for controller in task.controllers:
        yield from _check_controller(task, episodes, controller, seed)


def _check_spaces(task: Task, env: gymnasium.Env[Any, Any]) -> None:
    """The observation and the action space have the record's widths."""
    observation, action = env.observation_space, env.action_space
    is_vector = isinstance(observation, gymnasium.spaces.Box) and observation.shape == (task.observation_dim,)
    if not (is_vector or (task.observation_dim is None and isinstance(observation, gymnasium.spaces.Dict))):
        raise ValueError(
            f"`observation_dim` of task {task.name!r} is {task.observation_dim}, but it has {observation}."
        )
    if not isinstance(action, gymnasium.spaces.Box) or action.shape != (task.action_dim,):
        raise ValueError(f"`action_dim` of task {task.name!r} is {task.action_dim}, but it has {action}.")
    if not (np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        raise ValueError(f"`make_env` of task {task.name!r}: actions must be bounded, got {action}.")


def _step(env: gymnasium.Env[Any, Any], seed: int) -> int:
    env.reset(seed=seed)
    space: Any = env.action_space
    generator = np.random.default_rng(seed)
    for count in range(1, NUM_STEPS + 1):
        observation, reward, terminated, truncated, _ = env.step(generator.uniform(space.low, space.high))
        parts = observation.values() if isinstance(observation, dict) else [observation]
        if not (np.isfinite(float(reward)) and all(np.isfinite(part).all() for part in parts)):
            raise ValueError(f"`make_env`: the environment returned NaN or infinity at step {count} (seed {seed}).")
        if terminated or truncated:
            env.reset()
    return NUM_STEPS


def _random_episodes(task: Task, seed: int) -> Episodes:
    vector_env, generator = _short_environments(task, 2), np.random.default_rng(seed)
    space: Any = vector_env.action_space
    try:
        rollouts = run_episodes(
            lambda observations, _: generator.uniform(space.low, space.high).astype(np.float32),
            vector_env,
            seeds=range(seed, seed + NUM_EPISODES),
            record_images=True,
        )
    finally:
        vector_env.close()
    return Episodes.from_dataset(rollouts.to_episodes().to_dataset())


def _short_environments(task: Task, num_envs: int) -> VectorEnv[Any, Any, Any]:
    length = min(EPISODE_STEPS, task.max_episode_steps)
    short = dataclasses.replace(
        task, make_vector=None, make_env=lambda: gymnasium.wrappers.TimeLimit(task.make_env(), length)
    )
    return make_vector_env(short, num_envs)


def _check_controller(task: Task, episodes: Episodes, controller: str, seed: int) -> Iterator[CheckedPart]:
    sizes: dict[str, Any] = {"per_device_train_batch_size": BATCH_SIZE, "max_steps": NUM_TRAIN_STEPS, "seed": seed}
    common = {"output_dir": None, "disable_tqdm": True, **sizes}
    start = time.perf_counter()
    preset = control(task, controller)
    pipeline = preset.build_pipeline(episodes, seed)
    DenoisingTrainer(pipeline, DenoisingConfig(**common), train_dataset=episodes).train()
    if controller == "decision_diffuser":
        InverseDynamicsTrainer(pipeline, InverseDynamicsConfig(**common), train_dataset=episodes).train()
    IQLTrainer(pipeline, IQLConfig(**common, discount=task.discount), train_dataset=episodes).train()
    yield CheckedPart(
        f"{controller}: train", time.perf_counter() - start, f"{NUM_TRAIN_STEPS} steps, and of the critic"
    )
    start = time.perf_counter()
    method = preset.methods[0]
    trainer_type, config_type = METHODS[method]
    groups: dict[str, Any] = {"num_conditions": 4, "group_size": 4} if method == "nft" else {}
    trainer_type(
        pipeline, config_type(**common, **groups), train_dataset=episodes, peft_config=LoraConfig(r=4, lora_alpha=4)
    ).train()
    yield CheckedPart(f"{controller}: align", time.perf_counter() - start, f"{NUM_TRAIN_STEPS} steps of {method}")
    start = time.perf_counter()
    result = _evaluate(task, pipeline, controller, seed)
    yield CheckedPart(f"{controller}: evaluate", time.perf_counter() - start, result)


def _evaluate(task: Task, pipeline: Any, controller: str, seed: int) -> str:
    agent = Agent(pipeline, num_action_steps=task.num_action_steps)
    vector_env = _short_environments(task, 1)
    try:
        result = evaluate(
            agent,
            vector_env,
            seeds=[seed],
            num_candidates=2,
            action_selection="greedy",
            success=task.success,
            score=task.score,
            objective=task.objective,
        )
    finally:
        vector_env.close()
    statistics = result.statistics
    words = [f"return {statistics.mean:.2f} in {result.records[0].length} steps"]
    if statistics.normalized_score is not None:
        words.append(f"{task.score_name} {statistics.normalized_score:.2f}")
    return ", ".join(words)
