import json
import math
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import scipy.stats
import torch
from gymnasium.vector import AutoresetMode

from dmc_hub.data import Episodes, nav1d_behavior
from dmc_hub.envs.nav1d import (
    HORIZON,
    Nav1DEnv,
    Nav1DVectorEnv,
    decode_observation,
    observation,
    optimal_action,
    optimal_return,
    planned_next_positions,
)
from dmc_hub.evaluation import (
    Evaluation,
    candidate_diversity,
    evaluate,
    planner_coherency,
    planner_coherency_scores,
    policy_coherency,
    policy_coherency_scores,
    return_statistics,
)
from dmc_hub.rollout import run_episodes


class Countdown(gym.Env[np.ndarray, np.ndarray]):
    """The state is a counter that starts at 1 + seed % 4 and loses 1 a step; the reward is the action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, broken_at: int | None = None) -> None:
        self.broken_at = broken_at
        self.counter = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.counter = 1 + (0 if seed is None else seed % 4)
        return np.array([self.counter], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.counter -= 1
        reward = math.nan if self.counter == self.broken_at else float(action[0])
        is_over = self.counter == 0
        return np.array([self.counter], np.float32), reward, False, is_over, {}


def countdowns(num_envs: int, **kwargs: Any) -> gym.vector.SyncVectorEnv:
    return gym.vector.SyncVectorEnv([lambda: Countdown(**kwargs)] * num_envs)


def tenth_of_counter(observations: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
    return observations / 10


def optimal_controller(observations: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
    position, t = decode_observation(observations)
    return optimal_action(position, np.minimum(t, HORIZON - 1))[:, None]


def test_episodes_of_different_lengths_run_once_each_in_the_order_of_the_seeds() -> None:
    seeds = [3, 0, 2, 1, 7]
    rollouts = run_episodes(tenth_of_counter, countdowns(2), seeds=seeds)
    # seed 3 counts 4, 3, 2, 1: the rewards are 0.4 + 0.3 + 0.2 + 0.1
    np.testing.assert_array_equal(rollouts.lengths, [4, 1, 3, 2, 4])
    np.testing.assert_allclose(rollouts.returns, [1.0, 0.1, 0.6, 0.3, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(rollouts.observations[2, :, 0], [3, 2, 1, 0])
    np.testing.assert_array_equal(rollouts.paths()[2, :, 0], [3, 2, 1, 0, 0])
    np.testing.assert_array_equal(rollouts.valid[2], [True, True, True, False])
    np.testing.assert_array_equal(rollouts.truncations[2], [False, False, True, False])
    np.testing.assert_array_equal(rollouts.seeds, seeds)


def test_rollouts_become_valid_episodes() -> None:
    rollouts = run_episodes(tenth_of_counter, countdowns(3), seeds=range(5))
    episodes = Episodes.from_dataset(rollouts.to_episodes().to_dataset())
    np.testing.assert_array_equal(episodes.episode_lengths, [1, 2, 3, 4, 1])
    np.testing.assert_allclose(episodes.returns(), rollouts.returns, rtol=1e-6)


def test_the_number_of_environments_does_not_change_the_episodes() -> None:
    one_by_one = run_episodes(optimal_controller, Nav1DVectorEnv(1), seeds=range(5))
    together = run_episodes(optimal_controller, Nav1DVectorEnv(4), seeds=range(5))
    np.testing.assert_array_equal(one_by_one.observations, together.observations)
    np.testing.assert_array_equal(one_by_one.returns, together.returns)
    first, _ = Nav1DEnv().reset(seed=4)
    np.testing.assert_array_equal(together.observations[4, 0], first)


def test_the_optimal_controller_earns_the_optimum() -> None:
    rollouts = run_episodes(optimal_controller, Nav1DVectorEnv(128), seeds=range(256))
    assert rollouts.returns.mean() == pytest.approx(optimal_return(), abs=0.1)


def test_progress_counts_episodes(capsys: pytest.CaptureFixture[str]) -> None:
    run_episodes(tenth_of_counter, countdowns(2), seeds=range(3), progress=True)
    assert "3/3" in capsys.readouterr().err


def test_bad_actions_are_located() -> None:
    env = gym.make_vec("dmc_hub/Nav1D-v0", num_envs=2)
    with pytest.raises(ValueError, match=r"`actions` must have shape \(2, 1\), got \(2, 3\) in environment dmc_hub"):
        run_episodes(lambda observations, _: observations, env, seeds=[5, 6])

    def nan_at_the_clock_of_step_2(observations: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        actions = np.zeros((2, 1))
        actions[1, 0] = np.nan if observations[1, 1] == 0.25 else 0.0
        return actions

    message = r"`actions` must be finite, got \[nan\] in environment dmc_hub/Nav1D-v0 at step 2 \(seed 6\)"
    with pytest.raises(ValueError, match=message):
        run_episodes(nan_at_the_clock_of_step_2, env, seeds=[5, 6])


def test_actions_of_finished_environments_may_be_anything() -> None:
    def nan_once_over(observations: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        return np.where(observations > 0, 0.5, np.nan)

    rollouts = run_episodes(nan_once_over, countdowns(2), seeds=[0, 1])
    np.testing.assert_array_equal(rollouts.returns, [0.5, 1.0])


def test_bad_rewards_and_bad_environments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`rewards` must be finite, got nan in environment SyncVectorEnv at step 1"):
        run_episodes(tenth_of_counter, countdowns(1, broken_at=1), seeds=[2])
    with pytest.raises(ValueError, match="`seeds` is empty"):
        run_episodes(tenth_of_counter, countdowns(1), seeds=[])
    same_step = gym.vector.SyncVectorEnv([Countdown], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match=r"must have the autoreset mode NEXT_STEP, got AutoresetMode.SAME_STEP"):
        run_episodes(tenth_of_counter, same_step, seeds=[0])
    discrete = gym.make_vec("CartPole-v1", num_envs=1)
    with pytest.raises(ValueError, match=r"`vector_env` must have actions of shape \(dim,\), got \(\)"):
        run_episodes(tenth_of_counter, discrete, seeds=[0])


def test_return_statistics_by_hand() -> None:
    # sorted 0 1 2 3 4 5 6 100: the middle half is 2 3 4 5
    statistics = return_statistics(np.array([100.0, 0, 1, 2, 3, 4, 5, 6]), optimal_return=30.25)
    assert statistics.num_episodes == 8
    assert statistics.iqm == 3.5
    assert statistics.mean == 15.125
    assert statistics.share_of_optimum == 0.5
    assert statistics.std == pytest.approx(np.sqrt(np.mean((np.array([100, 0, 1, 2, 3, 4, 5, 6]) - 15.125) ** 2)))
    intervals = (statistics.ci_low, statistics.ci_high, statistics.mean_ci_high)
    low, high, mean_high = (limit for limit in intervals if limit is not None)
    assert low < 3.5 < high < mean_high


def test_confidence_interval_of_the_mean_agrees_with_the_normal_one() -> None:
    returns = np.random.default_rng(0).normal(5.0, 2.0, 400)
    statistics = return_statistics(returns)
    error = 1.96 * returns.std() / 20
    assert statistics.mean_ci_low == pytest.approx(returns.mean() - error, abs=0.03)
    assert statistics.mean_ci_high == pytest.approx(returns.mean() + error, abs=0.03)
    assert statistics == return_statistics(returns)
    assert statistics != return_statistics(returns, seed=1)


def test_degenerate_returns() -> None:
    constant = return_statistics(np.full(10, 7.0))
    assert (constant.ci_low, constant.iqm, constant.ci_high, constant.std) == (7.0, 7.0, 7.0, 0.0)
    single = return_statistics(np.array([7.0]))
    assert (single.iqm, single.ci_low, single.mean_ci_high, single.share_of_optimum) == (
        7.0,
        None,
        None,
        None,
    )
    for returns in ([], [1.0, np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="`returns` must be finite and of shape"):
            return_statistics(np.array(returns))


def plan(positions: list[float], actions: list[float], t: int) -> np.ndarray:
    clock = np.minimum(t + np.arange(len(positions)), HORIZON)
    return np.concatenate([observation(np.array(positions), clock), np.array(actions)[:, None]], axis=1)


def test_planner_coherency_is_one_for_true_plans_and_falls_with_the_gap() -> None:
    true_plan = plan([0.0, 0.5, 0.25], [1.0, -0.5, 0.0], t=0)
    assert planner_coherency(true_plan[None], planned_next_positions, 3) == pytest.approx(1.0)
    # the first planned state is off by 0.2, two tolerances; from there the second is right again
    wrong_plan = plan([0.0, 0.7, 0.45], [1.0, -0.5, 0.0], t=0)
    scores = planner_coherency_scores(wrong_plan, planned_next_positions, 3, tolerance=0.1)
    np.testing.assert_allclose(scores, [np.exp(-2.0), 1.0], rtol=1e-5)


def test_planner_coherency_ignores_steps_past_the_end() -> None:
    # at t = 7 only the first transition exists; the wild second one does not count
    last = plan([0.0, 0.5, -1.0, 1.0], [1.0, 1.0, 1.0, 0.0], t=7)
    scores = planner_coherency_scores(last, planned_next_positions, 3)
    np.testing.assert_array_equal(np.isnan(scores), [False, True, True])
    assert planner_coherency(np.stack([last, last]), planned_next_positions, 3) == pytest.approx(1.0)
    over = plan([0.0, 0.5], [1.0, 0.0], t=8)
    with pytest.raises(ValueError, match="No transition counts"):
        planner_coherency(over, planned_next_positions, 3)
    with pytest.raises(ValueError, match="`tolerance` must be positive"):
        planner_coherency(last, planned_next_positions, 3, tolerance=0.0)


def test_policy_coherency_is_the_density_relative_to_its_maximum() -> None:
    observations = observation(np.array([0.1, -0.9]), np.array([0, 7]))
    position, t = decode_observation(observations)
    best = optimal_action(position, t)
    # off by one standard deviation towards the inside: exp(-1/2); the optimal action itself: 1
    off = best - 0.1 * np.sign(best)
    actions = np.stack([best, off], axis=1)[..., None]
    scores = policy_coherency_scores(observations, actions, nav1d_behavior("expert"))
    np.testing.assert_allclose(scores, [[1.0, np.exp(-0.5)]] * 2, rtol=1e-3)
    assert policy_coherency(observations, actions, nav1d_behavior("full")) == pytest.approx(1.0)


def test_policy_coherency_is_zero_where_the_behavior_never_goes() -> None:
    observations = observation(np.array([-0.5, 0.5]), np.array([3, 3]))
    scores = policy_coherency_scores(observations, np.array([[0.5], [0.5]]), nav1d_behavior("partial"))
    assert scores[0] == 0.0
    assert 0.9 < scores[1] <= 1.0


def test_policy_coherency_needs_a_grid_in_higher_dimensions() -> None:
    def gaussian(observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return scipy.stats.multivariate_normal.logpdf(actions, mean=np.zeros(2))

    observations, actions = np.zeros((1, 3)), np.array([[1.0, 1.0]])
    with pytest.raises(ValueError, match="`action_grid` must be given for actions of 2 dimensions"):
        policy_coherency(observations, actions, gaussian)
    score = policy_coherency(observations, actions, gaussian, action_grid=np.zeros((1, 2)))
    assert score == pytest.approx(np.exp(-1.0))


def test_candidate_diversity_averages_states_and_dimensions() -> None:
    # first state: stds 1 and 3; second state: identical candidates
    candidates = np.array([[[1.0, 3.0], [-1.0, -3.0]], [[2.0, 2.0], [2.0, 2.0]]])
    assert candidate_diversity(candidates) == pytest.approx(1.0)


class Output(NamedTuple):
    action: np.ndarray
    candidates: np.ndarray


def noisy_pipeline(
    observations: np.ndarray,
    *,
    num_candidates: int,
    action_selection: str,
    num_inference_steps: int | None,
    generator: torch.Generator,
) -> Output:
    """Candidates scattered around a tenth of the counter, less and less as it counts down."""
    assert action_selection == "expectation"
    noise = torch.randn(len(observations), num_candidates, 1, generator=generator).numpy()
    candidates = (observations[:, None] + 0.1 * noise * observations[:, None]) / 10
    return Output(candidates.mean(axis=1), candidates)


def evaluation(**changes: Any) -> Evaluation:
    arguments: dict[str, Any] = {
        "seeds": range(5),
        "num_candidates": 4,
        "action_selection": "expectation",
        **changes,
    }
    return evaluate(noisy_pipeline, countdowns(2), **arguments)


def test_evaluation_repeats_exactly_and_depends_on_the_generator_seed() -> None:
    first, again, other = evaluation(), evaluation(), evaluation(generator_seed=1)
    np.testing.assert_array_equal(first.rollouts.returns, again.rollouts.returns)
    assert (first.rollouts.returns != other.rollouts.returns).all()
    assert first.statistics == return_statistics(first.rollouts.returns)
    assert first.rollouts.returns == pytest.approx([0.1, 0.3, 0.6, 1.0, 0.1], rel=0.3)


def test_diversity_and_coherency_count_visited_states_only() -> None:
    # the states visited from seeds 0..4 are 1 | 2 1 | 3 2 1 | 4 3 2 1 | 1, which sum to 21; both scores are
    # linear in them
    result = evaluation(coherency=lambda observations, output: observations)
    assert result.coherency == pytest.approx(21 / 11)
    expected = 21 / 11 / 100  # std of the candidates is a hundredth of the state
    many = evaluation(num_candidates=2000)
    assert many.candidate_diversity == pytest.approx(expected, rel=0.02)


def test_evaluation_is_json() -> None:
    result = evaluation(optimal_return=2.0, num_inference_steps=3, seeds=[3, 1])
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["seeds"] == [3, 1]
    assert values["returns"] == result.rollouts.returns.tolist()
    assert values["statistics"]["share_of_optimum"] == pytest.approx(result.statistics.mean / 2)
    assert values["num_inference_steps"] == 3
    assert values["coherency"] is None


def test_statistics_are_of_the_scores_where_those_are_the_objective() -> None:
    result = evaluation(score=lambda rollouts: -rollouts.lengths.astype(float), objective="score")
    assert result.outcomes.tolist() == [-1, -2, -3, -4, -1]
    assert result.statistics.mean == result.statistics.normalized_score == -2.2
    np.testing.assert_array_equal(result.rollouts.returns, evaluation().outcomes)
    with pytest.raises(ValueError, match="`objective` 'score' needs `score`"):
        evaluation(objective="score")
