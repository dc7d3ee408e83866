import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dmc_hub.envs import NAV1D_ID, register_environments
from dmc_hub.envs.nav1d import (
    HORIZON,
    Nav1DEnv,
    Nav1DVectorEnv,
    decode_observation,
    observation,
    optimal_action,
    optimal_q,
    optimal_return,
    optimal_value_function,
    planned_next_positions,
    reward_means,
    step,
)


def test_reward_means_are_the_documented_ones() -> None:
    documented = [0.549, 0.554, 0.028, -0.386, -0.803, -0.210, -0.165, -0.819]
    np.testing.assert_allclose(reward_means(), documented, atol=5e-4)
    with pytest.raises(ValueError, match="read-only"):
        reward_means()[0] = 0.0


def test_step_moves_half_the_action_and_rewards_by_the_gaussian() -> None:
    # 0.9 + 0.5 * 1 is clipped to 1; 0.2 + 0.5 * (-3) counts as 0.2 - 0.5
    next_position, _ = step(np.array([0.9, 0.2]), np.array([1.0, -3.0]), 0)
    np.testing.assert_allclose(next_position, [1.0, -0.3])
    mean = reward_means()[2]
    _, at_mean = step(mean, 0.0, 2)
    _, one_std_away = step(mean + 0.25, 0.0, 2)
    np.testing.assert_allclose([at_mean, one_std_away], [1.0, np.exp(-0.5)])


def test_observation_holds_position_clock_and_next_mean() -> None:
    result = observation(np.array([0.5, -0.25]), np.array([1, HORIZON]))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, [[0.5, 1 / 8, reward_means()[1]], [-0.25, 1.0, 0.0]], rtol=1e-6)
    position, t = decode_observation(result)
    np.testing.assert_array_equal(position, [0.5, -0.25])
    np.testing.assert_array_equal(t, [1, HORIZON])


def test_environment_passes_gymnasiums_checks() -> None:
    check_env(gym.make(NAV1D_ID, render_mode="rgb_array").unwrapped)


def test_registration_is_idempotent_and_works_from_a_fresh_process() -> None:
    register_environments()
    code = "import dmc_hub.envs, gymnasium as gym; print(gym.make('dmc_hub/Nav1D-v0').spec.id)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == NAV1D_ID


def test_registered_vector_environment_is_the_vectorised_one() -> None:
    assert isinstance(gym.make_vec(NAV1D_ID, num_envs=3), Nav1DVectorEnv)


def test_episode_terminates_after_eight_steps_and_refuses_a_ninth() -> None:
    env = Nav1DEnv()
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(HORIZON)]
    assert ends == [(False, False)] * (HORIZON - 1) + [(True, False)]
    with pytest.raises(ValueError, match="call `reset` first"):
        env.step(np.zeros(1, np.float32))


@pytest.mark.parametrize(
    ("action", "message"), [(np.zeros(2), r"shape \(1,\), got \(2,\)"), ([np.nan], "finite, got nan")]
)
def test_bad_actions_are_refused(action: Any, message: str) -> None:
    env = Nav1DEnv()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="`render_mode` must be"):
        Nav1DEnv(render_mode="human")
    with pytest.raises(ValueError, match="`num_envs` must be at least 1"):
        Nav1DVectorEnv(num_envs=0)
    with pytest.raises(ValueError, match="one seed per environment: got 2 for 3"):
        Nav1DVectorEnv(num_envs=3).reset(seed=[1, 2])
    with pytest.raises(ValueError, match="call `reset` first"):
        Nav1DVectorEnv(num_envs=1).step(np.zeros((1, 1)))
    with pytest.raises(ValueError, match="-1 <= low < high <= 1"):
        optimal_return(0.5, 0.5)


@pytest.mark.parametrize("seed", [7, [3, 1, 4]])
def test_vector_environment_equals_separate_ones_over_several_episodes(seed: int | list[int | None]) -> None:
    vector_env = Nav1DVectorEnv(num_envs=3)
    separate = gym.vector.SyncVectorEnv([Nav1DEnv] * 3)
    np.testing.assert_array_equal(vector_env.reset(seed=seed)[0], separate.reset(seed=seed)[0])
    rng = np.random.default_rng(0)
    for _ in range(20):
        actions = rng.uniform(-1.2, 1.2, (3, 1))
        for ours, theirs in zip(vector_env.step(actions)[:4], separate.step(actions)[:4], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_rendering_shows_the_trajectory() -> None:
    env = Nav1DEnv(render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    for _ in range(HORIZON):
        env.step(np.ones(1, np.float32))
    after = env.render()
    assert before is not None
    assert after is not None
    assert after.shape == (360, 560, 3)
    assert after.dtype == np.uint8

    def green(image: np.ndarray) -> int:
        red, green, blue = image.astype(int).transpose(2, 0, 1)
        return int(((green > red + 60) & (green > blue + 60)).sum())

    assert green(after) > 4 * green(before) > 0


def test_vector_environment_renders_every_copy() -> None:
    env = Nav1DVectorEnv(num_envs=2, render_mode="rgb_array")
    env.reset(seed=0)
    frames = env.render()
    assert frames is not None
    first, second = frames
    assert first.shape == second.shape
    assert (first != second).any()


def test_optimal_returns_are_the_documented_ones() -> None:
    assert optimal_return() == pytest.approx(7.38, abs=5e-3)
    assert optimal_return(0.0, 1.0) == pytest.approx(4.82, abs=5e-3)


def test_the_last_step_is_solved_in_closed_form() -> None:
    # with one step to go the best move is straight to the last mean, as far as the step size of 0.5 reaches
    positions = np.linspace(-1, 1, 41)
    expected = np.clip((reward_means()[-1] - positions) / 0.5, -1, 1)
    np.testing.assert_allclose(optimal_action(positions, HORIZON - 1), expected, atol=1e-3)


def test_following_optimal_actions_earns_the_optimal_value() -> None:
    starts = np.random.default_rng(0).uniform(-1, 1, 500)
    position, returns = starts, np.zeros(500)
    for t in range(HORIZON):
        position, rewards = step(position, optimal_action(position, t), t)
        returns += rewards
    solution = optimal_value_function()
    np.testing.assert_allclose(returns, np.interp(starts, solution.positions, solution.values[0]), atol=1e-5)


def test_no_action_is_better_than_the_optimal_one() -> None:
    rng = np.random.default_rng(1)
    position, t = rng.uniform(-1, 1, (200, 1)), rng.integers(0, HORIZON, (200, 1))
    best = optimal_q(position, t, optimal_action(position, t))
    others = optimal_q(position, t, np.linspace(-1, 1, 401))
    assert (others <= best + 1e-5).all()
    assert np.mean(best - others.mean(axis=1, keepdims=True)) > 0.5


def test_planned_transitions_past_the_end_do_not_count() -> None:
    plan = observation(np.array([[0.0, 0.5, 0.7, 0.7]]), np.array([[6, 7, 8, 8]]))
    actions = np.array([[[1.0], [-1.0], [0.0], [0.0]]])
    expected = [[[0.5], [0.0], [np.nan]]]
    np.testing.assert_allclose(planned_next_positions(plan, actions), expected)
