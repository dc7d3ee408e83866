"""Lanes that take turns: while the workers of one step, the controller of the other decides; nothing else changes."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from dmc_hub.data import Episodes, make_nav1d_dataset
from dmc_hub.envs.workers import RestartingVectorEnv, WorkerFailureWarning
from dmc_hub.evaluation import Evaluation
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.pipelines import DiffusionPolicyPipeline
from dmc_hub.rollout import Lane, Rollouts, run_episodes, run_lanes
from dmc_hub.scheduler import TransitionScheduler
from dmc_hub.task_evaluation import evaluate_on_task
from dmc_hub.tasks import get_task


class Counting(gym.Env[np.ndarray, np.ndarray]):
    """Counts from `seed` for 2 + seed % 3 steps; of the seed `dies` the first episode ends its process."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-10.0, 10.0, (1,), np.float32)

    def __init__(self, dies: int = -1, mark: Path | None = None) -> None:
        self.dies, self.mark = dies, mark

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.seed, self.count, self.state = seed or 0, 0, float(seed or 0)
        return np.array([self.state], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        self.state += float(action[0])
        if self.mark is not None and self.seed == self.dies and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return np.array([self.state], np.float32), self.state, self.count == 2 + self.seed % 3, False, {}


class Logged(RestartingVectorEnv):
    """Notes what is asked of it, and when the answers are waited for."""

    name, log = "", list[str]()

    def step_async(self, actions: np.ndarray) -> None:
        self.log.append(f"{self.name} asked")
        super().step_async(actions)

    def step_wait(self, timeout: float | None = None) -> Any:
        self.log.append(f"{self.name} waits")
        return super().step_wait(timeout)


def noisy_lane(vector_env: Any, on_batch: Any = None) -> Lane:
    """Its noise is of a generator that each batch seeds."""
    generator = torch.Generator()

    def act(observations: np.ndarray, source: torch.Generator | None) -> np.ndarray:
        if isinstance(vector_env, Logged):
            vector_env.log.append(f"{vector_env.name} decides")
        return np.asarray(torch.randn(observations.shape, generator=source))

    return Lane(act, vector_env, generator, lambda seeds: void(generator.manual_seed(seeds[0])), on_batch)


def void(_: Any) -> None:
    pass


def alone(seeds: Any, num_envs: int) -> Rollouts:
    return run_lanes([noisy_lane(gym.vector.SyncVectorEnv([Counting] * num_envs))], seeds=seeds)


def assert_same(ours: Rollouts, theirs: Rollouts) -> None:
    for name, value in vars(theirs).items():
        np.testing.assert_array_equal(getattr(ours, name), value, err_msg=name)


@pytest.mark.parametrize("num_lanes", [1, 2, 3])
def test_every_episode_is_what_one_lane_makes_of_it(num_lanes: int) -> None:
    environments = [RestartingVectorEnv([Counting] * 2) for _ in range(num_lanes)]
    batches: list[list[int]] = []
    try:
        lanes = [noisy_lane(each, lambda rollouts: batches.append(rollouts.seeds.tolist())) for each in environments]
        rollouts = run_lanes(lanes, seeds=range(7))
    finally:
        for each in environments:
            each.close()
    assert_same(rollouts, alone(range(7), 2))
    assert sorted(batches) == [[0, 1], [2, 3], [4, 5], [6]]


def test_one_decides_while_the_other_steps() -> None:
    environments = [Logged([Counting]) for _ in range(2)]
    log: list[str] = []
    for name, each in zip("ab", environments, strict=True):
        each.name, each.log = name, log
    run_lanes([noisy_lane(each) for each in environments], seeds=[2, 5])  # four steps each
    for each in environments:
        each.close()
    first, turn = ["a decides", "a asked", "b decides", "b asked"], ["a waits", "a decides", "a asked"]
    other = [entry.replace("a ", "b ", 1) for entry in turn]
    assert log == [*first, *(turn + other) * 3, "a waits", "b waits"]


def test_an_episode_whose_worker_dies_is_repeated(tmp_path: Path) -> None:
    make = functools.partial(Counting, 1, tmp_path / "died")
    environments = [RestartingVectorEnv([make] * 2) for _ in range(2)]
    with pytest.warns(WorkerFailureWarning, match="of the episode with seed 1"):
        rollouts = run_lanes([noisy_lane(each) for each in environments], seeds=range(6))
    for each in environments:
        each.close()
    expected = alone(range(6), 2)
    assert rollouts.seeds.tolist() == list(range(6))
    np.testing.assert_array_equal(rollouts.lengths, expected.lengths)
    others = [0, 2, 3, 4, 5]  # the repeated one has another batch's noise
    np.testing.assert_array_equal(rollouts.returns[others], expected.returns[others])
    assert rollouts.returns[1] != expected.returns[1]
    assert len(rollouts.failed_seeds) == 0


def test_lanes_must_be_alike() -> None:
    few, many = (gym.vector.SyncVectorEnv([Counting] * count) for count in (1, 2))
    with pytest.raises(ValueError, match=r"`lanes` must be at least one, .*; got \[1, 2\] environments"):
        run_lanes([noisy_lane(few), noisy_lane(many)], seeds=[0])
    with pytest.raises(ValueError, match=r"got \[\] environments"):
        run_lanes([], seeds=[0])
    rollouts = run_episodes(lambda observations, _: observations * 0, many, seeds=[3])
    assert rollouts.returns.tolist() == [6.0]


# ---- Evaluations ----------------------------------------------------------------------------------------

TASK = dataclasses.replace(get_task("nav1d-full"), num_action_steps=2)  # the agent remembers half of what it decides


def make_policy() -> DiffusionPolicyPipeline:
    torch.manual_seed(0)
    episodes = Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=20))
    denoiser = DiffusionTransformer1D(1, 3, dim=32, num_heads=2, depth=1, timestep_dim=16)
    torch.nn.init.normal_(list(denoiser.parameters())[-2], std=0.3)  # the last layer starts at zero
    normalizer = Normalizer.from_data(episodes.observations, episodes.actions)
    scheduler = TransitionScheduler(num_train_timesteps=20, prediction_type="sample")
    return DiffusionPolicyPipeline(denoiser, scheduler, normalizer, horizon=4, num_inference_steps=2)


def content(evaluation: Evaluation) -> dict[str, Any]:
    return {name: value for name, value in evaluation.to_dict().items() if name != "wall_seconds"}


def measure(**options: Any) -> Evaluation:
    settings: dict[str, Any] = {"first_seed": 40, "num_candidates": 1, "action_selection": "greedy", **options}
    return evaluate_on_task(TASK, make_policy(), "policy", num_episodes=11, **settings)


def test_an_evaluation_whose_workers_take_turns_is_the_same(tmp_path: Path) -> None:
    expected = content(measure(num_workers=3))
    assert content(measure(num_workers=6, overlap=True, cache_dir=tmp_path)) == expected
    files = {path.name: json.loads(path.read_text()) for path in tmp_path.rglob("[0-9]*.json")}
    assert sorted(files) == ["40.json", "43.json", "46.json", "49.json"]
    assert content(measure(num_workers=3, cache_dir=tmp_path)) == expected


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_halves_need_an_even_number_of_workers(num_workers: int) -> None:
    with pytest.raises(ValueError, match=f"`num_workers` must be even, got {num_workers}"):
        measure(num_workers=num_workers, overlap=True)
