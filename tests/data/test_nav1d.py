import numpy as np
import pytest

from dmc_hub.data import (
    NAV1D_VARIANTS,
    Episodes,
    episode_features,
    make_nav1d_dataset,
    nav1d_behavior,
    nav1d_behavior_log_prob,
)
from dmc_hub.envs.nav1d import HORIZON, observation, optimal_action, optimal_return, step

ACTIONS = np.linspace(-1, 1, 4001)


@pytest.mark.parametrize("variant", NAV1D_VARIANTS)
def test_rows_follow_the_task(variant: str) -> None:
    dataset = make_nav1d_dataset(variant, num_episodes=50)
    assert dataset.features == episode_features(3, 1)
    episodes = Episodes.from_dataset(dataset)
    np.testing.assert_array_equal(episodes.episode_lengths, [HORIZON] * 50)
    t = np.tile(np.arange(HORIZON), 50)
    next_position, reward = step(episodes.observations[:, 0], episodes.actions[:, 0], t)
    np.testing.assert_allclose(episodes.observations, observation(episodes.observations[:, 0], t))
    np.testing.assert_allclose(episodes.next_observations, observation(next_position, t + 1), atol=1e-6)
    np.testing.assert_allclose(episodes.rewards, reward, atol=1e-5)
    np.testing.assert_array_equal(episodes.terminations, t == HORIZON - 1)
    np.testing.assert_array_equal(episodes.next_observations[t < 7], episodes.observations[t > 0])


def test_generation_is_a_function_of_the_seed() -> None:
    first, again = (make_nav1d_dataset("full", num_episodes=20, seed=3).to_dict() for _ in range(2))
    assert first == again
    assert first != make_nav1d_dataset("full", num_episodes=20, seed=4).to_dict()


def test_mean_returns_are_the_documented_ones() -> None:
    returns = {name: Episodes.from_dataset(make_nav1d_dataset(name)).returns().mean() for name in NAV1D_VARIANTS}
    assert returns["full"] == pytest.approx(2.2, abs=0.1)
    assert returns["partial"] < returns["full"]
    assert 0.95 * optimal_return() < returns["expert"] < optimal_return()


def test_partial_covers_the_region_and_nothing_else() -> None:
    episodes = Episodes.from_dataset(make_nav1d_dataset("partial"))
    states = np.concatenate([episodes.observations[:, 0], episodes.next_observations[:, 0]])
    assert states.min() >= 0.0
    assert states.max() == 1.0
    assert states.min() < 0.01


def test_expert_noise_has_its_standard_deviation() -> None:
    episodes = Episodes.from_dataset(make_nav1d_dataset("expert"))
    t = np.tile(np.arange(HORIZON), episodes.num_episodes)
    best = optimal_action(episodes.observations[:, 0], t)
    inner = np.abs(best) < 0.6  # where six standard deviations are not clipped
    noise = (episodes.actions[:, 0] - best)[inner]
    assert noise.std() == pytest.approx(0.1, rel=0.03)
    assert abs(noise.mean()) < 0.005


@pytest.mark.parametrize(
    ("variant", "position", "t"),
    [("full", -0.7, 0), ("partial", 0.1, 0), ("partial", 0.9, 3), ("expert", 0.3, 2)],
)
def test_behavior_density_integrates_to_one(variant: str, position: float, t: int) -> None:
    density = np.exp(nav1d_behavior_log_prob(variant, position, t, ACTIONS))
    # the density of "partial" jumps where the next state leaves the region, which costs one grid cell
    assert density.mean() * 2.0 == pytest.approx(1.0, abs=2e-3)


def test_partial_density_of_the_last_step_is_uniform_over_the_actions_that_stay() -> None:
    # from 0.25 the last step stays in [0, 1] for actions in [-0.5, 1], so the density is 1 / 1.5
    log_prob = nav1d_behavior_log_prob("partial", 0.25, HORIZON - 1, np.array([-0.6, -0.4, 0.9, 1.1]))
    np.testing.assert_allclose(log_prob, [-np.inf, np.log(1 / 1.5), np.log(1 / 1.5), -np.inf], atol=1e-6)


def test_partial_density_of_the_step_before_is_weighted_by_survival() -> None:
    # one step before the end at s: staying has probability p(s) = min(1, 0.5 + s) for s in [0, 1], since
    # above 1 is clipped; from s = 0.5 the next state u is uniform in [0, 1]: E p = 0.5 * 0.75 + 0.5 * 1 =
    # 0.875, density 0.5 p(u) / 0.875
    actions = np.array([-1.0, -0.5, 0.0, 1.0])
    survival = np.array([0.5, 0.75, 1.0, 1.0])
    log_prob = nav1d_behavior_log_prob("partial", 0.5, HORIZON - 2, actions)
    np.testing.assert_allclose(log_prob, np.log(0.5 * survival / 0.875), atol=1e-5)


def test_partial_density_describes_the_data() -> None:
    episodes = Episodes.from_dataset(make_nav1d_dataset("partial", num_episodes=20000))
    first = slice(0, None, HORIZON)
    position, action = episodes.observations[first, 0], episodes.actions[first, 0]
    near = np.abs(position - 0.2) < 0.05
    counts, edges = np.histogram(action[near], bins=np.linspace(-1, 1, 9), density=True)
    centers = np.linspace(-1, 1, 8001)
    bins = np.digitize(centers, edges[1:-1])
    density = np.exp(nav1d_behavior_log_prob("partial", 0.2, 0, centers))
    expected = [density[bins == index].mean() for index in range(8)]
    np.testing.assert_allclose(counts, expected, atol=0.12)
    assert expected[-1] > 4 * expected[1]


def test_no_behavior_where_the_policy_never_was_or_outside_the_action_space() -> None:
    assert nav1d_behavior_log_prob("partial", -0.1, 2, 0.5) == -np.inf
    for variant in NAV1D_VARIANTS:
        assert nav1d_behavior_log_prob(variant, 0.4, 2, 1.01) == -np.inf


def test_behavior_of_observations_equals_that_of_positions() -> None:
    position, t, action = np.array([0.25, 0.5]), np.array([1, 6]), np.array([0.1, 0.2])
    result = nav1d_behavior("partial")(observation(position, t), action[:, None])
    np.testing.assert_allclose(result, nav1d_behavior_log_prob("partial", position, t, action))


def test_unknown_variants_are_refused_with_the_list() -> None:
    for call in (
        lambda: make_nav1d_dataset("medium"),
        lambda: nav1d_behavior("medium"),
        lambda: nav1d_behavior_log_prob("medium", 0.0, 0, 0.0),
    ):
        with pytest.raises(ValueError, match="`variant` must be one of 'full', 'partial', 'expert', got 'medium'"):
            call()
    with pytest.raises(ValueError, match="`num_episodes` must be at least 1"):
        make_nav1d_dataset("full", num_episodes=0)
