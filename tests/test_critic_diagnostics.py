"""Critics whose values are known, against the data's returns."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from torch import Tensor

from dmc_hub.critic_diagnostics import diagnose_critic, returns_to_go
from dmc_hub.data import Episodes
from dmc_hub.models.critic import TwinQCritic
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.plots import plot_critic

DISCOUNT = 0.5


def make_episodes() -> Episodes:
    """Rewards 1, 2, 4 and the task's end; rewards 8, 16, cut. The observation is the return-to-go until there."""
    returns = np.array([3.0, 4.0, 4.0, 16.0, 16.0], np.float32)
    return Episodes(
        observations=returns[:, None],
        actions=np.array([[0.0], [1.0], [-1.0], [0.5], [2.0]], np.float32),
        rewards=np.array([1.0, 2.0, 4.0, 8.0, 16.0], np.float32),
        next_observations=np.array([[4.0], [4.0], [0.0], [16.0], [6.0]], np.float32),
        terminations=np.array([False, False, True, False, False]),
        truncations=np.array([False, False, False, False, True]),
        episode_ends=np.array([3, 5]),
    )


class LinearCritic(TwinQCritic):
    """V is the observation; Q adds the (first) action, one of the two 100 more."""

    def value(self, observations: Tensor) -> Tensor:
        return observations[..., 0]

    def twin_q(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        first = actions[..., 0] if self.config.num_action_steps == 1 else actions[..., 0, 0] + 10 * actions[..., 1, 0]
        return observations[..., 0] + first + 100, observations[..., 0] + first


def pipeline(num_action_steps: int = 1) -> Any:
    """In the environment's units twice and thrice those of the networks, to see that inputs are normalised."""
    normalizer = Normalizer.from_data(np.array([[-1.0], [1.0]]), np.array([[-1.0], [1.0]]))
    return SimpleNamespace(critic=LinearCritic(1, 1, num_action_steps=num_action_steps), normalizer=normalizer)


def test_returns_to_go_by_hand() -> None:
    # 4; 2 + 4 / 2 = 4; 1 + 4 / 2 = 3.  16 + 6 / 2 = 19; 8 + 19 / 2 = 17.5
    found = returns_to_go(make_episodes(), DISCOUNT, np.array([0.0, 6.0]))
    np.testing.assert_allclose(found, [3, 4, 4, 17.5, 19])


def test_diagnostics_by_hand() -> None:
    found = diagnose_critic(pipeline(), make_episodes(), discount=DISCOUNT, expectile=0.8)
    assert found.num_steps == 5
    np.testing.assert_allclose(found.returns_to_go, [3, 4, 4, 17.5, 19])  # after the cut comes V = 6
    np.testing.assert_allclose(found.v, [3, 4, 4, 16, 16])
    np.testing.assert_allclose(found.q, [3, 5, 3, 16.5, 18])  # the smaller of the two
    assert found.q_gap == pytest.approx((0 + 1 - 1 - 1 - 1) / 5)
    assert found.v_gap == pytest.approx((-1.5 - 3) / 5)
    assert found.q_pearson == pytest.approx(np.corrcoef(found.q, found.returns_to_go)[0, 1])
    # ranks of Q 1.5 4-1 ... by hand: Q 1.5, 3, 1.5, 4, 5; returns 1, 2.5, 2.5, 4, 5
    ranks = np.corrcoef([1.5, 3, 1.5, 4, 5], [1, 2.5, 2.5, 4, 5])[0, 1]
    assert found.q_spearman == pytest.approx(ranks)
    assert found.v_spearman == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4.5, 4.5], [1, 2.5, 2.5, 4, 5])[0, 1])
    assert found.share_q_above_v == pytest.approx(3 / 5)
    assert found.fitted_expectile == pytest.approx(1 / (0 + 1 + 1 + 0.5 + 2))
    assert found.highest_return == 19
    assert found.share_q_above_highest == found.share_v_above_highest == 0
    assert found.bootstrapped_weight == pytest.approx((0.25 + 0.5) / 5)
    assert json.loads(json.dumps(found.to_dict()))["expectile"] == 0.8


def test_inputs_are_normalised_and_overestimation_is_seen() -> None:
    wide = pipeline()
    wide.normalizer = Normalizer.from_data(np.array([[-0.5], [0.5]]), np.array([[-2.0], [2.0]]))
    found = diagnose_critic(wide, make_episodes(), discount=DISCOUNT, expectile=0.8)
    np.testing.assert_allclose(found.v, [6, 8, 8, 32, 32])
    np.testing.assert_allclose(found.q - found.v, [0, 0.5, -0.5, 0.25, 1])
    assert found.highest_return == 16 + 0.5 * 12
    assert found.share_v_above_highest == pytest.approx(2 / 5)


def test_a_critic_of_sequences_sees_the_datas_sequences() -> None:
    found = diagnose_critic(pipeline(2), make_episodes(), discount=DISCOUNT, expectile=0.8)
    # the first action and ten times the next; after an episode's end the action is 0
    np.testing.assert_allclose(found.q - found.v, [0 + 10, 1 - 10, -1, 0.5 + 20, 2], rtol=1e-6)


def test_fitted_expectile_is_that_of_a_solved_regression() -> None:
    """V at the expectile of Q's noise, found by iterating its condition."""
    noise = np.random.default_rng(0).normal(size=4000)
    v = 0.0
    for _ in range(200):
        weights = np.where(noise > v, 0.8, 0.2)
        v = float(np.average(noise, weights=weights))
    count = len(noise)
    episodes = Episodes(
        observations=np.full((count, 1), v, np.float32),
        actions=(noise - v).astype(np.float32)[:, None],
        rewards=np.zeros(count, np.float32),
        next_observations=np.zeros((count, 1), np.float32),
        terminations=np.ones(count, bool),
        truncations=np.zeros(count, bool),
        episode_ends=np.arange(1, count + 1),
    )
    found = diagnose_critic(pipeline(), episodes, discount=0.9, expectile=0.8, num_steps=count)
    assert found.fitted_expectile == pytest.approx(0.8, abs=1e-4)
    assert found.q_pearson is None  # all returns are 0
    some = diagnose_critic(pipeline(), episodes, discount=0.9, expectile=0.8, num_steps=100)
    assert some.num_steps == len(some.q) == 100


def test_without_a_critic_there_is_nothing_to_diagnose() -> None:
    with pytest.raises(ValueError, match="has no critic"):
        diagnose_critic(SimpleNamespace(critic=None), make_episodes(), discount=0.9, expectile=0.7)


def test_the_plot_shows_values_and_returns(tmp_path: Any) -> None:
    rng = np.random.default_rng(0)
    returns = rng.normal(size=2000)
    plot_critic(returns, returns + 0.1 * rng.normal(size=2000), tmp_path / "good.png")
    plot_critic(returns, rng.normal(size=2000), tmp_path / "bad.png")
    good, bad = (matplotlib.image.imread(tmp_path / name)[..., :3] for name in ("good.png", "bad.png"))
    assert (good < 0.9).any(-1).mean() < (bad < 0.9).any(-1).mean()  # points on a line cover less
