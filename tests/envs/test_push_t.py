"""Push-T: geometry and rewards against gym-pusht's own, and what the wrappers promise."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gym_pusht", reason="Push-T comes with the extra [robotics]")

from dmc_hub.envs.push_t import GOAL_POSE, PushTEnv, PushTImageEnv, coverage, push_t_reward
from dmc_hub.rollout import run_episodes
from dmc_hub.tasks import get_task, make_vector_env


def poses_near_the_goal(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    poses = np.array(GOAL_POSE) + rng.normal(size=(count, 3)) * (25.0, 25.0, 0.4)
    return np.concatenate([rng.uniform(50, 450, (count, 2)), poses], axis=1)


def test_coverage_is_the_environments_own() -> None:
    env: Any = PushTEnv().unwrapped
    env.reset(seed=0)
    states = poses_near_the_goal(50)
    expected = []
    for state in states:
        env.block.angle, env.block.position = state[4], tuple(state[2:4])  # turning it moves it, too
        expected.append(env._get_coverage())
    np.testing.assert_allclose(coverage(states), expected, atol=1e-12)
    assert np.ptp(expected) > 0.5
    assert coverage(states.reshape(5, 10, 5)).shape == (5, 10)


def test_coverage_in_closed_form() -> None:
    at_goal = np.array([0.0, 0.0, *GOAL_POSE])
    assert coverage(at_goal) == pytest.approx(1.0, abs=1e-12)
    assert coverage(at_goal + np.array([0, 0, 300.0, 0, 0])) == 0.0
    # Turned by 180 degrees about its origin, the middle of the bar's edge, the T lies on the goal's other side.
    assert coverage(at_goal + np.array([0, 0, 0, 0, np.pi])) == pytest.approx(0.0, abs=1e-12)
    # Along its stem (down the bar's own y axis) by 30 the bar moves off the goal, but for the 30 × 30 on the stem; the
    # stem keeps 60 of its 90: (900 + 60 × 30) of 120 × 30 + 90 × 30.
    down = 30.0 * np.array([-np.sin(np.pi / 4), np.cos(np.pi / 4)])
    assert coverage(at_goal + np.array([0, 0, *down, 0])) == pytest.approx((900 + 1800) / 6300, abs=1e-12)


@pytest.mark.parametrize("states", [np.zeros((3, 4)), np.full((1, 5), np.nan)])
def test_states_that_cannot_be_are_refused(states: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"`states` must be finite and of shape \(..., 5\)"):
        coverage(states)


def test_recorded_steps_are_rewarded_as_the_environment_does() -> None:
    env = PushTEnv()
    observation, _ = env.reset(seed=0, options={"reset_to_state": [256, 100, 270, 260, 0.9]})
    steps = []
    for action in np.random.default_rng(0).uniform(150, 350, (40, 2)).astype(np.float32):
        next_observation, reward, terminated, _, info = env.step(action)
        assert info["success"] == terminated == (info["coverage"] > 0.95)
        steps.append((observation, action, next_observation, reward))
        observation = next_observation
    observations, actions, next_observations, rewards = (np.stack(part) for part in zip(*steps, strict=True))
    np.testing.assert_allclose(push_t_reward(observations, actions, next_observations), rewards, atol=1e-5)
    assert rewards.min() < 0.8 * rewards.max()


def test_pushing_onto_the_goal_is_a_success() -> None:
    env = PushTEnv()
    env.reset(seed=0, options={"reset_to_state": [50, 50, *GOAL_POSE]})
    inner: Any = env.unwrapped
    inner.block.angle, inner.block.position = GOAL_POSE[2], GOAL_POSE[:2]
    _, reward, terminated, truncated, info = env.step(np.array([50.0, 50.0]))
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info["success"] is True


def test_images_and_position_come_together() -> None:
    env, states = PushTImageEnv(), PushTEnv()
    observation, _ = env.reset(seed=4)
    np.testing.assert_array_equal(observation["state"], states.reset(seed=4)[0][:2])
    assert env.observation_space.contains(observation)
    before = observation["image"].copy()
    for _ in range(5):
        observation, *_ = env.step(np.array([256.0, 256.0]))
    assert env.observation_space.contains(observation)
    assert not np.array_equal(before, observation["image"])
    assert len(np.unique(before.reshape(-1, 3), axis=0)) > 3  # agent, block, goal and floor have colours of their own


def test_rollouts_know_success_and_the_highest_reward() -> None:
    task = get_task("push-t")
    env = make_vector_env(task, 2)
    rollouts = run_episodes(lambda observations, _: observations[:, 2:4], env, seeds=[3, 4])
    assert rollouts.successes is not None
    assert rollouts.successes.shape == rollouts.valid.shape
    np.testing.assert_array_equal(rollouts.succeeded("any step"), rollouts.max_rewards() >= 1.0)
    assert task.score is not None
    np.testing.assert_allclose(task.score(rollouts), [rollouts.rewards[i].max() for i in range(2)])
    assert set(rollouts.lengths) == {300}


def test_coverage_of_the_human_demonstrations(tmp_path: Path, real_file: Callable[[str], Path]) -> None:
    """Their last recorded step covers 84.7 % of the goal on average (the data's own description)."""
    zarr = pytest.importorskip("zarr", reason="reads the demonstrations")
    source = real_file("pusht/pusht_cchi_v7_replay.zarr.zip")
    zipfile.ZipFile(source).extractall(tmp_path)
    (folder,) = (path.parent for path in tmp_path.rglob(".zgroup") if (path.parent / "meta").is_dir())
    group = zarr.open_group(folder, mode="r")
    ends = np.asarray(group["meta/episode_ends"][:])
    assert coverage(np.asarray(group["data/state"][:])[ends - 1]).mean() == pytest.approx(0.847, abs=5e-4)
