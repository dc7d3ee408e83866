"""Environments in worker processes that raise, die and hang."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import NoAsyncCallError

from dmc_hub.envs.flat import FlatEnv
from dmc_hub.envs.workers import RestartingVectorEnv, WorkerFailureWarning
from dmc_hub.evaluation import evaluate
from dmc_hub.rollout import run_episodes


class Fragile(gym.Env[np.ndarray, np.ndarray]):
    """Counts from `seed` in steps of the action for 3 + seed % 3 steps; some of its episodes fail, once or always.

    Failures are `{seed: (step, how)}`: step 0 is the reset. With a `folder`, where each leaves a file, it fails once.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-10.0, 10.0, (1,), np.float32)

    def __init__(self, failures: dict[int, tuple[int, str]], folder: Path | None = None) -> None:
        self.failures, self.folder = failures, folder

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.seed, self.broken = 100 if seed is None else seed, ""
        self.count, self.state = 0, float(self.seed)
        self._fail_if_due()
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        self._fail_if_due()
        self.state += float(action[0])
        is_over = self.count == 3 + self.seed % 3
        reward = float("inf") if self.broken == "reward" else 10 * self.state
        return self._observation(), reward, is_over and self.seed % 2 == 0, is_over and self.seed % 2 == 1, {}

    def _observation(self) -> np.ndarray:
        broken = {"nan": [np.nan], "shape": [0.0, 0.0], "words": ["a"], "far outside": [151.0], "outside": [150.0]}
        return np.array(broken.get(self.broken, [self.state]))

    def _fail_if_due(self) -> None:
        step, how = self.failures.get(self.seed, (-1, ""))
        if step != self.count:
            return
        if self.folder is not None:
            mark = self.folder / f"{self.seed}"
            if mark.exists():
                return
            mark.touch()
        if how == "raise":
            raise ZeroDivisionError("no ground to stand on")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(3600)
        self.broken = how


def restarting(num_workers: int, *arguments: Any, timeout: float = 30.0) -> RestartingVectorEnv:
    return RestartingVectorEnv([functools.partial(Fragile, *arguments)] * num_workers, timeout=timeout)


def halve(observations: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
    return -observations / 2


def healthy(seeds: Any) -> Any:
    return run_episodes(halve, gym.vector.SyncVectorEnv([lambda: Fragile({})]), seeds=seeds)


def assert_same_episodes(ours: Any, theirs: Any) -> None:
    for name in ("seeds", "lengths", "returns", "observations", "actions", "next_observations", "terminations"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)


@pytest.mark.parametrize(
    ("how", "step", "reason"),
    [
        ("raise", 2, r"it raised ZeroDivisionError\('no ground to stand on'\)"),
        ("kill", 2, "its process ended with exit code -9"),
        ("hang", 2, "it did not answer in time"),
        ("raise", 0, r"it raised ZeroDivisionError\('no ground to stand on'\)"),
        ("kill", 0, "its process ended with exit code -9"),
        ("nan", 2, r"its observation is not finite: \[nan\]"),
        ("nan", 0, r"its observation is not finite: \[nan\]"),
        ("shape", 2, r"its observation has the shape \(2,\) instead of \(1,\)"),
        ("words", 2, "its observation or reward is no number .*"),
        ("reward", 2, "its reward is inf"),
    ],
)
def test_a_worker_that_fails_is_restarted_and_its_episode_repeated(
    how: str, step: int, reason: str, tmp_path: Path
) -> None:
    environments = restarting(3, {4: (step, how)}, tmp_path, timeout=3.0 if how == "hang" else 30.0)
    before = [process.pid for process in environments.processes]
    message = (
        rf"^Worker 1 of <Fragile.* failed at step {step} of the episode with seed 4: {reason}\. It is restarted\.$"
    )
    resets: list[list[int]] = []
    with pytest.warns(WorkerFailureWarning, match=message):
        rollouts = run_episodes(halve, environments, seeds=range(3, 10), on_reset=resets.append)
    after = [process.pid for process in environments.processes]
    environments.close()
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert_same_episodes(rollouts, healthy(range(3, 10)))
    assert resets == [[3, 4, 5], [6, 7, 8], [9, 4]]
    assert len(rollouts.failed_seeds) == 0
    # 7 episodes and the repetition, of which every call counts once
    assert rollouts.visited.sum() == rollouts.lengths.sum()


class Bounded(Fragile):
    """Says that its observations lie in a range of 100."""

    observation_space = gym.spaces.Box(-50.0, 50.0, (1,), np.float32)


@pytest.mark.parametrize("step", [0, 2])
def test_an_observation_far_outside_its_space_is_a_failure(step: int, tmp_path: Path) -> None:
    environments = RestartingVectorEnv([functools.partial(Bounded, {4: (step, "far outside")}, tmp_path)] * 2)
    message = rf"at step {step} of the episode with seed 4: its observation \[151\.\] is far outside Box\(-50\.0, 50\.0"
    with pytest.warns(WorkerFailureWarning, match=message):
        rollouts = run_episodes(halve, environments, seeds=range(3, 6))
    environments.close()
    assert_same_episodes(rollouts, healthy(range(3, 6)))


def test_an_observation_up_to_one_range_outside_its_space_is_taken() -> None:
    environments = RestartingVectorEnv([functools.partial(Bounded, {4: (2, "outside")})])
    rollouts = run_episodes(halve, environments, seeds=[4])
    environments.close()
    assert rollouts.next_observations.max() == 150.0


def test_actions_outside_their_space_are_clipped_in_the_worker() -> None:
    """gymnasium's workers pass them on as they are."""
    environments = RestartingVectorEnv([lambda: FlatEnv(Fragile({}))] * 2)
    rollouts = run_episodes(lambda observations, _: np.full_like(observations, 1000.0), environments, seeds=range(3, 5))
    environments.close()
    np.testing.assert_array_equal(rollouts.next_observations[:, :3, 0], [[13, 23, 33], [14, 24, 34]])
    assert not environments.single_action_space.contains(rollouts.actions[0, 0])


def test_an_episode_that_fails_always_is_given_up_and_named() -> None:
    environments = restarting(2, {1: (2, "raise"), 3: (1, "kill")})
    with pytest.warns(UserWarning, match="failed") as caught:
        result = evaluate(
            lambda observations, generator, **_: Output(halve(observations, generator)),
            environments,
            seeds=range(4),
            num_candidates=1,
            action_selection="greedy",
        )
    environments.close()
    messages = [str(warning.message) for warning in caught]
    assert sum("with seed 1: it raised" in message for message in messages) == 3
    assert sum("with seed 3: its process ended" in message for message in messages) == 3
    assert messages[-1].endswith("failed 3 times each on the seeds [1, 3]: these episodes are left out.")
    assert result.to_dict()["failed_seeds"] == [1, 3]
    assert_same_episodes(result.rollouts, healthy([0, 2]))


class Output:
    """Candidates whose spread is their observation, so that the diversity shows which calls were counted."""

    def __init__(self, action: np.ndarray) -> None:
        self.action = action
        self.candidates = np.stack([action, -action], axis=1)


def test_diversity_counts_no_call_of_a_failed_episode(tmp_path: Path) -> None:
    environments = restarting(2, {1: (2, "raise")}, tmp_path)
    with pytest.warns(WorkerFailureWarning):
        result = evaluate(
            lambda observations, generator, **_: Output(halve(observations, generator)),
            environments,
            seeds=range(2),
            num_candidates=1,
            action_selection="greedy",
        )
    environments.close()
    assert result.candidate_diversity == pytest.approx(np.abs(healthy(range(2)).actions).sum() / (3 + 4))


def test_where_all_fail_there_is_nothing_to_return() -> None:
    environments = restarting(1, {0: (0, "raise")})
    with (
        pytest.warns(WorkerFailureWarning),
        pytest.raises(RuntimeError, match=r"failed 3 times each on the seeds \[0\], all there were"),
    ):
        run_episodes(halve, environments, seeds=[0])
    environments.close()


def test_a_worker_that_dies_while_nothing_is_asked_of_it_is_noticed() -> None:
    environments = restarting(2, {})
    environments.reset(seed=[0, 1])
    environments.processes[1].kill()
    environments.processes[1].join()
    with pytest.warns(WorkerFailureWarning, match="Worker 1 .* at step 1 .* seed 1: its process ended"):
        observations, rewards, _, _, infos = environments.step(np.ones((2, 1), dtype=np.float32))
    np.testing.assert_array_equal(infos["_worker_failure"], [False, True])
    np.testing.assert_array_equal(observations, [[1], [0]])
    np.testing.assert_array_equal(rewards, [10, 0])
    _, rewards, *_ = environments.step(np.ones((2, 1), dtype=np.float32))
    np.testing.assert_array_equal(rewards, [20, 0])  # the lost one waits for the next reset
    np.testing.assert_array_equal(environments.reset(seed=7)[0], [[7], [8]])
    environments.close()


def test_it_steps_and_resets_as_gymnasium_does() -> None:
    ours, theirs = restarting(2, {}), gym.vector.SyncVectorEnv([lambda: Fragile({})] * 2)
    seeds: tuple[Any, ...] = (3, [5, 4])
    for seed in seeds:  # the second reset comes when an episode has just ended
        np.testing.assert_array_equal(ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0])
        for step in range(8 if seed == 3 else 4):
            actions = np.full((2, 1), step, dtype=np.float32)
            for one, other in zip(ours.step(actions)[:4], theirs.step(actions)[:4], strict=True):
                np.testing.assert_array_equal(one, other)
    ours.close()


def test_closing_ends_a_hanging_worker() -> None:
    environments = restarting(2, {1: (1, "hang")}, timeout=3.0)
    environments.reset(seed=0)
    environments.step_async(np.ones((2, 1), dtype=np.float32))
    environments.close()
    assert not any(process.is_alive() for process in environments.processes)


class OnlyHere(Fragile):
    """Can be made in one process only; in any other it hangs, or fails."""

    def __init__(self, process: int, how: str) -> None:
        super().__init__({})
        if os.getpid() != process:
            if how == "raise":
                os._exit(3)
            time.sleep(3600)


@pytest.mark.parametrize(("how", "error"), [("hang", "TimeoutError"), ("raise", "EOFError|ConnectionResetError")])
def test_a_worker_that_cannot_start_ends_the_construction(how: str, error: str) -> None:
    make = functools.partial(OnlyHere, os.getpid(), how)
    with pytest.raises(RuntimeError, match=rf"could not make its environment within 2 s \(({error})\)"):
        RestartingVectorEnv([make], timeout=2.0)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="`env_fns` is empty"):
        RestartingVectorEnv([])
    with pytest.raises(ValueError, match="`timeout` must be positive, got 0"):
        RestartingVectorEnv([lambda: Fragile({})], timeout=0)
    environments = restarting(1, {})
    with pytest.raises(ValueError, match="one seed per environment: got 2 for 1"):
        environments.reset(seed=[1, 2])
    with pytest.raises(ValueError, match="`options` has 'reset_mask'"):
        environments.reset(options={"reset_mask": np.array([True])})
    with pytest.raises(NoAsyncCallError, match="before `step_wait`"):
        environments.step_wait()
    environments.close()
